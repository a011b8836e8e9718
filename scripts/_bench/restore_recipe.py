"""What a snapshot's restore consists of, written down for the C floor: pieces of memory, and the calls that set state.

The calls are taken from the library's own chain, so that the floor makes the same ones in the same order, whatever they
come to be.
"""

from __future__ import annotations

import struct
from pathlib import Path

import attrs

from asyncvmm.machine.kvm.abi import Request
from asyncvmm.machine.kvm.fastpath.chain import ARGUMENTS, NOTHING, STEP, Chain, Program, SystemCall
from asyncvmm.machine.kvm.restore_chains import set_state
from asyncvmm.machine.kvm.restoring import RestoreBlueprint, _tsc_plan
from asyncvmm.snapshot.manifest import MEMORY
from asyncvmm.snapshot.snapshot import Snapshot

_HEADER = struct.Struct("<2I2Q512s")
_PIECE = struct.Struct("<2Qq")
_SETTING = struct.Struct("<4I2Q")
_VALUE, _STATE, _TSC_OFFSET = 0, 1, 2
_DATA, _ARENA, _OFFSET, _VM, _VCPU = range(5)
"""Slots of the chain: its data, and the values that it is given."""

_ANY_RESULT = -1 << 63
_PADDING = 8


@attrs.frozen
class _Setting:
    """One ioctl of a vCPU or the VM."""

    to_vm: bool
    may_fail: bool
    kind: int
    request: int
    value: int

    def packed(self) -> bytes:
        """As floor_restore.c has it."""
        return _SETTING.pack(self.to_vm, self.may_fail, self.kind, 0, self.request, self.value)


def write_restore_recipe(path: Path, snapshot: Snapshot, plan: RestoreBlueprint) -> Path:
    """Write the recipe of a snapshot with one vCPU and one memory file, and give its path back."""
    chain = Chain(given=4)
    vm, vcpu = chain.given(_VM - 1), chain.given(_VCPU - 1)
    set_state(chain, plan.shape, _tsc_plan(plan.state), vm, [vcpu])
    program = chain.program()
    arena = plan.state.arena + bytes(-len(plan.state.arena) % _PADDING)
    settings = [setting.packed() for setting in _settings(program, len(arena))]
    state = arena + _data(program)
    pieces = [
        _PIECE.pack(piece.offset, piece.size, -1 if piece.layer is None else piece.offset)
        for piece in plan.shape.pieces
    ]
    offset = plan.offsets()[0] % (1 << 64)
    memory = str(snapshot.path / MEMORY).encode()
    header = _HEADER.pack(len(pieces), len(settings), len(state), offset, memory)
    path.write_bytes(header + b"".join([*pieces, *settings]) + state)
    return path


def _settings(program: Program, behind: int) -> list[_Setting]:
    """``behind``: where the chain's own data lies, behind the arena. What it stores in it is the TSC offset's alone."""
    found = []
    for call, _, *rest in STEP.iter_unpack(program.steps):
        bases, arguments, least = rest[:ARGUMENTS], rest[ARGUMENTS:-1], rest[-1]
        if call != SystemCall.IOCTL:
            continue
        request, base, value = arguments[1], bases[2], arguments[2]
        kind = _VALUE if base == NOTHING else _STATE
        if request == Request.KVM_SET_DEVICE_ATTR:
            kind = _TSC_OFFSET
        elif base == _DATA:
            value += behind
        found.append(_Setting(bases[0] == _VM, least == _ANY_RESULT, kind, request, value))
    return found


def _data(program: Program) -> bytes:
    return program.template.tobytes()[program.data_offset :]
