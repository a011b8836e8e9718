"""scripts/fuzz: a target's ``run`` under atheris, with a corpus that is kept from one time to the next."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from tests.fuzz.inputs import SYNONYMS, TARGETS, load, saved

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "fuzz"
USAGE = f"usage: scripts/fuzz {{{','.join((*TARGETS, *SYNONYMS, 'all'))}}} SECONDS"

MOST_INPUT_BYTES = 2048
SLOWEST_RUN_S = 10
"""A run that takes longer is a finding."""
MOST_MEMORY_MIB = 1024

_INSTRUMENTED = ("asyncvmm.devices",)


def main(arguments: list[str]) -> int:
    """The exit code: 0 if nothing was found."""
    if len(arguments) != 2 or not arguments[1].isdecimal() or not int(arguments[1]):
        sys.exit(USAGE)
    name, seconds = SYNONYMS.get(arguments[0], arguments[0]), int(arguments[1])
    if name == "all":
        return max(_in_another_process(target, seconds) for target in TARGETS)
    if name not in TARGETS:
        sys.exit(USAGE)
    return _fuzz(name, seconds)


def _in_another_process(name: str, seconds: int) -> int:
    """libFuzzer ends the process it ran in."""
    print(f"== {name}", file=sys.stderr, flush=True)
    script = [sys.executable, str(ROOT / "scripts" / "fuzz"), name, str(seconds)]
    return int(subprocess.run(script, check=False).returncode != 0)


def _fuzz(name: str, seconds: int) -> int:
    atheris = import_module("atheris")
    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        run = load(name)
    directory = CACHE / name
    corpus = directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for data in saved(name):
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    gc.freeze()  # what is there stays there: no need to look at it each time
    atheris.Setup([sys.argv[0], *_options(directory, seconds), str(corpus)], run)
    atheris.Fuzz()
    return 0


def _options(directory: Path, seconds: int) -> list[str]:
    return [
        f"-max_total_time={seconds}",
        f"-max_len={MOST_INPUT_BYTES}",
        f"-timeout={SLOWEST_RUN_S}",
        f"-rss_limit_mb={MOST_MEMORY_MIB}",
        f"-artifact_prefix={directory}/",
        "-print_final_stats=1",
        "-reload=0",
        "-len_control=10",
    ]
