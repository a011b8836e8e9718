"""The QEMU command line follows from the plan alone."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import CmdlineError
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.qemu.command import ChildDescriptors, MemoryEnd, QemuBinary, build_command, kernel_cmdline

QEMU = QemuBinary(Path("/usr/bin/qemu-system-x86_64"), (7, 2, 22))
ENDS = ChildDescriptors(qmp=5, console=6, control=7, memory=MemoryEnd(8))
PLAN = BootPlan(name="vm", memory_mib=256, vcpus=2, kernel=Path("/k"), initrd=None, cmdline="quiet", tsc_khz=2_300_000)


def option(command: list[str], name: str) -> str:
    assert command.count(name) == 1
    return command[command.index(name) + 1]


def test_a_guest_that_can_be_told_its_tsc_frequency_gets_a_microvm() -> None:
    command = build_command(PLAN, QEMU, "tcg", ENDS, None)
    assert option(command, "-machine").startswith("microvm,")
    assert option(command, "-append") == "tsc_early_khz=2300000 tsc=reliable quiet"


def test_without_a_known_tsc_frequency_it_gets_a_q35_and_is_told_nothing() -> None:
    command = build_command(attrs.evolve(PLAN, tsc_khz=None), QEMU, "tcg", ENDS, None)
    assert option(command, "-machine") == "q35,memory-backend=ram"
    assert option(command, "-append") == "quiet"


def test_on_kvm_the_guest_sees_the_host_cpu_and_needs_no_tsc_words() -> None:
    command = build_command(PLAN, QEMU, "kvm", ENDS, None)
    assert option(command, "-accel") == "kvm"
    assert option(command, "-cpu") == "host"
    assert option(command, "-append") == "quiet"


def test_memory_and_vcpus_are_the_plans() -> None:
    command = build_command(PLAN, QEMU, "tcg", ENDS, None)
    assert option(command, "-m") == "256M"
    assert option(command, "-smp") == "2"
    assert option(command, "-cpu") == "max"


def test_com2_is_created_before_com1_so_that_linux_lists_com1_first() -> None:
    command = build_command(PLAN, QEMU, "tcg", ENDS, None)
    ports = [word for word in command if word.startswith("isa-serial")]
    assert ports == [
        "isa-serial,chardev=control,index=1,iobase=0x2f8,irq=3",
        "isa-serial,chardev=console,index=0,iobase=0x3f8,irq=4",
    ]


def test_each_line_is_an_inherited_socket() -> None:
    command = build_command(PLAN, QEMU, "tcg", ENDS, None)
    for socket in ("socket,id=qmp,fd=5", "socket,id=console,fd=6", "socket,id=control,fd=7"):
        assert socket in command


def test_nothing_of_the_hosts_configuration_gets_in() -> None:
    command = build_command(PLAN, QEMU, "tcg", ENDS, None)
    assert {"-nodefaults", "-no-user-config", "-no-reboot", "-S"} <= set(command)


def test_the_sandbox_is_on_where_qemu_has_one() -> None:
    assert option(build_command(PLAN, QEMU, "tcg", ENDS, None), "-sandbox").startswith("on,")
    assert "-sandbox" not in build_command(PLAN, attrs.evolve(QEMU, sandbox=False), "tcg", ENDS, None)


def test_an_initrd_is_named_only_if_there_is_one() -> None:
    assert "-initrd" not in build_command(PLAN, QEMU, "tcg", ENDS, None)
    assert option(build_command(PLAN, QEMU, "tcg", ENDS, "/proc/self/fd/9"), "-initrd") == "/proc/self/fd/9"


def test_a_name_with_commas_stays_one_value() -> None:
    command = build_command(attrs.evolve(PLAN, name="a,process=b"), QEMU, "tcg", ENDS, None)
    assert option(command, "-name") == "guest=a,,process=b,debug-threads=on"


def test_no_words_for_the_kernel_means_no_append() -> None:
    assert "-append" not in build_command(attrs.evolve(PLAN, tsc_khz=None, cmdline=""), QEMU, "tcg", ENDS, None)


def test_a_command_line_that_our_words_make_too_long_is_refused() -> None:
    with pytest.raises(CmdlineError, match="at most 2047 bytes"):
        kernel_cmdline(attrs.evolve(PLAN, cmdline="x" * 2047), "tcg")


@given(st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=300))
def test_the_callers_words_come_last_so_they_win(text: str) -> None:
    assert kernel_cmdline(attrs.evolve(PLAN, cmdline=text), "tcg").endswith(text)


def test_memory_is_a_file_that_is_shared_with_us() -> None:
    command = build_command(PLAN, QEMU, "tcg", ENDS, None)
    assert option(command, "-object") == "memory-backend-file,id=ram,size=256M,mem-path=/proc/self/fd/8,share=on"
    assert option(command, "-machine").endswith(",memory-backend=ram")
    assert ENDS.all() == [5, 6, 7, 8]


def test_a_restored_machine_keeps_its_writes_to_itself_and_needs_no_kernel() -> None:
    ends = attrs.evolve(ENDS, memory=MemoryEnd(8, shared=False), restores=True)
    command = build_command(PLAN, QEMU, "tcg", ends, "/initrd")
    assert option(command, "-object").endswith(",share=off")
    assert option(command, "-incoming") == "defer"
    assert not {"-kernel", "-initrd", "-append"} & set(command)
