from __future__ import annotations

import io
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asyncvmm.errors import ImageError
from asyncvmm.guest.image import build_image, find_image
from asyncvmm.guest.mkfs import FilesystemType
from asyncvmm.guest.rootfs import Rootfs, asked_rootfs, build_root, open_source

NOBODY = 65534
ODD = 'with "quotes", a \\ and a space'


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def _member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, io.BytesIO(data)


def _archive(path: Path) -> Path:
    """A root of a few files with owners, modes and times of their own."""
    with tarfile.open(path, "w:gz") as tar:
        for info, data in (
            _member("./", type=tarfile.DIRTYPE, mode=0o711),
            _member("bin/su", b"program" * 1000, mode=0o4755, mtime=1_000_000_000),
            _member("bin/sudo", type=tarfile.LNKTYPE, linkname="bin/su", mode=0o4755, mtime=1_000_000_000),
            _member("bin/sh", type=tarfile.SYMTYPE, linkname="/bin/su"),
            _member("etc/shadow", b"secret", mode=0, uid=0, gid=42),
            _member(f"home/user/{ODD}", b"mine", mode=0o600, uid=1000, gid=1001),
            _member("home/user", type=tarfile.DIRTYPE, mode=0o500, uid=1000, gid=1001),
        ):
            tar.addfile(info, data)
    return path


def _ext4_status(image: Path, path: str) -> str:
    return _run("debugfs", "-R", f"stat {path}", image)


def _check_ext4(image: Path) -> None:
    _run("e2fsck", "-fn", image)
    assert "Mode:  04755" in _ext4_status(image, "/bin/su")
    assert "Links: 2" in _ext4_status(image, "/bin/sudo")
    assert 'Fast link dest: "/bin/su"' in _ext4_status(image, "/bin/sh")
    shadow = _ext4_status(image, "/etc/shadow")
    assert "Mode:  0000" in shadow
    assert "User:     0   Group:    42" in shadow
    assert "User:  1000   Group:  1001" in _ext4_status(image, "/home/user")
    assert "Mode:  0711" in _ext4_status(image, "/")
    assert "0x3b9aca00" in _ext4_status(image, "/bin/su")  # mtime
    odd = _ext4_status(image, '"/home/user/{}"'.format(ODD.replace('"', '""')))
    assert "Mode:  0600" in odd
    assert "User:  1000   Group:  1001" in odd
    assert _run("debugfs", "-R", "cat /etc/shadow", image) == "secret"


def _check_squashfs(image: Path) -> None:
    lines = {
        line.rpartition("squashfs-root")[2]: line.split()[:2] for line in _run("unsquashfs", "-lln", image).splitlines()
    }
    assert lines["/bin/su"] == ["-rwsr-xr-x", "0/0"]
    assert lines["/etc/shadow"] == ["----------", "0/42"]
    assert lines[f"/home/user/{ODD}"] == ["-rw-------", "1000/1001"]
    assert lines[""] == ["drwx--x--x", "0/0"]


def _check_erofs(image: Path) -> None:
    _run("fsck.erofs", image)
    assert image.read_bytes()[1024:1028] == b"\xe2\xe1\xf5\xe0"


CHECKS: dict[FilesystemType, Callable[[Path], None]] = {
    "ext4": _check_ext4,
    "squashfs": _check_squashfs,
    "erofs": _check_erofs,
}

all_types = pytest.mark.parametrize("fstype", CHECKS)
pytestmark = pytest.mark.requires("e2fsprogs", "squashfs-tools", "erofs-utils")


def _build(source: Path, images: Path, fstype: FilesystemType = "ext4", size_mib: int | None = None) -> Path:
    rootfs = Rootfs(source, fstype, size_mib)
    images.mkdir(exist_ok=True)
    return build_root(rootfs, open_source(rootfs), images, lambda _: None)


@pytest.mark.requires("root")
@all_types
def test_an_archive_s_owners_modes_and_times_are_the_image_s(tmp_path: Path, fstype: FilesystemType) -> None:
    CHECKS[fstype](_build(_archive(tmp_path / "root.tar"), tmp_path / "images", fstype))


