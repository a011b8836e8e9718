"""The root file system and the network that PID 1 gives a workload, in a real Linux on QEMU/TCG, on both transports."""

from __future__ import annotations

import http.server
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncvmm.guest import cpio
from asyncvmm.guest.archive import GuestNet, RootMount, workload_archive
from asyncvmm.guest.image import find_image
from asyncvmm.guest.mkfs import TYPES, FilesystemType
from asyncvmm.guest.rootfs import Rootfs, build_root, open_source
from asyncvmm.guest.sources import find_busybox
from tests.support.hand_started import Guest, start_guest
from tests.support.probes import probe_programs
from tests.support.requirements import require

MACHINES = ("microvm", "q35")
SUFFIX = {"microvm": "device", "q35": "pci"}
WRITE = "cat /asked > /made || exit 1; mkdir -p /dir/deep && sha256sum /made | cut -d' ' -f1; mount | grep ' / '"
EPERM, EINVAL, ENODEV = 1, 22, 19

Start = Callable[..., Guest]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    require("qemu")
    require("image")
    guests: list[Guest] = []

    def begin(machine: str, appended: bytes, *devices: str) -> Guest:
        guests.append(start_guest(find_image(), appended, tmp_path, devices, machine))
        return guests[-1]

    yield begin
    for guest in guests:
        guest.end()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A root file system with busybox in it, and nothing in /dev."""
    require("busybox")
    busybox = find_busybox(None)
    root = tmp_path / "tree"
    for name in ("bin", "etc", "usr/bin", "probe"):
        (root / name).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(busybox.data)
    (root / "bin/busybox").chmod(0o755)
    for applet in ("sh", "cat", "mkdir", "mount", "grep", "cut", "ls", "stat", "head", "wc", "ip", "wget", "sync"):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "usr/bin/sha256sum").symlink_to("/bin/busybox")
    (root / "asked").write_bytes(bytes(range(256)) * 4096)
    for name, program in probe_programs().items():
        (root / "probe" / name).write_bytes(program)
        (root / "probe" / name).chmod(0o755)
    return root


def _make(tree: Path, fstype: FilesystemType = "ext4") -> Path:
    rootfs, images = Rootfs(tree, fstype), tree.with_name("images")
    images.mkdir()
    return build_root(rootfs, open_source(rootfs), images, lambda _: None)


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=60).stdout


def _drive(machine: str, image: Path, *, read_only: bool = False) -> list[str]:
    options = f"if=none,id=root,format=raw,file={image},readonly={'on' if read_only else 'off'}"
    return ["-drive", options, "-device", f"virtio-blk-{SUFFIX[machine]},drive=root"]


def _output(guest: Guest) -> list[str]:
    guest.wait_for("workload-exit .*")
    guest.wait_for_console(b"end\n")
    return bytes(guest.console).decode().partition("begin\n")[2].splitlines()[:-1]


def _workload(script: str) -> list[str]:
    return ["sh", "-c", f"echo begin; {script}; echo end"]


@pytest.mark.requires("e2fsprogs")
@pytest.mark.parametrize("machine", MACHINES)
def test_a_workload_writes_to_its_ext4_root_and_the_host_finds_it_whole(start: Start, tree: Path, machine: str) -> None:
    image = _make(tree)
    asked = _run("sha256sum", str(tree / "asked")).split()[0].decode()
    archive = workload_archive(_workload(WRITE), root=RootMount("vda", "ext4"))
    guest = start(machine, archive, *_drive(machine, image))
    output = _output(guest)
    assert output[0] == asked
    assert output[1].startswith("/dev/vda on / type ext4 (rw")
    assert guest.power_off() == 0
    _run("e2fsck", "-fn", str(image))
    copy = tree.with_name("copy")
    _run("debugfs", "-R", f"dump /made {copy}", str(image))
    assert _run("sha256sum", str(copy)).split()[0].decode() == asked


@pytest.mark.requires("e2fsprogs", "squashfs-tools", "erofs-utils")
@pytest.mark.parametrize("fstype", TYPES)
def test_what_cannot_be_written_is_recognised_and_gets_a_layer_that_can(
    start: Start, tree: Path, fstype: FilesystemType
) -> None:
    image = _make(tree, fstype)
    before = image.read_bytes()
    root = RootMount("vda", "auto", read_only=True)
    guest = start("microvm", workload_archive(_workload(WRITE), root=root), *_drive("microvm", image, read_only=True))
    output = _output(guest)
    assert len(output[0]) == 64
    assert output[1].startswith("overlay on / type overlay (rw")
    assert guest.power_off() == 0
    assert image.read_bytes() == before


@pytest.mark.requires("e2fsprogs")
def test_everything_is_ready_when_init_ok_is_said_and_the_mounts_have_moved_along(start: Start, tree: Path) -> None:
    script = (
        "ls -1d /dev/null /dev/pts /proc/1 /sys/class /run /tmp; stat -f -c %T /tmp; ls /asyncvmm; cat /proc/1/comm"
    )
    archive = workload_archive(_workload(script), root=RootMount("vda"))
    guest = start("q35", archive, *_drive("q35", _make(tree)))
    output = _output(guest)
    assert output[:7] == ["/dev/null", "/dev/pts", "/proc/1", "/run", "/sys/class", "/tmp", "tmpfs"]
    assert "/asyncvmm: No such file" in output[7]
    stages = [line.split(":") for line in guest.lines if line.startswith("BOOT_TIME:")]
    assert [stage for _, stage, _ in stages][-3:] == ["init_ok", "ready", "command_loop"]


@pytest.mark.requires("e2fsprogs")
def test_a_workload_in_its_own_root_cannot_reach_the_control_line_either(start: Start, tree: Path) -> None:
    script = r"""for probe in ioperm attach serial; do /probe/$probe; echo $probe=$?; done
