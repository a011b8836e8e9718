"""``scripts/bench``, as it is run, and what each line of it has."""

from __future__ import annotations

import subprocess
from pathlib import Path

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
KEYS = {
    *("name", "unit", "conditions", "ours", "peer_name", "peer", "ratio", "difference", "target", "met", "n", "order"),
    *("ours_spread", "peer_spread", "detail", "run"),
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run([BENCH, *arguments], capture_output=True, text=True, timeout=200, check=False)
