"""How a VM is restored: one chain of system calls from /dev/kvm to vCPUs that stand where they were saved.

Written down once for each shape of snapshot and made for each VM; what differs between two of them (the state's
address, the memory files, what is added to the time stamp counter) is given to each run. A *shell* is the part of it
that no snapshot is needed for, made ahead: what is left then is putting memory and state in.

    plan = restore_blueprint(saved)
    vm = plan.run(timeline)

    shell = Shell(plan.shape.shell, timeline)      # any time before
    vm = plan.fill(shell, timeline)
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache

import attrs

from asyncvmm.errors import AsyncVMMError, MemorySizeError, SnapshotDamaged, SnapshotMismatch, VcpuCountError
from asyncvmm.machine.host_clock import clock_sample
from asyncvmm.machine.kvm.abi import KVM_PIT_SPEAKER_DUMMY, KvmPitConfig, Request
from asyncvmm.machine.kvm.creation import (
    Creation,
    create_vcpu,
    create_vm,
    expect_tsc_khz,
    seen_tsc_khz,
    show_registers,
)
from asyncvmm.machine.kvm.fastpath.chain import Argument, At, Chain, Failure, Made, Program
from asyncvmm.machine.kvm.layers import Piece, arrange
from asyncvmm.machine.kvm.mapped import Pinned
from asyncvmm.machine.kvm.memory import MAP_SAVED, READ_SAVED, map_memory, map_saved, register_memory
from asyncvmm.machine.kvm.state.arena import Arena, VcpuPlaces, VmPlaces
from asyncvmm.machine.kvm.state.board import BoardState
from asyncvmm.machine.kvm.state.cpu_check import check_cpu, check_tsc, cpu_facts, same_tsc
from asyncvmm.machine.kvm.state.host import host_state
from asyncvmm.machine.kvm.state.setting import TSC_OFFSET_STEP, TscPlan, set_cpuid, set_vcpu, set_vm, setting_error
from asyncvmm.machine.kvm.state.vcpu import VcpuState
from asyncvmm.machine.kvm.state.vm import VmState
from asyncvmm.machine.kvm.system import open_system
from asyncvmm.machine.kvm.vm import KvmVm, creation_error
from asyncvmm.machine.saved import RestorePlan, SavedMachine
from asyncvmm.snapshot.memory_map import MemoryMap
from asyncvmm.timing.timeline import Timeline
from asyncvmm.x86.layout import ram_regions

MOST_KEPT = 16
"""Chains, decoded states, and blueprints, kept for coming VMs."""

MOST_VCPUS = 1024
"""What a chain has room for, some times over."""

BRIEF_VCPUS, BRIEF_PIECES = 4, 64
"""Up to which filling a shell is brief: well under a millisecond, some 50 us a vCPU and 3 us a mapping."""

_WORD = 1 << 64


@attrs.frozen(kw_only=True)
class ShellShape:
    """What a VM is before it has any state. Hashable."""

    memory_bytes: int
    vcpus: int
    devices: int = 0
    track_dirty: bool = False


@attrs.frozen(kw_only=True)
class Shape:
    """What VMs restored alike have in common. Hashable. ``high``: interrupt lines that are raised."""

    shell: ShellShape
    pieces: tuple[Piece, ...]
    layers: int
    vcpus: tuple[VcpuPlaces, ...]
    vm: VmPlaces
    high: tuple[int, ...]


@attrs.frozen(eq=False, kw_only=True)
class State:
    """A saved machine's state, checked and put together. ``arena`` is what KVM is given."""

    arena: bytes
    vcpu_places: tuple[VcpuPlaces, ...]
    vm_places: VmPlaces
    vcpus: tuple[VcpuState, ...]
    vm: VmState
    board: BoardState


class Shell:
    """A VM with memory and vCPUs, all of it new. It is filled once, or closed."""

    def __init__(self, shape: ShellShape, timeline: Timeline) -> None:
        """Make it. Raises KvmUnavailable, KvmIoctlError, MemorySizeError, VcpuCountError."""
        self.shape = shape
        self.steps = _shell(shape)
        self.made: Made | None = _run(self.steps.program, (), timeline, shape.vcpus, ())

    def take(self) -> Made:
        """It is somebody else's now."""
        made, self.made = self.made, None
        if made is None:
            raise ValueError("a shell that was filled or closed")
        return made

    def close(self) -> None:
        """Free it, unless it was taken. May be called again."""
        if self.made is not None:
            self.take().undo()


