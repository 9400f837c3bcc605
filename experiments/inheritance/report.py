"""Statistics of the rows: inheritance, retention and selectivity by seed, paired intervals, gates. No torch here."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats

from common.intervals import by_seed, paired_interval
from experiments.inheritance.world import ideal_gap
from experiments.study import read_rows

EQUIVALENT = 0.10  # means within this of each other count as the same inheritance
PRIMARY = ("BA-LoRA", "PiSSA")
TEMPERATURES = tuple(round(0.5 * 2 ** (i / 4), 3) for i in range(17))  # 0.5 to 8, at which entropies are measured


# ------------------------------------------------------------------------------------------------------------------
# Statistics
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Paired:
    """Differences of n seeds: mean, 95 % t interval, exact two-sided sign-flip test, and TOST within ±EQUIVALENT."""

    n: int
    mean: float
    low: float
    high: float
    p_sign_flip: float
    p_equivalent: float

    @classmethod
    def of(cls, differences: Iterable[float]) -> "Paired":
        d = np.asarray(list(differences), dtype=float)
        n, mean = len(d), float(np.mean(d)) if len(d) else math.nan
        if n < 2:
            return cls(n, mean, math.nan, math.nan, math.nan, math.nan)
        half = paired_interval(d.tolist())[1]
        signs = np.array(list(itertools.product((1, -1), repeat=n)))
        flipped = np.abs((signs * d).mean(axis=1))
        p_sign_flip = float((flipped >= abs(mean) * (1 - 1e-12)).mean())
        error = max(d.std(ddof=1) / math.sqrt(n), 1e-300)
        above = scipy.stats.t.sf((mean + EQUIVALENT) / error, n - 1)
        below = scipy.stats.t.cdf((mean - EQUIVALENT) / error, n - 1)
        return cls(n, mean, mean - half, mean + half, p_sign_flip, float(max(above, below)))


# ------------------------------------------------------------------------------------------------------------------
# Rows to measures
# ------------------------------------------------------------------------------------------------------------------


class Results:
    """The rows of a study, by arm, seed and condition. An arm may be "PiSSA @ scale 0.5": a point of that arm's row."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.failures = [row for row in rows if "error" in row]
        self.by_run = {
            (row["arm"], row["data"], row["seed"], row["beta"], row["eta"], row["questions"]): row
            for row in rows
            if "error" not in row
        }

    @classmethod
    def read(cls, path: Path) -> "Results":
        return cls(read_rows(path))

    def measures(self, arm, seed, beta, data="F0", eta=0.05, questions=True) -> dict | None:
        """The measures of one run, or None where there is none (yet). arm None: before fine-tuning."""
        arm, _, point = (arm or "").partition(" @ ")
        row = self.by_run.get((arm or None, data if arm else None, seed, beta, eta, questions))
        if row is None:
            return None
        return row["points"].get(point) if point else row["measures"]

    def seeds(self) -> list[int]:
        return sorted({row["seed"] for row in self.rows})

    def inheritance(self, arm, seed, beta=0.9, form="new", data="F0", **base) -> float:
        """I = [Δ_ft(β) − Δ_ft(0.5)] / [Δ_pre(β) − Δ_pre(0.5)], the denominator on the corpus' own prompts."""
        before = [self.measures(None, seed, b, **base) for b in (beta, 0.5)]
        after = [self.measures(arm, seed, b, data, **base) for b in (beta, 0.5)]
        if None in before or None in after:
            return math.nan
        return (after[0][f"gap_{form}"] - after[1][f"gap_{form}"]) / (before[0]["gap_old"] - before[1]["gap_old"])

    def retention(self, arm, seed, beta=0.9, data="F0", **base) -> float:
        """R = facts known after / before, the mean of statements and questions."""
        before, after = self.measures(None, seed, beta, **base), self.measures(arm, seed, beta, data, **base)
        if before is None or after is None:
            return math.nan
        kinds = ("facts_statements", "facts_questions")
        return sum(after[kind] for kind in kinds) / sum(before[kind] for kind in kinds)

    def value(self, name: str, arm, seed, beta=0.9, data="F0", **base) -> float:
        """One number of a run: I (new template), I_old, R, S = R − I, revival, or a measure by its own name."""
        base["data"] = data
        match name:
            case "I":
                return self.inheritance(arm, seed, beta, "new", **base)
            case "I_old":
                return self.inheritance(arm, seed, beta, "old", **base)
            case "R":
                return self.retention(arm, seed, beta, **base)
            case "S":
                return self.value("R", arm, seed, beta, **base) - self.value("I", arm, seed, beta, **base)
            case "revival":
                return self.inheritance(f"{arm} @ revived", seed, beta, "old", **base)
        measures = self.measures(arm, seed, beta, **base)
        return math.nan if measures is None else measures[name]

    def values(self, name: str, arm, beta=0.9, data="F0", **base) -> dict[int, float]:
        """`value` for every seed that has it."""
        found = {seed: self.value(name, arm, seed, beta, data, **base) for seed in self.seeds()}
        return {seed: value for seed, value in found.items() if not math.isnan(value)}

    def paired(self, name: str, first: str, second: str, beta=0.9, data="F0", **base) -> Paired:
        """`first` − `second` over the seeds that have both."""
        a, b = self.values(name, first, beta, data, **base), self.values(name, second, beta, data, **base)
        return Paired.of(by_seed(a, b).values())


