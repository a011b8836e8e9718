"""Functions of the caller's that restores call: checked before the call, and for being async where none is awaited."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from asyncvmm.errors import ConfigError


def check_hook(name: str, hook: object) -> None:
    """Raises ConfigError for what is neither None nor can be called."""
    if hook is not None and not callable(hook):
        raise ConfigError(name, expected="a function", found=repr(hook)[:80])


def call_plain(name: str, hook: Callable[..., object], *arguments: object) -> object:
    """Call a hook that is not awaited; gives what it does. Raises ConfigError for an async one, and what it raises."""
    found = hook(*arguments)
    if inspect.isawaitable(found):
        if inspect.iscoroutine(found):
            found.close()
        raise ConfigError(name, expected="a plain function", found="an async one")
    return found