@attrs.frozen(eq=False)
class RestoreBlueprint:
    """A VM to be restored, as often as wanted, for as long as the layers are open. Nothing is made yet."""

    shape: Shape
    state: State
    fds: tuple[int, ...]

    @property
    def board(self) -> BoardState:
        """What Board is made with."""
        return self.state.board

    @property
    def fills_briefly(self) -> bool:
        """Whether ``fill`` is so short that an event loop need not hand it to a worker thread. It reads no file."""
        pieces = self.shape.pieces
        few = self.shape.shell.vcpus <= BRIEF_VCPUS and len(pieces) <= BRIEF_PIECES
        return few and not any(piece.is_copied for piece in pieces)

    def run(self, timeline: Timeline) -> KvmVm:
        """Make the VM and give it its state; its vCPUs have no thread yet. The phases go to ``timeline``.

        Raises SnapshotDamaged, SnapshotMismatch, KvmUnavailable, KvmIoctlError, MemorySizeError, VcpuCountError.
        """

        def once(tsc: TscPlan) -> KvmVm:
            steps = _restoration(self.shape, tsc)
            given = (pinned.address, *self._offsets(), *self.fds)
            made = _run(steps.program, given, timeline, len(steps.vcpus), self.state.vcpus)
            try:
                _check_tsc_after(steps, made, self.state, tsc)
                return KvmVm.adopt(steps, made, "private-file")
            except BaseException:
                made.undo()
                raise

        pinned = Pinned(self.state.arena)
        return _with_tsc(self.state, once)

    def fill(self, shell: Shell, timeline: Timeline) -> KvmVm:
        """The same in a shell of ``shape.shell``, which becomes the VM, or is freed if that fails. Raises as run does,
        and ValueError for another shell."""
        if shell.shape != self.shape.shell:
            raise ValueError(f"a shell of {shell.shape}, not {self.shape.shell}")
        made, steps = shell.take(), shell.steps
        held = (made[steps.vm], made[steps.memory], *(made[vcpu.fd] for vcpu in steps.vcpus))

        def once(tsc: TscPlan) -> KvmVm:
            given = (pinned.address, *self._offsets(), *self.fds, *held)
            _run(_filling(self.shape, tsc), given, timeline, len(steps.vcpus), self.state.vcpus)
            _check_tsc_after(steps, made, self.state, tsc)
            return KvmVm.adopt(steps, made, "private-file")

        pinned = Pinned(self.state.arena)
        try:
            return _with_tsc(self.state, once)
        except BaseException:
            made.undo()
            raise

    def _offsets(self) -> list[int]:
        """KVM_VCPU_TSC_OFFSET for each vCPU: its TSC goes on from where it stood, in step with the others."""
        now, then = clock_sample(), self.state.vm.host_tsc
        ahead = (then - now.tsc) if now is not None and then is not None else 0
        return [_signed((vcpu.tsc_offset or 0) + ahead) for vcpu in self.state.vcpus]


@attrs.frozen(eq=False)
class _Kept:
    """A blueprint, and what it was made of: the very same objects, for to compare their contents takes as long."""

    plan: RestorePlan
    devices: int
    tsc_khz: int | None
    blueprint: RestoreBlueprint

    def is_of(self, plan: RestorePlan, devices: int, tsc_khz: int | None) -> bool:
        same = self.plan.saved is plan.saved and self.plan.layers is plan.layers
        return same and (self.plan.track_dirty, self.devices, self.tsc_khz) == (plan.track_dirty, devices, tsc_khz)


_kept: deque[_Kept] = deque(maxlen=MOST_KEPT)


def restore_blueprint(plan: RestorePlan, devices: int = 0) -> RestoreBlueprint:
    """Check what is to be restored, and prepare it, once for all plans of one snapshot. ``devices``: how many
    virtio-mmio devices the VM has.

    Raises SnapshotDamaged, SnapshotMismatch, MemorySizeError, and KvmUnavailable where there is no KVM to ask.
    """
    blueprint = kept_blueprint(plan, devices)
    if blueprint is None:
        tsc_khz = seen_tsc_khz()
        blueprint = _blueprint(plan, devices, tsc_khz)
        _kept.append(_Kept(plan, devices, tsc_khz, blueprint))
    return blueprint


def kept_blueprint(plan: RestorePlan, devices: int = 0) -> RestoreBlueprint | None:
    """What ``restore_blueprint`` would give, if that was asked of it lately."""
    tsc_khz = seen_tsc_khz()
    kept = tuple(_kept)  # at one moment: other threads add to it
    return next((one.blueprint for one in kept if one.is_of(plan, devices, tsc_khz)), None)


