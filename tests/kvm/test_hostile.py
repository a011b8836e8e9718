"""Guests, files and callers that mean harm, or do it. Guests here are machine code made on the spot.

``Attack`` builds an ELF of steps: each writes bytes to one I/O port, short ones by OUT (which the native run loop may
answer), long ones by REP OUTSB. The last step repeats for ever if told to; else the guest halts.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncvmm import VM, AsyncVMMError, VMConfig
from asyncvmm.errors import InitrdError, KernelError
from asyncvmm.events.types import Event, GuestHeartbeat, GuestListener, GuestReady, VmState
from asyncvmm.machine.assets import check_bootable
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.fastpath.binding import Fastpath, load
from asyncvmm.machine.kvm.platform import Board, Outlets
from asyncvmm.machine.pacing import TURN_BYTES
from asyncvmm.x86.load import plan_boot

pytestmark = pytest.mark.anyio

COM1, COM2, LCR, MCR, DEBUG_EXIT, I8042 = 0x3F8, 0x2F8, 0x3FB, 0x3FC, 0xF4, 0x64
CODE, DATA = 0x100000, 0x110000
SHORT = 64
PATIENCE_S = 60
MOST_TURNS = 2000
"""Loop turns looked at: under emulation a guest that floods a port that Python answers does not fill as many."""
MEMORY = 4 << 20

Step = tuple[int, bytes]
Make = Callable[..., VM]


def attack(*steps: Step, repeat: bool = False) -> bytes:
    """The ELF of a guest that does these steps."""
    code, data, last = bytearray(), bytearray(), 0
    for port, text in steps:
        last = len(code)
        code += b"\x66\xba" + struct.pack("<H", port)  # mov $port, %dx
        if len(text) <= SHORT:
            code += b"".join(b"\xb0" + bytes([byte]) + b"\xee" for byte in text)  # mov $byte, %al; out %al, %dx
        else:
            code += b"\xbe" + struct.pack("<I", DATA + len(data))  # mov $address, %esi
            code += b"\xb9" + struct.pack("<I", len(text)) + b"\xf3\x6e"  # mov $count, %ecx; rep outsb
            data += text
    code += b"\xe9" + struct.pack("<i", last - len(code) - 5) if repeat else b"\xf4\xeb\xfd"  # jmp last; or hlt
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", CODE)
    headers = 64 + 3 * 56
    offsets = [headers, headers + len(note), headers + len(note) + len(code)]
    image = bytearray(b"\x7fELF\x02\x01\x01".ljust(16, b"\0"))
    image += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, CODE, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    rows = ((4, 0, note), (1, CODE, code), (1, DATA, data or b"\0"))
    for (kind, address, content), offset in zip(rows, offsets, strict=True):
        image += struct.pack("<IIQQQQQQ", kind, 7, offset, address, address, len(content), len(content), 4)
    return bytes(image) + note + bytes(code) + bytes(data or b"\0")


@pytest.fixture
def vm(tmp_path: Path) -> Make:
    """A VM whose guest is an ``attack`` of these steps, after READY."""

    def make(*steps: Step, repeat: bool = False, **options: Any) -> VM:
        kernel = tmp_path / "attack.elf"
        kernel.write_bytes(attack((COM1, b"READY\n"), *steps, repeat=repeat))
        return VM(VMConfig(kernel=kernel, cmdline="", memory_mib=4, accel="kvm", boot_timeout_s=30.0, **options))

    return make


@pytest.fixture
def echoing(guest: Callable[[str], Path]) -> Make:
    """A VM whose guest is ready, then does as ``program`` (see foreign.S) says: echoes."""

    def make(program: str = "RE") -> VM:
        return VM(VMConfig(kernel=guest("foreign"), cmdline=program, memory_mib=4, accel="kvm", boot_timeout_s=30.0))

    return make


def block_the_loop(seconds: float) -> None:
    time.sleep(seconds)


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


# -- guests ------------------------------------------------------------------------------------------------------------


@pytest.mark.stalls
@pytest.mark.parametrize("port", [COM1, COM2])
async def test_a_backlog_of_newlines_is_worked_off_a_little_each_loop_turn(vm: Make, port: int) -> None:
    events: list[Event] = []
    async with vm((port, b"\n" * 4096), repeat=True, serial_lines=True) as machine:
        machine.events.attach(events.append)
        await machine.boot()
        block_the_loop(1.0)  # somebody else's fault; what comes of it must be bounded
        seen = [len(events)]
        while seen[-1] - seen[0] < 10 * TURN_BYTES and len(seen) < MOST_TURNS:
            await asyncio.sleep(0)
            seen.append(len(events))
    assert seen[-1] > seen[0]
    assert max(after - before for before, after in itertools.pairwise(seen)) <= 3 * TURN_BYTES


async def test_a_reset_asked_for_4096_times_ends_the_guest_once(vm: Make) -> None:
    events: list[Event] = []
    async with vm((I8042, b"\xfe" * 4096), (DEBUG_EXIT, b"\x07"), repeat=True) as machine:
        machine.events.attach(events.append)
        await machine.boot()
        with anyio.fail_after(PATIENCE_S):
            assert await machine.events.stopped == "reset"
    assert [event.state for event in events if isinstance(event, VmState)].count("stopped") == 1


async def test_malformed_and_repeated_markers_count_as_nothing(vm: Make) -> None:
    lines = (
        "listener proto=tcp port=99999999999999",
        "listener proto=tcp port=0",
        "listener proto=tcp port=65536",
        "heartbeat counter=99999999999999999999",
        "heartbeat counter=-1",
        "heartbeat counter=" + "9" * 8000,
        "workload-exit code=256",
        "BOOT_TIME:ready:18446744073709551616",
        "READY",
        "READY",
        "heartbeat counter=18446744073709551615",
        "listener proto=tcp port=8080",
    )
    events: list[Event] = []
    async with vm((COM2, "".join(f"{line}\n" for line in lines).encode())) as machine:
        machine.events.attach(events.append)
        await machine.boot()
        with anyio.fail_after(PATIENCE_S):
            assert (await machine.events.listener).port == 8080
        assert not machine.events.exit.done
        assert machine.state == "ready"
    kinds = (GuestHeartbeat, GuestListener, GuestReady)
    heard = [event for event in events if isinstance(event, kinds)]
    assert [type(event) for event in heard] == [GuestReady, GuestHeartbeat, GuestListener]


async def test_posted_bytes_keep_their_place_among_dlab_loopback_and_string_output(vm: Make) -> None:
    steps = (
        *((COM1, b"ab"), (LCR, b"\x83"), (COM1, b"\x01"), (LCR, b"\x03"), (COM1, b"cd")),
        *((COM1, b"s" * (SHORT + 1)), (MCR, b"\x10"), (COM1, b"lost"), (MCR, b"\x00"), (COM1, b"ef\n")),
        (DEBUG_EXIT, b"\x07"),
    )
    async with vm(*steps) as machine:
        console = machine.console.subscribe()
        await machine.boot()
        with anyio.fail_after(PATIENCE_S):
            await machine.events.stopped
            heard = b"".join([chunk async for chunk in console])
    assert heard == b"READY\nabcd" + b"s" * (SHORT + 1) + b"ef\n"


def test_no_access_of_any_width_to_any_port_raises_out_of_a_device() -> None:
    library, event_fd = load(), os.eventfd(0, os.EFD_NONBLOCK)
    outlets = Outlets(
        irq=lambda gsi, level: None,
        output_pending=lambda port: None,
        room=lambda port: None,
        shutdown=lambda: None,
        reset=lambda: None,
        debug_exit=lambda code: None,
    )
    dice = random.Random(5)
    try:
        board = Board(outlets, Fastpath(library, event_fd) if library else None)
        ports = [port for at in board.bus.attachments() for port in range(at.first - 3, at.end + 2)]
        for _ in range(30_000):
            port, size = dice.choice(ports), dice.choice((1, 1, 2, 4))
            board.bus.write(port, dice.getrandbits(32), size)
            assert 0 <= board.bus.read(dice.choice(ports), size) < 1 << 8 * size
            if dice.random() < 0.01:
                board.console.feed(dice.randbytes(30))
                board.console.take()
    finally:
        os.close(event_fd)


# -- files -------------------------------------------------------------------------------------------------------------


def test_an_elf_with_any_header_bytes_is_loaded_within_ram_or_refused() -> None:
    good, dice = attack((COM1, b"READY\n")), random.Random(7)
    numbers = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1, 0xFFF, CODE, 0xC0000000, len(good))
    for _ in range(5_000):
        image = bytearray(good)
        for _ in range(dice.choice((1, 1, 2, 3))):
            width = dice.choice((1, 2, 4, 8))
            at = dice.randrange(0, 232 // width) * width
            value = dice.choice(numbers) if dice.random() < 0.6 else dice.getrandbits(64)
            image[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        initrd = dice.choice((0, 1, 4096, 1 << 40))
        try:
            layout = plan_boot(bytes(image), initrd, "", MEMORY, 1)
        except AsyncVMMError:
            continue
        assert all(segment.address + len(segment.data) <= MEMORY for segment in layout.segments)
        assert layout.initrd_address is None or layout.initrd_address + initrd <= MEMORY


async def test_an_initrd_may_fill_the_room_to_the_last_byte(echoing: Make, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    kernel = echoing().config.kernel
    assert kernel is not None
    with pytest.raises(InitrdError) as refused:
        plan_boot(kernel.read_bytes(), MEMORY, "RE", MEMORY, 1)
    room = int(str(refused.value.expected).split()[2])
    for size, fits in ((0, True), (1, True), (room, True), (room + 1, False)):
        initrd.write_bytes(b"i" * size)
        async with VM(VMConfig(kernel=kernel, initrd=initrd, cmdline="RE", memory_mib=4, accel="kvm")) as machine:
            if fits:
                await machine.boot()
                continue
            with pytest.raises(InitrdError, match=f"at most {room} bytes"):
                await machine.boot()


def test_a_kernel_file_that_cannot_fit_is_not_read_to_find_out(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"\x7fELF")
    os.truncate(kernel, 256 << 20)  # sparse: it costs nothing to make
    plan = BootPlan(name="big", memory_mib=4, vcpus=1, kernel=kernel, initrd=None, cmdline="")
    tracemalloc.start()
    try:
        with pytest.raises(KernelError):
            check_bootable(plan)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 64 << 20, f"{most >> 20} MiB were allocated to refuse a file whose header is wrong"


# -- callers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["ls\n", [300]])
async def test_text_typed_into_the_console_is_refused_and_does_the_guest_no_harm(echoing: Make, data: Any) -> None:
    async with echoing() as machine:
        await machine.boot()
        console = machine.console.subscribe()
        with pytest.raises((TypeError, ValueError, AsyncVMMError)):
            await machine.console.write(data)
        await machine.console.write(b"!")
        with anyio.fail_after(PATIENCE_S):
            assert await anext(console) == b"!"
        assert machine.state == "ready"


@pytest.mark.parametrize("turns", range(1, 9))
async def test_a_stop_that_was_cancelled_is_finished_by_the_next(echoing: Make, tmp_path: Path, turns: int) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    machine = echoing()
    machine.stream_to(tmp_path / "events.jsonl")
    await machine.boot()
    stopping = asyncio.create_task(machine.stop())
    for _ in range(turns):
        await asyncio.sleep(0)
    await cancelled(stopping)
    await machine.stop()
    assert machine.state == "stopped"
    assert machine.events.stopped.done
    assert len(os.listdir("/proc/self/fd")) == descriptors


async def test_a_pause_that_was_cancelled_leaves_a_guest_that_is_what_its_state_says(echoing: Make) -> None:
    async with echoing() as machine:
        await machine.boot()
        pausing = asyncio.create_task(machine.pause())
        await asyncio.sleep(0)
        await cancelled(pausing)
        if machine.state == "paused":
            await machine.resume()
        console = machine.console.subscribe()
        with anyio.fail_after(5.0):
            await machine.console.write(b"?")
            assert await anext(console) == b"?"


@pytest.mark.stalls
async def test_a_guest_that_ended_while_it_was_paused_stays_ended(echoing: Make) -> None:
    async with echoing("RWD") as machine:
        await machine.boot()
        await machine.console.write(b"x")
        block_the_loop(0.2)  # it ends, and the loop has not heard of it
        with anyio.fail_after(PATIENCE_S):
            with suppress(AsyncVMMError):
                await machine.pause()
            await machine.events.stopped
        assert machine.state == "stopped"


async def test_a_trace_that_has_ended_slows_the_guest_no_more(echoing: Make) -> None:
    async with echoing() as machine:  # whose guest polls LSR
        await machine.boot()
        trace = machine.trace_exits()
        with anyio.fail_after(PATIENCE_S):
            await anext(trace)
        await trace.aclose()
        fastpath: Fastpath = machine._machine._building.fastpath  # type: ignore[union-attr]
        before = sum(port.count for port in fastpath.data.port)
        with anyio.fail_after(PATIENCE_S):
            while sum(port.count for port in fastpath.data.port) == before:  # noqa: ASYNC110 (nobody tells)
                await anyio.sleep(0.01)
