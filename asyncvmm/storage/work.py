"""Carries block requests out on an image, on whichever thread may wait for it; neighbouring ones in one system call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from asyncvmm.devices.virtio.block_io import BlockRequest, Operation
from asyncvmm.storage.image import Image
from asyncvmm.storage.raw import MOST_VIEWS

_WRITE: Final = Operation.WRITE

MOST_MERGED: Final = 1 << 20
"""Bytes of neighbouring requests that become one system call."""


def merged(batch: Sequence[BlockRequest]) -> Iterator[Sequence[BlockRequest]]:
    """The batch in order, in groups of reads or writes each of which begins where the one before it ends."""
    group: list[BlockRequest] = []
    size = views = behind = 0
    for request in batch:
        size, views = size + request.size, views + len(request.views)
        if group and (
            request.offset != behind or size > MOST_MERGED or views > MOST_VIEWS or not _goes_with(group[-1], request)
        ):
            yield group
            group, size, views = [], request.size, len(request.views)
        group.append(request)
        behind = request.offset + request.size
    if group:
        yield group


def _goes_with(before: BlockRequest, request: BlockRequest) -> bool:
    return (
        request.operation is before.operation
        and request.operation in (Operation.READ, Operation.WRITE)
        and request.sync == before.sync
    )


def work_on(image: Image, group: Sequence[BlockRequest], *, unsafe: bool = False) -> None:
    """Do what a group of ``merged`` asks for, and set ``result`` or ``failed`` of each. unsafe: without any flush."""
    failed = _try(image, group, unsafe)
    if len(group) == 1:
        group[0].failed = failed
        return
    for request in group:
        if failed is not None:  # which of them is to blame shows one by one
            request.failed = _try(image, (request,), unsafe)
        else:
            request.failed = None


def _try(image: Image, group: Sequence[BlockRequest], unsafe: bool) -> str | None:
    first = group[0]
    try:
        if first.operation is _WRITE:
            views = first.views if len(group) == 1 else [view for request in group for view in request.views]
            image.write(first.offset, views, sync=first.sync and not unsafe)
        else:
            _do(image, group, unsafe)
    except Exception as error:  # whatever it is: the request is answered, and the next ones are worked on
        return str(error) or type(error).__name__
    return None


def _do(image: Image, group: Sequence[BlockRequest], unsafe: bool) -> None:
    first = group[0]
    if first.operation is Operation.READ:
        _read(image, group)
    elif first.operation is not Operation.FLUSH:
        _change_ranges(image, first)
    if not unsafe and (first.operation is Operation.FLUSH or (first.ranges and first.sync)):
        image.flush()


def _read(image: Image, group: Sequence[BlockRequest]) -> None:
    start = group[0].offset
    data = image.read(start, group[-1].offset + group[-1].size - start)
    if len(group) == 1:
        group[0].result = data
        return
    view = memoryview(data)
    for request in group:
        request.result = view[request.offset - start :][: request.size]


def _change_ranges(image: Image, request: BlockRequest) -> None:
    for offset, size, unmap in request.ranges:
        if not size:
            continue
        if request.operation is Operation.DISCARD:
            image.discard(offset, size)
        else:
            image.zero(offset, size, unmap=unmap)
