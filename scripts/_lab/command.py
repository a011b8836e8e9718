"""The command line of ``scripts/lab``: prepare what is not cached, then run."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from _lab.kernel import outer_kernel
from _lab.project import project_disk
from _lab.qemu import LAB_FAILED, Outer, run
from _lab.system import system_disk
from asyncvmm.errors import AsyncVMMError


def main(root: Path, arguments: list[str]) -> int:
    """Run the lab as these arguments say and return the exit code."""
    options = _parse(arguments)
    cache = root / ".cache" / "lab"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        kernel = outer_kernel(cache, _report)
        system = system_disk(cache, root, _report)
        with project_disk(cache, root, options.command, options.also, options.env) as project:
            outer = Outer(
                kernel, system, project, options.memory, options.cpus, options.timeout, options.console,
                shlex.split(options.qemu),
            )  # fmt: skip
            return run(outer)
    except (AsyncVMMError, OSError) as error:
        _report(str(error))
        return LAB_FAILED
    except KeyboardInterrupt:
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("lab", description="Run a command where /dev/kvm is of the hardware kind.")
    parser.add_argument("--timeout", type=float, default=900, metavar="S", help="seconds until it is killed (900)")
    parser.add_argument("--memory", type=int, default=3072, metavar="MIB", help="the outer machine's memory (3072)")
    parser.add_argument(
        "--cpus", type=int, default=1, metavar="N", help="the outer machine's CPUs (1); more lose guests, see qemu.py"
    )
    parser.add_argument("--console", action="store_true", help="show the outer kernel's console on stderr")
    parser.add_argument(
        "--with", dest="also", action="append", default=[], type=Path, metavar="PATH",
        help="a file or directory to have in the lab at the same path",
    )  # fmt: skip
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="set in the command's environment"
    )
    parser.add_argument("--qemu", default="", metavar="WORDS", help="more words for the outer machine's QEMU")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    options = parser.parse_args(arguments)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        parser.error("a command is missing")
    return options


def _report(line: str) -> None:
    print(f"lab: {line}", file=sys.stderr, flush=True)
