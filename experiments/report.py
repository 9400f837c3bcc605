#!/usr/bin/env python3
"""An experiment's table: every arm with mean and standard deviation over its seeds, what differs, and what failed.

    python experiments/report.py output/NAME/plan.json       writes output/NAME/summary.md, and curve.png and curve.svg
    python experiments/report.py experiments/results/NAME    the same of records that were kept, on the terminal

The `report` entry of the experiment that the records name says what is compared:

    baseline: {method: pissa}    every other label of that axis minus this one, seed by seed, with a 95 % t-interval
    effects: [start, terms]      two axes of two labels each: how much of the whole difference each of them is,
                                 at each label of the other axes
    curve: rank                  the scores over an option, a line per arm
    scores: [accuracy]           these scores alone

Differences are taken between runs that are alike in everything else: the seed decides data order and initialisation.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from common import runs
from common.cli import UserError, run_script
from common.intervals import by_seed, difference, markdown, pyplot, spread
from common.runs import write_whole
from experiments import choose, run_record
from experiments.entries import load, names

# The scores that stand for a benchmark in a table.
HEADLINES = {
    "crows_pairs": ("pct_stereotype", "change"),
    "curve": ("response_loss", "forgetting", "kl_base_tuned", "distinct_answers"),
    "forgetting": ("forgetting", "kl_base_tuned"),
    "gsm8k": ("accuracy", "response_loss"),
    "hendrycks_math": ("accuracy",),
    "humaneval": ("pass@1",),
    "mbpp": ("pass@1",),
    "mt_bench": ("first_turn",),
}
CLASSIFICATION = ("accuracy", "matthews", "f1", "pearson", "spearman", "calibration_error")
IN_PERCENT = ("accuracy", "class_accuracy", "pass@1", "matthews", "f1", "pearson", "spearman", "calibration_error")
IN_PERCENT += ("pct_stereotype", "distinct_answers")

Record = dict[str, Any]
Column = tuple[str, str]  # benchmark or evaluation set, score


# ------------------------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------------------------


def columns_of(records: list[Record], only: list[str] | None) -> list[Column]:
    """The scores that the table shows, in the order in which the records have them."""
    found: dict[Column, None] = {}
    for record in records:
        for part, scores in record["scores"].items():
            for name in only if only and part not in HEADLINES else HEADLINES.get(part, CLASSIFICATION):
                if name in scores:
                    found[part, name] = None
    return list(found)


def value_of(record: Record, column: Column) -> float | None:
    """A score, in percent where it is a share."""
    found = runs.score_of(record, *column)
    if found is None:
        return None
    return 100 * found if column[1].partition(".")[0] in IN_PERCENT else found


def digits(column: Column) -> int:
    """Places after the point: of percents two, of losses and others three."""
    return 2 if column[1].partition(".")[0] in IN_PERCENT else 3


def without_value(members: list[Record], column: Column) -> str:
    """The cell's text where no run has the score. Answers that no judge has seen exist without a score."""
    return "not judged" if any(column[1] in record["scores"].get(column[0], {}) for record in members) else "-"


# ------------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------------


