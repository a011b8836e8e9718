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
from itertools import islice

import attrs

from asyncvmm.errors import AsyncVMMError, MemorySizeError, SnapshotDamaged, SnapshotMismatch, VcpuCountError
from asyncvmm.machine.host_clock import clock_sample
from asyncvmm.machine.kvm.creation import Creation, expect_tsc_khz, seen_tsc_khz
from asyncvmm.machine.kvm.fastpath.chain import Failure, Made, Program
from asyncvmm.machine.kvm.guest_tsc import tsc_offset
from asyncvmm.machine.kvm.launch_chain import LaunchChain
from asyncvmm.machine.kvm.layers import Piece, arrange
from asyncvmm.machine.kvm.mapped import Pinned
from asyncvmm.machine.kvm.memory import MAP_SAVED, READ_SAVED
from asyncvmm.machine.kvm.restore_chains import (
    MOST_KEPT,
    Shape,
    ShellShape,
    filling,
    restoration,
    shell_chain,
    tracking_ring,
)
from asyncvmm.machine.kvm.state.arena import Arena, VcpuPlaces, VmPlaces
from asyncvmm.machine.kvm.state.board import BoardState
from asyncvmm.machine.kvm.state.cpu_check import check_cpu, check_tsc, cpu_facts, same_tsc
from asyncvmm.machine.kvm.state.host import host_state
from asyncvmm.machine.kvm.state.setting import TSC_OFFSET_STEP, TscPlan, setting_error
from asyncvmm.machine.kvm.state.vcpu import VcpuState
from asyncvmm.machine.kvm.state.vm import VmState
from asyncvmm.machine.kvm.vm import KvmVm, creation_error
from asyncvmm.machine.kvm.working_set import advices
from asyncvmm.machine.saved import RestorePlan, SavedMachine
from asyncvmm.snapshot.memory_map import MemoryMap
from asyncvmm.timing.timeline import Timeline
from asyncvmm.timing.tsc import TscOffset
from asyncvmm.x86.layout import ram_regions

MOST_VCPUS = 1024
"""What a chain has room for, some times over."""

MOST_AHEAD = 1024
"""Runs of memory that a launch makes present; the rest is left to the guest's faults."""

MOST_STEPS_AHEAD = 64
"""Of a launch that are made on the loop before it is sent, a microsecond or two each; else none are."""

OFFSET_SLOT = 2
"""Where the chains for one vCPU are given its TSC offset."""

_WORD = 1 << 64


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
        self.steps = shell_chain(shape)
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
    _arena: Pinned

    @property
    def board(self) -> BoardState:
        """What Board is made with."""
        return self.state.board

    def run(self, timeline: Timeline) -> KvmVm:
        """Make the VM and give it its state; its vCPUs have no thread yet. The phases go to ``timeline``.

        Raises SnapshotDamaged, SnapshotMismatch, KvmUnavailable, KvmIoctlError, MemorySizeError, VcpuCountError.
        """

        def once(tsc: TscPlan) -> KvmVm:
            steps = restoration(self.shape, tsc)
            offsets = self.offsets()
            given = (self._arena.address, *offsets, *self.fds)
            made = _run(steps.program, given, timeline, len(steps.vcpus), self.state.vcpus)
            try:
                _check_tsc_after(steps, made, self.state, tsc)
                vm = KvmVm.adopt(steps, made, "private-file")
            except BaseException:
                made.undo()
                raise
            if tsc.by_offset:
                _Host.learn_offset(offsets[0], tsc_offset(vm.vcpus[0].fd))
            return vm

        return _with_tsc(self.state, once)

    def fill(self, shell: Shell, timeline: Timeline) -> KvmVm:
        """The same in a shell of ``shape.shell``, which becomes the VM, or is freed if that fails. Raises as run does,
        and ValueError for another shell."""
        if shell.shape != self.shape.shell:
            raise ValueError(f"a shell of {shell.shape}, not {self.shape.shell}")
        made, steps = shell.take(), shell.steps
        held = held_in(made, steps)

        def once(tsc: TscPlan) -> KvmVm:
            given = (self._arena.address, *self.offsets(), *self.fds, *held)
            _run(filling(self.shape, tsc), given, timeline, len(steps.vcpus), self.state.vcpus)
            _check_tsc_after(steps, made, self.state, tsc)
            return KvmVm.adopt(steps, made, "private-file")

        try:
            return _with_tsc(self.state, once)
        except BaseException:
            made.undo()
            raise

    def offsets(self) -> list[int]:
        """KVM_VCPU_TSC_OFFSET for each vCPU: its TSC goes on from where it stood, in step with the others."""
        now, then = clock_sample(), self.state.vm.host_tsc
        ahead = (then - now.tsc) if now is not None and then is not None else 0
        return [_signed((vcpu.tsc_offset or 0) + ahead) for vcpu in self.state.vcpus]

    # -- for launches, see launch.py -----------------------------------------------------------------------------------

    def launch_chain(self, plan: RestorePlan, *, in_shell: bool) -> LaunchChain | None:
        """What a launch makes, if it can be made so. Blocks. Raises SnapshotMismatch."""
        tsc = _tsc_plan(self.state)
        if not tsc.by_offset or seen_tsc_khz() is None or any(piece.is_copied for piece in self.shape.pieces):
            return None
        ahead = tuple(islice(advices(plan.saved.memory.size, plan.touched, plan.written), MOST_AHEAD))
        if in_shell:
            steps, program = shell_chain(self.shape.shell), filling(self.shape, tsc, ahead)
            vcpu = program.first - len(steps.vcpus)
        else:
            steps = restoration(self.shape, tsc, ahead)
            program, vcpu = steps.program, steps.vcpus[0].fd.slot
        offset, then = self.state.vcpus[0].tsc_offset or 0, self.state.vm.host_tsc
        return LaunchChain(
            steps=steps,
            program=program,
            vcpu=vcpu,
            clock=OFFSET_SLOT if then is not None else 0,
            ahead=program.ahead if program.ahead <= MOST_STEPS_AHEAD else 0,
            tsc=tsc,
            given=(self._arena.address, _signed(offset + (then or 0)), *self.fds),
            pinned=Pinned(program.steps),
        )

    def launched(self, chain: LaunchChain, made: Made, held: Made | None) -> KvmVm:
        """The VM that was made so. Raises LearnedError if it is not what it was to be."""
        whole = made if held is None else held
        _check_tsc_after(chain.steps, whole, self.state, chain.tsc)
        return KvmVm.adopt(chain.steps, whole, "private-file")

    def launch_error(self, made: Made) -> Exception:
        """What it means that it failed."""
        assert made.failure is not None
        return _error_of(made.failure, 1, self.state.vcpus)


