"""The answers of Debian's jq, which computes in doubles: integers are exact up to 2^53 (104 days of nanoseconds)."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

import orjson

from tests.consumers.answers import Answers, Totals

PROGRAM = """
def phases: map(select(.event == "phase"));
def totals: group_by(.vm, .name) | map([.[0].vm, .[0].name, (map(.ns) | add)]);
def named($event; names): map(select(.event == $event) | .vm as $vm
  | names | to_entries[] | {vm: $vm, name: .key, ns: .value});
def finish: .start_ns + .duration_ns;
def steps: {boot_wait, total, host_misc};

phases as $phases
| (phases | map(select(.parent) | {key: "\\(.vm) \\(.parent)", value: .duration_ns})
  | group_by(.key) | map({key: .[0].key, value: (map(.value) | add)}) | from_entries) as $inside
| (phases | group_by(.vm)
  | map(select(any(.name == "boot_wait" and (.failed | not))))
  | map({vm: .[0].vm, boot: map(select(.name == "boot"))[0], wait: map(select(.name == "boot_wait"))[0]})) as $boots
| {
  phases: ($phases | map({vm, name, ns: .duration_ns}) | totals),
  residuals: ($phases | map(. as $phase | $inside["\\(.vm) \\(.name)"] | select(.)
    | {vm: $phase.vm, name: $phase.name, ns: ($phase.duration_ns - .)}) | totals),
  told_residuals: ($phases | map(select(.residual_ns) | {vm, name, ns: .residual_ns}) | totals),
  boot: ($boots | map({vm, name: "boot_wait", ns: .wait.duration_ns},
    {vm, name: "total", ns: ((.wait | finish) - .boot.start_ns)},
    {vm, name: "host_misc", ns: (.wait.start_ns - .boot.start_ns)}) | totals),
  profile: (named("boot.profile"; steps) | totals),
  create_vm: (named("create_vm.profile"; {boot_wait}) | totals),
  stages: (map(select(.event == "guest.boot_time") | {vm, name: "\\(.stage)_ns", ns: .guest_ns}) | totals),
  told_stages: (named("boot.profile"; .guest) | totals),
  errors: (map(select(.event == "vm.error") | {key: .vm, value: .reason}) | from_entries)
}
"""


def answers(path: Path) -> Answers:
    """Everything, by one program."""
    done = subprocess.run(["jq", "-s", PROGRAM, path], capture_output=True, check=True, timeout=60)
    found = orjson.loads(done.stdout)
    errors = found.pop("errors")
    return Answers(errors=errors, **{name: totals(rows) for name, rows in found.items()})


def totals(rows: Iterable[tuple[str, str, int]]) -> Totals:
    return {(vm, name): ns for vm, name, ns in rows}


def recipe(program: str, directory: Path) -> Totals:
    """What README's recipe, a shell command, prints."""
    done = subprocess.run(["sh", "-c", program], cwd=directory, capture_output=True, check=True, timeout=60)
    assert done.stderr == b""
    return {(row["vm"], row["name"]): row["ns"] for row in orjson.loads(done.stdout)}