def arms(records: list[Record]) -> dict[str, list[Record]]:
    """The records by arm."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["arm"], []).append(record)
    return found


def cell(members: list[Record], column: Column) -> str:
    """Mean and standard deviation over the runs that have the score, and how many of them where it is not all."""
    known = [value for value in (value_of(record, column) for record in members) if value is not None]
    text = spread(known, digits(column), without_value(members, column))
    return f"{text} ({len(known)} of {len(members)} seeds)" if 0 < len(known) < len(members) else text


def unlike(records: list[Record]) -> list[str]:
    """A line for each arm with seeds that were made under different conditions, which it names."""
    found = {
        arm: runs.differing(runs.conditions(record, record["settings"]) for record in members)
        for arm, members in arms(records).items()
    }
    return [f"- {arm}: its seeds differ in: {what}" for arm, what in found.items() if what]


def table(records: list[Record], columns: list[Column]) -> str:
    """A row per arm."""
    head = ["arm", "seeds", *(f"{part} {name}" for part, name in columns), "rate", "minutes", "GiB"]
    rows = [head]
    for arm, members in arms(records).items():
        cells = [cell(members, column) for column in columns]
        rates = sorted({f"{record['settings'].get('learning_rate', 0):g}" for record in members})
        seconds = [record["time"]["train_seconds"] or record["time"]["seconds"] for record in members]
        seconds = [value for value in seconds if value is not None]
        memory = [record["memory"]["peak_gib"] for record in members if record["memory"]["peak_gib"] is not None]
        minutes = f"{statistics.mean(seconds) / 60:.1f}" if seconds else "-"
        rows.append(
            [arm, str(len(members)), *cells, ", ".join(rates), minutes, f"{max(memory):.2f}" if memory else "-"]
        )
    return markdown(rows)


def pairs(records: list[Record], axis: str, label: str, other: str) -> list[tuple[Record, Record]]:
    """Runs at `label` of the axis with those at `other` that are alike on every other axis."""

    def rest(record: Record) -> str:
        return json.dumps({name: value for name, value in record["labels"].items() if name != axis}, sort_keys=True)

    theirs = {rest(record): record for record in records if record["labels"].get(axis) == other}
    ours = [record for record in records if record["labels"].get(axis) == label]
    return [(record, theirs[rest(record)]) for record in ours if rest(record) in theirs]


def differences(records: list[Record], columns: list[Column], axis: str, baseline: str) -> str:
    """Every other label of the axis minus the baseline, apart for what the other axes (but the seed) say."""
    labels = list(dict.fromkeys(record["labels"].get(axis) for record in records))
    rows = [[f"minus {baseline}", "pairs", *(f"{part} {name}" for part, name in columns)]]
    for label in labels:
        if label == baseline:
            continue
        groups: dict[str, list[tuple[Record, Record]]] = {}
        for pair in pairs(records, axis, label, baseline):
            groups.setdefault(pair[0]["arm"], []).append(pair)
        for arm, members in groups.items():
            cells = []
            for column in columns:
                ours, theirs = ({i: value_of(pair[side], column) for i, pair in enumerate(members)} for side in (0, 1))
                cells.append(difference(by_seed(ours, theirs).values(), digits(column)))
            rows.append([arm, str(len(members)), *cells])
    return markdown(rows) if len(rows) > 1 else "no pairs yet"


def effects(records: list[Record], columns: list[Column], axes: list[str]) -> str:
    """Two axes of two labels: the whole difference from (first, first) to (second, second), and its parts, for
    each combination of the other axes' labels.

    Each part is the mean of what its change brings before and after the other one; the two add up to the whole. The
    interaction is how much more the second change brings where the first has been made.
    """
    first, second = axes
    labels = [list(dict.fromkeys(record["labels"].get(axis) for record in records)) for axis in axes]
    for axis, found in zip(axes, labels, strict=True):
        if len(found) != 2:
            return f"no parts: they need two labels of {axis}, and the runs have {len(found)}"
    (a, b), (x, y) = labels
    groups: dict[str, dict[str, dict[tuple[str, str], Record]]] = {}
    for record in records:
        others = [label for axis, label in record["labels"].items() if axis not in (first, second, "seed")]
        of_seed = groups.setdefault("-".join(others), {}).setdefault(str(record["seed"]), {})
        of_seed[record["labels"][first], record["labels"][second]] = record
    rows = [[f"from {a} {x} to {b} {y}", *(f"{part} {name}" for part, name in columns)]]
    for group, seeds in groups.items():
        whole = [cells for cells in seeds.values() if len(cells) == 4]
        corners = [[cells[place] for place in ((a, x), (b, x), (a, y), (b, y))] for cells in whole]
        found = [parts_of([[value_of(record, column) for record in four] for four in corners]) for column in columns]
        for i, name in enumerate(("whole", f"of {first}", f"of {second}", "interaction")):
            cells = [difference(parts[i], digits(column)) for parts, column in zip(found, columns, strict=True)]
            rows.append([f"{group}: {name}" if group else name, *cells])
    return markdown(rows)


def parts_of(corners: list[list[float | None]]) -> list[tuple[float, ...]]:
    """The whole difference, the parts of both changes and their interaction, each with a value per seed.

    Args:
        corners: per seed the score before, with the first change only, with the second only, and with both.
    """
    found = []
    for values in corners:
        if None not in values:
            start, only_first, only_second, both = values
            halves = ((only_first - start + both - only_second) / 2, (only_second - start + both - only_first) / 2)
            found.append((both - start, *halves, both - only_first - only_second + start))
    return list(zip(*found, strict=True)) if found else [()] * 4


def tuning_lines(records: list[Record]) -> list[str]:
    """For every arm, the scores over its grid by which the rate was chosen."""
    lines = []
    for arm, members in arms([record for record in records if record.get("chooses")]).items():
        chooses = members[0]["chooses"]
        scores = choose.curve(members, chooses["option"], chooses["score"])
        chosen = choose.best(scores, chooses["mode"], chooses.get("within") or 0.0)
        cells = [
            f"**{value}** {statistics.mean(found):.4f}" if value == chosen else f"{value} {statistics.mean(found):.4f}"
            for value, found in scores.items()
        ]
        edge = "; the best is at the grid's edge" if choose.is_at_edge(chosen, scores) else ""
        lines.append(f"- {arm}, by {chooses['score']}: " + "; ".join(cells) + edge)
    return lines


# ------------------------------------------------------------------------------------------------------------------
# Curve
# ------------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers tell apart.
STYLES = (("#D55E00", "o"), ("#0072B2", "D"), ("#E69F00", "^"), ("#000000", "s"), ("#009E73", "v"), ("#CC79A7", "x"))


def lines_of(records: list[Record], option: str, column: Column) -> dict[str, dict[float, list[float]]]:
    """The scores by line (the labels without the option's and the seed's) and by the option's value."""
    found: dict[str, dict[float, list[float]]] = {}
    for record in records:
        value, score = record["settings"].get(option.replace("-", "_")), value_of(record, column)
        if value is None or score is None or not math.isfinite(score):
            continue
        line = "-".join(label for axis, label in record["labels"].items() if axis not in (option, "seed"))
        found.setdefault(line or "all", {}).setdefault(float(value), []).append(score)
    return found


