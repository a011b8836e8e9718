"""The guest's console (COM1) as a program sees it: write bytes, iterate over bytes. Readers never slow the guest.

Each iterator has a bounded buffer of its own; what a slow one cannot hold is dropped, oldest first, and counted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import anyio

from asyncvmm.events.lines import LineScanner, Tail

BUFFER_BYTES = 1 << 20
"""Bytes one iterator holds for a reader that is behind."""

Write = Callable[[bytes], Awaitable[None]]


class Console:
    """COM1 of one VM.

    ``async for chunk in vm.console`` gives bytes from now on, in order, until the guest stops;
    ``async for line in vm.console.lines()`` gives text. ``tail`` is the last 4 KiB.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._tail = Tail()
        self._readers: list[ConsoleReader] = []
        self._ended = False

    async def write(self, data: bytes) -> None:
        """Type ``data`` into the guest; returns when its serial port has taken all of it.

        Raises StateError if the guest does not run, TypeError for what is not bytes (text has no encoding here).
        """
        await self._write(bytes(memoryview(data).cast("B")))

    @property
    def tail(self) -> bytes:
        """The newest 4 KiB of output."""
        return bytes(self._tail)

    def __aiter__(self) -> ConsoleReader:
        return self.subscribe()

    def subscribe(self, capacity: int = BUFFER_BYTES) -> ConsoleReader:
        """An iterator over the output from now on, holding at most ``capacity`` bytes for a slow reader."""
        reader = ConsoleReader(capacity)
        if self._ended:
            reader.end()
        else:
            self._readers.append(reader)
        return reader

    async def lines(self) -> AsyncIterator[str]:
        """Output from now on as lines without their newline; bytes that are not UTF-8 become U+FFFD."""
        scanner = LineScanner()
        async for chunk in self:
            for line in scanner.feed(chunk):
                yield line.text.decode("utf-8", "replace")
        last = scanner.flush(0)
        if last is not None:
            yield last.text.decode("utf-8", "replace")

    def feed(self, data: bytes, lost: int) -> None:
        """Output has come; ``lost`` bytes behind it were dropped before they got here. For the VM."""
        self._tail.feed(data)
        self._readers = [reader for reader in self._readers if not reader.closed]
        for reader in self._readers:
            reader.feed(data, lost)

    def end(self) -> None:
        """No more output will come. For the VM."""
        self._ended = True
        for reader in self._readers:
            reader.end()
        self._readers.clear()


class ConsoleReader:
    """One iteration over a console. ``lost`` counts the bytes this reader did not get."""

    def __init__(self, capacity: int) -> None:
        self.lost = 0
        self.closed = False
        self._capacity = capacity
        self._held = bytearray()
        self._ended = False
        self._awake: anyio.Event | None = None

    def __aiter__(self) -> ConsoleReader:
        return self

    async def __anext__(self) -> bytes:
        while not self._held:
            if self._ended or self.closed:
                raise StopAsyncIteration
            self._awake = self._awake or anyio.Event()
            await self._awake.wait()
        return self.take()

    def take(self) -> bytes:
        """All that is held, at once; empty if nothing is."""
        data, self._held = bytes(self._held), bytearray()
        return data

    async def aclose(self) -> None:
        """Stop reading."""
        self.closed = True
        self._wake()

    def feed(self, data: bytes, lost: int) -> None:
        """Output has come; one that has ended takes none. For Console."""
        if self._ended:
            return
        self._held += data
        dropped = max(0, len(self._held) - self._capacity)
        del self._held[:dropped]
        self.lost += lost + dropped
        self._wake()

    def end(self) -> None:
        """No more output will come. For Console."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._awake is not None:
            self._awake.set()
            self._awake = None
