"""QEMU's migration stream, as far as needed to keep guest memory out of it. Pure: bytes in, the rest of them out.

The facts: migration/savevm.c and migration/ram.c of QEMU 7.2, the same since 2.x: a header, the machine's name and
capabilities, then sections; first those of ``ram``, in several parts, then one for each device. A part of ``ram`` is a
row of records, each an address and flags in one word, big-endian:

    MEM_SIZE  the RAM blocks with their sizes          ZERO  a page of one byte's value
    PAGE      a page                                   EOS   the end of the part

A page's record names its block, or has CONTINUE: it is the same one as before. Memory that QEMU shares with us it
leaves out by itself (``x-ignore-shared``); a restored machine's is not shared, and comes in the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from typing import Final, TypeVar

from asyncvmm.errors import SnapshotFailed

T = TypeVar("T")

PAGE: Final = 4096
MOST_BYTES: Final = 1 << 26
"""Most bytes of a state without the guest's memory: some 60 KiB on a microvm, 300 KiB on a q35."""

_MAGIC, _VERSION = b"QEVM", 3
_EOF, _START, _PART, _END, _FULL, _SUBSECTION, _CONFIGURATION, _FOOTER = 0, 1, 2, 3, 4, 5, 7, 0x7E
_ZERO, _MEM_SIZE, _PAGE, _EOS, _CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20
_FLAGS = PAGE - 1
_WORD = 8
_LONGEST_NAME = 255
_PIECE = 1 << 20
_SECTION = b"ram"
_CAPABILITIES = b"configuration/capabilities"
_U32, _U64 = struct.Struct(">I"), struct.Struct(">Q")

TakePages = Callable[[int, bytes], None]
"""Takes pages of the guest's memory: their offset, and their bytes."""

Reader = Generator[int, bytes, T]
"""Yields how many bytes it wants next, and is sent them."""


