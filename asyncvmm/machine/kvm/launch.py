"""Launch: a restore under way on a runner's thread, outside of the interpreter; the loop makes the VM's Python half
beside it or, where they share a processor, after it.

    prepared = prepare_launch(plan, in_shell=False)
    prepared.arm()                           what can be made ahead is, see ahead.py

    launch = prepared.begin(None)            as little as can be is between the call and the chain of calls
    launch.decide(True)                      the guest may be entered as soon as its state is there
    await launch.mapped()                    it is; the guest may run already
    vm = launch.take(timeline)
    launch.hand_over(...)                    from here on its exits are answered

What a guest does before its first exit is answered nobody else can see: a launch can be given up until then.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from asyncio import get_running_loop
from collections.abc import Callable
from contextlib import suppress
from ctypes import addressof
from typing import TYPE_CHECKING, Final

import attrs

from asyncvmm.machine.kvm.ahead import Ahead
from asyncvmm.machine.kvm.bell import Bell
from asyncvmm.machine.kvm.fastpath.binding import Library, load
from asyncvmm.machine.kvm.fastpath.chain import At
from asyncvmm.machine.kvm.faults import NO_FAULTS, Faults
from asyncvmm.machine.kvm.launch_chain import LaunchChain
from asyncvmm.machine.kvm.restoring import (
    OFFSET_SLOT,
    RestoreBlueprint,
    Shell,
    held_in,
    offset_in_effect,
    restore_blueprint,
)
from asyncvmm.machine.kvm.runner import IDLE_NAME, Runner, give_back, take
from asyncvmm.machine.kvm.vcpu import KICK_SIGNAL, FirstRun
from asyncvmm.machine.waiting import in_thread_or_here

if TYPE_CHECKING:
    from asyncvmm.machine.kvm.fastpath.chain import Made
    from asyncvmm.machine.kvm.vm import KvmVm
    from asyncvmm.machine.saved import RestorePlan
    from asyncvmm.timing.timeline import Timeline

_UNDECIDED: Final = 0
_OPEN: Final = 1
_SHUT: Final = 2


LOOK_AFTER_S: Final = 0.001
"""Until it is looked whether a guest that has not come out is in."""


class Launch:
    """``blueprint`` is what is restored, ``loop`` the one that ran when it was made. All but ``join`` and ``native_id``
    is for that loop."""

    _runner: Runner
    """From ``send`` on."""

    def __init__(self, blueprint: RestoreBlueprint, chain: LaunchChain, library: Library) -> None:
        """Nothing is under way before ``send``; ``disarm`` gives it up until then. Raises OSError."""
        self.blueprint = blueprint
        self.opened = False
        self._chain = chain
        self._held: Made | None = None
        self._handed, self._over, self._lock = _locked(), _locked(), threading.Lock()
        self._taken = self._given_up = False
        self._kickable = True
        self._serves: Callable[[FirstRun | None], None] | None = None
        self._may_be_entered = not blueprint.board.ged.heeds_generation  # else its memory is written before
        self._slots = chain.lay_out()
        self._ahead = Ahead(chain, self._slots)
        self._bell = Bell(library, self._on_mapped)
        self.loop = self._bell.loop
        self._mapped: asyncio.Future[None] = self.loop.create_future()
        self._order = chain.order(self._slots, self._bell.fd, self._ahead.steps)
        self._order_address = addressof(self._order)

    def send(self, runner: Runner, shell: Shell | None, enters: bool | None) -> None:
        """Send ``runner``, which is the launch's from now on, as ``shell`` is. Once. ``enters``: whether the guest is
        entered, None if ``decide`` will say. If that is broken off, nothing is left of it."""
        try:
            self._runner = runner
            self.opened = enters is True and self._may_be_entered
            gate = _UNDECIDED if enters is None else _OPEN if self.opened else _SHUT
            if shell is not None:
                self._held = shell.take()
                self._chain.program.give(self._slots, len(self._chain.given), held_in(self._held, self._chain.steps))
            self._ahead.is_held = False
            runner.send(self._order_address, gate, self._serve)
        except BaseException:  # a signal's handler raised it
            self._break_off()
            raise

    @property
    def is_begun(self) -> bool:
        """Whether ``send`` has what it was given."""
        return hasattr(self, "_runner")

    def _break_off(self) -> None:
        self._given_up = True
        if self._runner.is_sent or not self._kickable:  # or it was, and is done with it
            self._give_up()
            self._bell.deafen()
            self.join()
        else:
            self._bell.close()
            self._ahead.is_held = True
            self._ahead.undo()
            self._runner.recall()
            if self._held is not None:
                self._held.undo()

    def disarm(self) -> None:
        """It will not be sent. On any thread."""
        self._bell.drop()
        self._ahead.undo()

    # -- on the loop -------------------------------------------------------------------------------------------------

    def decide(self, enters: bool) -> None:
        """Let the guest be entered, unless something must be done to its memory before; or have the vCPU held. Once."""
        self.opened = enters and self._may_be_entered
        self._decide(_OPEN if self.opened else _SHUT)

    def _decide(self, gate: int) -> None:
        with self._lock:
            if self._kickable:  # else it serves another launch by now
                self._runner.decide(gate)

    async def go_first(self) -> None:
        """Let the runner be done with the chain before the loop does more, where that pays: on the loop's own processor
        each would keep the other waiting; and to create a VM the kernel waits for its own threads, and for processors
        to leave what they are at. Raises nothing of the chain's."""
        if self._held is None or self._runner.is_here():
            try:
                await self.mapped()
            except Exception:
                return  # ``mapped`` raises it

    async def mapped(self) -> None:
        """Wait until memory and state are in place.

        Raises as RestoreBlueprint.run does, and LearnedError where it must be done the other way.
        """
        if self.opened and not self._mapped.done():
            self.loop.call_later(LOOK_AFTER_S, self._look)
        await self._mapped

    def _look(self) -> None:
        """The bell of a guest that was let in at once is rung when it has come out: it may be in for long."""
        if self._mapped.done() or self._given_up:
            return
        with self._lock:
            if not self._kickable:  # it has failed, which the loop is about to be told; the runner may serve another
                return
            is_made = self._runner.has_made(self._order.count)
        if is_made:
            self._bell.deafen()
            self._on_mapped()
        else:
            self.loop.call_later(LOOK_AFTER_S, self._look)

    def take(self, timeline: Timeline) -> KvmVm:
        """The VM, once it is mapped, the caller's from now on; its vCPU waits for ``hand_over``. The chain's phases go
        to ``timeline``. Raises as ``mapped`` does."""
        made = self._made(self._order.count)
        made.count_from_beginning(self._ahead.steps)
        timeline.record_later(made.spans)
        vm = self.blueprint.launched(self._chain, made, self._held)
        self._taken = True
        return vm

    def hand_over(self, name: str, serves: Callable[[FirstRun | None], None]) -> None:
        """Have the vCPU of the VM that was taken served so, on its thread, with how its first run ended if it was
        entered. Raises nothing."""
        self._runner.thread.name = name
        self._serves = serves
        self._release()

    @property
    def mapped_ns(self) -> int:
        """When memory and state were in place, CLOCK_MONOTONIC."""
        return self._made(self._order.count).ended_ns(len(self._chain.program.names) - 1)

    @property
    def tsc_offset(self) -> int:
        """How far the guest's TSC is ahead of the host's."""
        return offset_in_effect(self._made(0)[At(OFFSET_SLOT)])

    @property
    def faults(self) -> Faults:
        """Page faults of the thread before the guest was entered."""
        return Faults(*self._runner.errand.faults)

    async def aclose(self) -> None:
        """Give it up, unless it was taken: nothing is left of it. May be called again."""
        if not self._taken and not self._given_up:
            self._give_up()
            self._bell.deafen()
            await in_thread_or_here(self.join)

    def _give_up(self) -> None:
        self._given_up = True
        if self._mapped.done() and not self._mapped.cancelled():
            self._mapped.exception()  # counts as seen, or asyncio would complain of it later
        self._decide(_SHUT)
        self._kick()

    def _on_mapped(self) -> None:
        if not self._mapped.done():
            self._mapped.set_result(None)

    def _on_failure(self, error: BaseException) -> None:
        self._bell.deafen()
        if not self._mapped.done() and not self._given_up:
            self._mapped.set_exception(error)

    def _kick(self) -> None:
        with self._lock:
            if self._kickable:
                signal.pthread_kill(self._runner.ident, KICK_SIGNAL)

    # -- on any thread -----------------------------------------------------------------------------------------------

    @property
    def ident(self) -> int:
        """The thread that makes it, as signals find it."""
        return self._runner.ident

    @property
    def native_id(self) -> int | None:
        """The same, as the kernel counts."""
        return self._runner.thread.native_id

    def join(self) -> None:
        """Wait until the thread is done with the VM. Blocks: not for the loop."""
        self._release()
        with self._over:
            pass

    def _release(self) -> None:
        with self._lock:
            if self._handed.locked():
                self._handed.release()

    def _made(self, done: int) -> Made:
        """The run, of whose own steps ``done`` did not fail."""
        return self._chain.program.made(self._slots, self._ahead.steps + done)

    # -- on the runner's thread --------------------------------------------------------------------------------------

    def _serve(self) -> None:
        errand = self._runner.errand
        self._bell.silence()
        try:
            if errand.done < errand.order.count:
                self._fail(self._made(errand.done))
            else:
                self._handed.acquire()
                if self._serves is not None:
                    self._serves(self._first_run())
                elif not self._taken:
                    self._undo(self._made(errand.done))
        finally:
            with self._lock:
                self._kickable = False
            self._runner.thread.name = IDLE_NAME
            self._over.release()

    def _first_run(self) -> FirstRun | None:
        errand = self._runner.errand
        if not errand.entered and not errand.result:
            return None
        faults = Faults(*errand.left_faults) - Faults(*errand.faults) if errand.entered else NO_FAULTS
        return FirstRun(errand.result, errand.entered_ns, errand.left_ns, faults)

    def _fail(self, made: Made) -> None:
        error = self.blueprint.launch_error(made)
        self._undo(made)
        try:
            self.loop.call_soon_threadsafe(self._on_failure, error)
        except RuntimeError:  # the loop has closed
            self._bell.drop()

    def _undo(self, made: Made) -> None:
        made.undo()
        if self._held is not None:
            self._held.undo()


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


