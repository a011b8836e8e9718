"""WorkloadHold: why PID 1 holds the workload one step before its exec (design: pre-exec window).

The configuration may say so, until go(); or calls do that want to save the guest there, until the last of them ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attrs


@attrs.define
class WorkloadHold:
    """is_configured: whoever made the VM wants it, and it has not served its purpose yet. is_on: PID 1 was told to hold
    the workload, and not yet to let go.
    """

    is_configured: bool
    is_on: bool = False
    _calls: int = 0

    @contextmanager
    def wanted(self) -> Iterator[None]:
        """By one more call, for the time of the block."""
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1

    @property
    def is_wanted(self) -> bool:
        """By anybody."""
        return self.is_configured or self._calls > 0
