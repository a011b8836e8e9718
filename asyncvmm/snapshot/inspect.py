"""What a snapshot is, for people and for programs: what ``asyncvmm snapshot inspect`` shows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asyncvmm.errors import SnapshotError
from asyncvmm.snapshot.loading import Link, check_memory_file, open_chain, read_sections
from asyncvmm.timing.text import printable

if TYPE_CHECKING:
    from rich.console import Console

_TOP = ("id", "machine", "created", "asyncvmm", "memory_mib", "vcpus", "window", "logical_bytes")


def inspect(path: Path) -> dict[str, Any]:
    """Everything the snapshot at ``path`` says of itself, plain values. Its memory's content is not looked at.

    Raises SnapshotDamaged, SnapshotMismatch, SnapshotError.
    """
    with ExitStack() as resources:
        chain = open_chain(Path(path), resources)
        for link in chain:
            check_memory_file(link)
        newest = chain[-1]
        sections = {name: len(data) for name, data in read_sections(newest).items()}
        layers = [_layer(link) for link in chain]
    plain = newest.manifest.to_dict()
    facts = {"path": _text(newest.path)} | {name: plain[name] for name in _TOP}
    facts |= {
        "allocated_bytes": layers[-1]["allocated_bytes"],
        "chain_bytes": sum(layer["allocated_bytes"] for layer in layers),
        "chain": layers,
        "devices": plain["devices"],
        "regions": plain["regions"],
        "sections": sections,
        "files": {name: record["size"] for name, record in sorted(plain["files"].items())},
        "image": plain["image"],
        "cpu": plain["cpu"],
        "config": plain["config"],
    }
    for name, value in plain["extra"].items():
        facts.setdefault(name, value)
    return facts


def _text(path: Path) -> str:
    """JSON has no names that are not text."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _layer(link: Link) -> dict[str, Any]:
    manifest = link.manifest
    return {
        "path": _text(link.path),
        "id": manifest.id,
        "created": manifest.created,
        "difference": manifest.memory.is_difference,
        "data_bytes": manifest.memory.data_bytes,
        "zero_bytes": manifest.memory.zero_bytes,
        "allocated_bytes": _allocated(link),
    }


def _allocated(link: Link) -> int:
    """On disk now, of every file: a copy may take more, or less, than what was written."""
    try:
        return sum(
            os.stat(name, dir_fd=link.directory, follow_symlinks=False).st_blocks * 512 for name in link.manifest.files
        )
    except OSError as error:
        raise SnapshotError(str(link.path), expected="its files", found=error.strerror) from None


def draw(facts: Mapping[str, Any], console: Console) -> None:
    """Show what ``inspect`` found as a table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(facts):
        table.add_row(Text(printable(name)), Text(printable(value, 1000)))
    console.print(table)


def _rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "snapshot", facts["id"]
    yield "path", facts["path"]
    yield "made", f"{facts['created']} by asyncvmm {facts['asyncvmm']} on {facts['machine']}"
    yield "guest", f"{facts['memory_mib']} MiB, {facts['vcpus']} vCPU{'s' * (facts['vcpus'] != 1)}{_window(facts)}"
    if isinstance(trigger := facts.get("trigger"), dict):
        rest = {name: value for name, value in trigger.items() if name != "trigger"}
        yield "trigger", ", ".join(filter(None, (str(trigger.get("trigger", "")), _pairs(rest))))
    yield "devices", ", ".join(map(str, facts["devices"])) or "none"
    yield "on disk", f"{_mib(facts['allocated_bytes'])} of {_mib(facts['logical_bytes'])}"
    chain = facts["chain"]
    for number, layer in enumerate(chain if len(chain) > 1 else ()):
        kind = "difference" if layer["difference"] else "full"
        yield f"chain {number}", f"{layer['path']}: {kind}, {_mib(layer['allocated_bytes'])}, {layer['id']}"
    yield "state", _pairs(facts["sections"], " B")
    yield "files", _pairs(facts["files"], " B")
    yield "config", _pairs(facts["config"])


def _window(facts: Mapping[str, Any]) -> str:
    return ", held before its workload's exec" if facts["window"] else ""


def _pairs(values: Mapping[str, Any], unit: str = "") -> str:
    return ", ".join(f"{name} {value}{unit}" for name, value in values.items() if value not in (None, "", [], {}))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
