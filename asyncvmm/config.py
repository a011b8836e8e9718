"""What a caller asks for: VMConfig. Everything that can be checked without the host is checked here, at once.

Sources: the limits of the guest's command line are those of the Linux x86 boot protocol (2047 bytes and a NUL).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, get_args

import attrs

from asyncvmm.device_list import DeviceConfig
from asyncvmm.errors import CmdlineError, ConfigError, MemorySizeError, VcpuCountError

if TYPE_CHECKING:
    from asyncvmm.device_config import (
        BalloonConfig,
        ConsoleConfig,
        DriveConfig,
        NetConfig,
        RngConfig,
        VsockConfig,
    )

Accel = Literal["auto", "kvm", "qemu"]

MAX_CMDLINE = 2047
"""Longest kernel command line, bytes, without its NUL."""

MAX_VCPUS = 254
"""Most vCPUs an xAPIC can name (8-bit APIC IDs, 0xff is the broadcast, one is the IOAPIC's)."""

MIN_MEMORY_MIB = 2
"""Least guest memory: below it there is no room for a kernel at 1 MiB."""

MAX_MEMORY_MIB = 16 * 1024 * 1024
"""Most guest memory (16 TiB); what the host has is checked when the VM starts."""


MAX_METRICS_INTERVAL_S = 86400
"""Longest time between two ``metrics`` events: a day."""


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_memory(_: object, __: object, value: object) -> None:
    if not _is_int(value) or not MIN_MEMORY_MIB <= value <= MAX_MEMORY_MIB:
        raise MemorySizeError("guest memory", expected=f"{MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} MiB", found=repr(value))


def _check_vcpus(_: object, __: object, value: object) -> None:
    if not _is_int(value) or not 1 <= value <= MAX_VCPUS:
        raise VcpuCountError("vCPUs", expected=f"1 to {MAX_VCPUS}", found=repr(value))


def _check_accel(_: object, __: object, value: object) -> None:
    if value not in get_args(Accel):
        raise ConfigError("accelerator", expected=" or ".join(get_args(Accel)), found=repr(value))


def check_cmdline(text: str) -> None:
    """Refuse a command line that the boot protocol cannot carry. Raises CmdlineError."""
    what = "kernel command line"
    if not isinstance(text, str):
        raise CmdlineError(what, expected="text", found=repr(text))
    if "\0" in text:
        raise CmdlineError(what, expected="no NUL", found=f"a NUL at character {text.index(chr(0))}")
    if not _is_encodable(text):
        raise CmdlineError(what, expected="text that UTF-8 can carry", found="a lone surrogate")
    size = len(text.encode("utf-8", "surrogateescape"))
    if size > MAX_CMDLINE:
        raise CmdlineError(what, expected=f"at most {MAX_CMDLINE} bytes", found=f"{size} bytes")


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _check_cmdline(_: object, __: object, value: str | None) -> None:
    if value is not None:
        check_cmdline(value)


def _check_seconds(_: object, attribute: attrs.Attribute[float], value: object) -> None:
    if not (_is_int(value) or isinstance(value, float)) or not 0 < value < 1e9:
        raise ConfigError(attribute.name, expected="seconds above 0", found=repr(value))


def _check_interval(_: object, attribute: attrs.Attribute[float], value: object) -> None:
    if not (_is_int(value) or isinstance(value, float)) or not 0 < value <= MAX_METRICS_INTERVAL_S:
        expected = f"seconds above 0, at most {MAX_METRICS_INTERVAL_S}"
        raise ConfigError(attribute.name, expected=expected, found=repr(value))


def _check_words(_: object, attribute: attrs.Attribute[tuple[str, ...]], value: tuple[object, ...]) -> None:
    for word in value:
        if not isinstance(word, str):
            raise ConfigError(attribute.name, expected="words of text", found=repr(word))
        if "\0" in word:
            raise ConfigError(attribute.name, expected="words without NUL", found="a NUL")
        if not _is_encodable(word):
            raise ConfigError(attribute.name, expected="words that UTF-8 can carry", found="a lone surrogate")


def _check_program(_: object, __: object, value: tuple[str, ...]) -> None:
    if value and not value[0]:
        raise ConfigError("workload", expected="a program's name", found="an empty word")


def _check_text(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or not _is_encodable(value):
        raise ConfigError(attribute.name, expected="text", found=repr(value))
    if not value.isprintable():
        raise ConfigError(attribute.name, expected="printable text", found=repr(value))


def _check_bool(_: object, attribute: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(attribute.name, expected="True or False", found=repr(value))


def _words(value: Iterable[str]) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise ConfigError("workload or environment", expected="a sequence of words", found=repr(value))
    return tuple(value)


def _path(value: str | Path | None) -> Path | None:
    if value is None:
        return None
    try:
        path = Path(value)
    except TypeError:
        raise ConfigError("kernel or initrd", expected="a path", found=repr(value)) from None
    if not can_be_path(str(path)):
        raise ConfigError("kernel or initrd", expected="a path that a file can have", found=repr(value))
    return path


def can_be_path(text: str) -> bool:
    """Whether the system can be asked for a file of that name."""
    return "\0" not in text and _is_encodable(text)


# The records of devices are imported by who asks for a device: a VM without any does not pay for them.


def _drives(value: Any) -> tuple[DriveConfig, ...]:
    if value == ():
        return ()
    from asyncvmm.device_config import to_drives

    return to_drives(value)


def _net(value: Any) -> NetConfig | None:
    if value == "none" or value is None:
        return None
    from asyncvmm.device_config import to_net

    return to_net(value)


def _device(what: str, kind: str, value: Any) -> Any:
    """The record of a device, of class ``kind``; None for no device."""
    if value is None or value is False:
        return None
    from asyncvmm import device_config

    return device_config.to_record(what, getattr(device_config, kind), value)


def _balloon(value: Any) -> BalloonConfig | None:
    record: BalloonConfig | None = _device("balloon", "BalloonConfig", value)
    return record


def _vsock(value: Any) -> VsockConfig | None:
    record: VsockConfig | None = _device("vsock", "VsockConfig", value)
    return record


def _rng(value: Any) -> RngConfig | None:
    record: RngConfig | None = _device("rng", "RngConfig", value)
    return record


def _console(value: Any) -> ConsoleConfig | None:
    record: ConsoleConfig | None = _device("virtio_console", "ConsoleConfig", value)
    return record


@attrs.frozen(kw_only=True)
class VMConfig:
    """One microVM, as asked for.

    memory_mib: guest RAM in MiB. vcpus: number of virtual CPUs. image: name of a built guest image, used unless
    ``kernel`` is given. kernel, initrd: files to boot instead. cmdline: kernel command line, whole; None takes
    the default one. accel: ``auto`` measures and chooses. workload: program and arguments that PID 1 runs once it is
    ready; empty for none. env: the workload's environment, ``NAME=value`` words on top of a small default.
    boot_timeout_s: seconds until READY at the most. stall_timeout_s: seconds without a sign of life (serial bytes,
    exits) after which a guest that is not ready counts as dead. name: the ``vm`` field of events; None draws one.
    serial_lines: whether each line of the guest's serial ports becomes an event (``serial.line``).

    Devices, see device_config for each record: drives, DriveConfigs or paths, in the order vda, vdb and so on; net,
    ``none``, ``user`` or a NetConfig; balloon, vsock, rng, virtio_console: True for the default one, or a record.
    acpi: False for a kernel built without ACPI, which then finds its devices on the command line (KVM alone).
    metrics_interval_s: seconds between two ``metrics`` events. pre_exec_window: PID 1 holds the workload, one step
    before its exec, until ``vm.go()`` or a snapshot that waited for that is taken. track_dirty: keep account of the
    pages that are written, so that snapshots can be differences (KVM alone; it slows the guest a little).

    Raises ConfigError and its kinds at construction.
    """

    memory_mib: int = attrs.field(default=256, validator=_check_memory)
    vcpus: int = attrs.field(default=1, validator=_check_vcpus)
    image: str = attrs.field(default="default", validator=_check_text)
    kernel: Path | None = attrs.field(default=None, converter=_path)
    initrd: Path | None = attrs.field(default=None, converter=_path)
    cmdline: str | None = attrs.field(default=None, validator=_check_cmdline)
    accel: Accel = attrs.field(default="auto", validator=_check_accel)
    workload: tuple[str, ...] = attrs.field(default=(), converter=_words, validator=[_check_words, _check_program])
    env: tuple[str, ...] = attrs.field(default=(), converter=_words, validator=_check_words)
    boot_timeout_s: float = attrs.field(default=300.0, validator=_check_seconds)
    stall_timeout_s: float = attrs.field(default=60.0, validator=_check_seconds)
    name: str | None = attrs.field(default=None, validator=attrs.validators.optional(_check_text))
    serial_lines: bool = attrs.field(default=False, validator=_check_bool)
    drives: tuple[DriveConfig, ...] = attrs.field(default=(), converter=_drives)
    net: NetConfig | None = attrs.field(default=None, converter=_net)
    balloon: BalloonConfig | None = attrs.field(default=None, converter=_balloon)
    vsock: VsockConfig | None = attrs.field(default=None, converter=_vsock)
    rng: RngConfig | None = attrs.field(default=None, converter=_rng)
    virtio_console: ConsoleConfig | None = attrs.field(default=None, converter=_console)
    acpi: bool = attrs.field(default=True, validator=_check_bool)
    metrics_interval_s: float = attrs.field(default=60.0, validator=_check_interval)
    pre_exec_window: bool = attrs.field(default=False, validator=_check_bool)
    track_dirty: bool = attrs.field(default=False, validator=_check_bool)

    def __attrs_post_init__(self) -> None:
        if self.pre_exec_window and not self.workload:
            raise ConfigError("pre_exec_window", expected="a workload to hold", found="none")
        if self.balloon is not None and self.balloon.mib > self.memory_mib:
            raise ConfigError("balloon", expected=f"at most {self.memory_mib} MiB", found=f"{self.balloon.mib} MiB")

    @property
    def devices(self) -> DeviceConfig:
        """The virtio devices asked for."""
        return DeviceConfig(
            drives=self.drives,
            net=self.net,
            balloon=self.balloon,
            vsock=self.vsock,
            rng=self.rng,
            console=self.virtio_console,
        )

    @property
    def has_devices(self) -> bool:
        """Whether there is a virtio device at all."""
        return self.devices.count > 0
