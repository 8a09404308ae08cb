"""The quality benchmark's arithmetic: a measure by subject, 95 % intervals, paired differences, verdicts."""

from __future__ import annotations

import statistics

from .claims import Claim
from .jobs import Row

SCALES = {"drift_distance": 1e-3}  # kernel distances of the judge's features are large numbers
# 97.5 % points of Student's t for 1, 2, ... degrees of freedom
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval."""
    if len(values) < 2:
        return (values[0] if values else float("nan")), float("nan")
    t = T[len(values) - 2] if len(values) - 2 < len(T) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / len(values) ** 0.5


def column(rows: list[Row], where: tuple[str, str], measure: str) -> dict[str, float]:
    """subject -> value"""
    mine = [r for r in rows if (r["section"], r["setting"]) == where and r[measure] != ""]
    return {r["subject"]: float(r[measure]) * SCALES.get(measure, 1) for r in mine}


def shown(values: list[float], digits: int = 2) -> str:
    """Mean and interval as they stand in a table."""
    mean, half = interval(values)
    return "-" if mean != mean else f"{mean:.{digits}f}" + ("" if half != half else f" ± {half:.{digits}f}")


def cell(rows: list[Row], where: tuple[str, str], measure: str) -> str:
    """A measure's mean and interval over the subjects of a setting, as they stand in a table."""
    return shown(list(column(rows, where, measure).values()))


def paired(rows: list[Row], claim: Claim) -> tuple[list[float], list[float]]:
    """The two sides of a claim, on the subjects that both have."""
    first, second = column(rows, claim.first, claim.measure), column(rows, claim.second, claim.measure)
    both = [s for s in first if s in second]
    return [first[s] for s in both], [second[s] for s in both]


def verdict(differences: list[float], better: str) -> str:
    """What the paired differences say: a claim holds where their 95 % interval lies on its side of 0."""
    if len(differences) < 2:
        return "not measured"
    mean, half = interval(differences)
    mean = mean if better == "more" else -mean
    if mean - half > 0:
        return "holds"
    if mean + half < 0:
        return "**does not hold: the reverse**"
    return "undecided: no difference seen"
