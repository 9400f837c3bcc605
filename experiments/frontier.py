#!/usr/bin/env python3
"""The frontier study, from its records: what each arm keeps where all have learned the same, with ΔW scaled.

    python experiments/frontier.py experiments/results/frontier                      the tables, on the terminal
    python experiments/frontier.py experiments/results/frontier --page docs/results  frontier.md with its picture
    python experiments/frontier.py output/frontier/records --answers output/frontier
                                   500 problems at rule 1's points of the runs in that folder; answers.jsonl in RECORDS

The plan, the two rules and the predictions are in experiments/frontier.yaml, and are older than the first row. A
point is a run's end read at a scale α. Until the plan's runs are there the page says how many are, and draws no
conclusion.
"""

import itertools
import json
import statistics
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from common.cli import Parser, UserError, run_script
from common.intervals import by_seed, difference, holm, markdown, paired_interval, pyplot, save_picture, spread
from common.runs import records_in
from experiments.entries import load
from experiments.study import append_row, read_rows

SCALES = ("1", "0.9", "0.8", "0.65", "0.5")
TEXTS = ("mbpp", "mt_bench", "math500")
TOLERANCE = 0.003  # nats of validation loss, rule 1
ABOVE = (0.005, 0.01, 0.02, 0.04)  # nats
PRIMARY = (("masked-0.15", "cr-0.15"), ("masked-0.15", "pissa"))
COMPARED = sorted({arm for pair in PRIMARY for arm in pair})  # Rule 2 takes its level from their lowest losses.
OTHER = (  # pairs that the predictions are about, and the other rivals; not primary
    ("cr-0.15", "pissa"),
    ("masked-0.025", "cr-0.025"),
    ("masked-0.15", "cr-0.025"),
    ("ba-lora", "cr-0.025"),
    ("ba-lora-100", "cr-0.025"),
    ("ba-lora", "pissa"),
    ("lora", "pissa"),
    ("full", "pissa"),
    ("full", "masked-0.15"),
)
# The picture's arms: the name, at which point of the line and where beside it, and the colour.
SHOWN = {
    "pissa": ("PiSSA", 0, (8, -2), "#000000"),
    "cr-0.15": ("L_CR, λ₁ = 0.15", -1, (-10, 9), "#C77700"),
    "masked-0.15": ("L_CR without the target, λ₁ = 0.15", -2, (0, -20), "#0072B2"),
    "full": ("full fine-tuning", 0, (8, -2), "#8F2D8C"),
}


@dataclass
class Point:
    """A run's end at α. `validation` is the loss that is chosen by; the others are reported. KL is the texts' mean."""

    run: str
    rate: float
    alpha: float
    validation: float
    response: float
    kl: float
    forgetting: float


def points_of(record: dict[str, Any]) -> list[Point]:
    """From α = 1 to 0.5."""
    scores, rate = record["scores"]["curve"], record["settings"]["learning_rate"]
    found = []
    for scale in SCALES:
        texts = [
            statistics.mean(scores[f"{name}.{text}@{scale}"] for text in TEXTS)
            for name in ("kl_base_tuned", "forgetting")
        ]
        losses = (scores[f"validation_loss@{scale}"], scores[f"response_loss@{scale}"])
        found.append(Point(record["run"], rate, float(scale), *losses, *texts))
    return found


def by_arm_and_seed(records: list[dict[str, Any]]) -> dict[str, dict[int, list[list[Point]]]]:
    """The points of both rates' runs."""
    found: dict[str, dict[int, list[list[Point]]]] = {}
    for record in records:
        if record["status"] == "done":
            found.setdefault(record["arm"].removesuffix("-third"), {}).setdefault(record["seed"], []).append(
                points_of(record)
            )
    return {arm: found[arm] for arm in [*SHOWN, *sorted(found.keys() - SHOWN.keys())] if arm in found}


def within_tolerance(runs: list[list[Point]]) -> Point:
    """Rule 1: the least movement, rate × α, of the points with a validation loss near the lowest."""
    points = list(itertools.chain(*runs))
    lowest = min(point.validation for point in points)
    return min((point for point in points if point.validation <= lowest + TOLERANCE), key=lambda p: p.rate * p.alpha)


def at_level(runs: list[list[Point]], level: float) -> Point | None:
    """Rule 2: the smallest rate × α at which a run's line over α first reaches the level from below; None: nowhere."""
    found = []
    for run in runs:
        after = run[-1]
        if after.validation <= level:
            found.append(after)
            continue
        for before, after in itertools.pairwise(run[::-1]):
            if after.validation <= level:
                share = (before.validation - level) / (before.validation - after.validation)
                values = [
                    b + share * (a - b)
                    for b, a in zip(list(vars(before).values())[2:], list(vars(after).values())[2:], strict=True)
                ]
                found.append(Point(after.run, after.rate, *values))
                break
    return min(found, key=lambda point: point.rate * point.alpha, default=None)


