"""The command line: a thin shell over the library. Every AsyncVMMError is one line on stderr and exit code 2.

A reader of stdout that has had enough ends the command as SIGPIPE would, without a line.

Heavy imports happen inside the commands: ``asyncvmm --help`` must not pay for a VMM.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click
from click.exceptions import NoArgsIsHelpError

from asyncvmm.device_options import device_options
from asyncvmm.errors import AsyncVMMError
from asyncvmm.interrupts import ENDING, Ended, ending_signals, exit_code_of, signals_held
from asyncvmm.named_path import NamedPath, NamedText
from asyncvmm.snapshot.command import flatten, inspect, verify
from asyncvmm.standard_streams import EXIT_READER_GONE, hold_standard_streams, stdout_lost

EXIT_ERROR = 2

FILE = NamedPath()
EVENTS = NamedText()

T = TypeVar("T")
Command = Callable[..., None]


class Group(click.Group):
    """A group whose commands end with one line on stderr when asyncvmm refuses or fails."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Parse the command line and run the command."""
        hold_standard_streams()
        with signals_held(), ending_signals(), stdout_lost(EXIT_ERROR):
            return super().main(*args, **options)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        """Parse the command line; ``--help`` is printed here."""
        try:
            return super().make_context(*args, **options)
        except BrokenPipeError:
            sys.exit(EXIT_READER_GONE)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with signals_held(False):
                return super().invoke(ctx)
        except AsyncVMMError as error:
            _refuse(ctx, str(error))
        except NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            ctx.exit(EXIT_ERROR)
        except click.UsageError as error:
            asked = error.ctx or ctx
            _refuse(ctx, f"{error.format_message()} (see {asked.command_path} --help)")
        except KeyboardInterrupt as interrupt:
            ctx.exit(exit_code_of(interrupt))
        except BrokenPipeError:
            sys.stderr.close()
            ctx.exit(EXIT_READER_GONE)


def _refuse(ctx: click.Context, text: str) -> None:
    click.echo(f"asyncvmm: {' '.join(text.split())}", err=True)
    ctx.exit(EXIT_ERROR)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="asyncvmm")
def main() -> None:
    """Event-driven microVMs: boots Linux guests in milliseconds on KVM, in seconds where there is none."""


def vm_options(command: Command) -> Command:
    """The options that ``boot`` and ``run`` share."""
    options = [
        click.option("--image", default="default", show_default=True, metavar="NAME", help="Guest image to boot."),
        click.option("--kernel", type=FILE, metavar="FILE", help="bzImage or vmlinux instead."),
        click.option("--initrd", type=FILE, metavar="FILE", help="Initrd for --kernel."),
        click.option("--cmdline", metavar="TEXT", help="Kernel command line, whole."),
        click.option("--memory", default=256, show_default=True, metavar="MIB", help="Guest memory, MiB."),
        click.option("--vcpus", default=1, show_default=True, metavar="N", help="Virtual CPUs."),
        click.option("--accel", default="auto", show_default=True, metavar="auto|kvm|qemu", help="Machine to use."),
        click.option("--jsonl", type=EVENTS, metavar="PATH|-", help="Write events as JSON lines; - is boot's stdout."),
        click.option("--serial-lines", is_flag=True, help="Make each serial line an event too."),
        click.option("--progress", is_flag=True, help="Show the boot live on stderr if it is a terminal."),
        click.option("--timeout", default=300.0, show_default=True, metavar="S", help="Seconds until READY at most."),
    ]
    command = device_options(command)
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@vm_options
def boot(jsonl: str | None, progress: bool, **asked: Any) -> None:
    """Boot a guest, report its timings, power it off."""
    with signals_held():
        from asyncvmm.commands import boot as run_boot

        import_progress(progress)

    config = make_config(**asked)
    run_on_uvloop(lambda: run_boot(config, jsonl, progress))


