"""From VM.restore to the guest's first word, with its working set made present ahead and without, and the page faults.

The guest reads and writes pages before it speaks. The first restore of a snapshot finds out which; all later ones can
prefetch them. Both are timed to the moment when the output is in the program's hands.
"""

from __future__ import annotations

import attrs

from _bench.bench import Bench, Skipped
from _bench.figure import Figure
from _bench.saved import CONDITIONS, READS, WRITES, Awaited, kvm_of, middle, saved
from asyncvmm.events.snapshot_types import RestoreFirstGuestEvent
from asyncvmm.snapshot.snapshot import Snapshot
from asyncvmm.vm import VM

WORK = b"w"
WARM_UP = 2


@attrs.define
class Side:
    """The restores of one kind: ms, and page faults of the vCPU's thread until the guest was heard of."""

    prefetch: bool
    took: list[float] = attrs.field(factory=list)
    mapped: list[float] = attrs.field(factory=list)
    first_exit: list[float] = attrs.field(factory=list)
    minor: list[float] = attrs.field(factory=list)
    major: list[float] = attrs.field(factory=list)

    async def sample(self, snapshot: Snapshot) -> None:
        """Restore once."""
        first = Awaited(RestoreFirstGuestEvent)
        async with await VM.restore(snapshot, prefetch=self.prefetch, prepare=first.prepare) as vm:
            event = await first.wait()
            assert isinstance(event, RestoreFirstGuestEvent)
            marks = kvm_of(vm).restored
            assert marks is not None
            called_ns = vm.timeline.start_ns + event.t_ns - event.duration_ns
            self.took.append(event.duration_ns / 1e6)
            self.mapped.append((marks.mapped_ns - called_ns) / 1e6)
            self.first_exit.append(((marks.first_exit_ns or 0) - called_ns) / 1e6)
            self.minor.append(event.minor_faults or 0)
            self.major.append(event.major_faults or 0)

    def begin(self) -> None:
        """What was found so far was warming up."""
        for samples in (self.took, self.mapped, self.first_exit, self.minor, self.major):
            samples.clear()

    def detail(self) -> dict[str, float]:
        """Medians."""
        return {
            "mapped_ms": middle(self.mapped),
            "first_exit_ms": middle(self.first_exit),
            "minor_faults": middle(self.minor),
            "major_faults": middle(self.major),
        }


async def measure(bench: Bench) -> list[Figure]:
    """restore_first_guest_event, and restore_faults."""
    ahead, lazy = Side(prefetch=True), Side(prefetch=False)
    async with saved(bench, WORK) as snapshot:
        rounds = bench.rounds(30, 3)
        for number in range(WARM_UP + rounds):
            await lazy.sample(snapshot)
            await ahead.sample(snapshot)
            if number < WARM_UP:
                ahead.begin()
                lazy.begin()
        if not snapshot.working_set:
            raise Skipped("no restore has found a working set")
    return [_times(ahead, lazy), _faults(ahead, lazy)]


def _times(ahead: Side, lazy: Side) -> Figure:
    return Figure(
        name="restore_first_guest_event",
        unit="ms",
        ours=ahead.took,
        peer_name="the same without prefetch",
        peer=lazy.took,
        conditions={**CONDITIONS, "pages_read": READS, "pages_written": WRITES},
        detail={"prefetched": ahead.detail(), "not": lazy.detail()},
    )


def _faults(ahead: Side, lazy: Side) -> Figure:
    return Figure(
        name="restore_faults",
        unit="minor faults",
        ours=ahead.minor,
        peer_name="the same without prefetch",
        peer=lazy.minor,
        conditions={**CONDITIONS, "pages_read": READS, "pages_written": WRITES},
    )
