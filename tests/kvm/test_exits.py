"""Every kind of exit that a guest can make here, decoded and answered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.requirements import require

if TYPE_CHECKING:
    from tests.kvm.conftest import Boot

pytestmark = pytest.mark.anyio


async def test_ports_are_read_and_written_in_every_width_and_by_string(boot: Boot) -> None:
    async with boot("ports") as run:
        assert (await run.end()).code == 0x21
        answers = run.output
    assert len(answers) == 36
    assert answers[0:4] == b"\xff\0\0\0"
    assert answers[4:8] == b"\xff\xff\0\0"
    assert answers[8:12] == b"\xff\xff\xff\xff"
    assert answers[12:16] == b"\x5a\xff\0\0"  # the register, and beside it nothing
    assert answers[16:24] == b"\x5a" * 8
    assert answers[24:36] == b"\xff" * 12


async def test_port_exits_are_counted_by_address_and_unmapped_ones_as_such(boot: Boot) -> None:
    async with boot("ports") as run:
        await run.end()
    exits = run.exits
    assert set(exits.by_reason) == {"IO"}
    assert sum(entry.count for entry in exits.by_address.values()) == exits.total
    assert exits.by_address["out 0xf4"].count == 1
    assert exits.by_address["out 0x3ff"].count == 1
    # KVM may answer part of a string instruction itself, from what one exit fetched.
    assert 2 <= exits.by_address["in 0x3ff"].count <= 1 + 8
    assert 3 + 2 <= exits.by_address["out 0x1234"].count <= 3 + 4
    assert 3 + 2 <= exits.by_address["in 0x1234"].count <= 3 + 4
    assert 1 <= exits.by_address["out 0x3f8"].count <= 36
    # 3 + 3 single accesses, 4 + 4 in strings, and twice the high byte of a word at the last register
    assert exits.unmapped == 3 + 3 + 4 + 4 + 2


async def test_memory_with_nothing_behind_it_reads_all_ones_in_every_width(boot: Boot) -> None:
    async with boot("mmio") as run:
        assert (await run.end()).code == 0x22
    answers, exits = run.output, run.exits
    assert [answers[at : at + 8] for at in range(0, 32, 8)] == [
        b"\xff".ljust(8, b"\0"),
        b"\xff\xff".ljust(8, b"\0"),
        b"\xff\xff\xff\xff".ljust(8, b"\0"),
        b"\xff" * 8,
    ]
    assert exits.by_reason["MMIO"].count == 8
    reads = {f"mmio-read {0xD0000000 + at:#x}": 1 for at in (0x00, 0x10, 0x20, 0x30)}
    writes = {f"mmio-write {0xD0000000 + at:#x}": 1 for at in (0x40, 0x50, 0x60, 0x70)}
    counted = {label: entry.count for label, entry in exits.by_address.items() if label.startswith("mmio")}
    assert counted == reads | writes
    assert exits.unmapped == 8


async def test_statistics_carry_times_that_fit_together(boot: Boot) -> None:
    async with boot("ports") as run:
        await run.end()
    exits = run.exits
    for entry in [*exits.by_address.values(), *exits.by_reason.values()]:
        assert 0 < entry.max_ns <= entry.total_ns <= entry.count * entry.max_ns
    assert exits.by_reason["IO"].total_ns == sum(entry.total_ns for entry in exits.by_address.values())


@pytest.mark.parametrize(
    ("name", "reason", "code"),
    [
        ("reset-i8042", "reset", None),
        ("reset-acpi", "reset", None),
        ("shutdown-s5", "shutdown", None),
        ("debug-exit", "debug-exit", 0x5C),
    ],
)
async def test_a_guest_ends_itself(boot: Boot, name: str, reason: str, code: int | None) -> None:
    async with boot(name) as run:
        end = await run.end()
        assert (end.reason, end.code, end.last_exit) == (reason, code, "IO")
        assert run.output == b"."
        assert end.t_ns > 0


async def test_output_comes_before_the_end_that_followed_it(boot: Boot) -> None:
    async with boot("toy") as run:
        await run.end()
        assert run.output == b"hello\n"
        assert run.effects[-1] is run.ends[0]


async def test_a_triple_fault_ends_the_guest(boot: Boot) -> None:
    async with boot("triple") as run:
        end = await run.end()
    assert (end.reason, end.last_exit, end.code) == ("triple-fault", "SHUTDOWN", None)
    assert end.rip is not None
    assert run.exits.by_reason["SHUTDOWN"].count == 1


async def test_what_kvm_cannot_emulate_ends_the_guest_with_the_instruction_in_hand(boot: Boot) -> None:
    async with boot("popcnt") as run:
        end = await run.end()
    if end.code == 0x42:
        require("emulated-ring0")
    assert (end.reason, end.last_exit) == ("emulation-failure", "INTERNAL_ERROR")
    assert end.instruction.startswith(bytes.fromhex("f30fb8d8"))
    assert end.rip is not None
    assert 0x100000 <= end.rip < 0x101000
    assert "f3 0f b8 d8" in end.detail


async def test_an_interrupt_wakes_a_halted_guest(boot: Boot) -> None:
    async with boot("timer") as run:
        assert (await run.end()).code == 0x33
        assert run.output == b"ttt"
        assert "HLT" not in run.exits.by_reason  # the kernel's interrupt controller keeps it


async def test_an_interrupt_wakes_a_guest_that_it_finds_about_to_halt(boot: Boot) -> None:
    async with boot("doze") as run:
        assert (await run.end()).code == 0x33


async def test_the_power_button_is_an_interrupt_and_an_event_read_once(boot: Boot) -> None:
    async with boot("button") as run:
        await run.said(b">")
        await run.machine.request_shutdown()
        assert (await run.end()).reason == "shutdown"
        assert run.output == b">\x01\x00"


async def test_a_traced_guest_shows_each_exit_in_order(boot: Boot) -> None:
    from asyncvmm.machine.kvm.exits import IoExit
    from asyncvmm.machine.kvm.trace import ExitTrace

    async with boot("sequence") as run:
        await run.said(b"\x05")
        await run.machine.pause()
        trace = ExitTrace(run.machine, 300)
        before = run.exits.total
        await run.machine.resume()
        traced = [await anext(trace) for _ in range(300)]
        await run.machine.pause()
        counted = run.exits.total - before
        await trace.aclose()
        rest = [entry async for entry in trace]
        assert len(traced) + len(rest) + trace.lost == counted
    exits = [entry.exit for entry in traced]
    ports = [exit.port for exit in exits if isinstance(exit, IoExit)]
    assert len(ports) == len(exits)
    first = ports.index(0x3F8) + 1
    assert ports[first : first + 6] == [0x3FF, 0x3FF, 0x3F8] * 2
    sent = [exit.data[0] for exit in exits if isinstance(exit, IoExit) and exit.port == 0x3F8]
    assert sent == [(sent[0] + index) % 256 for index in range(len(sent))]
    times = [entry.t_ns for entry in traced]
    assert times == sorted(times)
    assert {entry.vcpu for entry in traced} == {0}


async def test_a_trace_holds_no_more_than_it_may(boot: Boot) -> None:
    from asyncvmm.machine.kvm.trace import ExitTrace

    async with boot("sequence") as run:
        trace = ExitTrace(run.machine, 10)
        await run.until(lambda: trace.lost > 10)
        await run.machine.stop()
        assert len([entry async for entry in trace]) == 10


async def test_a_trace_of_a_guest_that_has_ended_is_empty(boot: Boot) -> None:
    from asyncvmm.machine.kvm.trace import ExitTrace

    async with boot("toy") as run:
        await run.end()
        assert [entry async for entry in ExitTrace(run.machine, 10)] == []


async def test_a_newer_trace_ends_the_older(boot: Boot) -> None:
    from asyncvmm.machine.kvm.trace import ExitTrace

    async with boot("sequence") as run:
        older = ExitTrace(run.machine, 10)
        newer = ExitTrace(run.machine, 10)
        assert len([entry async for entry in older]) <= 10
        assert (await anext(newer)).vcpu == 0
