"""A VM whose guest sends back what it hears on its console."""

from __future__ import annotations

import anyio

from asyncvmm import VM

PATIENCE_S = 60


async def echoed(vm: VM, text: bytes) -> bytes:
    """What an echoing guest says to ``text``, as much as that was."""
    reader = vm.console.subscribe()
    await vm.console.write(text)
    answer = b""
    with anyio.fail_after(PATIENCE_S):
        while len(answer) < len(text):
            answer += await anext(reader)
    await reader.aclose()
    return answer
