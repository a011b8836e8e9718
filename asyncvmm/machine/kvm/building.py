"""A KVM machine being made, by boot or by restore: the VM, its board, its vCPU threads. Blocking, for worker threads.

Whoever awaits a step may be cancelled, its thread is not: each step looks first whether the machine was given up, and
``end_threads`` waits for the step that is under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import attrs

from asyncvmm.effects import Stopped
from asyncvmm.errors import HostError, SnapshotDamaged, SnapshotMismatch
from asyncvmm.machine.base import BootPlan
from asyncvmm.machine.kvm.dirty import DirtyLog
from asyncvmm.machine.kvm.fastpath.binding import Fastpath
from asyncvmm.machine.kvm.fastpath.binding import load as load_library
from asyncvmm.machine.kvm.guest_tsc import GuestTsc
from asyncvmm.machine.kvm.loading import Prepared, prepare
from asyncvmm.machine.kvm.output import Output
from asyncvmm.machine.kvm.platform import Board, Outlets
from asyncvmm.machine.kvm.vm import KvmVm
from asyncvmm.machine.kvm.working_set import prefetch
from asyncvmm.timing.timeline import Timeline

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.devices import DeviceSet
    from asyncvmm.machine.kvm.launch import Launch
    from asyncvmm.machine.kvm.restoring import RestoreBlueprint, Shell
    from asyncvmm.machine.kvm.state.board import BoardState
    from asyncvmm.machine.kvm.vcpu import FirstRun, Vcpu
    from asyncvmm.machine.saved import RestorePlan, SavedMachine
    from asyncvmm.snapshot.memory_map import Run


@attrs.frozen(kw_only=True)
class Joints:
    """What a machine joins to its parts. outlets: the board's. halt: is told why a vCPU cannot run on."""

    outlets: Callable[[], Outlets]
    halt: Callable[[Stopped], None]
    output: Output
    devices: DeviceSet | None


