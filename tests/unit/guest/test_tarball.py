from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import stat
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncvmm.errors import ImageError
from asyncvmm.guest.filetree import FileTree, Node
from asyncvmm.guest.tarball import Allowance, add_tar

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", **fields: object) -> Member:
    """A member of a test's archive: a regular file unless ``type`` says otherwise."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def archive(members: Sequence[Member], form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar archive of them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def load(tmp_path: Path, *layers: bytes, layer: bool = False, allowance: int = 1 << 20) -> FileTree:
    """The tree of these archives, one over the other."""
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    tree, left = FileTree(), Allowance(allowance)
    for number, data in enumerate(layers):
        path = tmp_path / f"layer{number}"
        path.write_bytes(data)
        add_tar(tree, path, scratch, left, layer=layer)
    return tree


def _content(node: Node) -> bytes:
    with node.content.path.open("rb") as stream:
        stream.seek(node.content.offset)
        return bytes(stream.read(node.size))


def _names(tree: FileTree) -> list[str]:
    return [name for name, _ in tree.walk()]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress], ids=["plain", "gzip", "xz"])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_form_and_packing_is_read(tmp_path: Path, pack: Callable[[bytes], bytes], form: int) -> None:
    data = archive([member("./d/f", b"hello", mode=0o4755, uid=7, gid=8, mtime=9)], form)
    node = load(tmp_path, pack(data)).find(["d", "f"])
    assert node is not None
    assert _content(node) == b"hello"
    assert (node.mode, node.uid, node.gid, node.mtime_ns) == (stat.S_IFREG | 0o4755, 7, 8, 9 * 10**9)


def test_links_devices_and_attributes_are_read(tmp_path: Path) -> None:
    members = [
        member("f", b"x", pax_headers={"SCHILY.xattr.user.a": "b"}),
        member("s", type=tarfile.SYMTYPE, linkname="/f"),
        member("h", type=tarfile.LNKTYPE, linkname="f"),
        member("n", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("p", type=tarfile.FIFOTYPE),
    ]
    tree = load(tmp_path, archive(members))
    nodes = dict(tree.walk())
    assert nodes["f"].xattrs == {"user.a": b"b"}
    assert nodes["s"].target == "/f"
    assert nodes["h"] is nodes["f"]
    assert nodes["n"].rdev == (1, 3)
    assert stat.S_ISFIFO(nodes["p"].mode)


def test_a_whiteout_takes_a_lower_layer_s_file_away_wherever_it_stands(tmp_path: Path) -> None:
    lower = archive([member("d/a"), member("d/b"), member("e/x/y")])
    upper = archive([member("d/a", b"new"), member("d/.wh.a"), member("d/.wh.b"), member(".wh.e")])
    tree = load(tmp_path, lower, upper, layer=True)
    assert _names(tree) == ["d", "d/a"]
    assert _content(dict(tree.walk())["d/a"]) == b"new"


def test_an_opaque_directory_hides_what_lower_layers_had_in_it(tmp_path: Path) -> None:
    lower = archive([member("d/a"), member("d/b/c"), member("e")])
    upper = archive([member("d/n"), member("d/.wh..wh..opq"), member("d/.wh..wh.plnk")])
    assert _names(load(tmp_path, lower, upper, layer=True)) == ["d", "d/n", "e"]


def test_a_whiteout_of_nothing_changes_nothing(tmp_path: Path) -> None:
    whiteouts = [member(name) for name in (".wh.x", "none/.wh.x", ".wh.", ".wh..", "a/.wh...x")]
    with contextlib.suppress(ImageError):
        load(tmp_path, archive([member("a")]), archive(whiteouts), layer=True)
    assert _names(load(tmp_path, archive([member("d/a")]), archive(whiteouts[:3]), layer=True)) == ["d", "d/a"]


def test_a_plain_archive_has_no_whiteouts(tmp_path: Path) -> None:
    assert _names(load(tmp_path, archive([member("a"), member(".wh.a")]))) == [".wh.a", "a"]


@pytest.mark.parametrize(
    "bad",
    [
        member("../escape"),
        member("/etc/passwd"),
        member("a/../../b"),
        member("h", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),
        member("h", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        member("h", type=tarfile.LNKTYPE, linkname="not-there"),
        member("s", type=tarfile.SYMTYPE, linkname=""),
        member("n", type=tarfile.BLKTYPE, devmajor=1 << 13),
        member("u", uid=1 << 32),
        member("x" * 300),
        member("weird", type=b"V"),
    ],
    ids=lambda bad: f"{bad[0].name[:12]}-{bad[0].type.decode()}",
)
def test_a_hostile_member_is_refused(tmp_path: Path, bad: Member) -> None:
    with pytest.raises(ImageError):
        load(tmp_path, archive([member("good"), bad], tarfile.GNU_FORMAT))


def test_a_file_behind_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    members = [member("out", type=tarfile.SYMTYPE, linkname="../../../tmp"), member("out/owned", b"x")]
    with pytest.raises(ImageError, match="inside the root"):
        load(tmp_path, archive(members))


def test_an_absolute_link_means_the_guest_s_root_not_the_host_s(tmp_path: Path) -> None:
    target = tmp_path / "host"
    members = [member("out", type=tarfile.SYMTYPE, linkname=str(target)), member("out/owned", b"x")]
    assert _names(load(tmp_path, archive(members)))[-1] == f"{str(target).lstrip('/')}/owned"
    assert not target.exists()


def test_an_archive_that_unpacks_to_too_much_is_refused_before_the_disk_is_full(tmp_path: Path) -> None:
    bomb = gzip.compress(archive([member("zeros", bytes(3 << 20))]))
    with pytest.raises(ImageError, match="at most 1048576 bytes"):
        load(tmp_path, bomb)
    assert sum(path.stat().st_size for path in (tmp_path / "scratch").iterdir()) <= 1 << 20


def test_a_sparse_file_of_a_terabyte_is_refused(tmp_path: Path) -> None:
    sparse = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": str(1 << 40),
    }
    with pytest.raises(ImageError, match="bytes unpacked"):
        load(tmp_path, archive([member("huge", pax_headers=sparse)]))


def test_a_sparse_map_that_leaves_its_file_is_refused(tmp_path: Path) -> None:
    sparse = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "9,9", "GNU.sparse.size": "10"}
    with pytest.raises(ImageError, match="content inside"):
        load(tmp_path, archive([member("f", b"123456789", pax_headers=sparse)]))


def test_a_header_of_megabytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="headers of at most"):
        load(tmp_path, archive([member("f", pax_headers={"comment": "x" * (2 << 20)})]))


def test_a_chain_of_headers_without_a_file_is_refused(tmp_path: Path) -> None:
    one = archive([member("f", pax_headers={"comment": "x"})])[:1024]
    with pytest.raises(ImageError):
        load(tmp_path, one * 5000, allowance=1 << 30)


@pytest.mark.parametrize("cut", [100, 512, 700, 1030, 1536 + 100])
def test_a_truncated_archive_is_refused(tmp_path: Path, cut: int) -> None:
    whole = archive([member("a", b"x" * 512), member("b", b"y" * 512)], tarfile.USTAR_FORMAT)
    with pytest.raises(ImageError):
        load(tmp_path, whole[: len(whole) - 10240 + 2048][:cut])


def test_damage_in_the_middle_is_no_end(tmp_path: Path) -> None:
    whole = bytearray(archive([member("a", b"x" * 512), member("b", b"y")], tarfile.USTAR_FORMAT))
    whole[1024 + 150] ^= 0xFF
    with pytest.raises(ImageError, match="headers to its end"):
        load(tmp_path, bytes(whole))


@pytest.mark.parametrize("data", [b"", b"not a tar", b"\x1f\x8b\x08rubbish", b"\xfd7zXZ\0rubbish", b"BZhrubbish"])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ImageError):
        load(tmp_path, data)


@pytest.mark.requires("zstd")
def test_damaged_zstd_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="zstd"):
        load(tmp_path, b"\x28\xb5\x2f\xfdrubbish")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(at=st.integers(0, 3000), patch=st.binary(min_size=1, max_size=24))
def test_a_damaged_archive_is_read_or_refused_with_a_typed_error(tmp_path: Path, at: int, patch: bytes) -> None:
    members = [member("d/f", b"hello"), member("s", type=tarfile.SYMTYPE, linkname="d"), member("x" * 120, b"y" * 600)]
    data = bytearray(archive(members, tarfile.GNU_FORMAT))
    data[at : at + len(patch)] = patch
    with contextlib.suppress(ImageError):
        tree = load(tmp_path, bytes(data))
        assert all(not path.startswith("/") and ".." not in path.split("/") for path, _ in tree.walk())