@attrs.define(eq=False)
class PreparedLaunch:
    """Restores of one plan, as often as wanted. One of them can be armed, made but for what only the call tells."""

    blueprint: RestoreBlueprint
    chain: LaunchChain
    library: Library
    _armed: list[Launch] = attrs.field(factory=list, init=False)
    _retired: bool = attrs.field(default=False, init=False)
    _lock: threading.Lock = attrs.field(factory=threading.Lock, init=False)

    def arm(self) -> None:
        """Have one armed for the running loop, if there is a descriptor to be had."""
        if not self._armed:
            self._put_back(self._made())

    def disarm(self) -> None:
        """Have none armed. On any thread."""
        while self._armed:
            with suppress(IndexError):  # it is being used at this moment
                self._armed.pop().disarm()

    def retire(self) -> None:
        """Have none armed any more. On any thread."""
        with self._lock:
            self._retired = True
        self.disarm()

    def begin(self, enters: bool | None, shell: Callable[[], Shell | None] | None = None) -> Launch | None:
        """Begin one, ``enters`` as Launch has it. ``shell`` gives a VM made ahead, if there is one. None where it has
        to be done the other way, for now. Raises what ``shell`` does."""
        try:
            launch: Launch | None = self._armed.pop()
        except IndexError:
            launch = self._made()
        if launch is not None and launch.loop is not get_running_loop():
            launch.disarm()
            launch = self._made()
        runner = None if launch is None else take()
        if launch is None or runner is None:
            self._put_back(launch)
            return None
        taken = None
        try:
            taken = None if shell is None else shell()
            if shell is None or taken is not None:
                launch.send(runner, taken, enters)
        finally:
            if not launch.is_begun:
                give_back(runner)
                self._put_back(launch)
            if taken is not None:
                taken.close()
        return launch if launch.is_begun else None

    def _put_back(self, launch: Launch | None) -> None:
        if launch is None:
            return
        with self._lock:
            if not self._retired:
                self._armed.append(launch)
                return
        launch.disarm()

    def _made(self) -> Launch | None:
        try:
            return Launch(self.blueprint, self.chain, self.library)
        except OSError:
            return None


def prepare_launch(plan: RestorePlan, *, in_shell: bool) -> PreparedLaunch | None:
    """Prepare restores of this plan, of a VM without devices and with one vCPU; None where they cannot be launched.
    Blocks. Raises as restore_blueprint does."""
    library = load()
    if library is None:
        return None
    blueprint = restore_blueprint(plan)
    chain = blueprint.launch_chain(plan, in_shell=in_shell)
    return None if chain is None else PreparedLaunch(blueprint, chain, library)
