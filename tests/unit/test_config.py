"""VMConfig refuses at once what no host could give."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncvmm.config import MAX_CMDLINE, VMConfig, check_cmdline
from asyncvmm.errors import CmdlineError, ConfigError, MemorySizeError, VcpuCountError

REFUSED: list[tuple[dict[str, Any], type[ConfigError]]] = [
    ({"memory_mib": 0}, MemorySizeError),
    ({"memory_mib": -1}, MemorySizeError),
    ({"memory_mib": 1 << 40}, MemorySizeError),
    ({"memory_mib": 1.5}, MemorySizeError),
    ({"memory_mib": True}, MemorySizeError),
    ({"memory_mib": "256"}, MemorySizeError),
    ({"vcpus": 0}, VcpuCountError),
    ({"vcpus": 10_000}, VcpuCountError),
    ({"vcpus": True}, VcpuCountError),
    ({"cmdline": "x" * (MAX_CMDLINE + 1)}, CmdlineError),
    ({"cmdline": "quiet\0"}, CmdlineError),
    ({"accel": "hvf"}, ConfigError),
    ({"accel": None}, ConfigError),
    ({"workload": "uname -a"}, ConfigError),
    ({"workload": b"uname"}, ConfigError),
    ({"workload": ("a\0b",)}, ConfigError),
    ({"workload": ("", "x")}, ConfigError),
    ({"env": "A=b"}, ConfigError),
    ({"boot_timeout_s": 0}, ConfigError),
    ({"boot_timeout_s": float("nan")}, ConfigError),
    ({"boot_timeout_s": float("inf")}, ConfigError),
    ({"stall_timeout_s": -1}, ConfigError),
    ({"boot_timeout_s": "3"}, ConfigError),
    ({"boot_timeout_s": True}, ConfigError),
    ({"stall_timeout_s": None}, ConfigError),
    ({"vcpus": "2"}, VcpuCountError),
    ({"kernel": 5}, ConfigError),
    ({"kernel": b"vmlinux"}, ConfigError),
    ({"kernel": "vm\0linux"}, ConfigError),
    ({"initrd": ("a", "b")}, ConfigError),
    ({"initrd": "\ud800"}, ConfigError),
    ({"cmdline": b"quiet"}, CmdlineError),
    ({"cmdline": "\ud800"}, CmdlineError),
    ({"workload": None}, ConfigError),
    ({"workload": (1, 2)}, ConfigError),
    ({"workload": ("a", "\ud800")}, ConfigError),
    ({"env": None}, ConfigError),
    ({"env": (b"A=b",)}, ConfigError),
    ({"env": ("A=\0",)}, ConfigError),
    ({"accel": ["kvm"]}, ConfigError),
    ({"image": 5}, ConfigError),
    ({"image": None}, ConfigError),
    ({"name": 5}, ConfigError),
    ({"name": "\ud800"}, ConfigError),
    ({"serial_lines": "no"}, ConfigError),
]


@pytest.mark.parametrize(("options", "error"), REFUSED, ids=[repr(options)[:40] for options, _ in REFUSED])
def test_what_no_host_could_give_is_refused(options: dict[str, Any], error: type[ConfigError]) -> None:
    with pytest.raises(error) as caught:
        VMConfig(**options)
    assert isinstance(caught.value, ValueError)
    assert caught.value.expected is not None
    assert caught.value.found is not None


def test_text_where_a_number_belongs_is_quoted() -> None:
    with pytest.raises(MemorySizeError, match="found '256'"):
        VMConfig(memory_mib="256")  # type: ignore[arg-type]


def test_bytes_that_are_no_utf_8_are_taken_as_the_shell_gives_them() -> None:
    words = ("cat", "\udcff")
    assert VMConfig(cmdline="x=\udcff", workload=words).workload == words


def test_the_defaults_are_accepted_and_frozen() -> None:
    config = VMConfig()
    with pytest.raises(AttributeError):
        config.vcpus = 2  # type: ignore[misc]


def test_words_and_paths_are_taken_in_any_form() -> None:
    config = VMConfig(workload=["uname", "-a"], env=iter(["A=b"]), kernel="/boot/vmlinuz")
    assert (config.workload, config.env) == (("uname", "-a"), ("A=b",))
    assert config.kernel is not None
    assert config.kernel.name == "vmlinuz"


@given(st.text(max_size=3000))
def test_a_command_line_is_measured_in_bytes(text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    try:
        check_cmdline(text)
    except CmdlineError:
        assert size > MAX_CMDLINE or "\0" in text
    else:
        assert size <= MAX_CMDLINE
