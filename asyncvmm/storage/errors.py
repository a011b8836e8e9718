"""What can go wrong with a drive's image. Every error names the path."""

from __future__ import annotations

from asyncvmm.errors import HostError


class DriveError(HostError):
    """A drive's image cannot be used: missing, not to be opened, of no use as a disk."""


class DriveBusy(DriveError):
    """Somebody else uses the image in a way that does not go together with what was asked for."""
