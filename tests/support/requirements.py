"""What a test may need of the machine it runs on: a closed list, each need with a check that looks anew.

A test says ``pytestmark = pytest.mark.requires("kvm")``, a fixture calls ``require("qemu")``. A skip for any other
reason, or for a need that this machine meets, fails the run (see tests/conftest.py).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MUSL_GCC = "12.2.0"
"""The musl-gcc of Debian 12, which builds the prebuilt guest programs bit for bit."""

Problem = str | None
"""Why a need is not met; None if it is."""

_REASON = re.compile(r"requires ([^:]+): ")


def require(need: str) -> None:
    """Skip the test unless this machine has what it needs. Raises KeyError for a need that is not on the list."""
    problem = problem_with(need)
    if problem is not None:
        pytest.skip(f"requires {need}: {problem}")


@cache
def problem_with(need: str) -> Problem:
    """Why this machine lacks ``need``; None if it has it. Looked at once a session."""
    return CHECKS[need]()


def objection_to(reason: str) -> str | None:
    """What is wrong with skipping for ``reason``; None if it is a need that this machine does not meet."""
    match = _REASON.match(reason.removeprefix("Skipped: "))
    if match is None or match[1] not in CHECKS:
        return "not on the list of tests/support/requirements.py"
    return "this machine has it" if CHECKS[match[1]]() is None else None


def _kvm() -> Problem:
    from asyncvmm.errors import KvmUnavailable
    from asyncvmm.machine.kvm.system import KvmSystem

    try:
        KvmSystem.open().close()
    except KvmUnavailable as error:
        return str(error)
    return None


def _qemu() -> Problem:
    from asyncvmm.errors import QemuUnavailable
    from asyncvmm.machine.qemu.binary import find_qemu

    try:
        find_qemu()
    except QemuUnavailable as error:
        return str(error)
    return None


def _image() -> Problem:
    from asyncvmm.errors import ImageError
    from asyncvmm.guest.store import find_image

    try:
        find_image("default")
    except ImageError as error:
        return str(error)
    return None


def _lab() -> Problem:
    return None if os.environ.get("ASYNCVMM_LAB") == "1" else "./scripts/lab runs this"


def _native_ring0() -> Problem:
    """Whether KVM runs a guest's ring 0 on the processor, or by its instruction emulator."""
    from asyncvmm.accel import probe_kvm

    verdict = probe_kvm().verdict
    return None if verdict == "fast" else f"KVM is {verdict}"


def _emulated_ring0() -> Problem:
    from asyncvmm.accel import probe_kvm

    verdict = probe_kvm().verdict
    return None if verdict == "slow" else f"KVM is {verdict}: its instruction emulator runs no guest kernel here"


def _native_library() -> Problem:
    from asyncvmm.machine.kvm.fastpath.binding import load

    return None if load() is not None else "it cannot be loaded here"


def _xsave() -> Problem:
    from asyncvmm.machine.kvm.state.host import host_state

    return None if host_state().has_xcrs else "a processor without it"


def _memory_above_4_gib() -> Problem:
    """RAM for a guest whose own lies on both sides of the hole below 4 GiB."""
    mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    return None if mib >= 4096 else f"the host has {mib} MiB"


def _small_kernel() -> Problem:
    path = ROOT / ".cache" / "kernel" / "vmlinux"
    return None if path.exists() else "./scripts/build-kernel makes it"


def _busybox() -> Problem:
    from asyncvmm.errors import ImageError
    from asyncvmm.guest.sources import find_busybox

    try:
        find_busybox(None)
    except ImageError as error:
        return str(error)
    return None


def _no_host_kernel() -> Problem:
    release = os.uname().release
    found = [path for path in (f"/boot/vmlinuz-{release}", f"/lib/modules/{release}/vmlinuz") if os.path.exists(path)]
    return f"there is {found[0]}" if found else None


def _musl_gcc() -> Problem:
    problem = _programs("musl-gcc", "objcopy")()
    if problem is None:
        done = subprocess.run(["musl-gcc", "-dumpfullversion"], capture_output=True, text=True, check=False)
        problem = None if done.stdout.strip() == MUSL_GCC else f"musl-gcc {MUSL_GCC}, found {done.stdout.strip()}"
    return problem


def _chromium() -> Problem:
    from tests.support.browser import find_chromium

    return None if find_chromium() else "no chromium on PATH"


def _root() -> Problem:
    return None if os.geteuid() == 0 else "run as root"


def _unprivileged() -> Problem:
    return None if os.geteuid() else "root may open everything"


def _mount_namespaces() -> Problem:
    if shutil.which("unshare") is None:
        return "no unshare on PATH"
    done = subprocess.run(["unshare", "-m", "true"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


def _tun() -> Problem:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/net/tun: {error.strerror}"
    return _root()


def _network_namespaces() -> Problem:
    if shutil.which("unshare") is None:
        return "no unshare on PATH"
    done = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


def _atheris() -> Problem:
    return None if find_spec("atheris") else "./scripts/fuzz installs it"


def _programs(*names: str) -> Callable[[], Problem]:
    def check() -> Problem:
        missing = [name for name in names if shutil.which(name) is None]
        return f"no {' and no '.join(missing)} on PATH" if missing else None

    return check


CHECKS: dict[str, Callable[[], Problem]] = {
    "kvm": _kvm,
    "qemu": _qemu,
    "image": _image,
    "lab": _lab,
    "native-ring0": _native_ring0,
    "emulated-ring0": _emulated_ring0,
    "native-library": _native_library,
    "xsave": _xsave,
    "memory above 4 GiB": _memory_above_4_gib,
    "small-kernel": _small_kernel,
    "busybox": _busybox,
    "no-host-kernel": _no_host_kernel,
    "gcc": _programs("gcc", "ld"),
    "jq": _programs("jq"),
    "musl-gcc": _musl_gcc,
    "iasl": _programs("iasl"),
    "cpio": _programs("cpio"),
    "chromium": _chromium,
    "root": _root,
    "unprivileged": _unprivileged,
    "atheris": _atheris,
    "mount-namespaces": _mount_namespaces,
    "network-namespaces": _network_namespaces,
    "tun": _tun,
    "passt": _programs("passt"),
    "gvproxy": _programs("gvproxy"),
    "setpriv": _programs("setpriv"),
    "zstd": _programs("zstd"),
    "e2fsprogs": _programs("mke2fs", "debugfs", "e2fsck"),
    "squashfs-tools": _programs("mksquashfs", "unsquashfs"),
    "erofs-utils": _programs("mkfs.erofs", "fsck.erofs"),
}
"""Every need a test may have."""
