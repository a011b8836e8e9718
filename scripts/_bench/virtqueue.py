"""What one request costs in the virtqueue's core: popped and pushed back, the rings in plain memory.

Beside it a floor: the same loads and stores of descriptors and ring entries, by struct, with nothing checked and no
object made, which is what Python cannot do without.
"""

from __future__ import annotations

import struct
import time

from _bench.bench import Bench
from _bench.figure import Figure
from _bench.turns import take_turns
from asyncvmm.devices.virtio.memory import GuestView
from asyncvmm.devices.virtio.queue import DESC_F_NEXT, DESC_F_WRITE, Queue

SIZE = 256
BUFFER = 512
DESCRIPTORS, AVAIL, USED, BUFFERS = 0x0000, 0x2000, 0x4000, 0x8000
_DESCRIPTOR = struct.Struct("<QIHH")


async def measure(bench: Bench) -> list[Figure]:
    """virtqueue_request for chains of one and of three descriptors."""
    return [_measure(length, bench.rounds(200, 30)) for length in (1, 3)]


def _measure(length: int, rounds: int) -> Figure:
    memory = bytearray(1 << 20)
    chains = SIZE // length
    _fill(memory, length, chains)
    queue = Queue(SIZE)
    view = GuestView([(0, memoryview(memory))])

    def ours() -> float:
        queue.reset()
        queue.size, queue.descriptors, queue.driver_area, queue.device_area = SIZE, DESCRIPTORS, AVAIL, USED
        queue.enable(view, event_idx=False, indirect=False)
        begin = time.perf_counter_ns()
        while (chain := queue.pop()) is not None:
            queue.push(chain, BUFFER)
        return (time.perf_counter_ns() - begin) / chains

    turns = take_turns(ours, lambda: _floor(memory, length, chains), rounds)
    return Figure(
        name="virtqueue_request",
        unit="ns/request",
        ours=turns.ours,
        peer_name="the same loads and stores in Python, unchecked",
        peer=turns.peer,
        conditions={"python_thread": "idle", "descriptors": length},
        detail={"requests_per_sample": chains},
    )


def _fill(memory: bytearray, length: int, chains: int) -> None:
    """Chains as a driver makes them, all available: readable descriptors, then a writable one."""
    for chain in range(chains):
        for place in range(length):
            index, is_last = chain * length + place, place == length - 1
            flags = DESC_F_WRITE if is_last else DESC_F_NEXT
            _DESCRIPTOR.pack_into(
                memory, 16 * index, BUFFERS + BUFFER * index, BUFFER, flags, 0 if is_last else index + 1
            )
        struct.pack_into("<H", memory, AVAIL + 4 + 2 * chain, chain * length)
    struct.pack_into("<H", memory, AVAIL + 2, chains)


def _floor(memory: bytearray, length: int, chains: int) -> float:
    table, ram = memoryview(memory), memoryview(memory)
    avail = table[AVAIL : AVAIL + 6 + 2 * SIZE].cast("H")
    index_of_used = table[USED : USED + 4].cast("H")
    used = table[USED : USED + 4 + 8 * SIZE].cast("I")
    unpack = _DESCRIPTOR.unpack_from
    begin = time.perf_counter_ns()
    for number in range(chains):
        index = head = avail[2 + number]
        while True:
            address, size, flags, index = unpack(table, 16 * index)
            ram[address : address + size]  # a view of the buffer is what a request is about
            if not flags & DESC_F_NEXT:
                break
        used[1 + 2 * number], used[2 + 2 * number] = head, BUFFER
        index_of_used[1] = number + 1
    return (time.perf_counter_ns() - begin) / chains
