from __future__ import annotations

from contextlib import nullcontext

from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.effects import ExitCount
from asyncvmm.machine.kvm.exits import io_key
from asyncvmm.machine.kvm.statistics import (
    MOST_ADDRESSES,
    OTHER,
    PortCounter,
    VcpuCounters,
    collect,
    port_label,
)


def test_a_port_is_named_with_its_direction() -> None:
    assert port_label(True, 0x3F8) == "out 0x3f8"
    assert port_label(False, 0x60) == "in 0x60"


def test_nothing_counted_is_nothing() -> None:
    exits = collect([VcpuCounters()], 0)
    assert (exits.by_reason, exits.by_address, exits.total) == ({}, {}, 0)


def test_an_exit_counts_by_reason_and_by_address() -> None:
    counters = VcpuCounters()
    counters.add("MMIO", "mmio-read 0x10", 5)
    counters.add("MMIO", "mmio-read 0x10", 7)
    counters.add("SHUTDOWN", None, 1)
    exits = collect([counters], 3)
    assert exits.by_reason == {"MMIO": ExitCount(2, 12, 7, 5), "SHUTDOWN": ExitCount(1, 1, 1, 1)}
    assert exits.by_address == {"mmio-read 0x10": ExitCount(2, 12, 7, 5)}
    assert (exits.total, exits.unmapped) == (3, 3)


def test_the_hot_path_counts_as_io_under_the_same_label_as_the_first_exit() -> None:
    counters = VcpuCounters()
    counters.add("IO", "out 0x3f8", 10)
    hot = counters.ports[io_key(True, 1, 0x3F8)] = PortCounter(print, 0, nullcontext())
    hot.add(4)
    hot.add(6)
    exits = collect([counters], 0)
    assert exits.by_address == {"out 0x3f8": ExitCount(3, 20, 10, 4)}
    assert exits.by_reason == {"IO": ExitCount(3, 20, 10, 4)}
    assert counters.total() == 3


def test_addresses_beyond_the_limit_share_one_entry_for_each_kind() -> None:
    counters = VcpuCounters()
    for address in range(MOST_ADDRESSES + 50):
        counters.add("MMIO", f"mmio-read {address:#x}", 1)
    counters.add("MMIO", "mmio-read 0x0", 1)
    counters.add("IO", "out 0x80", 1)
    exits = collect([counters], 0)
    assert len(exits.by_address) == MOST_ADDRESSES + 2
    assert exits.by_address[f"mmio-read {OTHER}"].count == 50
    assert exits.by_address[f"out {OTHER}"].count == 1
    assert exits.by_address["mmio-read 0x0"].count == 2


EXITS = st.lists(st.tuples(st.sampled_from(["IO", "MMIO"]), st.sampled_from("abc"), st.integers(0, 1000)))


@given(per_vcpu=st.lists(EXITS, max_size=4))
def test_the_sum_over_vcpus_is_that_of_one_that_took_all(per_vcpu: list[list[tuple[str, str, int]]]) -> None:
    alone, several = VcpuCounters(), [VcpuCounters() for _ in per_vcpu]
    for counters, exits in zip(several, per_vcpu, strict=True):
        for reason, label, took_ns in exits:
            counters.add(reason, label, took_ns)
            alone.add(reason, label, took_ns)
    together = collect(several, 0)
    assert together == collect([alone], 0)
    assert together.total == alone.total() == sum(map(len, per_vcpu))


def test_accesses_of_a_range_of_ports_are_told_from_all_others() -> None:
    counters = VcpuCounters()
    for label in ("in 0x2fd", "out 0x2f8", "in 0x3fd", "in 0x300"):
        counters.add("IO", label, 1)
    for port in (0x2F8, 0x2FF, 0x300, 0x2F7):
        counters.ports[io_key(True, 1, port)] = PortCounter(print, 0, nullcontext())
        counters.ports[io_key(True, 1, port)].add(1)
    assert counters.total() == 8
    assert counters.at_ports(0x2F8, 8) == 4
