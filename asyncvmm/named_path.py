"""NamedPath: a path on the command line. One without a name, which pathlib takes for the current directory, is refused.

Whether something is there, and can be read, is for the library to find out, and to say.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from asyncvmm.errors import ConfigError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    _ParamType = click.ParamType[Any]
else:
    _ParamType = click.ParamType  # generic in newer versions alone


class NamedText(_ParamType):
    """Text that names a path, and may name something else as well."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text. Raises ConfigError if there is none."""
        if value == "":
            raise ConfigError(_called(param), expected="a path", found=repr(value))
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shell knows its files."""
        return click.Path().shell_complete(ctx, param, incomplete)


class NamedPath(NamedText):
    """A path."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path. Raises ConfigError if it has no name."""
        return Path(super().convert(value, param, ctx))


def _called(param: click.Parameter | None) -> str:
    """What the usage calls it."""
    if isinstance(param, click.Option):
        return max(param.opts, key=len)
    return "path" if param is None else param.human_readable_name
