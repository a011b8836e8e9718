"""The second initramfs archive: it tells PID 1 what to run. The kernel unpacks it over the first one.

/asyncvmm/run/argv           the words, each ended by a NUL
/asyncvmm/run/env            NAME=value, each ended by a NUL
/asyncvmm/run/arm-pre-exec   exists if PID 1 is to wait for ``go`` before the exec
"""

from __future__ import annotations

from collections.abc import Sequence

from asyncvmm.errors import ConfigError
from asyncvmm.guest import cpio

MAX_BYTES = 128 * 1024 - 2
"""Most bytes of all words together, NULs included: PID 1's buffer."""

MAX_WORDS = 4096
"""Most words PID 1 takes."""


def workload_archive(argv: Sequence[str], env: Sequence[str] = (), *, arm_pre_exec: bool = False) -> bytes:
    """The archive that makes PID 1 run ``argv``, with ``env`` on top of its defaults; empty if there is nothing to run.

    Raises ConfigError for words with a NUL, too many or too long words, an ``env`` word that is not NAME=value, and
    an armed pre-exec window without a workload.
    """
    if not argv:
        if arm_pre_exec:
            raise ConfigError("pre-exec window", expected="a workload to hold", found="none")
        return b""
    if not argv[0]:
        raise ConfigError("workload", expected="a program's name", found="an empty word")
    for word in env:
        if word.find("=") < 1:
            raise ConfigError("environment", expected="NAME=value", found=repr(word))
    entries = [
        cpio.file("asyncvmm/run/argv", _words("workload", argv)),
        cpio.file("asyncvmm/run/env", _words("environment", env)),
    ]
    if arm_pre_exec:
        entries.append(cpio.file("asyncvmm/run/arm-pre-exec", b""))
    return cpio.write(entries)


def _words(what: str, words: Sequence[str]) -> bytes:
    if any("\0" in word for word in words):
        raise ConfigError(what, expected="words without NUL", found="a NUL")
    if len(words) > MAX_WORDS:
        raise ConfigError(what, expected=f"at most {MAX_WORDS} words", found=len(words))
    text = b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
    if len(text) > MAX_BYTES:
        raise ConfigError(what, expected=f"at most {MAX_BYTES} bytes", found=len(text))
    return text
