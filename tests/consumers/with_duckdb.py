"""The answers of DuckDB, in SQL."""

from __future__ import annotations

from pathlib import Path

import duckdb

from tests.consumers.answers import Answers, Totals

PHASES = "select vm, name, sum(duration_ns)::bigint from lines where event = 'phase' group by all"
RESIDUALS = """
    select outer_.vm, outer_.name, outer_.duration_ns - sum(inner_.duration_ns)::bigint
    from lines outer_ join lines inner_ on inner_.vm = outer_.vm and inner_.parent = outer_.name
    where outer_.event = 'phase' and inner_.event = 'phase' group by outer_.vm, outer_.name, outer_.duration_ns"""
TOLD_RESIDUALS = "select vm, name, residual_ns from lines where event = 'phase' and residual_ns is not null"
BOOT = """
    with boots as (
        select boot.vm, wait.duration_ns boot_wait, wait.start_ns - boot.start_ns host_misc,
               wait.start_ns + wait.duration_ns - boot.start_ns total
        from lines boot join lines wait on wait.vm = boot.vm
        where boot.name = 'boot' and wait.name = 'boot_wait' and not wait.failed)
    unpivot boots on boot_wait, total, host_misc"""
PROFILE = """
    unpivot (select vm, boot_wait, total, host_misc from lines where event = 'boot.profile')
    on boot_wait, total, host_misc"""
CREATE_VM = "select vm, 'boot_wait', boot_wait from lines where event = 'create_vm.profile'"
STAGES = "select vm, stage || '_ns', guest_ns from lines where event = 'guest.boot_time'"
TOLD_STAGES = """
    unpivot (select vm, unnest(guest) from lines where event = 'boot.profile') on columns(* exclude vm)"""
ERRORS = "select vm, reason from lines where event = 'vm.error'"


def answers(path: Path) -> Answers:
    """Everything, each by one query."""
    with duckdb.connect() as base:
        base.read_json(str(path), format="newline_delimited", sample_size=-1).create_view("lines")

        def totals(query: str) -> Totals:
            return {(vm, name): ns for vm, name, ns in base.sql(query).fetchall()}

        return Answers(
            phases=totals(PHASES),
            residuals=totals(RESIDUALS),
            told_residuals=totals(TOLD_RESIDUALS),
            boot=totals(BOOT),
            profile=totals(PROFILE),
            create_vm=totals(CREATE_VM),
            stages=totals(STAGES),
            told_stages=totals(TOLD_STAGES),
            errors=dict(base.sql(ERRORS).fetchall()),
        )


def recipe(totals: duckdb.DuckDBPyRelation) -> Totals:
    """What README's recipe computes."""
    return {(vm, name): ns for vm, name, ns in totals.fetchall()}
