"""What an error says of itself."""

from __future__ import annotations

from asyncvmm.errors import BootError, KvmIoctlError, StateError


def test_an_errors_repr_has_its_facts() -> None:
    error = StateError("boot", expected="a new VM", state="ready")
    assert repr(error) == "StateError('boot: expected a new VM, state ready')"
    assert repr(KvmIoctlError("KVM_RUN", 14, "Bad address")).startswith("KvmIoctlError('KVM_RUN failed: expected")
    assert repr(BootError("the guest panicked", reason="panic")) == "BootError('the guest panicked')"
