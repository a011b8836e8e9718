"""The virtio devices on QEMU's command line. Pure: records in, words out.

The facts: qemu-system-x86_64(1) and ``-device TYPE,help``; hw/virtio/virtio-rng.c, hw/virtio/virtio-balloon.c and
hw/char/virtio-console.c of QEMU 7.2. What is not obvious in them:

- microvm has no PCI: a device sits on one of 24 virtio-mmio transports, and is called ``virtio-blk-device`` where a
  q35 has ``virtio-blk-pci``. In both, Linux finds the devices in the order of the command line, so drive i is the
  i-th of vda, vdb and so on.
- A drive is opened here and handed over as an fd set: its name never gets near QEMU's option syntax, and QEMU opens
  nothing (qcow2's backing file excepted).
- Where the host has no room left for a write, QEMU would stop the guest; told to report, it gives the guest an I/O
  error, as our own disks do.
- QEMU asks a guest for its free pages (VIRTIO_BALLOON_F_FREE_PAGE_HINT) only while it migrates, and then needs a
  thread to do it in.
- virtconsole drops what does not fit into its socket; virtserialport holds its writer back instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs
import orjson

from asyncvmm.machine.base import BootPlan, DriveResource, Resources

if TYPE_CHECKING:
    from asyncvmm.device_config import BalloonConfig, ConsoleConfig, NetConfig, RngConfig

Transport = Literal["device", "pci"]
"""How a device's type name ends: virtio-mmio's or PCI's."""

CONSOLE = "console"
"""The name of port 0, hvc0 in the guest."""

BALLOON = "balloon0"
"""The balloon's id: /machine/peripheral/balloon0 for qom-get."""

STREAM_NETDEV = (7, 2)
"""The first release with ``-netdev stream``; ``-netdev socket`` puts the same bytes on the wire."""

LONGEST_PERIOD_MS = 3_600_000
"""Longest period of the entropy device's budget."""


@attrs.frozen
class DriveEnd:
    """A drive opened for QEMU: its descriptor, and whether it is a block device."""

    fd: int
    is_block_device: bool = False


@attrs.frozen(kw_only=True)
class DeviceEnds:
    """Descriptor numbers that QEMU inherits for its devices.

    ``drives`` as in the plan's resources; ``ports`` are ends of stream sockets by the port's name, ``vsock`` one of
    the socket that speaks vhost-user.
    """

    drives: tuple[DriveEnd, ...] = ()
    ports: Mapping[str, int] = attrs.field(factory=dict)
    vsock: int | None = None

    def descriptors(self) -> list[int]:
        """All of them."""
        found = [drive.fd for drive in self.drives] + list(self.ports.values())
        return found if self.vsock is None else [*found, self.vsock]


def device_words(plan: BootPlan, transport: Transport, version: tuple[int, ...], ends: DeviceEnds) -> list[str]:
    """The words for every device of the plan, drives first."""
    devices, words = plan.devices, []
    for index, (drive, end) in enumerate(zip(plan.resources.drives, ends.drives, strict=True)):
        words += _drive(index, drive, end, transport)
    if devices.net is not None:
        words += _net(devices.net, plan.resources, transport, version)
    if devices.balloon is not None:
        words += _balloon(devices.balloon, transport)
    if devices.rng is not None:
        words += _rng(devices.rng, transport)
    if devices.console is not None:
        words += _console(devices.console, ends.ports, transport)
    if ends.vsock is not None:
        words += _vsock(ends.vsock, transport)
    return words


# -- drives ------------------------------------------------------------------------------------------------------------


def node_name(index: int) -> str:
    """What QEMU calls the drive ``index`` in query-blockstats; our ids may be more than its own can hold."""
    return f"drive{index}"


def _drive(index: int, drive: DriveResource, end: DriveEnd, transport: Transport) -> list[str]:
    config, name = drive.config, node_name(index)
    options = [f"virtio-blk-{transport}", f"id=disk{index}", f"drive={name}", f"serial={config.id}"]
    options += ["rerror=report", "werror=report"]
    if config.read_only:
        options += ["discard=off", "write-zeroes=off"]
    elif not config.discard:
        options.append("discard=off")
    return [
        *("-add-fd", f"fd={end.fd},set={index}"),
        *("-blockdev", _json(_block_node(name, index, drive, end))),
        *("-device", ",".join(options)),
    ]


