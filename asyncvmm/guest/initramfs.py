"""The content of a guest image's initramfs: our PID 1, busybox under all its names, modules, a few files of /etc."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from asyncvmm.guest import cpio
from asyncvmm.guest.modules import Module, modules_list

_DIRECTORIES = ("dev", "mnt", "proc", "root", "run", "sys", "tmp", "var/log", "var/tmp")
_ETC = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost asyncvmm\n::1 localhost\n",
    "etc/hostname": "asyncvmm\n",
}
_DHCP = r"""#!/bin/sh
# What udhcpc calls when it has a lease: writes the lease as a line that PID 1 reads (init/network.c).
[ "$1" = bound ] || exit 0
line="$interface $ip/${mask:-24}"
[ -z "$router" ] || line="$line gateway=${router%% *}"
for server in $dns; do line="$line dns=$server"; done
printf '%s\n' "$line" > /run/asyncvmm-lease
"""
_NOT_FOR_A_WORKLOAD = frozenset({"busybox", "init", "linuxrc"})


def build_initramfs(init: bytes, busybox: bytes, applets: Sequence[str], modules: Sequence[Module]) -> bytes:
    """The archive, not compressed: unpacking it costs a guest less than decompressing it would.

    ``applets`` are paths relative to the root (``bin/sh``).
    """
    return cpio.write(_entries(init, busybox, applets, modules))


def _entries(init: bytes, busybox: bytes, applets: Sequence[str], modules: Sequence[Module]) -> Iterator[cpio.Entry]:
    yield from (cpio.directory(name) for name in _DIRECTORIES)
    # The kernel opens /dev/console for PID 1 before PID 1 can mount anything.
    yield cpio.character_device("dev/console", 5, 1)
    yield cpio.character_device("dev/null", 1, 3, 0o666)
    yield from (cpio.file(name, text.encode()) for name, text in _ETC.items())
    yield cpio.file("init", init, 0o755)
    yield cpio.file("bin/busybox", busybox, 0o755)
    for path in sorted(set(applets)):
        if path.rpartition("/")[2] not in _NOT_FOR_A_WORKLOAD:
            yield cpio.symlink(path, "/bin/busybox")
    yield cpio.file("asyncvmm/dhcp", _DHCP.encode(), 0o755)
    yield cpio.file("asyncvmm/modules.list", modules_list(list(modules)).encode())
    for module in {module.file: module for module in modules}.values():
        yield cpio.file(f"asyncvmm/modules/{module.file}", module.data)