class RamFilter:
    """Takes a stream piece by piece; ``rest`` is what is left of it without the pages of the block ``ram``, which
    ``take_pages`` gets. A restoring QEMU reads that as it would the whole."""

    def __init__(self, ram: str, size: int, take_pages: TakePages) -> None:
        self.rest = bytearray()
        self._ram = ram.encode()
        self._size = size
        self._take_pages = take_pages
        self._unread = bytearray()
        self._block = b""
        self._taken: set[int] = set()
        self._pages = bytearray()
        self._first = 0
        self._at_record = False
        self._parser: Reader[None] | None = self._parse()
        self._wanted = next(self._parser)

    def feed(self, data: bytes) -> None:
        """Take the next piece. Raises SnapshotFailed for what is no such stream, and what ``take_pages`` raises."""
        self._unread += data
        at, size = 0, len(self._unread)
        while self._parser is not None and size - at >= self._wanted:
            if self._at_record and self._block == self._ram:
                at = self._skim(at, size)
                if size - at < self._wanted:
                    break
            piece = bytes(memoryview(self._unread)[at : at + self._wanted])
            at += self._wanted
            try:
                self._wanted = self._parser.send(piece)
            except StopIteration:
                self._parser = None
        del self._unread[:at]
        if self._parser is None:
            self._add(self._unread)
            self._unread.clear()

    def finish(self) -> bytes:
        """The stream has ended: the rest. Raises SnapshotFailed if it ended too early."""
        if self._parser is not None or not self.rest:
            raise _unexpected("a whole one", "one that was cut off")
        return bytes(self.rest)

    def _skim(self, at: int, size: int) -> int:
        """Take the memory's pages from ``at`` on, as long as one follows another; where that ends.

        What ``_record`` would do, in a fifth of the time.
        """
        unread, taken = self._unread, self._taken
        with memoryview(unread) as view:
            while size - at >= _WORD + PAGE:
                (word,) = _U64.unpack_from(unread, at)
                flags = word & _FLAGS
                at += _WORD
                if flags == _PAGE | _CONTINUE:
                    taken.add(word - flags)
                    self._take(word - flags, view[at : at + PAGE])
                    at += PAGE
                elif flags == _ZERO | _CONTINUE and not unread[at] and word - flags not in taken:
                    at += 1
                else:
                    return at - _WORD
        return at

    def _take(self, address: int, data: bytes | memoryview) -> None:
        """A page to hand on, together with others that it follows."""
        if address != self._first + len(self._pages) or len(self._pages) >= _PIECE:
            self._hand_on()
            self._first = address
        self._pages += data

    def _hand_on(self) -> None:
        if self._pages:
            self._take_pages(self._first, bytes(self._pages))
            self._pages.clear()

    # -- the grammar, down to the first device's section -----------------------------------------------------------

    def _parse(self) -> Reader[None]:
        header = yield from self._keep(8)
        if header != _MAGIC + _U32.pack(_VERSION):
            raise _unexpected("a migration stream", header.hex())
        while True:
            kind = (yield from self._keep(1))[0]
            if kind == _CONFIGURATION:
                yield from self._keep_text(4)
            elif kind == _SUBSECTION:
                yield from self._capabilities()
            elif kind in (_START, _PART, _END):
                yield from self._section(kind)
            elif kind in (_FULL, _EOF):
                return
            else:
                raise _unexpected("a section", f"type {kind:#x}")

    def _capabilities(self) -> Reader[None]:
        name = yield from self._keep_text(1)
        if name != _CAPABILITIES:
            raise _unexpected(_CAPABILITIES.decode(), repr(name))
        yield from self._keep(4)
        for _ in range(_U32.unpack((yield from self._keep(4)))[0]):
            yield from self._keep_text(1)

    def _section(self, kind: int) -> Reader[None]:
        yield from self._keep(4)
        if kind == _START:
            name = yield from self._keep_text(1)
            if name != _SECTION:
                raise _unexpected("memory first", repr(name))
            yield from self._keep(8)
        while (yield from self._record()):
            pass
        self._hand_on()
        if (yield from self._keep(5))[0] != _FOOTER:
            raise _unexpected("the end of a section", "none")

    def _record(self) -> Reader[bool]:
        """Whether there is another one."""
        self._at_record = True
        word = yield _WORD
        self._at_record = False
        (value,) = _U64.unpack(word)
        address, flags = value & ~_FLAGS, value & _FLAGS
        if flags & ~_CONTINUE in (_PAGE, _ZERO):
            yield from self._page(word, address, flags)
            return True
        self._add(word)
        if flags == _MEM_SIZE:
            yield from self._blocks(address)
        elif flags != _EOS:
            raise _unexpected("a page", f"flags {flags:#x}")
        return bool(flags != _EOS)

    def _blocks(self, total: int) -> Reader[None]:
        while total > 0:
            name = yield from self._keep_text(1)
            size, _address = struct.unpack(">QQ", (yield from self._keep(16)))
            if name == self._ram and size != self._size:
                raise _unexpected(f"{self._size} bytes of memory", size)
            total -= size

    def _page(self, word: bytes, address: int, flags: int) -> Reader[None]:
        block = b""
        if not flags & _CONTINUE:
            length = yield 1
            self._block = yield length[0]
            block = length + self._block
        data = yield (PAGE if flags & _PAGE else 1)
        if self._block != self._ram:
            self._add(word + block + data)
        elif flags & _PAGE or data != b"\0" or address in self._taken:
            self._taken.add(address)
            self._take(address, data if flags & _PAGE else data * PAGE)

    # -- what is kept ----------------------------------------------------------------------------------------------

    def _keep(self, size: int) -> Reader[bytes]:
        data = yield size
        self._add(data)
        return data

    def _keep_text(self, width: int) -> Reader[bytes]:
        """What stands behind its own length, ``width`` bytes."""
        size = int.from_bytes((yield from self._keep(width)))
        if size > _LONGEST_NAME:
            raise _unexpected(f"a name of at most {_LONGEST_NAME} bytes", size)
        return (yield from self._keep(size)) if size else b""

    def _add(self, data: bytes | bytearray) -> None:
        self.rest += data
        if len(self.rest) > MOST_BYTES:
            raise _unexpected(f"at most {MOST_BYTES} bytes", "more")


def _unexpected(expected: object, found: object) -> SnapshotFailed:
    return SnapshotFailed("QEMU's state", expected=expected, found=found)
