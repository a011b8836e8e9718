"""README's blocks of code, as tests run them."""

from __future__ import annotations

import re

from tests.support.requirements import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def block_with(language: str, text: str) -> str:
    """The one block of a language that contains ``text``. Raises ValueError if there are none or several."""
    (block,) = (block for block in blocks(language) if text in block)
    return block
