"""The handshake with PID 1 behind a snapshot: fresh entropy and the right time, before the workload goes on.

One line on the control line (design: guest contract): ``go <seed-hex> <realtime_ns>``. It is also what opens the
pre-exec window.
"""

from __future__ import annotations

import os
import time

SEED_BYTES = 32


def go_line() -> bytes:
    """The line, with a seed that nobody else has and the time as it is now."""
    return b"go %s %d\n" % (os.urandom(SEED_BYTES).hex().encode(), time.time_ns())
