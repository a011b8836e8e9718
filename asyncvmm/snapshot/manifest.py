"""Manifest: what ``manifest.json`` says of a snapshot, and the checks on what one found there says.

The file is one JSON object. ``checksum`` is the SHA-256 of all the rest, as JSON with sorted keys and no white space:
a manifest may be laid out anew, but not changed. The names of files are names in the snapshot's own directory.

Files that are large are checked by CRC-32 (zlib's), one for each CHUNK_BYTES of offset, over the pages there that hold
data: it is to find what a disk or a copy damaged, and costs less than writing those pages does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import orjson

from asyncvmm.errors import SnapshotDamaged, SnapshotMismatch
from asyncvmm.snapshot.memory_map import MOST_BYTES, PAGE_BYTES, MemoryMap, Run, runs_from_plain, runs_to_plain

if TYPE_CHECKING:
    from asyncvmm.machine.saved import MachineKind

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.bin"
MEMORY = "memory.bin"

CHUNK_BYTES = 1 << 20
MOST_MANIFEST_BYTES = 16 << 20
MOST_FILES = 256
MOST_REGIONS = 64
MOST_VCPUS = 4096
MOST_PATH_BYTES = 4096

_ID = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,99})?")


@attrs.frozen(kw_only=True)
class Base:
    """The snapshot that this one is a difference of: its id, and its path, relative to this one's directory."""

    id: str
    path: str


@attrs.frozen(kw_only=True)
class FileRecord:
    """A file of a snapshot: bytes, and either its SHA-256 or the CRC-32 of each chunk that holds data, ascending.

    data: the runs that hold data; the rest reads as zeros. None in the memory's, where the memory map says it.
    """

    size: int
    sha256: str | None = None
    data: tuple[Run, ...] | None = None
    crc32: tuple[int, ...] | None = None

    def to_plain(self) -> dict[str, Any]:
        """As plain values, without what it has not."""
        plain: dict[str, Any] = {"size": self.size}
        if self.sha256 is not None:
            plain["sha256"] = self.sha256
        if self.data is not None:
            plain["data"] = runs_to_plain(self.data)
        if self.crc32 is not None:
            plain["crc32"] = list(self.crc32)
        return plain


