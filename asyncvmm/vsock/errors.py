"""What can become of an attempt to reach the guest through its socket device; part of the tree in asyncvmm.errors."""

from __future__ import annotations

from asyncvmm.errors import AsyncVMMError


class VsockConnectError(AsyncVMMError, OSError):
    """No connection came about. ``port`` is the guest's."""

    def __init__(self, what: str, *, port: int, expected: object = None, found: object = None) -> None:
        self.port = port
        super().__init__(what, expected=expected, found=found)


class VsockRefused(VsockConnectError, ConnectionRefusedError):
    """The guest refused it: nobody listens on that port, or no more connections are to be had."""


class VsockTimeout(VsockConnectError, TimeoutError):
    """The guest did not answer in time; it may have no driver for the device, or not yet."""
