"""The command line with wrong input: exit code 2, one line on stderr that says what was expected and found, no
traceback, nothing started. Every case is the real command in a process of its own, though most are forked from one that
has imported it already."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from asyncvmm.cli import main
from asyncvmm.storage.lock import lock_image
from tests.support.fork_server import ForkServer
from tests.support.requirements import ROOT

ASYNCVMM = Path(sys.executable).with_name("asyncvmm")
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    """What most are forked from."""
    with ForkServer() as server:
        yield server


@pytest.fixture
def refused(tmp_path: Path, server: ForkServer) -> Refused:
    """Run ``asyncvmm WORDS``, which must be refused; gives the line on stderr."""

    def run(*words: object, prefix: tuple[str, ...] = (), env: dict[str, str] | None = None) -> str:
        temporary = tmp_path / "TMPDIR"
        temporary.mkdir(exist_ok=True)
        command, env = [str(ASYNCVMM), *map(str, words)], {**os.environ, "TMPDIR": str(temporary), **(env or {})}
        if prefix:
            command = [*prefix, *command]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=env)
        else:
            done = server.run(command[1:], env)
        assert done.returncode == 2, done
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("asyncvmm: ")
        assert not list(temporary.iterdir())
        return lines[0]

    return run


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A kernel that would do."""
    path = tmp_path / "vmlinux"
    path.write_bytes(elf(0x1000000, 4096))
    return path


def elf(address: int, memory_size: int) -> bytes:
    """An ELF64 executable for x86-64 of one segment."""
    header = b"\x7fELF\2\1\1".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, address, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 120, address, address, 16, memory_size, 4096)
    return header + segment + b"\xf4" * 16


# -- the kernel and the initrd -----------------------------------------------------------------------------------------

FILES = {
    "nothing": b"",
    "a text file": b"This is no kernel.\n" * 100,
    "a truncated bzImage": bytes(0x1F1) + b"\x04" + bytes(0x10) + b"HdrS\x0f\x02" + bytes(0x100),
    "an ELF that leaves RAM": elf(0x1000000, 1 << 40),
    "an ELF that wraps around": elf((1 << 64) - 4096, 8192),
    "an ELF over our tables": elf(0x7000, 4096),
    "an ELF over the command line": elf(0x20000, 4096),
    "an ELF over the ACPI tables": elf(0xE0000, 4096),
    "half an ELF header": elf(0x1000000, 4096)[:40],
}


@pytest.mark.parametrize("accel", ["kvm", "qemu"])
@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_what_is_no_kernel_is_refused(refused: Refused, tmp_path: Path, content: bytes, accel: str) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    line = refused("boot", "--accel", accel, "--kernel", path)
    assert "expected" in line
    assert "found" in line


@pytest.mark.parametrize("accel", ["kvm", "qemu", "auto"])
@pytest.mark.parametrize("path", ["/nonexistent/kernel", "/dev", "/dev/zero"])
def test_a_kernel_that_is_no_readable_file_is_refused(refused: Refused, path: str, accel: str) -> None:
    assert path in refused("boot", "--accel", accel, "--kernel", path)


@pytest.mark.parametrize("accel", ["kvm", "qemu"])
@pytest.mark.parametrize("path", ["/nonexistent/initrd", "/dev", "/dev/zero"])
def test_an_initrd_that_is_no_readable_file_is_refused(refused: Refused, kernel: Path, path: str, accel: str) -> None:
    line = refused("boot", "--accel", accel, "--kernel", kernel, "--initrd", path)
    assert "initrd" in line
    assert path in line


@pytest.mark.requires("root", "setpriv")
@pytest.mark.parametrize("option", ["--kernel", "--initrd"])
def test_a_file_without_permission_is_refused(refused: Refused, kernel: Path, option: str) -> None:
    """Root without its capabilities is as anybody else."""
    secret = kernel.with_name("secret")
    shutil.copy(kernel, secret)
    os.chown(secret, 12345, 12345)
    secret.chmod(0)
    files = ["--kernel", secret] if option == "--kernel" else ["--kernel", kernel, option, secret]
    prefix = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
    assert "Permission denied" in refused("boot", "--accel", "qemu", *files, prefix=prefix)


