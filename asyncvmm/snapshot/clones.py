"""Clones: many VMs of one snapshot, in one process.

Each VM's memory has an mmu notifier in the one address space they share, and a page fault of any of them calls all:
the more there are, the dearer each gets. Beyond MOST_CLONES that is more than what is gained.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import attrs

from asyncvmm.config import VMConfig
from asyncvmm.errors import ConfigError
from asyncvmm.snapshot.hooks import call_plain, check_hook

if TYPE_CHECKING:
    from asyncvmm.snapshot.snapshot import Snapshot
    from asyncvmm.vm import VM

MOST_CLONES = 100
"""VMs of one snapshot in one process, unless the caller insists."""

Prepare = Callable[["VM", int], None]
Configure = Callable[[VMConfig, int], VMConfig]
Identity = Callable[["VM", int], Awaitable[None]]


@attrs.frozen
class Hooks:
    """What the caller does to each clone, see Snapshot.clones."""

    prepare: Prepare | None = None
    configure: Configure | None = None
    identity: Identity | None = None


@asynccontextmanager
async def make_clones(
    snapshot: Snapshot,
    count: int,
    hooks: Hooks,
    *,
    at_once: int | None,
    track_dirty: bool,
    beyond_bend: bool,
) -> AsyncIterator[list[VM]]:
    """Snapshot.clones."""
    _check(count, at_once, beyond_bend)
    for flag, value in (("track_dirty", track_dirty), ("beyond_bend", beyond_bend)):
        if not isinstance(value, bool):
            raise ConfigError(flag, expected="True or False", found=repr(value)[:80])
    _check_hooks(hooks)
    if count > 1 and hooks.configure is None and (net := snapshot.config.net) is not None and net.publish:
        raise ConfigError("clones", expected="configure=, for only one VM can have published ports", found=count)
    vms: dict[int, VM] = {}
    try:
        slots = anyio.Semaphore(at_once or 2 * (os.cpu_count() or 1))
        await _make(snapshot, count, vms, hooks, slots, track_dirty)
        yield [vms[number] for number in range(count)]
    finally:
        await _stop(list(vms.values()))


def _check(count: int, at_once: int | None, beyond_bend: bool) -> None:
    for what, value in (("clones", count), ("at_once", 1 if at_once is None else at_once)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(what, expected="a whole number above 0", found=repr(value))
    if count > MOST_CLONES and not beyond_bend:
        raise ConfigError("clones", expected=f"at most {MOST_CLONES} in one process, or beyond_bend=True", found=count)


def _check_hooks(hooks: Hooks) -> None:
    for name, hook in attrs.asdict(hooks, recurse=False).items():
        check_hook(name, hook)


async def _make(
    snapshot: Snapshot, count: int, vms: dict[int, VM], hooks: Hooks, slots: anyio.Semaphore, track_dirty: bool
) -> None:
    from asyncvmm.vm import VM

    async def one(number: int) -> None:
        def prepare(vm: VM) -> None:
            vm._clone = number if count > 1 else None
            if hooks.prepare is not None:
                call_plain("prepare", hooks.prepare, vm, number)

        try:
            configure = hooks.configure or _apart
            vms[number] = vm = await VM.restore(
                snapshot,
                prepare=prepare,
                configure=lambda config: configure(config, number),
                track_dirty=track_dirty,
            )
        finally:
            slots.release()
        if hooks.identity is not None:
            await _identify(hooks.identity, vm, number)

    try:
        async with anyio.create_task_group() as group:
            for number in range(count):
                await slots.acquire()  # nothing is there of a clone before its turn, however many were asked for
                group.start_soon(one, number)
    except BaseExceptionGroup as failed:
        raise _first(failed) from None


async def _identify(hook: Identity, vm: VM, number: int) -> None:
    given: object = hook(vm, number)
    if not isinstance(given, Awaitable):
        raise ConfigError("identity", expected="an async function (VM, number)", found=repr(given)[:80])
    await given


def _first(failed: BaseException) -> BaseException:
    """One error of many that are alike."""
    while isinstance(failed, BaseExceptionGroup):
        failed = failed.exceptions[0]
    return failed


def _apart(config: VMConfig, number: int) -> VMConfig:
    """What only one VM can have on this host, for each another one: the vsock's path gets the number behind it."""
    if config.vsock is None or config.vsock.uds_path is None:
        return config
    path = config.vsock.uds_path
    return attrs.evolve(config, vsock=attrs.evolve(config.vsock, uds_path=path.with_name(f"{path.name}.{number}")))


async def _stop(vms: list[VM]) -> None:
    with anyio.CancelScope(shield=True):
        async with anyio.create_task_group() as group:
            for vm in vms:
                group.start_soon(vm.stop)