@attrs.frozen(eq=False)
class _Kept:
    """A blueprint, and what it was made of: the very same objects, for to compare their contents takes as long."""

    plan: RestorePlan
    devices: int
    tsc_khz: int | None
    blueprint: RestoreBlueprint

    def is_of(self, plan: RestorePlan, devices: int, tsc_khz: int | None) -> bool:
        same = self.plan.saved is plan.saved and self.plan.layers is plan.layers
        mine = (self.plan.track_dirty, self.plan.ring_bytes, self.devices, self.tsc_khz)
        return same and mine == (plan.track_dirty, plan.ring_bytes, devices, tsc_khz)


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
    shell = ShellShape(
        memory_bytes=memory_bytes,
        vcpus=saved.vcpus,
        devices=devices,
        track_dirty=plan.track_dirty,
        ring=tracking_ring(memory_bytes, plan.ring_bytes) if plan.track_dirty else None,
    )
    shape = Shape(
        shell=shell,
        pieces=_pieces(memory_bytes, tuple(layer.map for layer in plan.layers)),
        layers=len(plan.layers),
        vcpus=state.vcpu_places,
        vm=state.vm_places,
        high=tuple(state.board.high),
    )
    return RestoreBlueprint(shape, state, tuple(layer.fd for layer in plan.layers), Pinned(state.arena))


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


# -- running them ------------------------------------------------------------------------------------------------------


class LearnedError(Exception):
    """This host's time stamp counters are not as was assumed; ``_tsc_plan`` knows now."""


class _Host:
    takes_offsets = True
    """Whether it knows KVM_VCPU_TSC_OFFSET (Linux 5.16), until it says that it does not."""
    fixed_offset: int | None = None
    """What the guests of a KVM have that takes offsets and heeds none: their TSC is the host's."""

    @classmethod
    def learn_offset(cls, told: int, shown: TscOffset | None) -> None:
        """By a vCPU that was told an offset, and has not run yet."""
        if shown is not None:
            cls.fixed_offset = None if shown == TscOffset.of(told) else shown.low


def offset_in_effect(told: int) -> int:
    """What a vCPU's TSC is ahead of the host's, once it was told an offset."""
    return told if _Host.fixed_offset is None else _Host.fixed_offset


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
        except LearnedError:
            continue


def _run(program: Program, given: Sequence[int], timeline: Timeline, count: int, vcpus: Sequence[VcpuState]) -> Made:
    """``count``: how many vCPUs it has. ``vcpus``: what they are given."""
    made = program.run(*given)
    timeline.record_later(made.spans)
    if made.failure is None:
        return made
    made.undo()
    raise _error_of(made.failure, count, vcpus)


def _error_of(failure: Failure, count: int, vcpus: Sequence[VcpuState]) -> Exception:
    if failure.name.startswith(TSC_OFFSET_STEP):
        _Host.takes_offsets = False
        return LearnedError()
    return setting_error(failure, vcpus) or _memory_error(failure) or creation_error(failure, count)


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
        raise LearnedError


def held_in(made: Made, steps: Creation) -> tuple[int, ...]:
    """What a chain is told of a shell."""
    return (made[steps.vm], made[steps.memory], *(made[vcpu.fd] for vcpu in steps.vcpus))


def _signed(value: int) -> int:
    return (value + (_WORD >> 1)) % _WORD - (_WORD >> 1)
