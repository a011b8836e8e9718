"""``asyncvmm metrics``: JSON lines of VMs in, metrics out."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import anyio

from asyncvmm.errors import ConfigError
from asyncvmm.events.lines import Line, LineScanner
from asyncvmm.export.exposition import check_target, serving, write_metrics
from asyncvmm.export.prometheus import RecordCollector
from asyncvmm.export.records import BYTE_ORDER_MARK, MAX_LINE, NotARecord, read_record
from asyncvmm.export.sources import Source

WRITE_EVERY_S = 1.0
"""Seconds between two writings of a file whose sources are followed."""

MAX_REMARKS = 10
"""Lines of a source that are named as unreadable; of more, only the number is told."""


async def metrics(files: Sequence[str], prometheus: str | None, listen: str | None, *, follow: bool) -> None:
    """Read ``files`` (``-``: stdin), write the metrics to ``prometheus``, serve them at ``listen``.

    Serving and following end by being cancelled, which then is no error. Raises ConfigError for what cannot be read,
    written or listened on, or has lines none of which is an event; HostError without prometheus-client.
    """
    if prometheus is None and listen is None:
        prometheus = "-"
    if prometheus is not None:
        check_target(prometheus, files)
    collector = RecordCollector()
    with ExitStack() as held:
        readers = [Reader(held, name, collector) for name in dict.fromkeys(files or ["-"])]
        if listen is not None:
            url = held.enter_context(serving(collector.registry, listen))
            print(f"serving {url}", file=sys.stderr, flush=True)
        try:
            await _run(readers, collector, prometheus, follow=follow, serve=listen is not None)
        except asyncio.CancelledError:
            if not follow and listen is None:
                raise
        if not follow and listen is None and collector.unreadable and not collector.records:
            raise ConfigError("metrics", expected="events of asyncvmm, one a line", found="none")
    if prometheus is not None:
        write_metrics(collector.registry, prometheus)


async def _run(
    readers: Sequence[Reader], collector: RecordCollector, prometheus: str | None, *, follow: bool, serve: bool
) -> None:
    try:
        async with anyio.create_task_group() as tasks:
            for reader in readers:
                tasks.start_soon(reader.read, follow)
            if follow or serve:
                tasks.start_soon(_keep_writing, collector, prometheus)
    except* ConfigError as errors:
        raise _first(errors) from None


def _first(errors: BaseExceptionGroup[ConfigError]) -> ConfigError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ConfigError)
    return error


async def _keep_writing(collector: RecordCollector, prometheus: str | None) -> None:
    """Until cancelled. Stdout is written at the end alone."""
    written = -1
    while True:
        seen = collector.records + collector.unreadable
        if prometheus is not None and prometheus != "-" and seen != written:
            await anyio.to_thread.run_sync(write_metrics, collector.registry, prometheus)
            written = seen
        await anyio.sleep(WRITE_EVERY_S)


class Reader:
    """Reads one source into a collector; names on stderr the first lines that are not events."""

    def __init__(self, held: ExitStack, name: str, collector: RecordCollector) -> None:
        self._source = Source(name)
        held.callback(self._source.close)
        self._collector = collector
        self._scanner = LineScanner(MAX_LINE)
        self._number = 0
        self._unreadable = 0

    async def read(self, follow: bool) -> None:
        """To the end, or for ever if the source is followed."""
        async for chunk in self._source.chunks(follow=follow):
            if not chunk:
                self._scanner, self._number = LineScanner(MAX_LINE), 0
            for line in self._scanner.feed(chunk):
                self._take(line)
        if (rest := self._scanner.flush(0)) is not None:
            self._take(rest)
        if self._unreadable > MAX_REMARKS:
            self._say(f"and {self._unreadable - MAX_REMARKS} more lines")

    def _take(self, line: Line) -> None:
        self._number += 1
        if self._number == 1:
            line = line._replace(text=line.text.removeprefix(BYTE_ORDER_MARK))
        if not line.text.strip() and not line.truncated:
            return
        try:
            if line.truncated:
                raise NotARecord(f"longer than {MAX_LINE} bytes")
            self._collector.add(read_record(line.text))
        except NotARecord as error:
            self._collector.add_unreadable()
            self._unreadable += 1
            if self._unreadable <= MAX_REMARKS:
                self._say(f"line {self._number}: {error}")

    def _say(self, remark: str) -> None:
        print(f"{self._source.name}: {remark}", file=sys.stderr, flush=True)
