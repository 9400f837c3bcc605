#!/usr/bin/env python3
"""Tables and pictures of `smollm2`, from its records: learning, forgetting, diversity, stereotypes.

    python experiments/smollm2.py experiments/results/smollm2                            the tables, on the terminal
    python experiments/smollm2.py output/smollm2/records --pictures docs/results         and two pictures

At equal learning: the ends of an arm's tuning runs, one per rate up to its best, are points of (response loss, KL).
Between two points the line is read. A step in the middle of a run is no such point, because its schedule has not ended.
"""

import itertools
from pathlib import Path
from typing import Any

from common.cli import Parser, UserError, run_script
from common.intervals import by_seed, difference, markdown, pyplot, save_picture, spread
from common.runs import records_in, score_of
from experiments.report import STYLES

Record = dict[str, Any]
Point = tuple[float, float]  # the response loss, and a measure at that loss

BASELINE = "pissa"
MEASURES = ("forgetting", "kl_base_tuned", "kl_tuned_base")
LAMBDAS = {"pissa": 0.0, "pissa-cr": 0.025, "pissa-cr-0.15": 0.15, "pissa-cr-1": 1.0}
LOSSES = (1.135, 1.14, 1.15)  # response losses that the arms are compared at: what nearly all of them reach
SHOWN = {"full": "full fine-tuning", "lora": "LoRA", "pissa": "PiSSA", "pissa-cr-0.15": "PiSSA, λ₁ = 0.15"}
ORDER = ["full", "lora", "lora-terms", *LAMBDAS, "pissa-dr", "pissa-svdr", "ba-lora"]


# ------------------------------------------------------------------------------------------------------------------
# What is read off
# ------------------------------------------------------------------------------------------------------------------


def points(record: Record, measure: str) -> list[Point]:
    """A run's curve, from the base to its end."""
    scores = record["scores"].get("curve") or {}
    steps = sorted(int(name.partition("@")[2]) for name in scores if name.startswith("response_loss@"))
    return [(scores[f"response_loss@{step}"], scores[f"{measure}@{step}"]) for step in steps]


def ends(tuning: list[Record], arm: str, measure: str) -> list[Point]:
    """The ends of the arm's runs, the smallest rate first, up to the rate with the lowest response loss."""
    found = [points(record, measure)[-1] for record in by_rate(tuning, arm)]
    return found[: found.index(min(found)) + 1]


def at_loss(curve: list[Point], loss: float) -> float | None:
    """The value of the line through the ends at the response loss; None beyond the ends."""
    for (before, old), (after, new) in itertools.pairwise(curve):
        if after <= loss <= before:
            return new if before == after else old + (new - old) * (before - loss) / (before - after)
    return None


def done(records: list[Record], phase: str) -> list[Record]:
    return [record for record in records if record["phase"] == phase and record["status"] == "done"]


def by_arm(records: list[Record]) -> dict[str, dict[int, Record]]:
    """The records by arm and seed, the arms in the plan's order."""
    found: dict[str, dict[int, Record]] = {}
    for record in sorted(records, key=lambda record: ORDER.index(record["arm"])):
        found.setdefault(record["arm"], {})[record["seed"]] = record
    return found


def by_rate(tuning: list[Record], arm: str) -> list[Record]:
    """The arm's tuning runs, the smallest rate first."""
    return sorted((one for one in tuning if one["arm"] == arm), key=lambda one: one["settings"]["learning_rate"])


# ------------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------------


def learning_table(arms: dict[str, dict[int, Record]]) -> str:
    """Every arm at its own rate."""
    columns = [("gsm8k", "accuracy"), ("curve", "response_loss")]
    columns += [("curve", name) for name in (*MEASURES, "distinct_answers", "entropy_change", "energy.10")]
    rows = [["arm", "rate", "seeds", *(name for _, name in columns)]]
    before = next(iter(next(iter(arms.values())).values()))
    rows.append(["base", "", "", *(spread([score_of(before, part, f"{name}@0")], 3) for part, name in columns)])
    for arm, runs in arms.items():
        rates = sorted({f"{record['settings']['learning_rate']:g}" for record in runs.values()})
        cells = [spread((score_of(record, *column) for record in runs.values()), 3) for column in columns]
        rows.append([arm, ", ".join(rates), str(len(runs)), *cells])
    return markdown(rows)


def equal_learning_table(tuning: list[Record]) -> str:
    """Every arm's KL and forgetting at the same response loss, by the ends of its runs."""
    rows = [["arm", *(f"{name} at {loss:.3f}" for name in MEASURES[1::-1] for loss in LOSSES)]]
    for arm in (arm for arm in ORDER if by_rate(tuning, arm)):
        found = [at_loss(ends(tuning, arm, name), loss) for name in MEASURES[1::-1] for loss in LOSSES]
        rows.append([arm, *("-" if value is None else f"{value:.3f}" for value in found)])
    return markdown(rows)


