"""A KVM guest driven without an event loop: started, held at some moment, saved, and restored as another VM."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import attrs

from asyncvmm.effects import Stopped
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.fastpath.binding import Fastpath
from asyncvmm.machine.kvm.fastpath.binding import load as load_library
from asyncvmm.machine.kvm.loading import prepare
from asyncvmm.machine.kvm.platform import Board, Outlets
from asyncvmm.machine.kvm.restoring import RestoreBlueprint, Shell, restore_blueprint
from asyncvmm.machine.kvm.state.board import BoardState
from asyncvmm.machine.kvm.state.cpu_check import cpu_facts
from asyncvmm.machine.kvm.state.machine import save_sections
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.machine.saved import MemoryLayer, RestorePlan, SavedMachine
from asyncvmm.snapshot.codec import decode, encode
from asyncvmm.snapshot.memory_map import MemoryMap
from asyncvmm.timing.timeline import Timeline

PATIENCE_S = 100.0 if os.environ.get("ASYNCVMM_LAB") else 20.0
_POLL_S = 0.0005


def _nothing(*_: object) -> None:
    """What a board causes that is asked for and not told."""


@attrs.frozen
class Saved:
    """A saved guest: what to restore it from. ``close`` ends the use of its memory."""

    plan: RestorePlan

    def blueprint(self) -> RestoreBlueprint:
        """What makes VMs of it."""
        return restore_blueprint(self.plan)

    def close(self) -> None:
        """Close the memory file."""
        for layer in self.plan.layers:
            os.close(layer.fd)


class HeldVm:
    """A guest with its board and vCPU threads. Held until ``run``, and again after ``hold``."""

    def __init__(self, vm: KvmVm, state: BoardState | None, native: bool = True) -> None:
        """``state``: the board's, if this is a restored VM. native: with the native run loop, if there is one."""
        self.vm = vm
        self.output = bytearray()
        self.ends: list[Stopped] = []
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        library = load_library() if native else None
        self._fastpath = None if library is None else Fastpath(library, self._event_fd)
        outlets = Outlets(
            irq=vm.set_irq_line,
            output_pending=_nothing,
            room=_nothing,
            shutdown=lambda: self._end(Stopped("shutdown")),
            reset=lambda: self._end(Stopped("reset")),
            debug_exit=lambda code: self._end(Stopped("debug-exit", code=code)),
        )
        self.board = Board(outlets, self._fastpath, state)
        for vcpu in vm.vcpus:
            vcpu.order("pause")
            vcpu.start(f"held-vcpu{vcpu.index}", self.board.bus, self._end, self._fastpath)

    @classmethod
    def boot(cls, kernel: Path, *, vcpus: int = 1, memory_mib: int = 4, native: bool = True) -> HeldVm:
        """A new guest, held."""
        plan = BootPlan(name="held", memory_mib=memory_mib, vcpus=vcpus, kernel=kernel, initrd=None)
        prepared = prepare(plan, Timeline())
        try:
            return cls(KvmVm(prepared.blueprint, Timeline()), None, native)
        finally:
            prepared.close()

    @classmethod
    def restore(cls, saved: Saved, *, from_shell: bool = False, native: bool = True) -> HeldVm:
        """The guest that was saved, held."""
        blueprint = saved.blueprint()
        if from_shell:
            vm = blueprint.fill(Shell(blueprint.shape.shell, Timeline()), Timeline())
        else:
            vm = blueprint.run(Timeline())
        return cls(vm, blueprint.board, native)

    def run(self) -> None:
        """Let the vCPUs run."""
        for vcpu in self.vm.vcpus:
            vcpu.order("run")

    def hold(self) -> None:
        """Keep them out of the guest."""
        for vcpu in self.vm.vcpus:
            vcpu.order("pause")
        for vcpu in self.vm.vcpus:
            assert vcpu.wait_parked(PATIENCE_S)

    def save(self) -> Saved:
        """The held guest, memory included."""
        vm = self.vm
        sections = save_sections(vm.fd, [vcpu.fd for vcpu in vm.vcpus], self.board)
        fd = os.memfd_create("saved")
        os.pwrite(fd, vm.memory.view, 0)
        whole = MemoryMap(size=vm.memory.size, data=((0, vm.memory.size),))
        saved = SavedMachine(
            accel="kvm",
            vcpus=len(vm.vcpus),
            regions=tuple((region.start, region.size) for region in vm.memory.regions),
            sections=sections,
            cpu=cpu_facts(vm.tsc_khz),
            memory=whole,
        )
        return Saved(RestorePlan(saved=saved, layers=(MemoryLayer(fd=fd, map=whole),)))

    def take(self) -> bytes:
        """Take the console's output; gives all that was taken so far."""
        self.output += self.board.console.take().data
        return bytes(self.output)

    def until(self, condition: Callable[[], object]) -> None:
        """Take output until that is true. Fails if the guest ended or the time is up."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            self.take()
            if condition():
                return
            assert not self.ends, self.ends
            assert time.monotonic() < deadline, f"no progress: {bytes(self.output[-80:])!r}"
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End and free it."""
        for vcpu in self.vm.vcpus:
            vcpu.order("stop")
        for vcpu in self.vm.vcpus:
            vcpu.join()
        self.vm.close()
        os.close(self._event_fd)

    def _end(self, stopped: Stopped) -> None:
        self.ends.append(stopped)
        for vcpu in self.vm.vcpus:
            vcpu.order("pause" if threading.current_thread().name.startswith("held") else "stop")


def with_section(plan: RestorePlan, name: str, section: bytes) -> RestorePlan:
    """The plan with another content of one section."""
    return attrs.evolve(plan, saved=attrs.evolve(plan.saved, sections={**plan.saved.sections, name: section}))


def with_field(plan: RestorePlan, section: str, name: str, value: object) -> RestorePlan:
    """The plan with one field of a section changed, which must be there."""
    record = decode(plan.saved.sections[section])
    assert name in record
    return with_section(plan, section, encode({**record, name: value}))


def restored(plan: RestorePlan) -> KvmVm:
    """The VM alone, without board and threads."""
    return restore_blueprint(plan).run(Timeline())


def descriptors() -> list[str]:
    """What this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return sorted(found)
