from __future__ import annotations

from asyncvmm.devices.i8042 import COMMAND, I8042, STATUS
from asyncvmm.devices.serial import THR, Serial
from asyncvmm.effects import ExitCount, ExitStatistics
from asyncvmm.metrics.machine import I8042Metrics, UartMetrics, VcpuMetrics
from asyncvmm.metrics.sources import copy_i8042, sum_uart, sum_vcpus


def port() -> Serial:
    return Serial(lambda level: None, lambda: None, lambda: None, lambda: 0)


def test_the_uart_group_is_the_sum_of_both_ports() -> None:
    console, control, group = port(), port(), UartMetrics()
    for byte in b"READY\n":
        console.write(THR, byte)
    control.write(THR, ord("!"))
    control.feed(b"go")
    control.read(0)
    control.take_output()
    sum_uart(group, (console, control))
    assert group.flush() == {
        "error_count": 0,
        "flush_count": 1,
        "missed_read_count": 0,
        "missed_write_count": 0,
        "read_count": 1,
        "write_count": 7,
        "rate_limiter_dropped_bytes": 0,
    }
    console.post(b"more\n", [1])
    sum_uart(group, (console, control))
    assert group.flush()["write_count"] == 5


def test_the_i8042_group_is_the_controllers_counts() -> None:
    controller, group = I8042(lambda: None), I8042Metrics()
    controller.read(STATUS)
    controller.read(2)
    controller.write(3, 0)
    controller.write(COMMAND, 0xFE)
    copy_i8042(group, controller)
    assert group.flush() == {
        "error_count": 0,
        "missed_read_count": 1,
        "missed_write_count": 1,
        "read_count": 1,
        "reset_count": 1,
        "write_count": 1,
    }


def statistics(**by_address: ExitCount) -> ExitStatistics:
    addresses = {label.replace("__", "-").replace("_", " "): entry for label, entry in by_address.items()}
    return ExitStatistics({}, addresses)


def test_exits_are_told_by_direction_whatever_the_address() -> None:
    group = VcpuMetrics()
    exits = statistics(
        in_0x3fd=ExitCount(3, 9_000, 4_000, 2_000),
        in_0x60=ExitCount(1, 2_500, 2_500, 2_500),
        out_0x3f8=ExitCount(4, 9_000, 3_000, 1_000),
        out_other=ExitCount(1, 1_000, 1_000),
        mmio__read_0xc0001070=ExitCount(2, 8_000, 6_999),
        mmio__write_0xc0001050=ExitCount(4, 4_000, 1_000),
    )
    sum_vcpus(group, exits)
    told = group.flush()
    assert [told[f"exit_{kind}"] for kind in ("io_in", "io_out", "mmio_read", "mmio_write")] == [4, 5, 2, 4]
    assert told["exit_io_in_agg"] == {"min_us": 2, "max_us": 4, "sum_us": 11}
    assert told["exit_io_out_agg"] == {"min_us": 1, "max_us": 3, "sum_us": 10}
    assert told["exit_mmio_read_agg"] == {"min_us": 0, "max_us": 6, "sum_us": 8}


def test_a_second_look_tells_what_came_since() -> None:
    group = VcpuMetrics()
    sum_vcpus(group, statistics(out_0x3f8=ExitCount(5, 10_000, 3_000)))
    group.flush()
    sum_vcpus(group, statistics(out_0x3f8=ExitCount(8, 16_000, 3_000)))
    told = group.flush()
    assert told["exit_io_out"] == 3
    assert told["exit_io_out_agg"] == {"min_us": 0, "max_us": 3, "sum_us": 6}


def test_every_other_exit_is_a_failure() -> None:
    group = VcpuMetrics()
    reasons = {name: ExitCount(count, 0, 0) for name, count in {"IO": 7, "MMIO": 3, "SHUTDOWN": 1}.items()}
    sum_vcpus(group, ExitStatistics(reasons, {}))
    assert group.flush()["failures"] == 1


def test_a_machine_that_cannot_tell_its_exits_changes_nothing() -> None:
    group = VcpuMetrics()
    sum_vcpus(group, None)
    assert group.flush() == VcpuMetrics().flush()