printf '#!/bin/sh\n/probe/ioperm\necho helper=$? > /run/said\n' > /h; /bin/busybox chmod 755 /h
echo '|/h' > /proc/sys/kernel/core_pattern; /probe/outb
for i in 1 2 3 4 5 6 7 8 9 10; do [ -s /run/said ] || /bin/busybox sleep 0.1; done; cat /run/said"""
    archive = workload_archive(_workload(script), root=RootMount("vda"))
    output = _output(start("microvm", archive, *_drive("microvm", _make(tree))))
    for probe in ("ioperm", "attach", "serial", "helper"):
        assert f"{probe}={EPERM}" in output


@pytest.mark.requires("e2fsprogs")
def test_a_root_is_put_down_whole_though_its_workload_is_still_writing(start: Start, tree: Path) -> None:
    image = _make(tree)
    script = "(while :; do echo more >> /log; done) & cat /dev/zero > /zeros"
    guest = start("microvm", workload_archive(_workload(script), root=RootMount("vda")), *_drive("microvm", image))
    guest.wait_for("heartbeat counter=2")
    assert guest.power_off() == 0
    assert "needs_recovery" not in _run("dumpe2fs", "-h", str(image)).decode()
    _run("e2fsck", "-fn", str(image))


@pytest.mark.requires("e2fsprogs")
def test_an_ext4_that_was_not_put_down_whole_can_be_read_all_the_same(start: Start, tree: Path) -> None:
    image = _make(tree)
    guest = start("microvm", workload_archive(_workload("sync; cat"), root=RootMount("vda")), *_drive("microvm", image))
    guest.wait_for("workload-pre-exec")
    guest.end()
    assert "needs_recovery" in _run("dumpe2fs", "-h", str(image)).decode()
    archive = workload_archive(_workload("ls /asked"), root=RootMount("vda", read_only=True))
    assert _output(start("microvm", archive, *_drive("microvm", image, read_only=True))) == ["/asked"]


@pytest.mark.requires("e2fsprogs")
def test_an_armed_workload_in_a_root_waits_for_its_go(start: Start, tree: Path) -> None:
    archive = workload_archive(_workload("echo $A"), ["A=begun"], arm_pre_exec=True, root=RootMount("vda"))
    guest = start("microvm", archive, *_drive("microvm", _make(tree)))
    guest.wait_for("heartbeat counter=1")
    assert b"begun" not in guest.console
    guest.send(b"go 00 1234567890000000000\n")
    assert "begun" in _output(guest)


@pytest.mark.parametrize(
    ("root", "reason", "said"),
    [
        (RootMount("vda", "auto"), EINVAL, b"no root on vda: Invalid argument"),
        (RootMount("vdz", "ext4"), ENODEV, b"no root on vdz: No such device"),
        (RootMount("vda", "squashfs"), EINVAL, b"no root on vda: Invalid argument"),
    ],
)
def test_a_root_that_cannot_be_had_ends_the_boot_and_says_why(
    start: Start, tmp_path: Path, root: RootMount, reason: int, said: bytes
) -> None:
    image = tmp_path / "nonsense"
    image.write_bytes(b"nonsense" * 65536)
    guest = start("microvm", workload_archive(["true"], root=root), *_drive("microvm", image))
    assert guest.wait_for("init-error .*") == f"init-error root={reason}"
    assert guest.process.wait(60) == 0
    guest.wait_for_console(said)
    assert "READY" not in guest.lines


@pytest.fixture
def web_server() -> Iterator[int]:
    """Serves one page on the host's loopback interface, which QEMU's user network calls 10.0.2.2."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"from the host\n")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def _card(machine: str) -> list[str]:
    return ["-netdev", "user,id=net", "-device", f"virtio-net-{SUFFIX[machine]},netdev=net"]


STATIC = GuestNet(address="10.0.2.15/24", gateway="10.0.2.2", dns="10.0.2.3")


