"""Numbers of the virtio 1.2 specification that several files share.

Device ids: section 5. Status bits: 2.1. Reserved feature bits: 6. Each device's own feature bits are in its file.
"""

from __future__ import annotations

from typing import Final

NET: Final = 1
BLOCK: Final = 2
CONSOLE: Final = 3
ENTROPY: Final = 4
BALLOON: Final = 5
VSOCK: Final = 19

STATUS_ACKNOWLEDGE: Final = 1
STATUS_DRIVER: Final = 2
STATUS_DRIVER_OK: Final = 4
STATUS_FEATURES_OK: Final = 8
STATUS_DEVICE_NEEDS_RESET: Final = 64
STATUS_FAILED: Final = 128
KNOWN_STATUS: Final = (
    STATUS_ACKNOWLEDGE
    | STATUS_DRIVER
    | STATUS_DRIVER_OK
    | STATUS_FEATURES_OK
    | STATUS_DEVICE_NEEDS_RESET
    | STATUS_FAILED
)

VIRTIO_F_INDIRECT_DESC: Final = 28
VIRTIO_F_EVENT_IDX: Final = 29
VIRTIO_F_VERSION_1: Final = 32

TRANSPORT_FEATURES: Final = 1 << VIRTIO_F_INDIRECT_DESC | 1 << VIRTIO_F_EVENT_IDX | 1 << VIRTIO_F_VERSION_1
"""What the transport and the queues offer by themselves, whatever the device."""
