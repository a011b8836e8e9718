"""The registers of the virtio-mmio transport, version 2, by the names and offsets of virtio 1.2, section 4.2.2."""

from __future__ import annotations

from typing import Final

MAGIC: Final = 0x74726976
VERSION: Final = 2
VENDOR_ID: Final = 0x6D6D7661
PAGE_BYTES: Final = 0x1000

MAGIC_VALUE: Final = 0x000
VERSION_REGISTER: Final = 0x004
DEVICE_ID: Final = 0x008
VENDOR_ID_REGISTER: Final = 0x00C
DEVICE_FEATURES: Final = 0x010
DEVICE_FEATURES_SEL: Final = 0x014
DRIVER_FEATURES: Final = 0x020
DRIVER_FEATURES_SEL: Final = 0x024
QUEUE_SEL: Final = 0x030
QUEUE_NUM_MAX: Final = 0x034
QUEUE_NUM: Final = 0x038
QUEUE_READY: Final = 0x044
QUEUE_NOTIFY: Final = 0x050
INTERRUPT_STATUS: Final = 0x060
INTERRUPT_ACK: Final = 0x064
STATUS: Final = 0x070
QUEUE_DESC_LOW: Final = 0x080
QUEUE_DESC_HIGH: Final = 0x084
QUEUE_DRIVER_LOW: Final = 0x090
QUEUE_DRIVER_HIGH: Final = 0x094
QUEUE_DEVICE_LOW: Final = 0x0A0
QUEUE_DEVICE_HIGH: Final = 0x0A4
SHM_LEN_LOW: Final = 0x0B0
SHM_BASE_HIGH: Final = 0x0BC
CONFIG_GENERATION: Final = 0x0FC
CONFIG: Final = 0x100

INTERRUPT_USED_BUFFER: Final = 1
INTERRUPT_CONFIG_CHANGE: Final = 2


def identify(words: memoryview, device_id: int) -> None:
    """Write into a page, given as 32-bit words, what it always says: which device is here, and no shared memory."""
    words[MAGIC_VALUE // 4], words[VERSION_REGISTER // 4] = MAGIC, VERSION
    words[DEVICE_ID // 4], words[VENDOR_ID_REGISTER // 4] = device_id, VENDOR_ID
    for register in range(SHM_LEN_LOW, SHM_BASE_HIGH + 4, 4):
        words[register // 4] = (1 << 32) - 1