@main.command(context_settings={"allow_interspersed_args": False})
@vm_options
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(ctx: click.Context, /, jsonl: str | None, progress: bool, command: tuple[str, ...], **asked: Any) -> None:
    """Run COMMAND as the guest's workload: its output on stdout, its exit code as ours.

    The workload's stdin is the console, to which run sends nothing.
    """
    with signals_held():
        from asyncvmm.commands import run as run_workload

        import_progress(progress)

    config = make_config(**asked, workload=command)
    ctx.exit(run_on_uvloop(lambda: run_workload(config, jsonl, progress)))


class SnapshotGroup(click.Group):
    """``snapshot`` itself takes one; a first word is one of its commands, for the guest's comes behind options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the hidden command in front of options."""
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["take", *args]
        return super().parse_args(ctx, args)


@main.group(cls=SnapshotGroup)
def snapshot() -> None:
    """Save a booted guest:

    asyncvmm snapshot --on pre-exec|listener|heartbeat=N|after=MS [--quiesce-ms N] --out DIR -- CMD

    All options: asyncvmm snapshot take --help. Or look after one that was saved.
    """


@snapshot.command("take", context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False})
@click.option(
    "--on", required=True, multiple=True, metavar="pre-exec|listener|heartbeat=N|after=MS", help="What to wait for."
)
@click.option("--quiesce-ms", default=0, show_default=True, metavar="MS", help="How long to wait then.")
@click.option("--out", required=True, metavar="DIR", help="The directory to be made.")
@click.option("--precopy", is_flag=True, help="Copy memory while the guest runs, for a shorter pause.")
@vm_options
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def snapshot_take(
    on: tuple[str, ...],
    quiesce_ms: int,
    out: str,
    precopy: bool,
    jsonl: str | None,
    progress: bool,
    command: tuple[str, ...],
    **asked: Any,
) -> None:
    """Boot a guest with COMMAND as its workload, save it when what --on says has come, and stop it."""
    with signals_held():
        from asyncvmm.snapshot_commands import policy, take

    when = policy(on, quiesce_ms, out)
    config = make_config(**asked, workload=command)
    run_on_uvloop(lambda: take(config, when, jsonl, precopy))


for _command in (inspect, verify, flatten):
    snapshot.add_command(_command)


@main.command()
@click.argument("directory", type=FILE, metavar="DIR")
@click.option("--clones", default=1, show_default=True, metavar="N", help="How many VMs to make of it.")
@click.option("--beyond-bend", is_flag=True, help="More than 100 of them, where each costs more than the last.")
@click.option(
    "--jsonl", type=EVENTS, metavar="PATH|-", help="Write events as JSON lines; with - the output goes to stderr."
)
@click.pass_context
def restore(ctx: click.Context, directory: Path, clones: int, beyond_bend: bool, jsonl: str | None) -> None:
    """Run the guest that is saved in DIR, or several of it, until its workload ends: its exit code is ours, of several
    the first, by their numbers, that is not 0."""
    with signals_held():
        from asyncvmm.snapshot_commands import restore as run_restored

    ctx.exit(run_on_uvloop(lambda: run_restored(directory, clones, jsonl, beyond_bend)))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a page.")
def doctor(as_json: bool) -> None:
    """Say what this host can do, measured, and what to fix."""
    with signals_held():
        from asyncvmm.commands import doctor as run_doctor

    run_doctor(as_json=as_json)


@main.group()
def image() -> None:
    """Build and list guest images."""


