from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface

import pytest

from asyncvmm.errors import ConfigError
from asyncvmm.guest import cpio
from asyncvmm.guest.archive import MAX_BYTES, MAX_WORDS, GuestNet, RootMount, workload_archive


def _files(archive: bytes) -> dict[str, bytes]:
    return {entry.name: entry.data for entry in cpio.read(archive)}


def test_each_word_ends_with_a_nul_so_that_empty_words_survive() -> None:
    assert _files(workload_archive(["sh", "-c", ""]))["asyncvmm/run/argv"] == b"sh\0-c\0\0"


def test_the_environment_goes_the_same_way() -> None:
    assert _files(workload_archive(["true"], ["A=1", "B="]))["asyncvmm/run/env"] == b"A=1\0B=\0"


def test_the_window_is_armed_by_a_file_that_exists() -> None:
    assert "asyncvmm/run/arm-pre-exec" in _files(workload_archive(["true"], arm_pre_exec=True))
    assert "asyncvmm/run/arm-pre-exec" not in _files(workload_archive(["true"]))


def test_nothing_to_run_is_no_archive_at_all() -> None:
    assert workload_archive([]) == b""


def test_the_archive_can_stand_behind_another_one() -> None:
    assert len(workload_archive(["true"])) % 4 == 0


def test_words_of_any_bytes_pass_unchanged() -> None:
    word = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert _files(workload_archive(["echo", word, "é"]))["asyncvmm/run/argv"] == b"echo\0\xff\xfe\0\xc3\xa9\0"


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        (["a\0b"], []),
        ([""], []),
        (["a"], ["A=\0"]),
        (["a"], ["novalue"]),
        (["a"], ["=x"]),
        (["a" * MAX_BYTES], []),
        (["a"] * (MAX_WORDS + 1), []),
    ],
)
def test_what_pid_1_could_not_take_is_refused(argv: list[str], env: list[str]) -> None:
    with pytest.raises(ConfigError):
        workload_archive(argv, env)


def test_arming_without_a_workload_is_refused() -> None:
    with pytest.raises(ConfigError, match="pre-exec window"):
        workload_archive([], arm_pre_exec=True)


def test_a_root_is_one_line_of_device_type_and_mode() -> None:
    archive = _files(workload_archive(["true"], root=RootMount("vdb", "erofs", read_only=True)))
    assert archive["asyncvmm/run/root"] == b"vdb erofs ro\n"
    assert _files(workload_archive(["true"], root=RootMount("vda")))["asyncvmm/run/root"] == b"vda auto rw\n"


def test_a_network_is_one_line_of_interface_and_what_it_gets() -> None:
    assert _files(workload_archive(["true"], net=GuestNet()))["asyncvmm/run/net"] == b"eth0 dhcp\n"
    address, gateway, dns = IPv4Interface("192.0.2.2/24"), IPv4Address("192.0.2.1"), "192.0.2.3"
    static = GuestNet("eth1", address, gateway, dns)
    line = _files(workload_archive([], net=static))["asyncvmm/run/net"]
    assert line == b"eth1 192.0.2.2/24 gateway=192.0.2.1 dns=192.0.2.3\n"


def test_ports_are_names_one_a_line() -> None:
    assert _files(workload_archive([], ports=["a", "b.c"]))["asyncvmm/run/ports"] == b"a\nb.c\n"


@pytest.mark.parametrize(
    "make",
    [
        lambda: RootMount("../vda"),
        lambda: RootMount("vda rw"),
        lambda: RootMount(""),
        lambda: RootMount("vda", "xfs"),
        lambda: GuestNet("eth0 x"),
        lambda: GuestNet("e" * 16),
        lambda: GuestNet(address="10.0.0.1"),
        lambda: GuestNet(address="none"),
        lambda: GuestNet(address="10.0.0.1/33"),
        lambda: GuestNet(address="::1/64"),
        lambda: GuestNet(address="10.0.0.1/8", gateway="10.0.0.1\n"),
        lambda: GuestNet(address="10.0.0.1/8", dns="::1"),
        lambda: GuestNet(gateway="10.0.0.1"),
        lambda: workload_archive([], ports=["a/b"]),
    ],
)
def test_a_root_network_or_port_that_pid_1_would_misread_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()
