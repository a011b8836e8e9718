"""The answers of pandas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]

from tests.consumers.answers import Answers, Totals

STEPS = ["boot_wait", "total", "host_misc"]


def answers(path: Path) -> Answers:
    """Everything, from one frame."""
    lines = pandas.read_json(path, lines=True, dtype_backend="numpy_nullable")
    phases = lines[lines.event == "phase"]
    profile = lines[lines.event == "boot.profile"].set_index("vm")
    create_vm = lines[lines.event == "create_vm.profile"].set_index("vm")
    stages = lines[lines.event == "guest.boot_time"].assign(stage=lambda rows: rows.stage + "_ns")
    return Answers(
        phases=recipe(phases.groupby(["vm", "name"]).duration_ns.sum()),
        residuals=residuals(phases),
        told_residuals=recipe(phases.set_index(["vm", "name"]).residual_ns.dropna()),
        boot=boot(phases),
        profile=recipe(profile[STEPS].stack()),
        create_vm=recipe(create_vm[["boot_wait"]].stack()),
        stages=clock(stages.set_index(["vm", "stage"]).guest_ns),
        told_stages=told_stages(profile.guest),
        errors=lines[lines.event == "vm.error"].set_index("vm").reason.to_dict() if "reason" in lines else {},
    )


def residuals(phases: Any) -> Totals:
    inside = phases.groupby(["vm", "parent"]).duration_ns.sum()
    inside.index.names = ["vm", "name"]
    whole = phases.set_index(["vm", "name"]).duration_ns
    return recipe((whole - inside).dropna())


def boot(phases: Any) -> Totals:
    begin = phases[phases.name == "boot"].set_index("vm").start_ns
    wait = phases[(phases.name == "boot_wait") & ~phases.failed].set_index("vm")
    found = pandas.DataFrame(
        {
            "boot_wait": wait.duration_ns,
            "host_misc": wait.start_ns - begin.reindex(wait.index),
            "total": wait.start_ns + wait.duration_ns - begin.reindex(wait.index),
        }
    )
    return recipe(found.stack())


def told_stages(guests: Any) -> Totals:
    """Column by column, a stage that one VM lacks would make doubles of the others' integers."""
    return {(vm, stage): ns for vm, guest in guests.items() for stage, ns in guest.items()}


def clock(stages: Any) -> Totals:
    """Beyond 2^63 pandas makes doubles of integers."""
    return {index: int(ns) for index, ns in stages.items()}


def recipe(totals: Any) -> Totals:
    """What README's recipe computes: a series by VM and name. Integers only: 1.0 is not what was asked for."""
    assert str(totals.dtype).lower() == "int64", totals
    return {index: int(ns) for index, ns in totals.items()}