@image.command("build")
@click.option("--name", default="default", show_default=True, help="The image's name.")
@click.option("--kernel", type=FILE, metavar="FILE", help="bzImage or vmlinux to take.")
@click.option("--modules", type=FILE, metavar="DIR", help="Its modules.")
@click.option("--rootfs", type=FILE, metavar="DIR|TAR|OCI", help="What to make a root file system of.")
@click.option("--rootfs-type", metavar="ext4|squashfs|erofs", help="Its type; ext4 if not given.")
@click.option("--rootfs-size", type=int, metavar="MIB", help="Size of an ext4, MiB; what it needs and 64 if not given.")
def image_build(
    name: str,
    kernel: Path | None,
    modules: Path | None,
    rootfs: Path | None,
    rootfs_type: str | None,
    rootfs_size: int | None,
) -> None:
    """Build a bootable guest image from the distribution's packages."""
    with signals_held():
        from asyncvmm.commands import build
        from asyncvmm.guest.rootfs import asked_rootfs

    build(name, kernel, modules, asked_rootfs(rootfs, rootfs_type, rootfs_size))


@image.command("list")
def image_list() -> None:
    """List the images that are built."""
    with signals_held():
        from asyncvmm.commands import list_built

    list_built()


@main.command()
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE...")
@click.option("--vm", "vms", multiple=True, metavar="NAME", help="Only this VM of the files; more than once for more.")
@click.option("--html", type=FILE, metavar="OUT", help="Write a page that needs no network; - is stdout.")
@click.option("--perfetto", type=FILE, metavar="OUT", help="Write a trace for Perfetto; - is stdout.")
def timeline(files: tuple[Path, ...], vms: tuple[str, ...], html: Path | None, perfetto: Path | None) -> None:
    """Draw the boots and restores that FILEs (JSON lines, - is stdin) record, and compare them if there are several."""
    with signals_held():
        from asyncvmm.timeline_command import timeline as draw

    draw(files, vms, html, perfetto)


@main.command()
@click.argument("files", nargs=-1, metavar="[FILE.jsonl|-]...")
@click.option("--prometheus", metavar="OUT|-", help="Write OpenMetrics (OUT.prom: Prometheus's text); - is stdout.")
@click.option("--listen", metavar="HOST:PORT", help="Serve them at http://HOST:PORT/metrics until interrupted.")
@click.option("--follow", is_flag=True, help="Keep reading files that grow, until interrupted.")
def metrics(files: tuple[str, ...], **asked: Any) -> None:
    """Count what FILEs (JSON lines of VMs; stdin if none) record, for Prometheus."""
    with signals_held():
        from asyncvmm.export.command import metrics as export_metrics

    run_on_uvloop(lambda: export_metrics(files, **asked))


@main.command()
def schema() -> None:
    """Print the JSON Schema of the JSON lines."""
    with signals_held():
        from asyncvmm.commands import print_schema

    print_schema()


def import_progress(wanted: bool) -> None:
    """Import what shows progress before there is a loop that this would keep waiting."""
    if wanted:
        import asyncvmm.progress  # noqa: F401


def make_config(*, memory: int, timeout: float, **asked: Any) -> Any:
    """The VMConfig of the shared options. Raises ConfigError."""
    with signals_held():
        from asyncvmm.config import VMConfig
        from asyncvmm.device_options import DEFAULTS, device_records

    devices = {name: asked.pop(name) for name in DEFAULTS}
    if devices != DEFAULTS:
        asked |= device_records(**devices)
    return VMConfig(memory_mib=memory, boot_timeout_s=timeout, **asked)


def run_on_uvloop(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run what ``work`` makes on uvloop; Ctrl-C, SIGTERM and a terminal that closes cancel it: everything is freed."""
    with signals_held():
        import warnings

        import uvloop

        # An interrupt that comes before the loop runs ends the command as it should: Python need not remark on it.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    return uvloop.run(_until_terminated(work))


async def _until_terminated(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    import asyncio

    task = asyncio.current_task()
    assert task is not None
    came: list[int] = []

    def end(number: int) -> None:
        came.append(number)
        task.cancel()

    loop = asyncio.get_running_loop()
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            loop.add_signal_handler(number, end, number)
    try:
        return await work()
    except asyncio.CancelledError:
        raise (Ended(came[0]) if came else KeyboardInterrupt) from None


if __name__ == "__main__":
    main()