def _block_node(name: str, index: int, drive: DriveResource, end: DriveEnd) -> dict[str, Any]:
    """The file as the node itself if it is raw: a format layer above would only pass requests on."""
    config = drive.config
    shared = {
        "read-only": config.read_only,
        "cache": {"direct": config.cache == "none", "no-flush": config.cache == "unsafe"},
        "discard": "unmap" if config.discard else "ignore",
    }
    file = {"driver": "host_device" if end.is_block_device else "file", "filename": f"/dev/fdset/{index}"}
    # A copy is sparse to stay small: so it is where the guest writes zeros.
    zeroes = {"detect-zeroes": "unmap" if config.discard and config.overlay is not False else "off"}
    if drive.format == "raw":
        return {**file, "node-name": name, **shared, **zeroes}
    return {"driver": drive.format, "node-name": name, **shared, **zeroes, "file": {**file, **shared}}


def _json(value: Mapping[str, Any]) -> str:
    return orjson.dumps(value).decode()


# -- the others --------------------------------------------------------------------------------------------------------


def _net(config: NetConfig, resources: Resources, transport: Transport, version: tuple[int, ...]) -> list[str]:
    from asyncvmm.net.addresses import MTU  # with it come the records of devices, which few need

    fd = resources.net_fd
    if config.mode == "tap":
        backend = f"tap,id=net0,fd={fd}"
    elif version >= STREAM_NETDEV:
        backend = f"stream,id=net0,server=off,addr.type=fd,addr.str={fd}"
    else:
        backend = f"socket,id=net0,fd={fd}"
    card = f"virtio-net-{transport},id=net0,netdev=net0"
    mac = resources.mac or config.mac
    if mac is not None:
        card += f",mac={mac}"
    if config.mode == "user":
        card += f",host_mtu={MTU}"  # no wire is in between: larger packets are fewer
    if transport == "pci":
        card += ",romfile="  # else QEMU loads a boot ROM, which nobody runs
    return ["-netdev", backend, "-device", card]


def _balloon(config: BalloonConfig, transport: Transport) -> list[str]:
    options = [
        f"virtio-balloon-{transport}",
        f"id={BALLOON}",
        f"deflate-on-oom={_switch(config.deflate_on_oom)}",
        f"free-page-reporting={_switch(config.free_page_reporting)}",
    ]
    words = []
    if config.free_page_hinting:
        words = ["-object", "iothread,id=hinting"]
        options += ["free-page-hint=on", "iothread=hinting"]
    return [*words, "-device", ",".join(options)]


def _rng(config: RngConfig, transport: Transport) -> list[str]:
    device = f"virtio-rng-{transport},rng=rng0"
    budget = entropy_budget(config)
    if budget is not None:
        device += f",max-bytes={budget[0]},period={budget[1]}"
    return ["-object", "rng-builtin,id=rng0", "-device", device]


def entropy_budget(config: RngConfig) -> tuple[int, int] | None:
    """Bytes, and the milliseconds after which the guest may have as many again; None for no limit.

    At no time more than the rate and, where a period can be that short, than the burst.
    """
    rate, burst = config.bytes_per_s, config.burst_bytes
    if rate == 0:
        return None
    period_ms = max(1, min((burst or rate) * 1000 // rate, LONGEST_PERIOD_MS))
    quota = rate * period_ms // 1000
    if burst:
        quota = min(quota, burst)
    return (quota, period_ms) if quota else (1, -(-1000 // rate))


def _console(config: ConsoleConfig, ports: Mapping[str, int], transport: Transport) -> list[str]:
    names = (CONSOLE, *config.ports)
    words = ["-device", f"virtio-serial-{transport},id=serial0,max_ports={len(names)}"]
    for number, name in enumerate(names):
        kind = "virtserialport" if number else "virtconsole"
        words += ["-chardev", f"socket,id=port{number},fd={ports[name]}"]
        words += ["-device", f"{kind},bus=serial0.0,nr={number},chardev=port{number},name={name}"]
    return words


def _vsock(fd: int, transport: Transport) -> list[str]:
    return ["-chardev", f"socket,id=vsock0,fd={fd}", "-device", f"vhost-user-vsock-{transport},chardev=vsock0"]


def _switch(value: bool) -> str:
    return "on" if value else "off"