@attrs.frozen(kw_only=True)
class Manifest:
    """A snapshot's manifest.

    id: 32 hexadecimal digits. machine: which backend made it. created: RFC 3339, UTC. asyncvmm: the version that made
    it. regions, cpu: as in SavedMachine. devices: names. config: the VM's configuration. window: taken before the
    workload's exec, PID 1 waits for ``go``. image: SHA-256 of what was booted, by ``kernel`` and ``initrd``. extra:
    more plain values by name (``trigger``, ``disks``). When the snapshot's directory is committed, logical_bytes,
    allocated_bytes (on disk, of all files) and files are filled in.
    """

    id: str
    machine: MachineKind
    created: str
    asyncvmm: str
    memory_mib: int
    vcpus: int
    regions: tuple[Run, ...]
    memory: MemoryMap
    cpu: Mapping[str, Any] = attrs.field(factory=dict)
    devices: tuple[str, ...] = ()
    config: Mapping[str, Any] = attrs.field(factory=dict)
    window: bool = False
    image: Mapping[str, str | None] | None = None
    base: Base | None = None
    extra: Mapping[str, Any] = attrs.field(factory=dict)
    logical_bytes: int = 0
    allocated_bytes: int = 0
    files: Mapping[str, FileRecord] = attrs.field(factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values: what the file holds, but for its checksum."""
        plain = {name: getattr(self, name) for name in _AS_IT_IS}
        return plain | {
            "format": FORMAT,
            "regions": [list(region) for region in self.regions],
            "devices": list(self.devices),
            "memory": self.memory.to_plain(),
            "base": self.base and attrs.asdict(self.base),
            "files": {name: record.to_plain() for name, record in self.files.items()},
        }

    @classmethod
    def from_dict(cls, plain: object) -> Manifest:
        """The manifest that ``to_dict`` wrote. Raises SnapshotDamaged, or SnapshotMismatch for another format."""
        if not isinstance(plain, dict):
            raise SnapshotDamaged("manifest", expected="an object", found=type(plain).__name__)
        _check_format(plain)
        if plain.keys() != _CHECKS.keys() | {"format"}:
            odd = sorted(str(name) for name in plain.keys() ^ (_CHECKS.keys() | {"format"}))
            raise SnapshotDamaged("manifest", expected="the fields of a manifest", found=f"{', '.join(odd)[:80]} amiss")
        fields = {name: _checked(name, check, plain[name]) for name, check in _CHECKS.items()}
        manifest = cls(**fields)
        _check_sizes(manifest)
        return manifest

    def to_bytes(self) -> bytes:
        """The file. Raises ValueError for values that are not plain, and if it would be too large."""
        plain = self.to_dict()
        try:
            plain["checksum"] = _checksum(plain)
            data = orjson.dumps(plain, option=orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE)
        except orjson.JSONEncodeError as error:
            raise ValueError(f"manifest: {error}") from None
        if len(data) > MOST_MANIFEST_BYTES:
            raise ValueError(f"manifest of {len(data)} bytes, where {MOST_MANIFEST_BYTES} is the most")
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest of a file that holds ``data``. Raises SnapshotDamaged or SnapshotMismatch."""
        try:
            plain = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise SnapshotDamaged("manifest", expected="JSON", found=str(error)) from None
        if not isinstance(plain, dict):
            raise SnapshotDamaged("manifest", expected="an object", found=type(plain).__name__)
        _check_format(plain)
        said = plain.pop("checksum", None)
        if said != (found := _computed(plain)):
            raise SnapshotDamaged("manifest", expected=f"checksum {str(said)[:64]}", found=found)
        return cls.from_dict(plain)


def is_name(name: str) -> bool:
    """Whether it may be a file's name: one or two parts, neither of them hidden, ``.`` or ``..``."""
    return _NAME.fullmatch(name) is not None


def _check_format(plain: Mapping[str, Any]) -> None:
    found = plain.get("format")
    if type(found) is not int:
        raise SnapshotDamaged("manifest", expected="a format", found=str(found)[:80])
    if found != FORMAT:
        raise SnapshotMismatch("snapshot", expected=f"format {FORMAT}", found=f"format {found}")


def _checksum(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _computed(plain: Mapping[str, Any]) -> str:
    try:
        return _checksum(plain)
    except orjson.JSONEncodeError as error:  # nested deeper than what was written can be
        raise SnapshotDamaged("manifest", expected="plain values", found=str(error)) from None


Check = Callable[[Any], Any]


def _checked(name: str, check: Check, value: object) -> Any:
    try:
        return check(value)
    except (TypeError, ValueError, KeyError) as error:
        raise SnapshotDamaged(f"manifest, {name}", expected=str(error), found=_shown(value)) from None


def _shown(value: object) -> str:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


def _number(least: int, most: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"a number from {least} to {most}")
        return value

    return check


def _text(pattern: re.Pattern[str], what: str) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(what)
        return value

    return check


def _of(kind: type, what: str) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(what)
        return value

    return check


def _maybe(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _regions(value: Any) -> tuple[Run, ...]:
    what = f"1 to {MOST_REGIONS} pairs of address and size, whole pages, ascending"
    if not isinstance(value, list) or not 0 < len(value) <= MOST_REGIONS:
        raise ValueError(what)
    end = 0
    for region in value:
        if not isinstance(region, list) or [type(number) for number in region] != [int, int]:
            raise ValueError(what)
        address, size = region
        if address < end or size < 1 or address % PAGE_BYTES or size % PAGE_BYTES or address + size > 1 << 52:
            raise ValueError(what)
        end = address + size
    return tuple((address, size) for address, size in value)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MOST_FILES or not all(isinstance(name, str) for name in value):
        raise ValueError("names of devices")
    return tuple(value)


def _image(value: Any) -> dict[str, str | None]:
    if not isinstance(value, dict) or not value.keys() <= {"kernel", "initrd"}:
        raise ValueError("kernel and initrd")
    return {name: _maybe(_text(_SHA256, "a SHA-256 each"))(digest) for name, digest in value.items()}


def _base(value: Any) -> Base:
    what = "an id and a relative path"
    if not isinstance(value, dict) or value.keys() != {"id", "path"}:
        raise ValueError(what)
    path = value["path"]
    if not isinstance(path, str) or not 0 < len(path) <= MOST_PATH_BYTES or path.startswith("/") or "\0" in path:
        raise ValueError(what)
    return Base(id=_text(_ID, what)(value["id"]), path=path)


def _files(value: Any) -> dict[str, FileRecord]:
    if not isinstance(value, dict) or len(value) > MOST_FILES or not value.keys() >= {STATE, MEMORY}:
        raise ValueError(f"at most {MOST_FILES} files, {STATE} and {MEMORY} among them")
    if MANIFEST in value or not all(is_name(name) for name in value):
        raise ValueError("names of files in the snapshot's directory")
    return {name: _file(name, record) for name, record in value.items()}


def _file(name: str, plain: Any) -> FileRecord:
    kinds = {STATE: {"size", "sha256"}, MEMORY: {"size", "crc32"}}
    wanted = kinds.get(name, {"size", "data", "crc32"})
    if not isinstance(plain, dict) or plain.keys() != wanted:
        raise ValueError(f"{' and '.join(sorted(wanted))} of {name}")
    size = _number(0, MOST_BYTES + PAGE_BYTES)(plain["size"])
    if name == STATE:
        return FileRecord(size=size, sha256=_text(_SHA256, f"a SHA-256 of {name}")(plain["sha256"]))
    data = runs_from_plain(plain["data"], size + -size % PAGE_BYTES) if "data" in plain else None
    return FileRecord(size=size, data=data, crc32=_sums(plain["crc32"]))


def _sums(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        raise ValueError("a CRC-32 for each chunk")
    if value and not 0 <= min(value) <= max(value) < 1 << 32:
        raise ValueError("a CRC-32 for each chunk")
    return tuple(value)


def _check_sizes(manifest: Manifest) -> None:
    size = manifest.memory.size
    if sum(size for _, size in manifest.regions) != size:
        raise SnapshotDamaged("manifest, regions", expected=f"{size} bytes of memory", found="another sum")
    if manifest.memory_mib << 20 != size:
        raise SnapshotDamaged("manifest, memory_mib", expected=size >> 20, found=manifest.memory_mib)
    if manifest.memory.is_difference != (manifest.base is not None):
        raise SnapshotDamaged("manifest", expected="a base for a difference, and for that only", found="otherwise")


_AS_IT_IS = (
    "id",
    "machine",
    "created",
    "asyncvmm",
    "memory_mib",
    "vcpus",
    "cpu",
    "config",
    "window",
    "image",
    "extra",
    "logical_bytes",
    "allocated_bytes",
)

_DICT = _of(dict, "an object")

_CHECKS: Mapping[str, Check] = {
    "id": _text(_ID, "32 hexadecimal digits"),
    "machine": _text(re.compile("kvm|qemu"), "kvm or qemu"),
    "created": _text(re.compile(r"[0-9TZtz:.+-]{1,40}"), "a time, RFC 3339"),
    "asyncvmm": _text(re.compile(r"[!-~]{1,40}"), "a version"),
    "memory_mib": _number(1, MOST_BYTES >> 20),
    "vcpus": _number(1, MOST_VCPUS),
    "regions": _regions,
    "memory": MemoryMap.from_plain,
    "cpu": _DICT,
    "devices": _names,
    "config": _DICT,
    "window": _of(bool, "true or false"),
    "image": _maybe(_image),
    "base": _maybe(_base),
    "extra": _DICT,
    "logical_bytes": _number(0, 1 << 53),
    "allocated_bytes": _number(0, 1 << 53),
    "files": _files,
}
