"""scripts/fuzz: a target's ``run`` under atheris, with a corpus that is kept from one time to the next."""

from __future__ import annotations

import gc
import hashlib
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from tests.fuzz.inputs import INPUTS, SYNONYMS, TARGETS, load, saved
from tests.fuzz.keep import fewest

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "fuzz"
USAGE = f"usage: scripts/fuzz {{{','.join((*TARGETS, *SYNONYMS, 'all'))}}} {{SECONDS,keep}}"

MOST_INPUT_BYTES = 2048
SLOWEST_RUN_S = 10
"""A run that takes longer is a finding."""
MOST_MEMORY_MIB = 1024

_INSTRUMENTED = ("asyncvmm.devices", "asyncvmm.net.framing", "asyncvmm.guest", "asyncvmm.snapshot")


def parse(arguments: list[str]) -> tuple[list[str], int]:
    """The targets, and how long each; 0 to keep what was found. Ends the process for anything else."""
    if len(arguments) == 2 and (arguments[1] == "keep" or (arguments[1].isdecimal() and int(arguments[1]))):
        name = SYNONYMS.get(arguments[0], arguments[0])
        seconds = 0 if arguments[1] == "keep" else int(arguments[1])
        if name in TARGETS:
            return [name], seconds
        if name == "all":
            return list(TARGETS), seconds
    sys.exit(USAGE)


def main(names: list[str], seconds: int) -> int:
    """The exit code: 0 if nothing was found."""
    if not seconds:
        for name in names:
            keep(name)
        return 0
    if len(names) == 1:
        return fuzz(names[0], seconds)
    return max(_in_another_process(name, seconds) for name in names)


def _in_another_process(name: str, seconds: int) -> int:
    """libFuzzer ends the process it ran in."""
    print(f"== {name}", file=sys.stderr, flush=True)
    script = [sys.executable, str(ROOT / "scripts" / "fuzz"), name, str(seconds)]
    return int(subprocess.run(script, check=False).returncode != 0)


def fuzz(name: str, seconds: int) -> int:
    """Does not return, as a rule."""
    atheris = import_module("atheris")
    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        run = load(name)
    directory, corpus = CACHE / name, _corpus(name)
    corpus.mkdir(parents=True, exist_ok=True)
    for data in saved(name):
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
    gc.freeze()  # what is there stays there: no need to look at it each time
    atheris.Setup([sys.argv[0], *_options(directory, seconds), str(corpus)], run)
    atheris.Fuzz()
    return 0


def keep(name: str) -> None:
    """Make inputs/NAME.txt of what is there and what the fuzzer found. Comments there and findings stay."""
    path = INPUTS / f"{name}.txt"
    findings = _findings(path.read_text().splitlines() if path.exists() else [])
    scripts = saved(name) + [entry.read_bytes() for entry in sorted(_corpus(name).iterdir())]
    kept = [script.hex() for script in fewest(load(name), scripts)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in [*findings, "# far into the device", *kept]))
    print(f"== {path.relative_to(ROOT)}: {len(kept)} scripts of {len(scripts)}", file=sys.stderr)


def _findings(lines: list[str]) -> list[str]:
    """Each comment, with the script below it, but for those that were chosen here."""
    end = lines.index("# far into the device") if "# far into the device" in lines else len(lines)
    return lines[:end]


def _corpus(name: str) -> Path:
    return CACHE / name / "corpus"


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
