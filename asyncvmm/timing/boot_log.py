"""A boot's profile as text, once per boot, through the standard ``logging``: logger ``asyncvmm.boot``, level INFO."""

from __future__ import annotations

import logging

from asyncvmm.timing.boot_profile import BootProfile

log = logging.getLogger("asyncvmm.boot")


def log_boot(profile: BootProfile) -> None:
    """Log the host's steps and the guest's stages up to ready. The second time, nothing."""
    if not profile.host_logged and log.isEnabledFor(logging.INFO):
        profile.host_logged = True
        for line in (*profile.host_lines(), *profile.guest_lines()):
            log.info(line)


def log_command_loop(profile: BootProfile) -> None:
    """Log the guest's last stage, once it has come and the others are logged. The second time, nothing."""
    line = profile.command_loop_line()
    if line is not None and profile.host_logged and not profile.guest_extension_logged:
        profile.guest_extension_logged = True
        log.info(line)
