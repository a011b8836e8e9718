"""An empty qcow2 image over a raw base (QEMU's docs/interop/qcow2.txt, version 3): what a QEMU machine writes to.

Four clusters or a few more: header, refcount table, refcount block, L1 table. Everything the guest has not written is
read from the base. Made here, a clone needs neither qemu-img nor a process of its own.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from asyncvmm.errors import ImageError
from asyncvmm.storage.image import whole_sectors

MAGIC: Final = b"QFI\xfb"
CLUSTER_BITS: Final = 16
CLUSTER: Final = 1 << CLUSTER_BITS
MOST_BASE_PATH: Final = 1023

_HEADER = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_HEADER_BYTES: Final = 104
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT: Final = 0xE2792ACA
_REFCOUNT_ORDER: Final = 4
_L2_COVERS: Final = CLUSTER // 8 * CLUSTER
"""Bytes of the disk that one L1 entry stands for."""

_MOST_L1_CLUSTERS: Final = 512
"""L1 clusters (4 MiB: 2 PiB of disk) of which one refcount block surely counts every cluster."""


def empty_overlay(base: Path, size: int) -> tuple[int, dict[int, bytes]]:
    """The file of an overlay of ``base``, a raw image of ``size`` bytes: its size, and what it holds at which offsets.

    ``base`` is made absolute, since the file may lie elsewhere. Raises ImageError for what none can be over.
    """
    name = os.fsencode(os.path.realpath(base))
    l1_entries = -(-whole_sectors(size) // _L2_COVERS)
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    if len(name) > MOST_BASE_PATH or not 0 < l1_clusters <= _MOST_L1_CLUSTERS:
        raise ImageError("overlay", expected="a base of a short name and at most 2 PiB", found=f"{base}: {size} bytes")
    clusters = 3 + l1_clusters
    return clusters * CLUSTER, {
        0: _header(name, size, l1_entries),
        CLUSTER: struct.pack(">Q", 2 * CLUSTER),
        2 * CLUSTER: struct.pack(">H", 1) * clusters,
    }


def _header(name: bytes, size: int, l1_entries: int) -> bytes:
    extensions = _EXTENSION.pack(_BACKING_FORMAT, 3) + b"raw".ljust(8, b"\0") + _EXTENSION.pack(0, 0)
    fields = (MAGIC, 3, _HEADER_BYTES + len(extensions), len(name), CLUSTER_BITS, whole_sectors(size))
    places = (0, l1_entries, 3 * CLUSTER, CLUSTER, 1, 0, 0)  # no encryption; L1; refcount table, one cluster; snapshots
    return _HEADER.pack(*fields, *places, 0, 0, 0, _REFCOUNT_ORDER, _HEADER_BYTES) + extensions + name


def base_of(head: bytes) -> tuple[bytes, int]:
    """The base's path and the disk's size that a qcow2 header names. Raises ImageError for no such header."""
    if len(head) < _HEADER_BYTES or not head.startswith(MAGIC):
        raise ImageError("overlay", expected="a qcow2 image", found=repr(head[:4]))
    place, length = struct.unpack_from(">QI", head, 8)
    (size,) = struct.unpack_from(">Q", head, 24)
    name = head[place : place + length]
    if not place or len(name) != length:
        raise ImageError("overlay", expected="a qcow2 image over a base", found="one without")
    return name, size
