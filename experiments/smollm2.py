#!/usr/bin/env python3
"""Tables and pictures of `smollm2`, from its records: learning, forgetting, diversity, stereotypes.

    python experiments/smollm2.py experiments/results/smollm2                            the tables, on the terminal
    python experiments/smollm2.py output/smollm2/records --pictures docs/results         and four pictures

At equal learning: a run's checkpoints, with the base as step 0, are points of (response loss, forgetting); between two
of them the line. All arms are read off at one response loss, the highest that any run of the study ended with, so that
no run is asked for what it has not reached. Differences to PiSSA are taken seed by seed.
"""

import argparse
import itertools
import statistics
from pathlib import Path
from typing import Any

from common.cli import UserError, run_script
from common.intervals import paired_interval
from common.markdown import markdown
from common.run_records import records_in
from experiments.report import STYLES

Record = dict[str, Any]
Point = tuple[float, float]  # response loss, and what is read off at it

BASELINE = "pissa"
MEASURES = ("forgetting", "kl_base_tuned", "kl_tuned_base")
LAMBDAS = {"pissa": 0.0, "pissa-cr": 0.025, "pissa-cr-0.15": 0.15, "pissa-cr-1": 1.0}
ORDER = ["full", "lora", "lora-terms", *LAMBDAS, "pissa-dr", "pissa-svdr", "ba-lora"]


# ------------------------------------------------------------------------------------------------------------------
# What is read off
# ------------------------------------------------------------------------------------------------------------------


def score(record: Record, benchmark: str, name: str) -> float | None:
    found = (record["scores"].get(benchmark) or {}).get(name)
    return found.get("value") if isinstance(found, dict) else found


def points(record: Record, measure: str) -> list[Point]:
    """A run's curve, from the base to its end."""
    scores = record["scores"].get("curve") or {}
    steps = sorted(int(name.partition("@")[2]) for name in scores if name.startswith("response_loss@"))
    return [(scores[f"response_loss@{step}"], scores[f"{measure}@{step}"]) for step in steps]


def at_loss(curve: list[Point], loss: float) -> float | None:
    """What the curve has where it first reaches the response loss; None where it never does."""
    for (before, old), (after, new) in itertools.pairwise(curve):
        if after <= loss <= before:
            return new if before == after else old + (new - old) * (before - loss) / (before - after)
    return None


def common_loss(records: list[Record]) -> float:
    """The highest response loss that a run ended with."""
    return max(points(record, "forgetting")[-1][0] for record in records)


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


