"""A device that stands still because of its driver: the log says which, and why."""

from __future__ import annotations

import logging

import pytest

from asyncvmm.machine.device_faults import MOST_TOLD, FaultReport


def test_a_fault_is_told_with_its_device_and_guest(caplog: pytest.LogCaptureFixture) -> None:
    FaultReport("blk-root", "a1b2")("a buffer of no bytes")
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("asyncvmm.devices", logging.WARNING)
    assert "blk-root of a1b2" in record.getMessage()
    assert "a buffer of no bytes" in record.getMessage()


def test_a_guest_that_resets_in_a_loop_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    report = FaultReport("rng", "a1b2")
    for _ in range(100):
        report("again")
    assert len(caplog.records) == MOST_TOLD
    assert "no more" in caplog.messages[-1]
    assert "no more" not in caplog.messages[0]