class Building:
    """The parts of one machine, there as they come: ``vm``, then ``board`` and what belongs to it."""

    def __init__(self, plan: BootPlan, timeline: Timeline, joints: Joints) -> None:
        self.vm: KvmVm | None = None
        self.board: Board | None = None
        self.fastpath: Fastpath | None = None
        self.guest_tsc: GuestTsc | None = None
        self.log: DirtyLog | None = None
        self.held: Sequence[Run] | None = None
        """Of a restored VM: what files hold of its memory."""
        self.tracked = plan.track_dirty
        self._plan = plan
        self._timeline = timeline
        self._joints = joints
        self._prepared: Prepared | None = None
        self._blueprint: RestoreBlueprint | None = None
        self._serves: Callable[[FirstRun | None], None] | None = None
        self.given_up = False
        self._lock = threading.Lock()

    def give_up(self) -> None:
        """Begin no further step. On any thread."""
        self.given_up = True

    def prepare(self) -> None:
        """Read the files and decide the layout. Raises ConfigError, HostError."""
        with self._lock:
            if not self.given_up and self._prepared is None:
                self._prepared = prepare(self._plan, self._timeline)

    @property
    def is_prepared(self) -> bool:
        """Whether that was done."""
        return self._prepared is not None

    def boot(self) -> None:
        """All steps of a boot."""
        self.create()
        self.launch()

    def rebuild(self, plan: RestorePlan, shell: Shell | None = None) -> None:
        """All steps of a restore."""
        self.recreate(plan, shell)
        self.hold()

    def create(self) -> None:
        """Create the VM, loaded. Raises HostError, ConfigError."""
        self.prepare()
        with self._lock:
            if not self.given_up and self._prepared is not None:
                vm = self.vm = KvmVm(self._prepared.blueprint, self._timeline)
                self._let_go()
                self.log = _log(vm, is_on=self.tracked)

    def launch(self) -> None:
        """Let the guest run: here, so that it need not wait for the loop, nor the loop for its threads to start."""
        with self._lock:
            if not self.given_up and self.vm is not None:
                with self._timeline.phase("vcpu_start"):
                    self._join_board(self.vm)
                    self._start_vcpus(self.vm)

    def recreate(self, plan: RestorePlan, shell: Shell | None = None) -> None:
        """Create the VM as it was saved, in ``shell`` if there is one that fits, which is used up in any case.

        Raises SnapshotDamaged, SnapshotMismatch, HostError.
        """
        from asyncvmm.machine.kvm.restoring import restore_blueprint

        with self._lock:
            if self.given_up:
                return
            _check_size(plan.saved, self._plan)
            blueprint = self._blueprint = restore_blueprint(plan, self._plan.devices.count)
            vm = self.vm = blueprint.fill(shell, self._timeline) if shell else blueprint.run(self._timeline)
            self._keep_account(vm, plan)
            if plan.touched or plan.written:
                with self._timeline.phase("memory_state_write"):
                    prefetch(vm.memory, plan.touched, plan.written)

    def hold(self) -> None:
        """Make the restored VM's vCPU threads, which wait."""
        with self._lock:
            if not self.given_up and self.vm is not None and self._blueprint is not None:
                with self._timeline.phase("device_state_restore"):
                    self._join_board(self.vm, self._blueprint.board).change_generation(self.vm.memory.write)
                for vcpu in self.vm.vcpus:
                    vcpu.order("pause")
                self._start_vcpus(self.vm)

    def expect(self, launch: Launch, plan: RestorePlan) -> None:
        """Make for a VM that is being launched what can be made before it is there. On the loop.

        Raises SnapshotMismatch, HostError.
        """
        _check_size(plan.saved, self._plan)
        with self._timeline.phase("device_state_restore"):
            self._make_board(launch.blueprint.board)

    def adopt(self, launch: Launch, plan: RestorePlan) -> None:
        """Make it this machine's VM once it is mapped; its vCPU waits, unless its guest runs. On the loop.

        Raises as Launch.take does.
        """
        with self._lock:
            vm = self.vm = launch.take(self._timeline)
            self._serves = self._adopt_vcpu(vm.vcpus[0], launch)
            self._keep_account(vm, plan)
            with self._timeline.phase("device_state_restore"):
                self.guest_tsc = GuestTsc.at_offset(launch.tsc_offset)
                board = self._join_board(vm)
                if not launch.opened:
                    board.change_generation(vm.memory.write)

    def forget(self) -> None:
        """What was made for a VM that did not come."""
        self.board = self.fastpath = self.guest_tsc = None

    def serve(self, launch: Launch) -> None:
        """Answer the exits of its guest from now on, or hold it. On the loop."""
        assert self.vm is not None
        assert self._serves is not None
        launch.hand_over(_thread_name(self._plan, self.vm.vcpus[0]), self._serves)
        self._serves = None

    def _adopt_vcpu(self, vcpu: Vcpu, launch: Launch) -> Callable[[FirstRun | None], None]:
        assert self.board is not None
        if not launch.opened:
            vcpu.order("pause")
        return vcpu.adopt(launch, launch.ident, launch.faults, self.board.bus, self._joints.halt, self.fastpath)

    def end_threads(self) -> KvmVm | None:
        """End what is being built or runs."""
        with self._lock:
            vm = self.vm
            self._let_go()
        for vcpu in vm.vcpus if vm else ():
            vcpu.order("stop")
        for vcpu in vm.vcpus if vm else ():
            vcpu.join()
        return vm

    def _let_go(self) -> None:
        """Of what was prepared: the files are loaded, or never will be."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.close()

    def _keep_account(self, vm: KvmVm, plan: RestorePlan) -> None:
        self.tracked, self.held = plan.track_dirty, [run for layer in plan.layers for run in layer.map.data]
        self.log = _log(vm, is_on=self.tracked)

    def _make_board(self, state: BoardState | None = None) -> Board:
        self.fastpath = _fastpath(self._joints.output.posted_fd)
        board = self.board = Board(self._joints.outlets(), self.fastpath, state)
        self._joints.output.connect(board, self.fastpath)
        return board

    def _join_board(self, vm: KvmVm, state: BoardState | None = None) -> Board:
        board = self.board or self._make_board(state)
        board.announce_output()
        if self._joints.devices is not None:
            with self._timeline.phase("device_attach"):
                self._joints.devices.attach(vm, board.bus)
        if self.guest_tsc is None:
            self.guest_tsc = GuestTsc.of([vcpu.fd for vcpu in vm.vcpus])
        return board

    def _start_vcpus(self, vm: KvmVm) -> None:
        assert self.board is not None
        for vcpu in vm.vcpus:
            vcpu.start(_thread_name(self._plan, vcpu), self.board.bus, self._joints.halt, self.fastpath)


def _thread_name(plan: BootPlan, vcpu: Vcpu) -> str:
    return f"{plan.name}-vcpu{vcpu.index}"


def device_section(saved: SavedMachine) -> bytes:
    """What was saved of the virtio devices. Raises SnapshotDamaged."""
    if "devices" not in saved.sections:
        raise SnapshotDamaged("sections", expected="devices", found=", ".join(sorted(saved.sections))[:200])
    return saved.sections["devices"]


def _check_size(saved: SavedMachine, plan: BootPlan) -> None:
    wanted, found = (plan.memory_mib << 20, plan.vcpus), (saved.memory.size, saved.vcpus)
    if saved.accel != "kvm":
        raise SnapshotMismatch("snapshot", expected="one of a KVM machine", found=f"one of {saved.accel}")
    if wanted != found:
        raise SnapshotMismatch("machine", expected="{} bytes of memory, {} vCPUs".format(*wanted), found=found)


def _fastpath(posted_fd: int) -> Fastpath | None:
    """None where the library cannot be loaded. Raises HostError."""
    library = load_library()
    try:
        return None if library is None else Fastpath(library, posted_fd)
    except OSError as error:
        raise HostError("serial output", expected="memory for what is posted", found=error.strerror) from error


def _log(vm: KvmVm, *, is_on: bool = False) -> DirtyLog:
    memory = vm.memory
    if not vm.rings:
        return DirtyLog(vm.fd, memory.regions, memory.host_address, memory.host_writes, is_on=is_on)
    from asyncvmm.machine.kvm.dirty_ring import DirtyRing

    log = DirtyRing(vm.fd, memory.regions, memory.host_address, memory.host_writes, vm.rings, is_on=is_on)
    for vcpu in vm.vcpus:
        vcpu.on_ring_full = partial(log.make_room, vcpu.index)
    return log
