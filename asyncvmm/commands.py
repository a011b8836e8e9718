"""What the commands do, once the command line is understood. Output on stdout, progress and complaints on stderr."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
import orjson

from asyncvmm.config import VMConfig
from asyncvmm.console import ConsoleReader
from asyncvmm.errors import ConfigError, HostError
from asyncvmm.events.outputs import Output, WriteWatch, open_output
from asyncvmm.events.types import Event, GuestExit, GuestPreExec, VmTimingEvent
from asyncvmm.vm import VM

if TYPE_CHECKING:
    from asyncvmm.guest.rootfs import Rootfs

OUTPUT_BYTES = 256 << 20
"""Bytes of a workload's output that are held for a stdout that is behind."""

_RETRY_S = 0.05
_PIECE = 1 << 20


async def boot(config: VMConfig, jsonl: str | None, progress: bool = False) -> None:
    """``asyncvmm boot``: to READY, one summary line (or JSON lines, or live progress), power off."""
    async with VM(config) as vm:
        if jsonl is not None:
            vm.stream_to(jsonl)
        with shown(vm, progress, jsonl):
            timing = await vm.boot()
        if jsonl != "-" and not progress:
            print(f"ready in {timing.total_ms} ms on {vm.accel}", file=sys.stderr)
        await vm.shutdown()


async def run(config: VMConfig, jsonl: str | None, progress: bool = False) -> int:
    """``asyncvmm run``: the workload's console output on stdout; gives its exit code.

    Raises ConfigError for JSON lines on stdout, HostError if some output was lost to a stdout that was too slow.
    """
    if jsonl == "-":
        raise ConfigError("--jsonl of run", expected="a file", found="stdout, which the workload's output has")
    async with VM(config) as vm:
        if jsonl is not None:
            vm.stream_to(jsonl)
        output = WorkloadOutput(vm)
        with closing(open_output("-")) as stdout:
            with shown(vm, progress, jsonl, GuestPreExec):
                await vm.boot()
                await vm.events.pre_exec
            await output.copy_to(stdout)
        code = await vm.events.exit
        await vm.shutdown()
    return code


def shown(vm: VM, wanted: bool, jsonl: str | None, *until: type[Event]) -> AbstractContextManager[object]:
    """The boot live on stderr for the time of a block, to its timing and ``until``; nothing where it is not wanted."""
    if not wanted:
        return nullcontext()
    from asyncvmm.progress import Progress, progress_line

    return Progress(vm.events, progress_line(jsonl), (VmTimingEvent, *until))


class WorkloadOutput:
    """The console from ``workload-pre-exec`` to ``workload-exit``, at most ``capacity`` bytes of it held."""

    def __init__(self, vm: VM, capacity: int = OUTPUT_BYTES) -> None:
        self._vm = vm
        self._capacity = capacity
        self._reader = ConsoleReader(0)
        vm.events.attach(self._on_event)

    async def copy_to(self, output: Output) -> None:
        """Write all of it to ``output``, once it has begun. Raises HostError at the end if some of it was lost."""
        async for chunk in self._reader:
            await write_all(output, chunk)
        if self._reader.lost:
            found = f"{self._reader.lost} bytes of the workload's output lost"
            raise HostError("stdout", expected="a reader that keeps up", found=found)

    def _on_event(self, event: object) -> None:
        if isinstance(event, GuestPreExec):
            self._reader = self._vm.console.subscribe(self._capacity)
        elif isinstance(event, GuestExit):
            self._reader.end()


async def write_all(output: Output, data: bytes) -> None:
    """Write ``data``, waiting for a slow reader on the loop: a thread that waits in write(2) could not be cancelled.

    Raises BrokenPipeError if the reader is gone, HostError if the output is dead otherwise.
    """
    for start in range(0, len(data), _PIECE):
        rest = bytearray(data[start : start + _PIECE])
        while rest:
            count = _write_some(output, rest)
            del rest[:count]
            if not count:
                await _room(output)


def _write_some(output: Output, data: bytearray) -> int:
    try:
        return output.write(data)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HostError("stdout", expected="something to write to", found=error.strerror) from error


async def _room(output: Output) -> None:
    try:
        watch = WriteWatch(output.fd)
    except OSError:  # what epoll does not take
        await anyio.sleep(_RETRY_S)
        return
    with closing(watch):
        await anyio.wait_readable(watch.fd)


def doctor(*, as_json: bool) -> None:
    """``asyncvmm doctor``: a page on a terminal, one JSON object elsewhere or when asked."""
    from rich.console import Console

    from asyncvmm.doctor import diagnose, render

    report = diagnose()
    if as_json or not sys.stdout.isatty():
        sys.stdout.write(orjson.dumps(report.to_dict(), option=orjson.OPT_APPEND_NEWLINE).decode())
    else:
        render(report, Console())


def build(name: str, kernel: Path | None, modules: Path | None, rootfs: Rootfs | None = None) -> None:
    """``asyncvmm image build``: progress on stderr, the image's directory on stdout."""
    from asyncvmm.guest.image import build_image

    def report(line: str) -> None:
        print(line, file=sys.stderr)

    print(build_image(name, kernel=kernel, modules=modules, rootfs=rootfs, report=report).directory)


def list_built() -> None:
    """``asyncvmm image list``: one image a line."""
    from asyncvmm.guest.image import list_images

    for image in list_images():
        print(f"{image.name}\t{image.directory}")


def print_schema() -> None:
    """``asyncvmm schema``: the JSON Schema of every event line."""
    from asyncvmm.events.schema import schema

    sys.stdout.write(orjson.dumps(schema(), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode())
