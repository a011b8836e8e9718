"""The doctor's report as a page for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncvmm.accel import speed_text
from asyncvmm.doctor.report import VERDICTS, DoctorReport, HostReport, ImageReport, KvmReport, Problem, QemuReport

_COLOURS = {"fast": "green", "usable": "green", "built": "green", "slow": "yellow"}


def render(report: DoctorReport, console: Console) -> None:
    """Print the page."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(no_wrap=True)
    facts.add_column()
    for name, verdict, text in _rows(report):
        facts.add_row(name, Text(verdict, style=_COLOURS.get(verdict, "red")), Text(text))
    console.print(facts)
    _print_verdicts(report, console)
    _print_problems(report.problems, console)


def _rows(report: DoctorReport) -> Iterator[tuple[str, str, str]]:
    software, choice = report.software, report.choice
    yield "host", "", _host(report.host)
    yield "kvm", report.kvm.verdict, _kvm(report.kvm)
    yield "qemu", report.qemu.verdict, _qemu(report.qemu)
    yield "image", report.image.state, _image(report.image)
    yield "software", "", f"asyncvmm {software.asyncvmm}, Python {software.python}, uvloop {software.uvloop}"
    accel = "none" if choice.accel is None else choice.accel
    yield "machine", "", f"{accel}: {choice.reason}"


def _host(host: HostReport) -> str:
    model = host.cpu_model or host.architecture
    where = ", itself a virtual machine" if host.nested else ""
    return f"Linux {host.kernel} on {model}, {host.cores} cores, {host.memory_mib} MiB{where}"


def _kvm(kvm: KvmReport) -> str:
    if kvm.ring0_mips is None or kvm.exit_us is None:
        return f"{kvm.device.path}: {kvm.found}"
    tsc = f", TSC {kvm.tsc_khz / 1000:.0f} MHz" if kvm.tsc_khz else ""
    speed = f"{speed_text(kvm.ring0_mips)}, an exit takes {kvm.exit_us:.1f} us"
    return f"{speed}, at most {kvm.max_vcpus} vCPUs{tsc}"


def _qemu(qemu: QemuReport) -> str:
    return f"{qemu.version} at {qemu.path}" if qemu.verdict == "usable" else f"{qemu.found}"


def _image(image: ImageReport) -> str:
    return f"{image.name}: kernel {image.kernel}" if image.state == "built" else f"{image.name}: {image.found}"


def _print_verdicts(report: DoctorReport, console: Console) -> None:
    console.print()
    words = Table.grid(padding=(0, 2))
    words.add_column(no_wrap=True)
    for verdict, meaning in VERDICTS.items():
        mine = verdict == report.kvm.verdict
        words.add_row(Text(f"{'>' if mine else ' '} {verdict}"), Text(meaning), style="" if mine else "dim")
    console.print(words)


def _print_problems(problems: list[Problem], console: Console) -> None:
    for problem in problems:
        console.print()
        console.print(Text(f"{problem.what}: {problem.found}", style="bold"))
        console.print(Text(f"  fix: {problem.fix}"))
    if not problems:
        console.print()
        console.print(Text("Nothing to fix.", style="green"))