@pytest.mark.requires("root")
@all_types
def test_a_directory_s_are_too(tmp_path: Path, fstype: FilesystemType) -> None:
    with tarfile.open(_archive(tmp_path / "root.tar")) as tar:
        tar.extractall(tmp_path / "files", numeric_owner=True)
    CHECKS[fstype](_build(tmp_path / "files", tmp_path / "images", fstype))


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that an ordinary user can get at: pytest's own cannot be entered."""
    path = Path(tempfile.mkdtemp(prefix="asyncvmm-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def _as_nobody(work: Callable[[], object]) -> None:
    """Do it in a child that is no longer root."""
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@all_types
def test_an_ordinary_user_s_image_has_the_archive_s_owners_but_an_erofs_root_s(
    open_directory: Path, fstype: FilesystemType
) -> None:
    images, source = open_directory / "images", _archive(open_directory / "root.tar")
    images.mkdir(mode=0o777)
    images.chmod(0o777)
    _as_nobody(lambda: _build(source, images, fstype))
    CHECKS[fstype](next(images.glob(f"*/root.{fstype}")))


def test_a_device_is_left_out_and_said_where_it_cannot_be_made(open_directory: Path) -> None:
    images, source = open_directory / "images", open_directory / "root.tar"
    images.mkdir(mode=0o777)
    images.chmod(0o777)
    with tarfile.open(source, "w") as tar:
        tar.addfile(_member("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)[0])
    rootfs, said = Rootfs(source), images / "said"
    _as_nobody(lambda: build_root(rootfs, open_source(rootfs), images, lambda line: _append(said, line)))
    assert "left out: device dev/null" in said.read_text().splitlines()
    _run("e2fsck", "-fn", next(images.glob("*/root.ext4")))


def _append(path: Path, line: str) -> None:
    with path.open("a") as stream:
        stream.write(f"{line}\n")


@pytest.mark.requires("root")
def test_devices_and_attributes_are_made_by_root(tmp_path: Path) -> None:
    source = tmp_path / "root.tar"
    capability = "\x01\x00\x00\x02" + "\x00\x20\x00\x00" + "\x00" * 12  # cap_net_raw, as ping has it
    with tarfile.open(source, "w") as tar:
        tar.addfile(_member("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3)[0])
        tar.addfile(_member("ping", pax_headers={"SCHILY.xattr.security.capability": capability})[0])
    image = _build(source, tmp_path / "images")
    assert "Type: character special" in _ext4_status(image, "/dev/null")
    assert "security.capability (20)" in _ext4_status(image, "/ping")


def test_a_sparse_file_keeps_its_size_and_its_bytes_their_places(tmp_path: Path) -> None:
    sparse = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "1000000,4",
        "GNU.sparse.size": "3000000",
    }
    with tarfile.open(tmp_path / "root.tar", "w") as tar:
        tar.addfile(*_member("f", b"here", pax_headers=sparse))
    image = _build(tmp_path / "root.tar", tmp_path / "images")
    _run("debugfs", "-R", f"dump /f {tmp_path / 'f'}", image)
    assert (tmp_path / "f").read_bytes() == bytes(1000000) + b"here" + bytes(1999996)


def test_an_ext4_has_room_for_its_files_and_64_mib(tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    for number in range(3000):
        (files / f"{number}").write_bytes(b"x")
    (files / "large").write_bytes(os.urandom(10 << 20))
    image = _build(files, tmp_path / "images")
    header = _run("dumpe2fs", "-h", image)
    free = next(int(line.split()[2]) for line in header.splitlines() if line.startswith("Free blocks"))
    assert 48 << 20 < free * 4096 < 80 << 20
    _run("e2fsck", "-fn", image)


def test_an_ext4_of_a_given_size_has_that_size(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    assert _build(tmp_path / "files", tmp_path / "images", size_mib=100).stat().st_size == 100 << 20


def test_files_that_do_not_fit_are_an_error_that_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/large").write_bytes(os.urandom(12 << 20))
    with pytest.raises(ImageError, match="mke2fs"):
        _build(tmp_path / "files", tmp_path / "images", size_mib=8)
    assert not list((tmp_path / "images").iterdir())


def test_a_hostile_archive_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "root.tar"
    with tarfile.open(source, "w") as tar:
        tar.addfile(_member("out", type=tarfile.SYMTYPE, linkname="../../../../..")[0])
        tar.addfile(*_member("out/tmp/owned", b"x"))
    with pytest.raises(ImageError, match="inside the root"):
        _build(source, tmp_path / "images")
    assert not list((tmp_path / "images").iterdir())


@pytest.mark.parametrize(
    "make",
    [
        lambda path: asked_rootfs(path, "xfs", None),
        lambda path: Rootfs(path, "squashfs", 5),
        lambda path: Rootfs(path, "ext4", 0),
        lambda path: Rootfs(path, "ext4", 1 << 40),
        lambda path: open_source(Rootfs(path / "none")),
        lambda path: asked_rootfs(None, "ext4", None),
        lambda path: asked_rootfs(None, None, 5),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    with pytest.raises(ImageError):
        make(tmp_path)


def test_a_fifo_keeps_nobody_waiting_and_a_device_is_not_read_for_ever(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for source in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ImageError, match="neither"):
            open_source(Rootfs(source))


def test_a_missing_tool_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("asyncvmm.guest.mkfs._SBIN", ())
    for fstype, package in (("ext4", "e2fsprogs"), ("squashfs", "squashfs-tools"), ("erofs", "erofs-utils")):
        rootfs = asked_rootfs(tmp_path, fstype, None)
        assert rootfs is not None
        with pytest.raises(ImageError, match=package):
            open_source(rootfs)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ASYNCVMM_HOME", str(tmp_path / "home"))
    path = tmp_path / "bzImage"
    path.write_bytes(bytes(0x202) + b"HdrS" + bytes(0x200))
    return path


@pytest.mark.requires("busybox")
@all_types
def test_an_image_has_its_root_beside_its_kernel_and_says_so(
    tmp_path: Path, kernel: Path, fstype: FilesystemType
) -> None:
    source = _archive(tmp_path / "root.tar")
    image = build_image("test", kernel=kernel, rootfs=Rootfs(source, fstype))
    assert image == find_image("test")
    assert image.root == image.directory / f"root.{fstype}"
    assert image.root_type == fstype
    output = image.manifest["outputs"][f"root.{fstype}"]
    assert output["size"] == image.root.stat().st_size
    assert output["type"] == fstype
    assert not image.root.stat().st_mode & 0o222
    assert sorted(path.name for path in image.directory.parent.parent.iterdir()) == [".built", ".lock", "test"]


@pytest.mark.requires("busybox")
def test_a_second_build_of_the_same_does_nothing_and_of_another_root_another_image(
    tmp_path: Path, kernel: Path
) -> None:
    files, said = tmp_path / "files", list[str]()
    files.mkdir()
    (files / "a").write_text("1")
    first = build_image("test", kernel=kernel, rootfs=Rootfs(files))
    assert build_image("test", kernel=kernel, rootfs=Rootfs(files), report=said.append) == first
    assert said == ["image test is up to date"]
    (files / "a").write_text("2")
    assert build_image("test", kernel=kernel, rootfs=Rootfs(files)).directory != first.directory
    assert build_image("test", kernel=kernel).root is None


@pytest.mark.requires("busybox")
def test_an_image_whose_root_is_cut_short_is_refused(tmp_path: Path, kernel: Path) -> None:
    (tmp_path / "files").mkdir()
    image = build_image("test", kernel=kernel, rootfs=Rootfs(tmp_path / "files"))
    assert image.root is not None
    image.root.chmod(0o644)
    os.truncate(image.root, 4096)
    with pytest.raises(ImageError, match="damaged image file"):
        find_image("test")


def _image_build(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asyncvmm.cli", "image", "build", "--name", "test", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)


@pytest.mark.requires("busybox")
def test_the_command_builds_an_image_with_a_root(tmp_path: Path, kernel: Path) -> None:
    (tmp_path / "files").mkdir()
    done = _image_build("--kernel", kernel, "--rootfs", tmp_path / "files", "--rootfs-size", "32")
    assert done.returncode == 0, done.stderr
    image = find_image("test")
    assert done.stdout == f"{image.directory}\n"
    assert image.root is not None
    assert image.root.stat().st_size == 32 << 20


@pytest.mark.parametrize(
    "words", [["--rootfs-type", "ext4"], ["--rootfs", "/none"], ["--rootfs", "/", "--rootfs-type", "x"]]
)
def test_the_command_refuses_in_one_line(kernel: Path, words: list[str]) -> None:
    done = _image_build("--kernel", kernel, *words)
    assert done.returncode == 2
    assert done.stderr.startswith("asyncvmm: root")
    assert done.stderr.count("\n") == 1


def test_files_are_staged_where_nobody_else_can_see_them(tmp_path: Path) -> None:
    image = _build(_archive(tmp_path / "root.tar"), tmp_path / "images")
    assert stat.S_IMODE(image.parent.stat().st_mode) == 0o700
    assert [path.name for path in image.parent.iterdir()] == ["root.ext4"]