def rate_table(tuning: list[Record]) -> str:
    """λ₁ against a lower rate: the ends of the tuning runs of PiSSA and of L_CR alone."""
    rows = [["arm", "λ₁", "rate", "response loss", "forgetting", "KL(base ‖ tuned)"]]
    for arm, weight in LAMBDAS.items():
        for record in by_rate(tuning, arm):
            ends = [points(record, name)[-1] for name in MEASURES[:2]]
            cells = [f"{ends[0][0]:.3f}", f"{ends[0][1]:.3f}", f"{ends[1][1]:.3f}"]
            rows.append([arm, f"{weight:g}", f"{record['settings']['learning_rate']:g}", *cells])
    return markdown(rows)


def stereotype_table(arms: dict[str, dict[int, Record]]) -> str:
    """CrowS-Pairs before and after."""
    names = ("pct_stereotype", "likelihood_diff", "loss", "change", "slope", "flips.mcnemar_p")
    rows = [["arm", *names, f"change minus {BASELINE}'s"]]
    base = next(iter(next(iter(arms.values())).values()))
    before = [spread([score_of(base, "crows_pairs", f"before.{name}")], 3) for name in names[:3]]
    rows.append(["base", *before, *[""] * 4])
    changes = {
        arm: {seed: score_of(record, "crows_pairs", "change") for seed, record in runs.items()}
        for arm, runs in arms.items()
    }
    for arm, runs in arms.items():
        cells = [spread((score_of(record, "crows_pairs", name) for record in runs.values()), 3) for name in names]
        beside = "" if arm == BASELINE else difference(by_seed(changes[arm], changes.get(BASELINE, {})).values(), 3)
        rows.append([arm, *cells, beside])
    return markdown(rows)


# ------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------


def draw(path: Path, title: str, lines: dict[str, list[Point]], log: bool) -> Path:
    """KL against the response loss, a line per arm with its name at its end."""
    figure, axis = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for (name, line), (colour, marker) in zip(lines.items(), STYLES, strict=False):
        axis.plot(*zip(*line, strict=True), color=colour, marker=marker, markersize=5)
        axis.annotate(name, line[-1], (8, -3), textcoords="offset points", color=colour)
    axis.invert_xaxis()
    axis.margins(x=0.3 if log else 0.25)
    if log:
        axis.set_yscale("log")
    axis.grid(linewidth=0.4, alpha=0.6)
    axis.set_xlabel("response loss, nats (better: to the right); a point is a learning rate")
    axis.set_ylabel("KL(base ‖ tuned), nats per token (better: below)")
    return save_picture(figure, path, title)


def pictures(tuning: list[Record], folder: Path) -> list[Path]:
    """KL at equal learning for four arms, and for every λ₁ over all rates."""
    lines = {name: ends(tuning, arm, "kl_base_tuned") for arm, name in SHOWN.items() if by_rate(tuning, arm)}
    weights = {
        f"λ₁ = {weight:g}": [points(record, "kl_base_tuned")[-1] for record in by_rate(tuning, arm)]
        for arm, weight in LAMBDAS.items()
        if by_rate(tuning, arm) and arm != "pissa-cr"  # which lies on PiSSA's line
    }
    nearest = "At equal loss, full fine-tuning at a low rate moves least from the base"
    slower = "λ₁ = 1 does no more than a lower rate; λ₁ = 0.15 does a little more (one seed)"
    return [
        draw(folder / "smollm2-forgetting.png", nearest, lines, log=False),
        draw(folder / "smollm2-lambda.png", slower, weights, log=True),
    ]


def tables(records: list[Record]) -> str:
    """All tables as Markdown."""
    study, tuning = done(records, "study"), done(records, "tuning")
    others = [f"- {record['run']}: {record['status']}" for record in records if record["status"] != "done"]
    text = [f"{len(records)} runs, {len(others)} of them not done.", *others]
    if study:
        arms = by_arm(study)
        text += ["", "Each arm at its own rate:", "", learning_table(arms)]
        text += ["", "Stereotypes:", "", stereotype_table(arms)]
    if tuning:
        text += ["", "At equal response loss, seed 100:", "", equal_learning_table(tuning)]
        text += ["", "λ₁ against the rate, seed 100:", "", rate_table(tuning)]
    return "\n".join(text)


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("records", type=Path, help="folder of the records")
    parser.add_argument("--pictures", type=Path, help="folder that gets the pictures")
    args = parser.parse_args(argv)
    records = list(records_in(args.records).values())
    if not any("curve" in record["scores"] for record in records):
        raise UserError(f"{args.records} has no record of smollm2")
    print(tables(records))
    if args.pictures:
        print("\n".join(map(str, pictures(done(records, "tuning"), args.pictures))))


if __name__ == "__main__":
    run_script(main)
