"""Control messages of a console with several ports.

Facts: virtio 1.2, section 5.3.6.2 (le32 id, le16 event, le16 value; behind PORT_NAME the name, behind RESIZE le16 cols
and le16 rows).
"""

from __future__ import annotations

import struct
from typing import Final

import attrs

DEVICE_READY: Final = 0
PORT_ADD: Final = 1
PORT_REMOVE: Final = 2
PORT_READY: Final = 3
CONSOLE_PORT: Final = 4
RESIZE: Final = 5
PORT_OPEN: Final = 6
PORT_NAME: Final = 7

SUBJECT_BYTES: Final = 6
"""Where a message's value begins: what is before says what it is about."""

_HEADER = struct.Struct("<IHH")
_SIZE = struct.Struct("<HH")

MOST_BYTES: Final = 64
"""More than any message of ours has."""


@attrs.frozen
class Control:
    """One message about the port ``id``. ``tail``: what stands behind the header."""

    id: int
    event: int
    value: int = 0
    tail: bytes = b""

    def to_bytes(self) -> bytes:
        """As it goes over the queue."""
        return _HEADER.pack(self.id, self.event, self.value) + self.tail

    @classmethod
    def parse(cls, data: bytes) -> Control:
        """Raises ValueError for less than a header."""
        if len(data) < _HEADER.size:
            raise ValueError(f"expected {_HEADER.size} bytes, found {len(data)}")
        port, event, value = _HEADER.unpack_from(data)
        return cls(port, event, value, data[_HEADER.size :])


def resize(port: int, columns: int, rows: int) -> Control:
    """The console's window has a new size."""
    return Control(port, RESIZE, 0, _SIZE.pack(columns, rows))
