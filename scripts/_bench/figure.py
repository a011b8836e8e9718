"""A measured figure as a record: samples in, medians, spread, ratio and verdict out. Pure.

``statistics`` is imported when all is measured: a process with its libraries, which no program with VMs needs, takes
longer to create one (each mapping some 0.3 us).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs

Subject = Literal["ours", "ratio", "difference"]
Sign = Literal["<=", ">="]
_COMPARE = {"<=": operator.le, ">=": operator.ge}


@attrs.frozen
class Target:
    """What a figure is to keep: ``ours`` itself, its ``ratio`` to the peer's median, or its ``difference`` from it."""

    subject: Subject
    sign: Sign
    limit: float

    def __str__(self) -> str:
        return f"{self.subject}{self.sign}{self.limit:g}"

    def met(self, values: Mapping[Subject, float | None]) -> bool | None:
        """Whether ``values`` keep it; None where the subject was not measured."""
        value = values[self.subject]
        return None if value is None else bool(_COMPARE[self.sign](value, self.limit))


@attrs.frozen(kw_only=True)
class Figure:
    """One figure: samples of ours, and of the peer (floor or competitor) taken in turns with them in the same run.

    ``conditions`` says under which load and settings, ``order`` in which order the sides take their turns; ``detail``
    is what helps to read the figure.
    """

    name: str
    unit: str
    ours: Sequence[float]
    peer_name: str | None = None
    peer: Sequence[float] = ()
    target: Target | None = None
    conditions: Mapping[str, Any] = attrs.field(factory=dict)
    detail: Mapping[str, Any] = attrs.field(factory=dict)
    order: str = "A B A B"

    def record(self) -> dict[str, Any]:
        """The figure as one JSON object."""
        values = compare(self.ours, self.peer)
        return {
            "name": self.name,
            "unit": self.unit,
            "conditions": dict(self.conditions),
            "ours": rounded(values["ours"]),
            "peer_name": self.peer_name,
            "peer": rounded(compare(self.peer, ())["ours"] if self.peer else None),
            "ratio": rounded(values["ratio"]),
            "difference": rounded(values["difference"]),
            "target": str(self.target) if self.target else None,
            "met": self.target.met(values) if self.target else None,
            "n": len(self.ours),
            "order": self.order if self.peer else "A",
            "ours_spread": spread(self.ours),
            "peer_spread": spread(self.peer) if self.peer else None,
            "detail": dict(self.detail),
        }


def compare(ours: Sequence[float], peer: Sequence[float]) -> dict[Subject, float | None]:
    """Our median, and its ratio to and difference from the peer's (None without one)."""
    from statistics import median

    middle = median(ours)
    if not peer:
        return {"ours": middle, "ratio": None, "difference": None}
    other = median(peer)
    return {"ours": middle, "ratio": middle / other if other else None, "difference": middle - other}


def spread(samples: Sequence[float]) -> dict[str, float | None]:
    """Minimum, quartiles, 99th percentile and maximum; a single sample is all of them."""
    from statistics import median, quantiles

    if len(samples) < 2:
        return dict.fromkeys(("min", "p25", "median", "p75", "p99", "max"), rounded(samples[0]))
    cuts = quantiles(samples, n=100, method="inclusive")
    values = (min(samples), cuts[24], median(samples), cuts[74], cuts[98], max(samples))
    return dict(zip(("min", "p25", "median", "p75", "p99", "max"), map(rounded, values), strict=True))


def rounded(value: float | None) -> float | None:
    """Four significant digits: more would be noise."""
    return None if value is None else float(f"{value:.4g}")
