"""HTML and SVG by construction: text and attribute values are escaped unless they were made here."""

from __future__ import annotations

from html import escape

_VOID = frozenset({"meta", "link", "rect", "line", "path", "circle", "br"})


class Markup(str):
    """Text that is markup already. Made by ``element`` and ``join`` only, and of literals."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """The element ``name``. Children that are not Markup are escaped, None is left out.

    Attributes: a trailing underscore is dropped, others are hyphens; True is the bare name, None and False leave it.
    """
    given = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*parts: str | None) -> Markup:
    """The parts one after the other, escaped where they are not Markup."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts if part is not None))


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