@pytest.mark.parametrize("accel", ["kvm", "qemu"])
def test_an_initrd_that_does_not_fit_is_refused(refused: Refused, kernel: Path, tmp_path: Path, accel: str) -> None:
    initrd = tmp_path / "initrd"
    with initrd.open("wb") as file:
        file.truncate(64 << 20)
    line = refused("boot", "--accel", accel, "--kernel", kernel, "--initrd", initrd, "--memory", 32)
    assert "initrd" in line


def test_an_initrd_without_a_kernel_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "a kernel beside it" in refused("boot", "--initrd", tmp_path)


def test_a_workload_without_pid_1_is_refused(refused: Refused, kernel: Path) -> None:
    assert "PID 1" in refused("run", "--kernel", kernel, "--", "true")


# -- numbers and words -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--memory", "0"), "guest memory"),
        (("--memory", "-1"), "guest memory"),
        (("--memory", "99999999999"), "guest memory"),
        (("--memory", "8000000"), "guest memory"),
        (("--memory", "much"), "--memory"),
        (("--vcpus", "0"), "vCPUs"),
        (("--vcpus", "10000"), "vCPUs"),
        (("--timeout", "0"), "seconds"),
        (("--timeout", "nan"), "seconds"),
        (("--cmdline", "x" * 2048), "2047 bytes"),
        (("--cmdline", "ü" * 1024), "2047 bytes"),
        (("--accel", "hvf"), "auto or kvm or qemu"),
        (("--image", "nosuch"), "nosuch"),
        (("--image", "../../etc"), "etc"),
        (("--image", ""), "image"),
        (("--no-such-option",), "--no-such-option"),
        (("--jsonl", "/nonexistent/directory/file"), "/nonexistent/directory/file"),
        (("--jsonl", "/dev"), "/dev"),
        (("--jsonl", "unix:/nonexistent/socket"), "socket"),
    ],
    ids=lambda value: " ".join(word[:20] for word in value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("command", [("boot",), ("run",)], ids=["boot", "run"])
def test_what_cannot_be_asked_for_is_refused(
    refused: Refused, command: tuple[str, ...], words: tuple[str, ...], said: str
) -> None:
    tail = ("--", "true") if command == ("run",) else ()
    assert said in refused(*command, *words, *tail)


@pytest.mark.parametrize("accel", ["kvm", "qemu"])
def test_more_memory_than_the_host_has_is_refused(refused: Refused, kernel: Path, accel: str) -> None:
    assert "the host" in refused("boot", "--accel", accel, "--kernel", kernel, "--memory", 16 << 20)


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--drive", ""), "drive path"),
        (("--drive", "image,rw"), "'rw'"),
        (("--drive", "image,id="), "'id='"),
        (("--drive", "image,cache=fast"), "writeback or none or unsafe"),
        (("--drive", "image,ro,overlay"), "read_only"),
        (("--drive", "a,root", "--drive", "b,root"), "one root"),
        (("--drive", "a,id=x", "--drive", "b,id=x"), "different ids"),
        (("--drive", "a") * 9, "at most 8"),
        (("--net", ""), "none, user or tap=NAME"),
        (("--net", "bridge"), "none, user or tap=NAME"),
        (("--net", "tap=a/b"), "interface"),
        (("--address", "10.0.0.5/24"), "--net"),
        (("--net", "user", "--address", "10.0.0.5"), "ADDRESS/PREFIX"),
        (("--net", "user", "--address", "10.0.0.255/24"), "10.0.0.255/24"),
        (("--publish", "80:80"), "--net"),
        (("--net", "user", "--publish", "80"), "[ADDR:]HOST:GUEST"),
        (("--net", "user", "--publish", "0:80"), "1 to 65535"),
        (("--net", "user", "--publish", "80:80", "--publish", "80:81"), "80 twice"),
        (("--balloon", "-1"), "balloon"),
        (("--balloon", "257"), "at most 256 MiB"),
        (("--balloon", "much"), "--balloon"),
        (("--vsock", ""), "vsock uds_path"),
        (("--vsock", "x" * 120), "at most 96 bytes"),
        (("--port", ""), "console port"),
        (("--port", "console"), "console"),
        (("--port", "a", "--port", "a"), "different names"),
    ],
    ids=lambda value: " ".join(word[:20] for word in value[:4]) if isinstance(value, tuple) else "",
)
def test_a_device_that_cannot_be_asked_for_is_refused(
    refused: Refused, kernel: Path, words: tuple[str, ...], said: str
) -> None:
    assert said in refused("boot", "--accel", "qemu", "--kernel", kernel, *words)


