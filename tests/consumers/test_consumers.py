"""jq, DuckDB, pandas and Polars read real boots' JSON lines and come to the same totals as the profiles, to the ns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.consumers import with_duckdb, with_jq, with_pandas, with_polars
from tests.consumers.answers import Answers, Consumer, Totals
from tests.consumers.conftest import NAMES, Boots
from tests.support.readme import block_with
from tests.support.requirements import require

CONSUMERS: dict[str, Consumer] = {
    "jq": with_jq.answers,
    "duckdb": with_duckdb.answers,
    "pandas": with_pandas.answers,
    "polars": with_polars.answers,
}
LARGEST = 2**64 - 1
EXACT_IN_DOUBLES = 2**53


@pytest.fixture(scope="module", params=CONSUMERS)
def consumer(request: pytest.FixtureRequest) -> Consumer:
    """Each of them."""
    if request.param == "jq":
        require("jq")
    return CONSUMERS[request.param]


@pytest.fixture(scope="module")
def one(consumer: Consumer, boot_file: Path) -> Answers:
    """Of the one boot of the command."""
    return consumer(boot_file)


@pytest.fixture(scope="module")
def several(consumer: Consumer, boots: Boots) -> Answers:
    """Of the boots of this process."""
    return consumer(boots.path)


def of(totals: Totals, vm: str) -> dict[str, int]:
    return {name: ns for (other, name), ns in totals.items() if other == vm}


# -- one boot ----------------------------------------------------------------------------------------------------------


def test_the_phases_give_the_boots_total_wait_and_rest_as_its_profile_has_them(one: Answers) -> None:
    assert one.boot == one.profile
    assert len(one.profile) == 3
    assert min(one.profile.values()) > 0


def test_the_phases_add_up_to_what_the_lines_say(one: Answers, boot_file: Path) -> None:
    expected: dict[tuple[str, str], int] = {}
    for line in map(orjson.loads, boot_file.read_bytes().splitlines()):
        if line["event"] == "phase":
            key = line["vm"], line["name"]
            expected[key] = expected.get(key, 0) + line["duration_ns"]
    assert one.phases == expected
    assert {"total", "boot", "boot_wait", "setup", "accel"} <= {name for _, name in expected}


def test_a_phases_residual_is_what_its_children_leave(one: Answers) -> None:
    assert one.residuals == one.told_residuals
    assert {name for _, name in one.residuals} >= {"total", "boot"}


def test_what_no_phase_accounts_for_is_less_than_2_percent_of_a_boot(one: Answers) -> None:
    assert sum(one.residuals.values()) * 50 < next(ns for (_, name), ns in one.phases.items() if name == "total")


def test_both_profiles_have_the_same_wait_as_its_phase(one: Answers) -> None:
    ((key, wait),) = one.create_vm.items()
    assert wait == one.phases[key] == one.profile[key]


def test_the_guests_stages_up_to_ready_are_those_of_the_profile(one: Answers) -> None:
    late = {key for key in one.stages if key[1] == "command_loop_ns"}
    assert {key: ns for key, ns in one.stages.items() if key not in late} == {
        key: ns for key, ns in one.told_stages.items() if key not in late
    }
    assert len(one.stages) == 6


def test_a_boot_that_went_well_has_no_error(one: Answers) -> None:
    assert one.errors == {}


# -- several -----------------------------------------------------------------------------------------------------------


def test_every_consumer_keeps_the_vms_of_a_file_apart(several: Answers) -> None:
    assert {vm for vm, _ in several.phases} == set(NAMES)
    assert several.boot == several.profile
    assert several.residuals == several.told_residuals


@pytest.mark.parametrize("name", NAMES[:-1])
def test_the_totals_are_those_of_the_vms_own_profiles(several: Answers, boots: Boots, name: str) -> None:
    steps = boots.boot[name].totals()
    assert of(several.boot, name) == {step: steps[step] for step in ("boot_wait", "total", "host_misc")}
    assert of(several.create_vm, name) == {"boot_wait": boots.create_vm[name].boot_wait}
    known = boots.boot[name].guest.to_dict()
    assert {stage: ns for stage, ns in of(several.stages, name).items() if stage in known} == known


def test_a_boot_that_failed_has_an_error_and_phases_and_no_profile(several: Answers) -> None:
    failed = NAMES[-1]
    assert several.errors == {failed: "timeout"}
    assert of(several.profile, failed) == {}
    assert of(several.phases, failed)["boot_wait"] > 0


def test_a_stage_that_only_one_vms_profile_has_is_that_vms_alone(
    consumer: Consumer, boots: Boots, tmp_path: Path
) -> None:
    """command_loop comes about when the profile is written: with it, or after it."""
    late, path = {NAMES[0]: 2**53 - 1}, tmp_path / "late.jsonl"
    lines = [orjson.loads(line) for line in boots.path.read_bytes().splitlines()]
    for line in lines:
        if line["event"] == "boot.profile":
            line["guest"].pop("command_loop_ns", None)
            line["guest"] |= {"command_loop_ns": late[line["vm"]]} if line["vm"] in late else {}
    path.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
    told = consumer(path).told_stages
    assert {key: ns for key, ns in told.items() if key[1] == "command_loop_ns"} == {
        (vm, "command_loop_ns"): ns for vm, ns in late.items()
    }


def test_all_consumers_agree(boots: Boots) -> None:
    require("jq")
    first, *others = [consumer(boots.path) for consumer in CONSUMERS.values()]
    for other in others:
        assert other == first


# -- on KVM, where every step is ours ----------------------------------------------------------------------------------

STEPS = {
    "memory_alloc": ("memory_alloc_duration", "guest_memory_mmap"),
    "memory_register": ("memory_register_duration", "kvm_set_user_memory_region"),
    "kernel_load": ("kernel_load_duration", "kernel_elf_load"),
    "rootfs_load": ("rootfs_load_duration", "rootfs_write"),
    "vcpu_create": ("vcpu_create_duration", "vcpu_creation"),
    "vcpu_config": ("vcpu_config_duration", None),
    "cpuid_config": (None, "cpuid_config"),
    "register_config": (None, "vcpu_register_config"),
    "boot_wait": (None, "boot_wait"),
}
"""Phases, and what BootProfile and CreateVmProfile call them."""


def test_the_phases_of_a_boot_on_kvm_are_the_steps_of_its_profiles(consumer: Consumer, kvm_boot: Boots) -> None:
    found = consumer(kvm_boot.path)
    ((vm, boot),) = kvm_boot.boot.items()
    for phase, (in_boot, in_create_vm) in STEPS.items():
        assert in_boot is None or found.phases[vm, phase] == getattr(boot, in_boot)
        assert in_create_vm is None or found.phases[vm, phase] == getattr(kvm_boot.create_vm[vm], in_create_vm)
    assert of(found.profile, vm) == {step: boot.totals()[step] for step in ("boot_wait", "total", "host_misc")}
    assert of(found.boot, vm)["total"] == boot.total
    assert found.residuals == found.told_residuals


# -- what numbers survive ----------------------------------------------------------------------------------------------


def forged(boot_file: Path, target: Path, ns: int) -> Path:
    """The boot of a guest whose clock reads ``ns`` at every stage."""
    lines = [orjson.loads(line) for line in boot_file.read_bytes().splitlines()]
    for line in lines:
        if line["event"] == "guest.boot_time":
            line["guest_ns"] = ns
    target.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))
    return target


def test_integers_are_exact_for_every_consumer_up_to_2_to_the_53(
    consumer: Consumer, boot_file: Path, tmp_path: Path
) -> None:
    found = consumer(forged(boot_file, tmp_path / "forged.jsonl", EXACT_IN_DOUBLES))
    assert set(found.stages.values()) == {EXACT_IN_DOUBLES}


@pytest.mark.parametrize("ns", [EXACT_IN_DOUBLES + 1, 2**63 - 1, 2**63, LARGEST])
def test_a_guest_whose_clock_is_absurd_spoils_none_of_the_hosts_totals(
    consumer: Consumer, boot_file: Path, tmp_path: Path, ns: int
) -> None:
    found = consumer(forged(boot_file, tmp_path / "forged.jsonl", ns))
    assert found.boot == found.profile
    assert found.residuals == found.told_residuals


# -- README ------------------------------------------------------------------------------------------------------------


RECIPES: dict[str, Callable[[Any], Totals]] = {
    "duckdb": with_duckdb.recipe,
    "pandas": with_pandas.recipe,
    "polars": with_polars.recipe,
}
"""What makes totals of what README's programs call ``totals``."""


@pytest.mark.parametrize("name", RECIPES)
def test_readmes_program_gives_the_totals_of_every_phase(name: str, boots: Boots, tmp_path: Path) -> None:
    (tmp_path / "boot.jsonl").symlink_to(boots.path)
    program = block_with("python", f"import {name}")
    assert len(list(filter(None, program.splitlines()))) == 3
    names: dict[str, Any] = {}
    with contextlib.chdir(tmp_path):
        exec(compile(program, "README.md", "exec"), names)
        totals = RECIPES[name](names["totals"])
    assert totals == CONSUMERS[name](boots.path).phases


def test_readmes_command_for_jq_gives_the_totals_of_every_phase(boots: Boots, tmp_path: Path) -> None:
    require("jq")
    (tmp_path / "boot.jsonl").symlink_to(boots.path)
    program = block_with("bash", "jq -s")
    assert len(list(filter(None, program.splitlines()))) == 3
    assert with_jq.recipe(program, tmp_path) == with_jq.answers(boots.path).phases