def _blueprint(plan: RestorePlan, devices: int, tsc_khz: int | None) -> RestoreBlueprint:
    saved = plan.saved
    check_cpu(saved.cpu, cpu_facts(tsc_khz))
    _check_count(saved.vcpus)
    state = saved_state(saved)
    memory_bytes = saved.memory.size
    if tuple((region.start, region.size) for region in ram_regions(memory_bytes)) != tuple(saved.regions):
        raise SnapshotMismatch("memory layout", expected=f"{memory_bytes} bytes as laid out here", found=saved.regions)
    shell = ShellShape(memory_bytes=memory_bytes, vcpus=saved.vcpus, devices=devices, track_dirty=plan.track_dirty)
    shape = Shape(
        shell=shell,
        pieces=_pieces(memory_bytes, tuple(layer.map for layer in plan.layers)),
        layers=len(plan.layers),
        vcpus=state.vcpu_places,
        vm=state.vm_places,
        high=tuple(state.board.high),
    )
    return RestoreBlueprint(shape, state, tuple(layer.fd for layer in plan.layers))


def _check_count(vcpus: int) -> None:
    most = min(host_state().max_vcpus, MOST_VCPUS)
    if not 1 <= vcpus <= most:
        raise VcpuCountError("vCPUs", expected=f"1 to {most} (this host's KVM)", found=vcpus)


def saved_state(saved: SavedMachine) -> State:
    """The sections that are KVM's and the board's, checked. Raises SnapshotDamaged."""
    return _state(*(_section(saved, name) for name in ("vm", "board", *map(vcpu_section, range(saved.vcpus)))))


def vcpu_section(index: int) -> str:
    """The name of a vCPU's section."""
    return f"vcpu{index}"


def _section(saved: SavedMachine, name: str) -> bytes:
    if name not in saved.sections:
        raise SnapshotDamaged("sections", expected=name, found=", ".join(sorted(saved.sections))[:200])
    return saved.sections[name]


@lru_cache(MOST_KEPT)
def _pieces(memory_bytes: int, maps: tuple[MemoryMap, ...]) -> tuple[Piece, ...]:
    return arrange(memory_bytes, maps)


@lru_cache(MOST_KEPT)
def _state(vm: bytes, board: bytes, *vcpus: bytes) -> State:
    states = tuple(VcpuState.of(vcpu_section(index), section) for index, section in enumerate(vcpus))
    host, arena = host_state(), Arena()
    for state in states:
        if state.xcrs is not None and not host.has_xcrs:
            raise SnapshotMismatch("vCPU", expected="a processor with XSAVE", found="one without")
    vm_state = VmState.of(vm)
    vcpu_places = tuple(arena.add_vcpu(state, host.xsave_bytes) for state in states)
    vm_places = arena.add_vm(vm_state)
    return State(
        arena=arena.content(),
        vcpu_places=vcpu_places,
        vm_places=vm_places,
        vcpus=states,
        vm=vm_state,
        board=BoardState.of(board),
    )


# -- chains ------------------------------------------------------------------------------------------------------------


@lru_cache(MOST_KEPT)
def _shell(shape: ShellShape) -> Creation:
    chain = Chain()
    return _finish(chain, _make_shell(chain, shape))


@lru_cache(MOST_KEPT)
def _restoration(shape: Shape, tsc: TscPlan) -> Creation:
    """The whole chain; it is given the arena's address, a TSC offset for each vCPU, and the layers' descriptors."""
    vcpus = shape.shell.vcpus
    chain = Chain(given=1 + vcpus + shape.layers)
    layers = [chain.given(1 + vcpus + index) for index in range(shape.layers)]
    steps = _make_shell(chain, shape.shell, (shape.pieces, layers))
    _set_state(chain, shape, tsc, steps.vm, [vcpu.fd for vcpu in steps.vcpus])
    return _finish(chain, steps)


@lru_cache(MOST_KEPT)
def _filling(shape: Shape, tsc: TscPlan) -> Program:
    """What a shell still lacks; it is given what ``_restoration`` is, and the VM, its memory, and the vCPUs."""
    vcpus, first = shape.shell.vcpus, 1 + shape.shell.vcpus
    held = first + shape.layers
    chain = Chain(given=held + 2 + vcpus)
    with chain.phase("memory_state_write"):
        map_saved(chain, chain.given(held + 1), shape.pieces, [chain.given(first + n) for n in range(shape.layers)])
    _set_state(chain, shape, tsc, chain.given(held), [chain.given(held + 2 + n) for n in range(vcpus)])
    return chain.program()