def chosen_at_level(arms: dict[str, dict[int, list[list[Point]]]], above: float = 0.0) -> dict[str, dict[int, Point]]:
    """Rule 2's points, of the seeds in which all compared arms have both rates.

    Args:
        above: nats to add to the rule's level.
    """
    seeds = {seed for arm in COMPARED[:1] for seed in arms.get(arm, {})}
    seeds = {seed for seed in seeds if all(len(arms.get(arm, {}).get(seed, [])) == 2 for arm in COMPARED)}
    found: dict[str, dict[int, Point]] = {}
    for seed in sorted(seeds):
        level = above + max(min(p.validation for p in itertools.chain(*arms[arm][seed])) for arm in COMPARED)
        for arm, runs in arms.items():
            point = at_level(runs[seed], level) if len(runs.get(seed, [])) == 2 else None
            if point is not None:
                found.setdefault(arm, {})[seed] = point
    return found


def num_compared(level: dict[str, dict[int, Point]]) -> int:
    """How many seeds have rule 2's point for all compared arms."""
    return min(len(level.get(arm, {})) for arm in COMPARED)


# ------------------------------------------------------------------------------------------------------------------
# Tables and the picture
# ------------------------------------------------------------------------------------------------------------------


def points_table(arms: dict[str, dict[int, list[list[Point]]]]) -> str:
    """All points, means over seeds."""
    rows = [["arm", "rate", "α", "seeds", "validation loss", "response loss", "KL(base ‖ tuned)", "forgetting"]]
    for arm, runs in arms.items():
        flat = [run for of_seed in runs.values() for run in of_seed]
        for rate, place in itertools.product(sorted({run[0].rate for run in flat}, reverse=True), range(len(SCALES))):
            here = [run[place] for run in flat if run[0].rate == rate]
            cells = [
                spread([getattr(p, name) for p in here], 3) for name in ("validation", "response", "kl", "forgetting")
            ]
            rows.append([arm, f"{rate:g}", SCALES[place], str(len(here)), *cells])
    return markdown(rows)


def chosen_table(chosen: dict[str, dict[int, Point]], answers: dict[tuple[str, float], float] | None = None) -> str:
    """The reported values at the chosen points, with the accuracy there where `answers` has it."""
    head = ["arm", "seeds", "rate × α", "response loss", "KL(base ‖ tuned)", "forgetting"]
    rows = [head if answers is None else [*head, "accuracy, 500 problems"]]
    for arm, points in chosen.items():
        solved = [] if answers is None else [answers.get((p.run, p.alpha)) for p in points.values()]
        products = ", ".join(scales_of(points.values(), rate) for rate in sorted({p.rate for p in points.values()}))
        cells = [spread([getattr(p, name) for p in points.values()], 3) for name in ("response", "kl", "forgetting")]
        accuracy = [] if answers is None else [spread(solved, 3, "not measured")]
        rows.append([arm, str(len(points)), products, *cells, *accuracy])
    return markdown(rows)


def scales_of(points: Iterable[Point], rate: float) -> str:
    """The range of α among the points at the rate."""
    scales = [f"{point.alpha:.2f}" for point in points if point.rate == rate]
    return f"{rate:g} × {min(scales)}" + (f" to {max(scales)}" if len(set(scales)) > 1 else "")


def of_pair(
    chosen: dict[str, dict[int, Point]], pair: tuple[str, str], value: Callable[[Point], float | None]
) -> list[float]:
    """The first arm's value − the second's, of every seed that has both."""
    ours, theirs = ({seed: value(point) for seed, point in chosen.get(arm, {}).items()} for arm in pair)
    return list(by_seed(ours, theirs).values())


def primary_table(chosen: dict[str, dict[int, Point]]) -> str:
    """KL at equal loss, paired by seed: t-interval, t-test, Holm over the two."""
    rows, tests = [["difference in KL, at equal loss", "seeds", "mean [95 %]", "p, Holm"]], []
    for pair in PRIMARY:
        differences = of_pair(chosen, pair, attrgetter("kl"))
        tests.append(float(scipy.stats.ttest_1samp(differences, 0).pvalue))
        rows.append([" − ".join(pair), str(len(differences)), difference(differences, 4)])
    for row, p in zip(rows[1:], holm(tests), strict=True):
        row.append(f"{p:.4f}")
    return markdown(rows)


