"""The answers of Polars."""

from __future__ import annotations

from pathlib import Path

import polars
from polars import col

from tests.consumers.answers import Answers, Totals

STEPS = ["boot_wait", "total", "host_misc"]


def answers(path: Path) -> Answers:
    """Everything, from one frame."""
    lines = polars.read_ndjson(path, infer_schema_length=None)
    phases = lines.filter(col("event") == "phase")
    profile = lines.filter(col("event") == "boot.profile")
    create_vm = lines.filter(col("event") == "create_vm.profile")
    stages = lines.filter(col("event") == "guest.boot_time")
    errors = lines.filter(col("event") == "vm.error")
    return Answers(
        phases=recipe(phases.group_by("vm", "name").agg(col("duration_ns").sum())),
        residuals=residuals(phases),
        told_residuals=recipe(phases.select("vm", "name", "residual_ns").drop_nulls()),
        boot=boot(phases),
        profile=recipe(profile.unpivot(on=STEPS, index="vm")),
        create_vm=recipe(create_vm.unpivot(on=["boot_wait"], index="vm")),
        stages=recipe(stages.select("vm", col("stage") + "_ns", "guest_ns")),
        told_stages=recipe(profile.select("vm", "guest").unnest("guest").unpivot(index="vm").drop_nulls()),
        errors=dict(errors.select("vm", "reason").rows()) if "reason" in lines.columns else {},
    )


def residuals(phases: polars.DataFrame) -> Totals:
    inside = phases.group_by("vm", "parent").agg(col("duration_ns").sum().alias("inside"))
    both = phases.join(inside, left_on=["vm", "name"], right_on=["vm", "parent"])
    return recipe(both.select("vm", "name", col("duration_ns") - col("inside")))


def boot(phases: polars.DataFrame) -> Totals:
    begin = phases.filter(col("name") == "boot").select("vm", col("start_ns").alias("begin"))
    wait = phases.filter((col("name") == "boot_wait") & ~col("failed")).join(begin, on="vm")
    found = wait.select(
        "vm",
        boot_wait=col("duration_ns"),
        host_misc=col("start_ns") - col("begin"),
        total=col("start_ns") + col("duration_ns") - col("begin"),
    )
    return recipe(found.unpivot(index="vm"))


def recipe(totals: polars.DataFrame) -> Totals:
    """What README's recipe computes: VM, name, nanoseconds. Integers only: 1.0 is not what was asked for."""
    assert totals.dtypes[-1].is_integer(), totals
    return {(vm, name): ns for vm, name, ns in totals.rows()}
