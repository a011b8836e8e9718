"""The page of a timeline: one HTML file that needs nothing else and asks nobody for anything.

Boots stand side by side on one scale, with what moved between them above. Its Content-Security-Policy lets in its own
style and script, by their hashes, and nothing of the network: text of a file could do nothing even if it were not
escaped. Without a script everything is shown; the script adds details under the pointer and zooming.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources

from asyncvmm.timing.chart import Chart
from asyncvmm.timing.compare import Comparison
from asyncvmm.timing.markup import Markup, element, join
from asyncvmm.timing.page_chart import article, colours_of, span_of
from asyncvmm.timing.page_compare import comparison_section

MAX_BOOTS = 24
"""Boots that are drawn one by one; of more there is the comparison."""

_HINT = "Point at a row, tap it or Tab to it for details. Double-click it or press Enter to zoom to it, Esc to go back."

_FOOTER = (
    "Drawn by asyncvmm timeline. Axes count from the boot's start, tables and details from the VM's, on the host's "
    "monotonic clock."
)


def page(charts: Sequence[Chart], comparison: Comparison) -> str:
    """The whole page."""
    style, script = _asset("page.css"), _asset("page.js")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", _title(charts)),
        element("link", rel="icon", href="data:,"),
        element("style", Markup(style)),
    )
    body = element("body", _body(charts, comparison), element("script", Markup(script)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _body(charts: Sequence[Chart], comparison: Comparison) -> Markup:
    drawn = charts[:MAX_BOOTS]
    colours, span_ns = colours_of(drawn), span_of(drawn)
    boots = [article(chart, number, span_ns, colours, len(charts) == 1) for number, chart in enumerate(drawn, 1)]
    more = len(charts) - len(drawn)
    return join(
        element("header", element("h1", _title(charts)), element("p", _HINT, class_="hint")),
        element(
            "main",
            comparison_section(comparison) if len(charts) > 1 else None,
            element("section", *boots, class_="boots" + " alone" * (len(charts) == 1), aria_label="Boots"),
            element("p", f"{more} more {_kind(charts)}s are in the comparison only.", class_="hint")
            if more > 0
            else None,
        ),
        element("footer", _FOOTER),
        element("div", id="tip", role="status", hidden=True),
    )


def _title(charts: Sequence[Chart]) -> str:
    if len(charts) == 1:
        return f"{charts[0].recording.what.capitalize()} of VM {charts[0].name}"
    return f"{len(charts)} {_kind(charts)}s compared"


def _kind(charts: Sequence[Chart]) -> str:
    kinds = {chart.recording.what for chart in charts}
    return kinds.pop() if len(kinds) == 1 else "VM"


def _asset(name: str) -> str:
    return resources.files("asyncvmm.timing").joinpath(name).read_text("utf-8")


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
