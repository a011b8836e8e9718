"""Tiny guests on this machine's own /dev/kvm: how they are built, booted and counted.

Guests are tests/guests/kvm/*.S, assembled into .cache/guests under a name that says what went into them: where there is
no assembler, as in the lab, those built before serve. ``pytest --collect-only tests/kvm`` builds them all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest

from asyncvmm import VM, VMConfig
from asyncvmm.device_list import DeviceConfig
from asyncvmm.effects import Effect, ExitStatistics, SerialOutput, Stopped
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.launch import Launch, PreparedLaunch
from asyncvmm.machine.kvm.machine import KvmMachine
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.timing.timeline import Timeline
from tests.support.launched import Ready, grasping_snapshot, ready_snapshot
from tests.support.memory_guest import Files, New, new_guest
from tests.support.requirements import require

SOURCES = Path(__file__).parents[1] / "guests" / "kvm"
CACHE = Path(__file__).parents[2] / ".cache" / "guests"
_SHARED = (*sorted(path.name for path in SOURCES.glob("*.inc")), "guest.ld")
IN_LAB = bool(os.environ.get("ASYNCVMM_LAB"))
PATIENCE_S = 100.0 if IN_LAB else 20.0
"""A guest that has not done by then what a test waits for never will."""
NAME = "kvmtest"

_WITH_DEFINES = (
    "end",
    "echo",
    "ring3",
    "tally",
    "pulse",
    "clone",
    "deaf",
    "expire",
    "lines",
    "virtio",
    "virtio_disk",
    "virtio_reset",
    "virtio_hostile",
)

VARIANTS: dict[str, tuple[str, dict[str, int]]] = {
    **{path.stem: (path.stem, {}) for path in SOURCES.glob("*.S") if path.stem not in _WITH_DEFINES},
    "reset-i8042": ("end", {"PORT": 0x64, "VALUE": 0xFE}),
    "reset-acpi": ("end", {"PORT": 0x602, "VALUE": 0x01}),
    "shutdown-s5": ("end", {"PORT": 0x600, "VALUE": 0x34}),
    "debug-exit": ("end", {"PORT": 0xF4, "VALUE": 0x5C}),
    "echo-ioapic": ("echo", {"CHIP": 0}),
    "echo-pic": ("echo", {"CHIP": 1}),
    "virtio": ("virtio", {"EVENT_IDX": 0, "REQUESTS": 3}),
    "virtio-more": ("virtio", {"EVENT_IDX": 0, "REQUESTS": 9}),
    "virtio-event-idx": ("virtio", {"EVENT_IDX": 1, "REQUESTS": 3}),
    "virtio-disk": ("virtio_disk", {"EVENT_IDX": 0, "REQUESTS": 60}),
    "virtio-disk-long": ("virtio_disk", {"EVENT_IDX": 0, "REQUESTS": 250}),
    "virtio-disk-event-idx": ("virtio_disk", {"EVENT_IDX": 1, "REQUESTS": 60}),
    "virtio-reset": ("virtio_reset", {"EVENT_IDX": 0, "ROUNDS": 30}),
    **{f"virtio-hostile-{how}": ("virtio_hostile", {"EVENT_IDX": 0, "HOW": how}) for how in range(1, 7)},
    "tally": ("tally", {"AVX": 0, "ROUNDS": 3000}),
    "tally-avx": ("tally", {"AVX": 1, "ROUNDS": 3000}),
    "pulse-one-shot": ("pulse", {"TIMER": 0}),
    "pulse-periodic": ("pulse", {"TIMER": 1}),
    "pulse-deadline": ("pulse", {"TIMER": 2}),
    "expire-one-shot": ("expire", {"TIMER": 0}),
    "expire-periodic": ("expire", {"TIMER": 1}),
    "expire-deadline": ("expire", {"TIMER": 2}),
    "expire-pit": ("expire", {"TIMER": 3}),
    "lines": ("lines", {"MASKED": 0}),
    "lines-masked": ("lines", {"MASKED": 1}),
    "clone": ("clone", {"CLOCK": 1, "HELD": 0}),
    "clone-unknown": ("clone", {"CLOCK": 0, "HELD": 0}),
    "clone-held": ("clone", {"CLOCK": 0, "HELD": 1}),
    "deaf": ("deaf", {"BEATS": 0}),
    "deaf-beating": ("deaf", {"BEATS": 1}),
    "ring3": ("ring3", {"RING0_ROUNDS": 20_000, "RING3_ROUNDS": 20_000_000}),
}
"""Guests by name: the source and what is defined for it."""


# -- building ----------------------------------------------------------------------------------------------------------


def guest_path(name: str) -> Path:
    """Where the guest is, or would be."""
    source, defines = VARIANTS[name]
    inputs = [(SOURCES / file).read_bytes() for file in (f"{source}.S", *_SHARED)]
    digest = hashlib.sha256(b"\0".join([*inputs, repr(sorted(defines.items())).encode()]))
    return CACHE / f"{name}-{digest.hexdigest()[:16]}.elf"


def build(name: str, target: Path) -> None:
    """Assemble and link, aside and then renamed: another run may do the same."""
    source, defines = VARIANTS[name]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        unlinked, linked = Path(scratch, "o"), Path(scratch, "elf")
        words = [f"-D{key}={value}" for key, value in defines.items()]
        assemble = ["gcc", "-c", *words, "-o", str(unlinked), str(SOURCES / f"{source}.S")]
        link = ["ld", "--no-warn-rwx-segments", "-T", str(SOURCES / "guest.ld"), "-o", str(linked), str(unlinked)]
        for command in (assemble, link):
            subprocess.run(command, check=True, timeout=60)
        linked.rename(target)


@pytest.fixture(scope="session", autouse=True)
def kvm() -> None:
    """Every test here needs /dev/kvm."""
    require("kvm")


def pytest_collection_finish() -> None:
    """Build what is not there, so that a run elsewhere finds it."""
    if shutil.which("gcc") and shutil.which("ld"):
        for name in VARIANTS:
            if not (target := guest_path(name)).exists():
                build(name, target)


@pytest.fixture(scope="session")
def guest() -> Callable[[str], Path]:
    """The ELF of a guest, by name. Looked for here, not on a watched loop: in the lab a file can take a second."""
    paths = {name: guest_path(name) for name in VARIANTS}
    there = {name for name, path in paths.items() if path.exists()}

    def find(name: str) -> Path:
        if name not in there:
            require("gcc")
        return paths[name]

    return find


# -- running -----------------------------------------------------------------------------------------------------------


@attrs.define
class Run:
    """A guest that runs, and what has been heard of it."""

    machine: KvmMachine = attrs.field(init=False)
    effects: list[Effect] = attrs.field(factory=list)
    _heard: anyio.Event = attrs.field(factory=anyio.Event)

    def take(self, effects: Sequence[Effect]) -> None:
        """An EffectSink."""
        self.effects.extend(effects)
        self._heard.set()
        self._heard = anyio.Event()

    @property
    def output(self) -> bytes:
        """All of the console."""
        return b"".join(e.data for e in self.effects if isinstance(e, SerialOutput) and e.port == "console")

    @property
    def lost(self) -> int:
        """Console bytes that were dropped."""
        return sum(e.lost for e in self.effects if isinstance(e, SerialOutput))

    @property
    def ends(self) -> list[Stopped]:
        """Every Stopped; there must not be two."""
        return [e for e in self.effects if isinstance(e, Stopped)]

    @property
    def exits(self) -> ExitStatistics:
        """The machine's exit statistics."""
        statistics = self.machine.exits()
        assert statistics is not None
        return statistics

    def count(self, label: str) -> int:
        """How many exits of one ``by_address`` label."""
        entry = self.exits.by_address.get(label)
        return entry.count if entry else 0

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until effects make ``condition`` true."""
        with anyio.fail_after(PATIENCE_S):
            while not condition():
                await self._heard.wait()

    async def said(self, data: bytes) -> None:
        """Wait until the console has had ``data``."""
        await self.until(lambda: data in self.output)

    async def end(self) -> Stopped:
        """Wait for the guest's end."""
        await self.until(lambda: self.ends)
        assert len(self.ends) == 1
        return self.ends[0]