def draw(records: list[Record], option: str, columns: list[Column], folder: Path) -> list[Path]:
    """A panel per score: mean and standard deviation over the option, on a logarithmic axis where it spans a decade."""
    plt = pyplot()
    columns = [column for column in columns if lines_of(records, option, column)]
    if not columns:
        return []
    figure, axes = plt.subplots(1, len(columns), figsize=(4.2 * len(columns), 3.4), squeeze=False, layout="constrained")
    for axis, column in zip(axes[0], columns, strict=True):
        values: set[float] = set()
        for (line, points), (colour, marker) in zip(
            lines_of(records, option, column).items(), STYLES * 9, strict=False
        ):
            places = sorted(points)
            values |= set(places)
            axis.errorbar(
                places,
                [statistics.mean(points[place]) for place in places],
                [statistics.stdev(points[place]) if len(points[place]) > 1 else 0.0 for place in places],
                color=colour,
                marker=marker,
                markersize=4,
                capsize=2,
                label=line,
                linewidth=1.3,
            )
        if min(values) > 0 and max(values) / min(values) >= 8:
            axis.set_xscale("log", base=2 if all(value.is_integer() for value in values) else 10)
        axis.set_xlabel(option)
        axis.set_title(" ".join(column), fontsize=9, loc="left")
        axis.grid(linewidth=0.4, alpha=0.6)
    axes[0][0].legend(frameon=False, fontsize=8)
    paths = [folder / f"curve.{suffix}" for suffix in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths


def summary(about: str, records: dict[str, Record], options: dict[str, Any]) -> str:
    """The whole report as Markdown."""
    done = [record for record in records.values() if record["status"] == "done" and record["phase"] == "study"]
    lines = [about, ""]
    others = [record for record in records.values() if record["status"] != "done"]
    if others:
        lines.append(f"{len(others)} of {len(records)} runs are not done:")
        for record in others:
            error = record["error"]
            why = f" at {error['step']}, exit code {error['code']}: {error['message']}" if error else ""
            lines.append(f"- {record['run']}: {record['status']}{why}")
        lines.append("")
    if not done:
        return "\n".join([*lines, "no run is done yet"])
    columns = columns_of(done, options.get("scores"))
    lines.append(table(done, columns))
    lines += [
        "",
        "Mean ± standard deviation over seeds; shares in percent; minutes of training; GiB of the fullest process.",
    ]
    for name in options.get("scores") or []:
        if not any(name == column[1] for column in columns):
            lines += ["", f"No run has the score {name!r}."]
    for axis, baseline in (options.get("baseline") or {}).items():
        lines += ["", f"Differences by {axis}, seed by seed, with 95 % t-intervals:", ""]
        lines.append(differences(done, columns, axis, baseline))
    if options.get("effects"):
        lines += ["", "Parts of the difference, seed by seed, with 95 % t-intervals:", ""]
        lines.append(effects(done, columns, options["effects"]))
    if different := unlike(done):
        lines += ["", "Seeds that were not made alike:", "", *different]
    tuned = tuning_lines([record for record in records.values() if record["status"] == "done"])
    if tuned:
        lines += ["", "Chosen on validation:", "", *tuned]
    return "\n".join(lines)


def options_of(records: dict[str, Record]) -> dict[str, Any]:
    """The `report` entry of the experiment that all the records are of, where it is one of experiments/."""
    of = {record["experiment"] for record in records.values()}
    return (load(*of).get("report") or {}) if len(of) == 1 and of <= set(names()) else {}


def main(argv: list[str]) -> None:
    if len(argv) != 1:
        raise UserError("expected a plan.json, or a folder of records")
    path = Path(argv[0])
    if path.is_dir():
        records = runs.records_in(path)
        print(summary(f"records of {path}", records, options_of(records)))
        return
    plan = run_record.load_plan(path)
    records = {name: run_record.write_record(plan, name) for name in plan["runs"]}
    options, folder = plan["report_options"], Path(plan["folder"])
    text = summary(f"# {plan['experiment']}\n\n{plan['about']}", records, options)
    drawn = []
    if options.get("curve"):
        done = [record for record in records.values() if record["status"] == "done"]
        tuning = [record for record in done if record["phase"] == "tuning"]
        shown = tuning or done  # where a tuning chose, its grid is the curve
        drawn = draw(shown, options["curve"], columns_of(shown, options.get("scores")), folder)
    write_whole(folder / "summary.md", text + "\n")
    print(text)
    print(f"\nsummary: {', '.join(map(str, [folder / 'summary.md', *drawn]))}")


if __name__ == "__main__":
    run_script(main)
