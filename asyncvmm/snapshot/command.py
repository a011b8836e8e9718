"""``asyncvmm snapshot inspect``, ``verify`` and ``flatten``: commands over snapshots that were saved."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from asyncvmm.named_path import NamedPath

_DIRECTORY = click.argument("directory", type=NamedPath(), metavar="DIR")


@click.command("inspect")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table; as in a pipe.")
@_DIRECTORY
def inspect(directory: Path, as_json: bool) -> None:
    """Say what the snapshot in DIR is."""
    import orjson
    from rich.console import Console

    from asyncvmm.snapshot.inspect import draw
    from asyncvmm.snapshot.inspect import inspect as look_at

    facts = look_at(directory)
    if as_json or not sys.stdout.isatty():
        sys.stdout.write(orjson.dumps(facts, option=orjson.OPT_APPEND_NEWLINE).decode())
    else:
        draw(facts, Console())


@click.command("verify")
@_DIRECTORY
def verify(directory: Path) -> None:
    """Read all of the snapshot in DIR, and of those it is a difference of, and check it."""
    from asyncvmm.snapshot.verify import verify as check
    from asyncvmm.timing.text import printable

    found = check(directory)
    for problem in found.problems[1:]:
        print(f"asyncvmm: {' '.join(str(problem).split())}", file=sys.stderr)
    found.raise_for_problems()
    chain = f", {len(found.chain)} in its chain" if len(found.chain) > 1 else ""
    print(f"{printable(str(directory), 4096)}: whole, {found.data_bytes} bytes{chain}")


@click.command("flatten")
@click.option("--out", type=NamedPath(), metavar="OUT", help="Elsewhere, not in place.")
@_DIRECTORY
def flatten(directory: Path, out: Path | None) -> None:
    """Make the snapshot in DIR, a difference of others, one that needs no other."""
    from asyncvmm.snapshot.flatten import flatten as make_full
    from asyncvmm.timing.text import printable

    manifest = make_full(directory, out)
    print(f"{printable(str(out or directory), 4096)}: full, {manifest.allocated_bytes} bytes on disk")