Make = Callable[..., Run]
Boot = Callable[..., AbstractAsyncContextManager[Run]]


@pytest.fixture
def make(guest: Callable[[str], Path]) -> Make:
    """A machine that has not been started, with a guest by name or path."""

    def make(
        name: str | Path,
        *,
        memory_mib: int = 4,
        vcpus: int = 1,
        cmdline: str = "",
        devices: DeviceConfig | None = None,
    ) -> Run:
        kernel = guest(name) if isinstance(name, str) else name
        plan = BootPlan(
            name=NAME,
            memory_mib=memory_mib,
            vcpus=vcpus,
            kernel=kernel,
            initrd=None,
            cmdline=cmdline,
            devices=devices or DeviceConfig(),
        )
        run = Run()
        run.machine = KvmMachine(plan, Timeline(), run.take)
        return run

    return make


@pytest.fixture
def boot(make: Make) -> Boot:
    """Boot a guest for a block of code."""

    @asynccontextmanager
    async def boot(
        name: str, *, memory_mib: int = 4, vcpus: int = 1, devices: DeviceConfig | None = None
    ) -> AsyncIterator[Run]:
        run = make(name, memory_mib=memory_mib, vcpus=vcpus, devices=devices)
        try:
            await run.machine.start()
            yield run
        finally:
            await run.machine.stop()

    return boot