def _make_shell(chain: Chain, shape: ShellShape, saved: tuple[Sequence[Piece], Sequence[At]] | None = None) -> Creation:
    """Memslots come before the interrupt controllers, as in creation.py, and the snapshot's pages before both."""
    regions = ram_regions(shape.memory_bytes)
    with chain.phase("kvm_open"):
        system = open_system(chain, vcpus=shape.vcpus)
    vm = create_vm(chain, system)
    with chain.phase("memory_alloc"):
        memory = map_memory(chain, regions)
    if saved is not None:
        with chain.phase("memory_state_write"):
            map_saved(chain, memory, *saved)
    with chain.phase("memory_register"):
        register_memory(chain, vm, memory, regions, track_dirty=shape.track_dirty)
        registers = show_registers(chain, vm, len(regions), shape.devices) if shape.devices else None
    with chain.phase("irqchip_create"):
        chain.ioctl(Request.KVM_CREATE_IRQCHIP, vm)
        chain.ioctl(Request.KVM_CREATE_PIT2, vm, chain.data(KvmPitConfig(KVM_PIT_SPEAKER_DUMMY)))
    with chain.phase("vcpu_create"):
        vcpus = tuple(create_vcpu(chain, vm, index, system) for index in range(shape.vcpus))
        tsc_khz = chain.ioctl(Request.KVM_GET_TSC_KHZ, vcpus[0].fd)
    return Creation(_NO_PROGRAM, regions, system, vm, memory, vcpus, tsc_khz, None, (), registers, shape.devices)


_NO_PROGRAM = Chain().program()


def _finish(chain: Chain, steps: Creation) -> Creation:
    return attrs.evolve(steps, program=chain.program())


def _set_state(chain: Chain, shape: Shape, tsc: TscPlan, vm: Argument, fds: Sequence[Argument]) -> None:
    arena = chain.given(0)
    with chain.phase("cpuid_config"):
        set_cpuid(chain, fds, arena, shape.vcpus)
    with chain.phase("vcpu_state_restore"):
        for index, (fd, places) in enumerate(zip(fds, shape.vcpus, strict=True)):
            set_vcpu(chain, index, fd, arena, places, tsc, chain.given(1 + index))
    with chain.phase("device_state_restore"):
        set_vm(chain, vm, arena, shape.vm, shape.high)


# -- running them ------------------------------------------------------------------------------------------------------


class _LearnedError(Exception):
    """This host's time stamp counters are not as was assumed; ``_tsc_plan`` knows now."""


class _Host:
    takes_offsets = True
    """Whether it knows KVM_VCPU_TSC_OFFSET (Linux 5.16), until it says that it does not."""


def _tsc_plan(state: State) -> TscPlan:
    """As far as is known. Raises SnapshotMismatch for a frequency that this host cannot give."""
    saved_khz, host_khz, scaling = state.vcpus[0].tsc_khz, seen_tsc_khz(), host_state().tsc_scaling
    check_tsc(saved_khz, host_khz, scaling)
    khz = None if host_khz is None or same_tsc(saved_khz, host_khz) else saved_khz
    known = state.vm.host_tsc is not None and all(vcpu.tsc_offset is not None for vcpu in state.vcpus)
    return TscPlan(known and khz is None and _Host.takes_offsets and clock_sample() is not None, khz)


def _with_tsc(state: State, once: Callable[[TscPlan], KvmVm]) -> KvmVm:
    """Do it as planned, and anew each time that the plan turns out to be wrong: twice at the most."""
    while True:
        try:
            return once(_tsc_plan(state))
        except _LearnedError:
            continue


def _run(program: Program, given: Sequence[int], timeline: Timeline, count: int, vcpus: Sequence[VcpuState]) -> Made:
    """``count``: how many vCPUs it has. ``vcpus``: what they are given."""
    made = program.run(*given)
    timeline.record_later(made.spans)
    if made.failure is None:
        return made
    made.undo()
    if made.failure.name.startswith(TSC_OFFSET_STEP):
        _Host.takes_offsets = False
        raise _LearnedError
    raise setting_error(made.failure, vcpus) or _memory_error(made.failure) or creation_error(made.failure, count)


def _memory_error(failure: Failure) -> AsyncVMMError | None:
    if failure.name == MAP_SAVED and failure.errno == errno.ENOMEM:
        return MemorySizeError("guest memory", expected="a mapping of it", found=os.strerror(failure.errno))
    if failure.name in (MAP_SAVED, READ_SAVED):
        found = os.strerror(failure.errno) if failure.errno else f"{failure.result} bytes"
        return SnapshotDamaged(failure.name, expected="a memory file that is whole", found=found)
    return None


def _check_tsc_after(steps: Creation, made: Made, state: State, tsc: TscPlan) -> None:
    """The first VM of a process shows what frequency this host's TSC has. Raises as _tsc_plan does."""
    expect_tsc_khz(made[steps.tsc_khz])
    if _tsc_plan(state) != tsc:
        raise _LearnedError


def _signed(value: int) -> int:
    return (value + (_WORD >> 1)) % _WORD - (_WORD >> 1)