def difference_table(chosen: dict[str, dict[int, Point]]) -> str:
    """All pairs at equal loss, paired by seed, with t-intervals; no correction for their number."""
    rows = [["at equal validation loss", "seeds", "KL [95 %]", "forgetting [95 %]", "response loss [95 %]"]]
    for pair in (*PRIMARY, *OTHER):
        cells = [of_pair(chosen, pair, attrgetter(name)) for name in ("kl", "forgetting", "response")]
        if cells[0]:
            rows.append([" − ".join(pair), str(len(cells[0])), *(difference(cell, 3) for cell in cells)])
    return markdown(rows)


def levels_table(arms: dict[str, dict[int, list[list[Point]]]]) -> str:
    """The KL of all pairs at higher losses than rule 2's, where less is learned: not planned."""
    chosen = {above: chosen_at_level(arms, above) for above in ABOVE}
    rows = [["KL [95 %], at a validation loss above rule 2's by", *(f"{above:g}" for above in ABOVE)]]
    for pair in (*PRIMARY, *OTHER):
        found = [of_pair(points, pair, attrgetter("kl")) for points in chosen.values()]
        if any(found):
            rows.append([" − ".join(pair), *(difference(cell, 3) if cell else "no point" for cell in found)])
    return markdown(rows)


def accuracy_differences(first: dict[str, dict[int, Point]], answers: dict[tuple[str, float], float]) -> str:
    """Between the arms at rule 1's points, paired by seed, where they are measured."""
    found = {pair: of_pair(first, pair, lambda p: answers.get((p.run, p.alpha))) for pair in (*PRIMARY, *OTHER)}
    texts = [f"{' − '.join(pair)}: {difference([100 * d for d in of], 1)}" for pair, of in found.items() if of]
    return f"Accuracy, in points, paired by seed, without a correction: {'; '.join(texts)}."


def scaling_alone(runs: dict[int, list[list[Point]]], first: dict[int, Point]) -> str:
    """PiSSA at rule 1's points against PiSSA at the higher rate and α = 1: prediction 1."""
    ends = {seed: max(of_seed, key=lambda run: run[0].rate)[0] for seed, of_seed in runs.items()}
    shares = spread([first[seed].kl / ends[seed].kl for seed in first], 2)
    losses = difference([first[seed].response - ends[seed].response for seed in first], 3)
    return f"Of PiSSA's KL at the higher rate and α = 1, {shares} is left at rule 1's points; response loss: {losses}."


def title(level: dict[str, dict[int, Point]], seeds: int) -> str:
    """The picture's message."""
    if num_compared(level) < seeds:
        return "Does a term stay closer to the base than ΔW scaled by α? Under study"

    def is_closer(*pair: str) -> bool:
        differences = of_pair(level, pair, attrgetter("kl"))
        return len(differences) >= seeds and sum(paired_interval(differences)) < 0  # the upper bound

    if all(itertools.starmap(is_closer, (*PRIMARY, OTHER[0]))):
        if is_closer("full", "masked-0.15"):
            return "At equal loss, full fine-tuning scaled by α stays closest to the base, then L_CR without the target"
        return "At equal loss, L_CR stays closer to the base than ΔW scaled by α; without the target, closer still"
    return "At equal loss, L_CR is not shown to stay closer to the base than ΔW scaled by α"


def draw(arms: dict[str, dict[int, list[list[Point]]]], seeds: int, path: Path) -> None:
    """KL against response loss over α, at the arm's higher rate: the mean over seeds and a band of one deviation."""
    figure, axis = pyplot().subplots(figsize=(7.6, 4.4), layout="constrained")
    for arm, (name, at, place, colour) in SHOWN.items():
        runs = [max(of_seed, key=lambda run: run[0].rate) for of_seed in arms.get(arm, {}).values()]
        if not runs:
            continue
        losses, kls = (np.array([[getattr(p, which) for p in run] for run in runs]) for which in ("response", "kl"))
        x, y = losses.mean(0), kls.mean(0)
        axis.plot(x, y, color=colour, marker="o", markersize=4)
        if len(runs) > 1:
            axis.fill_between(x, y - kls.std(0, ddof=1), y + kls.std(0, ddof=1), color=colour, alpha=0.15, linewidth=0)
        axis.annotate(name, (x[at], y[at]), place, textcoords="offset points", color=colour)
        if arm == "pissa":
            for alpha, *point in zip(SCALES, x, y, strict=True):
                axis.annotate(f"α = {alpha}", point, (-8, 2), textcoords="offset points", ha="right", size=8)
    axis.invert_xaxis()
    axis.margins(x=0.3, y=0.1)
    axis.set_ylim(bottom=0)
    axis.grid(linewidth=0.4, alpha=0.6)
    axis.set_xlabel("response loss, nats per token: less to the right, where more is learned")
    axis.set_ylabel("KL(base ‖ tuned), nats per token: less kept above")
    save_picture(figure, path, title(chosen_at_level(arms), seeds))