# -- counting ----------------------------------------------------------------------------------------------------------


@attrs.frozen
class Resources:
    """What a VM is made of, as the process shows it."""

    descriptors: tuple[str, ...]
    threads: tuple[str, ...]
    mappings: int

    @classmethod
    def now(cls) -> Resources:
        """Count them. Descriptors are those of KVM; mappings those of vCPUs and of guest RAM of 67 MiB."""
        maps = Path("/proc/self/maps").read_text().splitlines()
        sizes = (tuple(int(word, 16) for word in line.split()[0].split("-")) for line in maps)
        return cls(
            tuple(sorted(link for link in _links() if link.startswith(("/dev/kvm", "anon_inode:kvm")))),
            tuple(thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)),
            sum("kvm-vcpu" in line for line in maps) + sum(end - start == 67 << 20 for start, end in sizes),
        )


def _links() -> Iterator[str]:
    for entry in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue


@pytest.fixture
def resources() -> Callable[[], Resources]:
    """Counts what VMs hold now."""
    assert Resources.now() == Resources((), (), 0), "an earlier test left something behind"
    return Resources.now


@pytest.fixture
def nothing() -> Resources:
    """What no VM holds."""
    return Resources((), (), 0)


# -- machines that are saved -------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """Where they are saved."""
    found = Files(tmp_path)
    yield found
    found.close()


@pytest.fixture
def new(guest: Callable[[str], Path]) -> New:
    """A guest that does with its memory what it is told; its machine is not started."""
    return lambda **options: new_guest(guest("memory"), **options)


@pytest.fixture
def vm(guest: Callable[[str], Path]) -> Callable[..., VM]:
    """A VM whose guest does what ``program`` says."""

    def make(program: str, **options: Any) -> VM:
        options = {"boot_timeout_s": 30.0, "stall_timeout_s": 20.0, **options}
        return VM(VMConfig(kernel=guest("foreign"), cmdline=program, memory_mib=4, accel="kvm", **options))

    return make


@pytest.fixture
async def original(vm: Callable[..., VM]) -> AsyncIterator[VM]:
    """One that has booted, and echoes."""
    async with vm("RE") as original:
        await original.boot()
        yield original


@pytest.fixture
def ready(guest: Callable[[str], Path]) -> Ready:
    """Snapshots whose restores are launched, see tests/support/launched.py."""
    return lambda program: ready_snapshot(guest("foreign"), program)


@pytest.fixture
async def grasping(guest: Callable[[str], Path]) -> AsyncIterator[Snapshot]:
    """See grasping_snapshot."""
    async with grasping_snapshot(guest("foreign")) as snapshot:
        yield snapshot


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Those that begin."""
    found: list[Launch] = []
    begin = PreparedLaunch.begin

    def noted(self: PreparedLaunch, *arguments: Any) -> Launch | None:
        launch = begin(self, *arguments)
        if launch is not None:
            found.append(launch)
        return launch

    monkeypatch.setattr(PreparedLaunch, "begin", noted)
    return found
