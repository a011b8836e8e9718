"""Linux's own driver of the VM generation ID: a clone's kernel notices that it is another one, and mixes the ID in."""

from __future__ import annotations

from pathlib import Path

import anyio

from asyncvmm import VM, VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.guest.image import find_image
from asyncvmm.snapshot.snapshot import Snapshot
from tests.lab.conftest import PATIENCE_S

NOTICE = "crng reseeded due to virtual machine fork"
"""What add_vmfork_randomness of drivers/char/random.c says once the generator is seeded."""

SETTLED, NOTICED = b"settled\n", b"noticed\n"
LOOK = f'until dmesg | grep -q "{NOTICE}"; do sleep 0.1; done'
WORKLOAD = ("sh", "-c", f"head -c 1 /dev/random >/dev/null; echo settled; {LOOK}; echo noticed")


async def saved_while_settled(config: VMConfig) -> Snapshot:
    """One that has seen no other generation than its first."""
    async with VM(config) as vm:
        reader = vm.console.subscribe()
        await vm.boot()
        assert NOTICED not in await read_to(reader, SETTLED)
        return await vm.snapshot(then="stop")


async def read_to(reader: ConsoleReader, end: bytes) -> bytes:
    said = b""
    while end not in said.replace(b"\r\n", b"\n"):
        said += await anext(reader)
    return said


async def story(config: VMConfig) -> None:
    readers: list[ConsoleReader] = []
    with anyio.fail_after(PATIENCE_S):
        snapshot = await saved_while_settled(config)
        async with (
            snapshot,
            await VM.restore(snapshot, prepare=lambda vm: readers.append(vm.console.subscribe())) as vm,
        ):
            await read_to(readers[0], NOTICED)
            assert await vm.events.exit == 0


def test_a_clones_kernel_notices_its_new_generation(small_kernel: Path) -> None:
    config = VMConfig(kernel=small_kernel, initrd=find_image().initrd, memory_mib=128, accel="kvm", workload=WORKLOAD)
    anyio.run(story, config, backend_options={"use_uvloop": True})