@pytest.mark.requires("kvm", "qemu")
@pytest.mark.parametrize("accel", ["kvm", "qemu"])
@pytest.mark.parametrize(
    ("drive", "said"),
    [
        ("{0}/nosuch", "/nosuch"),
        ("{0}/nosuch,ro", "/nosuch"),
        ("{0}/nosuch,overlay", "/nosuch"),
        ("{0}", "block device"),
        ("{0}/fifo", "/fifo"),
        ("/dev/null", "/dev/null"),
        ("{0}/nothing,overlay", "not empty"),
    ],
)
def test_a_drive_that_is_none_is_refused(
    refused: Refused, kernel: Path, tmp_path: Path, drive: str, said: str, accel: str
) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "nothing").touch()
    assert said in refused("boot", "--accel", accel, "--kernel", kernel, "--drive", drive.format(tmp_path))


@pytest.mark.requires("kvm", "qemu")
@pytest.mark.parametrize("accel", ["kvm", "qemu"])
def test_a_place_where_no_socket_can_be_is_refused(refused: Refused, kernel: Path, accel: str) -> None:
    line = refused("boot", "--accel", accel, "--kernel", kernel, "--vsock", kernel)
    assert str(kernel) in line
    assert "/nonexistent/s" in refused("boot", "--accel", accel, "--kernel", kernel, "--vsock", "/nonexistent/s")


def test_a_user_network_without_a_helper_is_told_what_to_install(
    refused: Refused, kernel: Path, tmp_path: Path
) -> None:
    bare = {"PATH": str(tmp_path)}
    line = refused("boot", "--accel", "kvm", "--kernel", kernel, "--net", "user", env=bare)
    assert "passt" in line
    assert "gvproxy" in line