def at_entropy_of(results: Results, arm: str, seed: int, temperatures: tuple[float, ...]) -> float:
    """I (new template) of PiSSA with the temperature at which its clear items' entropy, β = 0.9, is that of `arm`."""
    of_arm, of_pissa = results.measures(arm, seed, 0.9), results.measures("PiSSA", seed, 0.9)
    if of_arm is None or of_pissa is None:
        return math.nan
    wanted = of_arm["entropies"][temperatures.index(1.0)]
    temperature = math.exp(np.interp(wanted, of_pissa["entropies"], np.log(temperatures)))
    return results.inheritance("PiSSA", seed) / temperature


def on_drift_curve(results: Results, points: list[str], seed: int, retention: float) -> float:
    """I (new template) that merely less fine-tuning has at `retention`: linear between the points of PiSSA's curve."""
    curve = sorted((results.retention(point, seed), results.inheritance(point, seed)) for point in points)
    curve = [(r, i) for r, i in curve if not math.isnan(r + i)]
    if len(curve) < 2 or math.isnan(retention):
        return math.nan
    r, i = zip(*curve, strict=True)
    return float(np.interp(retention, r, i))


# ------------------------------------------------------------------------------------------------------------------
# Gates
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Gate:
    name: str
    passed: int
    of: int
    worst: str

    def line(self) -> str:
        state = "passes" if self.of and self.passed == self.of else ("not run" if not self.of else "FAILS")
        return f"| {self.name} | {self.passed} of {self.of} | {self.worst} | {state} |"


def _gate(name: str, checks: dict[str, tuple[float, bool]], distance=abs) -> Gate:
    worst = max(checks, key=lambda key: distance(checks[key][0]), default=None)
    text = "" if worst is None else f"{checks[worst][0]:.2f} ({worst})"
    return Gate(name, sum(passed for _, passed in checks.values()), len(checks), text)


def gates(results: Results) -> list[Gate]:
    """The assay's own checks, on the corpora with η = 0.05 and questions."""
    before = {
        (seed, beta): measures
        for seed in results.seeds()
        for beta in (0.5, 0.7, 0.9)
        if (measures := results.measures(None, seed, beta)) is not None
    }
    ratio, zero, facts = {}, {}, {}
    for (seed, beta), measures in before.items():
        label = f"seed {seed}, β = {beta:g}"
        known = (measures["facts_statements"] + measures["facts_questions"]) / 2
        facts[label] = known, known > 0.9
        if beta == 0.5:
            zero[label] = measures["gap_old"], abs(measures["gap_old"]) < 0.3
        else:
            value = measures["gap_old"] / ideal_gap(beta)
            ratio[label] = value, abs(value - 1) <= 0.15
    lowered, room = {}, {}
    for seed in results.seeds():
        inheritance = results.inheritance("PiSSA", seed)
        fair, against = (results.measures("PiSSA", seed, 0.9, data) for data in ("F0", "F2"))
        if fair is not None and against is not None:
            difference = against["gap_new"] - fair["gap_new"]
            lowered[f"seed {seed}"] = difference, difference < 0
        if not math.isnan(inheritance):
            room[f"seed {seed}"] = inheritance, 0.2 <= inheritance <= 5
    return [
        _gate("Δ_pre / (2·logit β) within 15 % of 1", ratio, lambda value: abs(value - 1)),
        _gate("\\|Δ_pre(0.5)\\| < 0.3", zero),
        _gate("facts known before fine-tuning > 90 %", facts, lambda value: -value),
        _gate("F2 lowers the gap: Δ(PiSSA, F2) − Δ(PiSSA, F0) < 0, in nats", lowered, lambda value: value),
        _gate("I(PiSSA) leaves room: 0.2 to 5", room, lambda value: -value),
    ]


def ungated(results: Results) -> Results:
    """The rows without the seeds whose pre-training, at any β of the main world, fails a gate."""
    out = set()
    for seed in results.seeds():
        of_seed = Results([row for row in results.rows if row["seed"] == seed])
        if any(gate.passed < gate.of for gate in gates(of_seed)[:3]):
            out.add(seed)
    return Results([row for row in results.rows if row["seed"] not in out])