@pytest.mark.parametrize(("machine", "net"), [("microvm", GuestNet()), ("q35", STATIC)], ids=["dhcp", "static"])
def test_a_workload_finds_its_network_up(start: Start, web_server: int, net: GuestNet, machine: str) -> None:
    script = f"""wget -q -O - http://10.0.2.2:{web_server}/
ip -4 -o addr show eth0 | grep -o 'inet [^ ]*'; ip route | grep -o 'default via [^ ]*'; cat /etc/resolv.conf"""
    guest = start(machine, workload_archive(_workload(script), net=net), *_card(machine))
    assert _output(guest) == [
        "from the host",
        "inet 10.0.2.15/24",
        "default via 10.0.2.2",
        "nameserver 10.0.2.3",
    ]
    assert not [line for line in guest.lines if line.startswith("init-warning")]


@pytest.mark.requires("e2fsprogs")
def test_name_servers_are_written_where_the_workload_looks(start: Start, tree: Path) -> None:
    (tree / "etc/resolv.conf").symlink_to("/proc/sys/kernel/hostname")
    archive = workload_archive(_workload("cat /etc/resolv.conf"), root=RootMount("vda"), net=GuestNet())
    guest = start("microvm", archive, *_drive("microvm", _make(tree)), *_card("microvm"))
    assert _output(guest) == ["nameserver 10.0.2.3"]


@pytest.mark.parametrize(
    ("net", "problem"),
    [
        (GuestNet(interface="eth7"), "interface"),
        (GuestNet(address="10.0.2.15/24", gateway="0.0.0.0"), "gateway"),
        (GuestNet(address="192.0.2.1/32", gateway="198.51.100.1"), None),
    ],
)
def test_a_network_that_cannot_be_had_is_a_warning_and_no_dead_boot(
    start: Start, net: GuestNet, problem: str | None
) -> None:
    guest = start("microvm", workload_archive(_workload("ip route"), net=net), *_card("microvm"))
    output = _output(guest)
    warnings = [line for line in guest.lines if line.startswith("init-warning")]
    assert warnings == ([f"init-warning net={problem}"] if problem else [])
    if net.gateway == "198.51.100.1":
        assert any(line.startswith("default via 198.51.100.1") for line in output)


def test_dhcp_that_nobody_answers_is_given_up_soon(start: Start) -> None:
    silent = ["-netdev", "hubport,id=net,hubid=0", "-device", "virtio-net-device,netdev=net"]
    guest = start("microvm", workload_archive(_workload("true"), net=GuestNet()), *silent)
    guest.wait_for("READY")
    assert guest.lines.index("init-warning net=dhcp") < guest.lines.index("READY")


@pytest.mark.requires("busybox")
@pytest.mark.parametrize("machine", MACHINES)
def test_console_ports_are_found_by_name_and_pass_bytes_as_they_are(start: Start, tmp_path: Path, machine: str) -> None:
    serial, bulk, console = f"virtio-serial-{SUFFIX[machine]}", tmp_path / "bulk", tmp_path / "console"
    devices = [
        *("-device", serial, "-device", f"virtio-rng-{SUFFIX[machine]}"),
        *("-chardev", f"file,id=hvc,path={console}", "-device", "virtconsole,chardev=hvc,name=console"),
        *("-chardev", f"file,id=bulk,path={bulk}", "-device", "virtserialport,chardev=bulk,name=org.example.bulk"),
    ]
    script = r"""printf 'one\ntwo\n' > /dev/hvc0; cat /bin/busybox > /dev/virtio-ports/org.example.bulk
ls -1 /dev/virtio-ports; head -c 64 /dev/hwrng | wc -c"""
    archive = workload_archive(_workload(script), ports=["console", "org.example.bulk"])
    guest = start(machine, archive, *devices)
    assert _output(guest) == ["console", "org.example.bulk", "64"]
    guest.power_off()
    assert console.read_bytes() == b"one\ntwo\n"
    assert bulk.read_bytes() == find_busybox(None).data


@pytest.mark.parametrize("machine", MACHINES)
def test_each_device_finds_its_driver(start: Start, machine: str) -> None:
    devices = [word for kind in ("balloon", "rng", "net") for word in ("-device", f"virtio-{kind}-{SUFFIX[machine]}")]
    guest = start(machine, workload_archive(_workload("ls -1 /sys/bus/virtio/drivers/*/virtio*/driver -d")), *devices)
    assert sorted(path.split("/")[5] for path in _output(guest)) == ["virtio_balloon", "virtio_net", "virtio_rng"]
    assert not [line for line in guest.lines if line.startswith("init-warning")]


def test_a_port_that_never_comes_is_a_warning(start: Start) -> None:
    guest = start("microvm", workload_archive([], ports=["none"]))
    assert guest.wait_for("init-warning port=.*") == "init-warning port=none"
    guest.wait_for("READY")


def test_a_warning_names_a_module_that_does_not_fit(start: Start) -> None:
    damaged = cpio.write([cpio.file("asyncvmm/modules/virtio_rng.ko", b"not a module")])
    guest = start("microvm", damaged, "-device", "virtio-rng-device")
    assert guest.wait_for("init-warning .*") == "init-warning module=virtio_rng.ko"