@pytest.mark.requires("passt", "kvm")
def test_a_port_that_somebody_has_is_not_published(refused: Refused, kernel: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        line = refused("boot", "--accel", "kvm", "--kernel", kernel, "--net", "user", "--publish", f"{port}:80")
    assert str(port) in line


@pytest.mark.requires("kvm", "qemu")
@pytest.mark.parametrize("accel", ["kvm", "qemu"])
def test_a_drive_that_somebody_writes_is_refused(refused: Refused, kernel: Path, tmp_path: Path, accel: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with image.open("r+b") as somebody:
        lock_image(somebody.fileno(), image, writer=True)
        for words in (f"{image}", f"{image},ro", f"{image},overlay"):
            assert f"{image} in use" in refused("boot", "--accel", accel, "--kernel", kernel, "--drive", words)


@pytest.mark.requires("root", "setpriv", "kvm")
def test_a_tap_without_permission_is_refused(refused: Refused, kernel: Path) -> None:
    prefix = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
    line = refused("boot", "--accel", "kvm", "--kernel", kernel, "--net", "tap=asyncvmm9", prefix=prefix)
    assert "tun" in line or "CAP_NET_ADMIN" in line


# -- other words -------------------------------------------------------------------------------------------------------


def test_run_without_a_command_is_refused(refused: Refused) -> None:
    assert "COMMAND" in refused("run")


def test_run_does_not_mix_json_lines_with_the_workloads_output(refused: Refused) -> None:
    line = refused("run", "--jsonl", "-", "--", "true")
    assert line == "asyncvmm: --jsonl of run: expected a file, found stdout, which the workload's output has"


def test_a_command_that_is_not_there_is_refused(refused: Refused) -> None:
    assert "nosuch" in refused("nosuch")


def test_a_timeline_of_nothing_is_refused(refused: Refused, tmp_path: Path) -> None:
    assert "nosuch" in refused("timeline", tmp_path / "nosuch")


@pytest.mark.parametrize("content", [b"", b"\n" * 100, b"no JSON\n{}\n", b"\0" * 5000])
def test_a_timeline_of_a_file_without_an_event_is_refused(refused: Refused, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    line = refused("timeline", path)
    assert line == f"asyncvmm: timeline: expected events of asyncvmm, one a line, found none in {path}"


@pytest.mark.parametrize("words", [("--kernel", "/nonexistent"), ("--modules", "/tmp"), ("--name", "../x")])
def test_an_image_that_cannot_be_built_is_refused(refused: Refused, tmp_path: Path, words: tuple[str, ...]) -> None:
    refused("image", "build", *words, env={"ASYNCVMM_HOME": str(tmp_path / "home")})


# -- hosts -------------------------------------------------------------------------------------------------------------


@pytest.mark.requires("mount-namespaces", "kvm")
@pytest.mark.parametrize("over", ["/dev/null", "/etc/hostname"])
def test_something_else_at_dev_kvm_is_refused(refused: Refused, kernel: Path, over: str) -> None:
    script = f'mount --bind {over} /dev/kvm && exec "$@"'
    line = refused("boot", "--accel", "kvm", "--kernel", kernel, prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    assert "KVM" in line


@pytest.mark.requires("mount-namespaces")
def test_a_host_without_dev_kvm_is_told_so(refused: Refused, kernel: Path) -> None:
    script = 'mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod /dev/urandom c 1 9 && exec "$@"'
    line = refused("boot", "--accel", "kvm", "--kernel", kernel, prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    assert "/dev/kvm" in line


@pytest.mark.requires("mount-namespaces", "kvm", "setpriv")
def test_kvm_without_permission_is_refused(refused: Refused, kernel: Path) -> None:
    script = (
        "mount -t tmpfs none /dev && mknod /dev/null c 1 3 && mknod -m 000 /dev/kvm c 10 232 && chown 12345 /dev/kvm"
        ' && exec setpriv --bounding-set -all --inh-caps -all "$@"'
    )
    line = refused("boot", "--accel", "kvm", "--kernel", kernel, prefix=("unshare", "-m", "sh", "-c", script, "sh"))
    assert "ermission" in line


def test_a_host_without_qemu_is_told_so(refused: Refused, kernel: Path, tmp_path: Path) -> None:
    line = refused("boot", "--accel", "qemu", "--kernel", kernel, env={"PATH": str(tmp_path)})
    assert "qemu-system-x86_64" in line


def test_an_image_store_that_is_empty_is_told_so(refused: Refused, tmp_path: Path) -> None:
    line = refused("boot", env={"ASYNCVMM_HOME": str(tmp_path / "home")})
    assert "image build" in line


# -- what does work ----------------------------------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert done.exit_code == 0
    for command in ("boot", "run", "doctor", "image", "timeline", "schema"):
        assert command in done.output


def test_help_says_that_a_workload_is_sent_no_input() -> None:
    done = CliRunner().invoke(main, ["run", "--help"])
    assert "The workload's stdin is the console, to which run sends nothing." in " ".join(done.output.split())


def test_help_loads_no_machine() -> None:
    program = (
        "import sys; sys.argv[1:] = ['--help']\nfrom asyncvmm.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    )
    program += "print([name for name in ('anyio', 'uvloop', 'orjson', 'asyncvmm.vm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_schema_is_printed() -> None:
    done = CliRunner().invoke(main, ["schema"])
    assert done.exit_code == 0
    assert '"guest.ready"' in done.output


@pytest.mark.parametrize("group", ["snapshot", "image"])
def test_a_group_without_a_command_shows_its_usage(group: str) -> None:
    done = CliRunner().invoke(main, [group])
    assert done.exit_code == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Usage: ")
    assert lines[0].endswith(f" {group} [OPTIONS] COMMAND [ARGS]...")
    assert "Commands:" in lines
