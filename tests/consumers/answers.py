"""What each consumer of the JSON lines is asked, and what the file itself says the answers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import attrs

Totals = Mapping[tuple[str, str], int]
"""Nanoseconds by VM and name."""


@attrs.frozen(kw_only=True)
class Answers:
    """All of them computed by the consumer, from one file of one or several VMs.

    phases: durations by phase. residuals: a phase's duration without its direct children, computed. told_residuals:
    the same, as the phases say. boot: boot_wait, total and host_misc, by their definitions, from the phases. profile:
    the same names, as boot.profile says. create_vm: boot_wait as create_vm.profile says. stages and told_stages: the
    guest's clock by stage, from guest.boot_time and from boot.profile's ``guest``. errors: the reason of each vm.error.
    """

    phases: Totals
    residuals: Totals
    told_residuals: Totals
    boot: Totals
    profile: Totals
    create_vm: Totals
    stages: Totals
    told_stages: Totals
    errors: Mapping[str, str]


Consumer = Callable[[Path], Answers]
