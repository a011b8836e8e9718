from __future__ import annotations

import contextlib
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.errors import ImageError
from asyncvmm.guest import filetree
from asyncvmm.guest.filetree import FileTree, Node, split


def _file() -> Node:
    return Node(stat.S_IFREG | 0o644)


def _directory(mode: int = 0o755) -> Node:
    return Node(stat.S_IFDIR | mode)


def _symlink(target: str) -> Node:
    return Node(stat.S_IFLNK | 0o777, target=target)


def _paths(tree: FileTree) -> list[str]:
    return [path for path, _ in tree.walk()]


def test_parents_that_an_archive_leaves_out_are_made() -> None:
    tree = FileTree()
    tree.put(["a", "b", "c"], _file())
    assert _paths(tree) == ["a", "a/b", "a/b/c"]


def test_parents_come_first_in_the_walk() -> None:
    tree = FileTree()
    for name in ("b/x", "a", "b-c", "b/a/z"):
        tree.put(split(name), _file())
    assert _paths(tree) == ["a", "b", "b/a", "b/a/z", "b/x", "b-c"]


def test_a_directory_that_comes_again_changes_its_mode_and_keeps_its_files() -> None:
    tree = FileTree()
    tree.put(["a", "b"], _file())
    tree.put(["a"], _directory(0o700))
    assert _paths(tree) == ["a", "a/b"]
    assert tree.root.children["a"].mode == stat.S_IFDIR | 0o700


def test_a_file_takes_the_place_of_a_directory_with_all_in_it() -> None:
    tree = FileTree()
    tree.put(["a", "b"], _file())
    tree.put(["a"], _file())
    assert _paths(tree) == ["a"]


def test_the_root_itself_can_be_given_a_mode_but_cannot_be_a_file() -> None:
    tree = FileTree()
    tree.put(["a"], _file())
    tree.put([], _directory(0o711))
    assert tree.root.mode == stat.S_IFDIR | 0o711
    assert _paths(tree) == ["a"]
    with pytest.raises(ImageError, match="root"):
        tree.put([], _file())


@pytest.mark.parametrize("target", ["usr/lib", "/usr/lib", "./usr/../usr/lib", "/usr//lib/"])
def test_a_link_on_the_way_is_followed_inside_the_tree(target: str) -> None:
    tree = FileTree()
    tree.put(["usr", "lib"], _directory())
    tree.put(["lib"], _symlink(target))
    tree.put(["lib", "libc.so"], _file())
    assert _paths(tree) == ["lib", "usr", "usr/lib", "usr/lib/libc.so"]


def test_a_link_that_is_the_last_part_of_a_path_is_replaced_not_followed() -> None:
    tree = FileTree()
    tree.put(["passwd"], _symlink("/etc/passwd"))
    tree.put(["passwd"], _file())
    assert _paths(tree) == ["passwd"]
    assert stat.S_ISREG(tree.root.children["passwd"].mode)


@pytest.mark.parametrize("target", ["..", "../../etc", "a/../../..", "/.."])
def test_a_link_that_climbs_above_the_root_is_refused(target: str) -> None:
    tree = FileTree()
    tree.put(["a"], _directory())
    tree.put(["out"], _symlink(target))
    with pytest.raises(ImageError, match="inside the root"):
        tree.put(["out", "x"], _file())


def test_links_in_a_circle_are_refused() -> None:
    tree = FileTree()
    tree.put(["a"], _symlink("b"))
    tree.put(["b"], _symlink("a"))
    with pytest.raises(ImageError, match="at most 40"):
        tree.put(["a", "x"], _file())


def test_links_that_lead_the_long_way_round_are_refused() -> None:
    tree = FileTree()
    tree.put(["d"], _directory())
    for number in range(30):
        tree.put([f"l{number}"], _symlink("d/../" * 400 + (f"l{number - 1}" if number else "d")))
    with pytest.raises(ImageError, match="symbolic links"):
        tree.put(["l29", "x"], _file())


def test_a_file_below_a_file_is_refused() -> None:
    tree = FileTree()
    tree.put(["a"], _file())
    with pytest.raises(ImageError, match="directory above it"):
        tree.put(["a", "b"], _file())


def test_two_names_of_one_file_are_one_node() -> None:
    tree = FileTree()
    node = _file()
    tree.put(["a"], node)
    tree.link(["d", "b"], ["a"])
    assert tree.find(["d", "b"]) is node


@pytest.mark.parametrize("target", [["none"], ["d"], ["d", "none"], []])
def test_a_hard_link_to_nothing_or_to_a_directory_is_refused(target: list[str]) -> None:
    tree = FileTree()
    tree.put(["d"], _directory())
    with pytest.raises(ImageError, match="hard link"):
        tree.link(["b"], target)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a/..", "x" * 256, "a\0b", "d/" * 2048 + "x"])
def test_a_name_that_could_leave_the_root_or_that_linux_could_not_hold_is_refused(name: str) -> None:
    with pytest.raises(ImageError, match="file name"):
        split(name)


def test_dots_and_double_slashes_mean_nothing() -> None:
    assert split("./a//b/./c/") == ["a", "b", "c"]
    assert split("./") == []


def test_a_tree_of_too_many_files_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filetree, "MAX_ENTRIES", 3)
    tree = FileTree()
    for name in "abc":
        tree.put([name], _file())
    with pytest.raises(ImageError, match="at most 3 files"):
        tree.put(["d"], _file())


NAMES = st.lists(st.sampled_from(["a", "b", "c", "..", "/", ""]), max_size=4).map("/".join)
STEPS = st.tuples(st.sampled_from(["file", "directory", "symlink", "link", "remove", "clear"]), NAMES, NAMES)


@given(st.lists(STEPS, max_size=30))
def test_whatever_is_done_to_a_tree_its_paths_stay_inside_it(steps: list[tuple[str, str, str]]) -> None:
    tree = FileTree()
    for kind, name, other in steps:
        with contextlib.suppress(ImageError):
            _do(tree, kind, split(name), other)
    for path, node in tree.walk():
        assert split(path) == path.split("/")
        assert node.is_directory or not node.children


def _do(tree: FileTree, kind: str, path: list[str], other: str) -> None:
    if kind == "link":
        tree.link(path, split(other))
    elif kind == "remove" and path:
        tree.remove(path)
    elif kind == "clear":
        tree.clear(path)
    elif kind in ("file", "directory", "symlink"):
        made = {"file": _file(), "directory": _directory(), "symlink": _symlink(other or "a")}
        tree.put(path, made[kind])