def report(records: list[dict[str, Any]], answers: dict[tuple[str, float], float]) -> str:
    """Everything that the rows carry, as Markdown."""
    axes = load("frontier")["axes"]
    planned, seeds = len(axes["arm"]) * len(axes["seed"]), len(axes["seed"])
    done = [record for record in records if record["status"] == "done"]
    arms = by_arm_and_seed(records)
    text = [f"{len(done)} of {planned} runs are done, {len(records) - len(done)} failed or are not finished."]
    text += [f"- {record['run']}: {record['status']}" for record in records if record["status"] != "done"]
    level = chosen_at_level(arms)
    complete = num_compared(level)
    if complete == seeds:
        text += ["", "**Primary outcome:**", "", primary_table(level)]
    else:
        state = f"{complete} of {seeds} seeds have all runs of the primary comparison"
        text += ["", f"**The study is under way.** {state}. No conclusion is drawn before all have."]
    whole = {arm: {seed: runs for seed, runs in of.items() if len(runs) == 2} for arm, of in arms.items()}
    first = {arm: {seed: within_tolerance(runs) for seed, runs in of.items()} for arm, of in whole.items() if of}
    if first:
        text += [
            "",
            "At rule 1's points (within 0.003 nats of the arm's lowest validation loss):",
            "",
            chosen_table(first, answers),
        ]
    if answers:
        text += ["", accuracy_differences(first, answers)]
    if "pissa" in first:
        text += ["", scaling_alone(arms["pissa"], first["pissa"])]
    if level:
        text += ["", "At rule 2's points (equal validation loss):", "", chosen_table(level)]
        text += ["", "The differences there, paired by seed, without a correction for their number:", ""]
        text += [difference_table(level), "", "The KL at higher losses, not planned:", "", levels_table(arms)]
    if arms:
        text += ["", "All points, mean ± standard deviation over seeds:", "", points_table(arms)]
    return "\n".join(text)


def read_answers(folder: Path) -> dict[tuple[str, float], float]:
    """Accuracy by run and α."""
    rows = read_rows(folder / "answers.jsonl")
    return {(row["run"], row["scale"]): row["accuracy"]["value"] for row in rows}


def measure_answers(records: list[dict[str, Any]], folder: Path, output: Path) -> None:
    """Exports rule 1's points, solves the 500 problems with each, and adds a line to answers.jsonl; the rest stays."""
    known, problems = read_answers(folder), output / "files" / "answers.jsonl"
    if not problems.is_file():
        subprocess.run(load("frontier")["files"][problems.name].format(file=problems).split(), check=True)
    for of_seed in by_arm_and_seed(records).values():
        for runs in of_seed.values():
            if len(runs) < 2:
                continue
            point = within_tolerance(runs)
            made = output / "scaled" / f"{point.run}-{point.alpha:g}"
            if (point.run, point.alpha) in known or not (output / point.run / "checkpoints").is_dir():
                continue
            export = ["--export-from", output / point.run, "--scale", point.alpha, "--output-dir", made, "--overwrite"]
            solve = ["--ckpt", made / "merged", "--data", problems, "--output-dir", made, "--backend", "transformers"]
            solve += ["--batch-size", "50", "--max-new-tokens", "96", "--dtype", "bfloat16", "--skip-done"]
            for command in (["train.py", *export], ["eval/gsm8k.py", *solve]):
                subprocess.run(["python", *map(str, command)], check=True)
            accuracy = json.loads((made / "gsm8k.json").read_text())["accuracy"]
            append_row(folder / "answers.jsonl", {"run": point.run, "scale": point.alpha, "accuracy": accuracy})


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("records", type=Path, help="folder of the records")
    parser.add_argument("--page", type=Path, help="folder that gets frontier.md and frontier.png")
    parser.add_argument("--answers", type=Path, help="folder of the runs, to solve problems at the chosen points")
    args = parser.parse_args(argv)
    records = list(records_in(args.records).values())
    if any(record["experiment"] != "frontier" for record in records):
        raise UserError(f"{args.records} holds records of another experiment than frontier")
    if args.answers:
        measure_answers(records, args.records, args.answers)
    text = report(records, read_answers(args.records))
    print(text)
    if args.page:
        draw(by_arm_and_seed(records), len(load("frontier")["axes"]["seed"]), args.page / "frontier.png")
        page = args.page / "frontier.md"
        head = page.read_text().partition("<!-- tables -->")[0]
        picture = "![KL against the response loss over α; a band is one deviation over seeds](frontier.png)"
        page.write_text(f"{head}<!-- tables -->\n\n{text}\n\n{picture}\n")


if __name__ == "__main__":
    run_script(main)
