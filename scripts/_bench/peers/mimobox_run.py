"""Run in an environment that has mimobox: a VM, its snapshot, and a restore from it for each line on stdin.

    python mimobox_run.py GUEST.S ASSETS

Prints a JSON object a line, nanoseconds by name; ``error`` says what went wrong. The wheel brings no kernel along: the
guest takes its place. The environment's VM_ASSETS_DIR must be ASSETS.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Until stdin ends."""
    source, assets = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        build(source, assets)
        serve()
    except Exception as error:  # whatever it is, the bench is to hear of it
        say(error=f"{type(error).__name__}: {error}"[:500])


def build(source: Path, assets: Path) -> None:
    """What mimobox wants to find: a kernel, and an archive for it."""
    words = ["gcc", "-nostdlib", "-static", "-Wl,-Ttext=0x1000000", "-Wl,--build-id=none"]
    subprocess.run([*words, "-o", str(assets / "vmlinux"), str(source)], check=True, timeout=60)
    (assets / "rootfs.cpio.gz").write_bytes(gzip.compress(b"\0"))


def serve() -> None:
    """The VM, and what is made of it."""
    mimobox = import_module("mimobox")
    created, vm = timed(lambda: mimobox.Sandbox(isolation="microvm"))
    command, _ = timed(lambda: vm.execute("/bin/echo hi"))
    saved, snapshot = timed(vm.snapshot)
    say(first_vm=created, first_command=command, snapshot=saved)
    for _ in sys.stdin:
        restored, clone = timed(lambda: mimobox.Sandbox.from_snapshot(snapshot))
        command, _ = timed(partial(clone.execute, "/bin/echo hi"))
        say(restore=restored, command=command)


def timed(call: Callable[[], Any]) -> tuple[int, Any]:
    """Nanoseconds, and what it gave."""
    begin = time.monotonic_ns()
    value = call()
    return time.monotonic_ns() - begin, value


def say(**found: int | str) -> None:
    """One line."""
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