def spread(values: list[float | None], form: str) -> str:
    """Mean ± sample standard deviation of those that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = form.format(statistics.mean(known))
    return text + (f" ± {statistics.stdev(known):.3f}" if len(known) > 1 else "")


def difference(values: dict[int, float | None], others: dict[int, float | None], form: str = "{:+.3f}") -> str:
    """Mean of the differences seed by seed with its 95 % t-interval; * where that excludes 0."""
    known = values.keys() & others.keys()
    pairs = [(values[seed], others[seed]) for seed in sorted(known)]
    found = [one - two for one, two in pairs if one is not None and two is not None]
    if len(found) < 2:
        return form.format(found[0]) + " (one pair)" if found else "-"
    mean, half = paired_interval(found)
    low, high = form.format(mean - half), form.format(mean + half)
    return f"{form.format(mean)} [{low}, {high}]" + (" *" if abs(mean) > half else "")


def learning_table(arms: dict[str, dict[int, Record]]) -> str:
    """Every arm at its own rate."""
    columns = [("gsm8k", "accuracy", "{:.3f}"), ("curve", "response_loss", "{:.3f}")]
    columns += [("curve", name, "{:.3f}") for name in (*MEASURES, "distinct_answers", "entropy_change", "energy.10")]
    rows = [["arm", "rate", "seeds", *(name for _, name, _ in columns)]]
    before = next(iter(next(iter(arms.values())).values()))
    rows.append(["base", "", "", *(spread([score(before, part, f"{name}@0")], form) for part, name, form in columns)])
    for arm, runs in arms.items():
        rates = sorted({f"{record['settings']['learning_rate']:g}" for record in runs.values()})
        cells = [spread([score(record, part, name) for record in runs.values()], form) for part, name, form in columns]
        rows.append([arm, ", ".join(rates), str(len(runs)), *cells])
    return markdown(rows)


def equal_learning_table(arms: dict[str, dict[int, Record]], loss: float) -> str:
    """Every arm where it has learned the same, and its difference to PiSSA."""
    rows = [["arm", *(f"{name}, minus {BASELINE}" if i else name for name in MEASURES for i in (0, 1))]]
    for arm, runs in arms.items():
        cells = []
        for name in MEASURES:
            ours, theirs = (
                {seed: at_loss(points(record, name), loss) for seed, record in found.items()}
                for found in (runs, arms.get(BASELINE, {}))
            )
            cells += [spread(list(ours.values()), "{:.3f}"), "" if arm == BASELINE else difference(ours, theirs)]
        rows.append([arm, *cells])
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
    before = [score(base, "crows_pairs", f"before.{name}") for name in names[:3]]
    rows.append(["base", *("-" if value is None else f"{value:.3f}" for value in before), *[""] * 4])
    for arm, runs in arms.items():
        cells = [spread([score(record, "crows_pairs", name) for record in runs.values()], "{:.3f}") for name in names]
        ours, theirs = (
            {seed: score(record, "crows_pairs", "change") for seed, record in found.items()}
            for found in (runs, arms.get(BASELINE, {}))
        )
        rows.append([arm, *cells, "" if arm == BASELINE else difference(ours, theirs)])
    return markdown(rows)


# ------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------


def figure_of(width: float, count: int) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, count, figsize=(width, 3.6), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.grid(linewidth=0.4, alpha=0.6)
    return plt, figure, axes[0]


def mean_curve(curves: list[list[Point]]) -> list[Point]:
    """The mean over runs, checkpoint by checkpoint."""
    return [tuple(map(statistics.mean, zip(*step, strict=True))) for step in zip(*curves, strict=True)]


def draw_curves(axis: Any, curves: dict[str, list[Point]], ylabel: str) -> None:
    """A line per curve."""
    for number, (name, curve) in enumerate(curves.items()):
        colour, marker = STYLES[number % len(STYLES)]
        line = "--" if number >= len(STYLES) else "-"
        places = ([loss for loss, _ in curve], [value for _, value in curve])
        axis.plot(*places, color=colour, marker=marker, linestyle=line, markersize=3, linewidth=1, label=name)
    axis.invert_xaxis()
    axis.set_xlabel("response loss, nats (learning: to the right)")
    axis.set_ylabel(ylabel)


def pictures(arms: dict[str, dict[int, Record]], tuning: list[Record], folder: Path) -> list[Path]:
    """Forgetting against learning; λ₁ against rates; spectrum and diversity; stereotypes by type."""
    paths = [folder / f"smollm2-{name}.png" for name in ("forgetting", "lambda", "diversity", "stereotypes")]
    plt, figure, axes = figure_of(11, 2)
    for axis, name in zip(axes, MEASURES[:2], strict=True):
        groups = {arm: mean_curve([points(record, name) for record in runs.values()]) for arm, runs in arms.items()}
        draw_curves(axis, groups, f"{name}, nats per token")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(paths[0], dpi=130)

    plt, figure, axes = figure_of(6, 1)
    groups = {}
    for arm, weight in LAMBDAS.items():
        ends = [points(record, "kl_base_tuned")[-1] for record in by_rate(tuning, arm)]
        groups[f"λ₁ = {weight:g}, {len(ends)} rates"] = ends
    draw_curves(axes[0], groups, "KL(base ‖ tuned), nats per token")
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(paths[1], dpi=130)

    plt, figure, axes = figure_of(11, 3)
    for axis, name in zip(axes, ("energy.10", "entropy_change", "distinct_answers"), strict=True):
        bars(axis, arms, lambda record, name=name: score(record, "curve", name))
        axis.set_title(name, fontsize=9, loc="left")
    figure.savefig(paths[2], dpi=130)

    plt, figure, axes = figure_of(11, 1)
    scored = {arm: [one for one in runs.values() if "crows_pairs" in one["scores"]] for arm, runs in arms.items()}
    scored = {arm: runs for arm, runs in scored.items() if runs}
    first = next(iter(scored.values()))[0]
    names = sorted(n.split(".")[1] for n in first["scores"]["crows_pairs"] if n.endswith(".change"))
    width = 0.8 / len(scored)
    for i, (arm, runs) in enumerate(scored.items()):
        values = [[score(one, "crows_pairs", f"by_type.{name}.change") for one in runs] for name in names]
        means = [statistics.mean(found) for found in values]
        colour, is_second_round = STYLES[i % len(STYLES)][0], i >= len(STYLES)
        places = [x + i * width for x in range(len(names))]
        axes[0].bar(places, means, width, label=arm, color=colour, alpha=0.4 if is_second_round else 1.0)
    axes[0].set_xticks([x + 0.4 for x in range(len(names))], names, fontsize=7)
    axes[0].set_ylabel("change of preference, nats")
    axes[0].legend(frameon=False, fontsize=7, ncols=5)
    figure.savefig(paths[3], dpi=130)
    plt.close("all")
    return paths


def bars(axis: Any, arms: dict[str, dict[int, Record]], value_of: Any) -> None:
    """A point per run, a row per arm."""
    for row, runs in enumerate(arms.values()):
        values = [value for value in map(value_of, runs.values()) if value is not None]
        axis.plot(values, [row] * len(values), "o", color=STYLES[1][0], markersize=4)
    axis.locator_params(axis="x", nbins=4)
    axis.set_yticks(range(len(arms)), list(arms), fontsize=7)
    axis.invert_yaxis()


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------


def tables(records: list[Record]) -> str:
    """All tables as Markdown."""
    study, tuning = done(records, "study"), done(records, "tuning")
    others = [f"- {record['run']}: {record['status']}" for record in records if record["status"] != "done"]
    text = [f"{len(records)} runs, {len(others)} of them not done.", *others]
    if study:
        arms, loss = by_arm(study), common_loss(study)
        text += ["", "Each arm at its own rate:", "", learning_table(arms)]
        text += ["", f"At the response loss {loss:.3f}:", "", equal_learning_table(arms, loss)]
        text += ["", "Stereotypes:", "", stereotype_table(arms)]
    if tuning:
        text += ["", "λ₁ against the rate, seed 100:", "", rate_table(tuning)]
    return "\n".join(text)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="folder of the records")
    parser.add_argument("--pictures", type=Path, help="folder that gets the pictures")
    args = parser.parse_args(argv)
    records = list(records_in(args.records).values())
    if not any("curve" in record["scores"] for record in records):
        raise UserError(f"{args.records} has no record of smollm2")
    print(tables(records))
    if args.pictures:
        drawn = pictures(by_arm(done(records, "study")), done(records, "tuning"), args.pictures)
        print("\n".join(map(str, drawn)))


if __name__ == "__main__":
    run_script(main)
