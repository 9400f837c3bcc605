#!/usr/bin/env python3
"""Puts results into tables and pictures: the published layout, published numbers beside ours, curves of a training run.

How to run
    python eval/report.py results/base results/ba-lora           two checkpoints on the same problems, with a verdict
    python eval/report.py results/seed-* --output-dir report     one row per method, mean ± std over its seeds
    python eval/report.py results/base results/ba-lora --html report.html    a page to read every item in, side by side
    python eval/report.py output/glue/*                          runs of finetune_bert_l_sst2.py, tasks by columns
    python eval/report.py PiSSA=results/a PiSSA=results/b        rows named by hand
    python eval/report.py output/nlg/records                     all runs of an experiment, from their records
    python eval/report.py                                        the published tables; ours are not run

A folder holds what the eval scripts wrote, or is the output of finetune_bert_l_sst2.py, or has records of runs. Model,
method and seed of a checkpoint that train.py made are read from its config.yaml, which is in the folder above; other
rows are named after their folder. What eval/forgetting.py measured is a column of its own, outside of the average.

Published numbers stand beside ours by formulation: those of the one that our runs have. Where a method has none there,
those of a primary source stand there. Each row says its version, and a line below the table its source.

What comes out: tables on the terminal; with --output-dir also
    report.md, report.tex          a table per model: methods by rows, benchmarks by columns, the average
    report.png, report.svg         the same as a plot
    training.png, training.svg     terms and λs over the steps, where a run's metrics.jsonl is there (or --metrics FILE)
"""

import itertools
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from common.cli import UserError, option, parse_arguments, run_script
from common.intervals import markdown, pyplot
from common.runs import changed_content, differing, first_difference, write_whole
from eval.benchmark import read_jsonl
from eval.html_report import require_writable, write_html
from eval.published import PublishedTable, published_rows, published_tables
from eval.results import BESIDE, METHODS, NLG, NLU, TERMS, Column, ReportedRun, load_runs, scoring

NOT_RUN, NOT_JUDGED, FAILED, NOT_PUBLISHED = "not run", "not judged", "failed", "not published"


Folders = tyro.conf.Positional[Annotated[list[str], tyro.conf.arg(metavar="[NAME=]FOLDER ...")]]


@dataclass
class ResultsArguments:
    """The results to report."""

    results: Folders = option([], "results, the base first")
    metrics: list[str] = option([], "metrics.jsonl of further runs")


@dataclass
class ReportArguments:
    """Where the report goes."""

    output_dir: str | None = option(None, "folder for tables and pictures")
    html: str | None = option(None, "file for one page with tables, training curves and every item")
    overwrite: bool = option(False, "replace a report that is there already")


@dataclass
class Arguments(ReportArguments, ResultsArguments):
    """All of it."""


PARTS = {"nlg": NLG, "nlu": NLU}


# ------------------------------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A method on a model: for each benchmark a score per seed."""

    method: str
    params: str = ""
    published: str | None = None  # the version; None: ours
    scores: dict[str, list[float]] = field(default_factory=dict)
    deviations: dict[str, float | None] = field(default_factory=dict)  # published ones; ours come from the scores
    printed_average: float | None = None  # published
    notes: dict[str, str] = field(default_factory=dict)  # additions to a cell: an interval, another number of items
    without: dict[str, list[str]] = field(default_factory=dict)  # for each run without a score the reason
    remarks: list[str] = field(default_factory=list)  # the row's lines below the table
    origins: dict[str, list[ReportedRun]] = field(default_factory=dict)  # our runs behind each score

    def mean(self, benchmark: str) -> float | None:
        scores = self.scores.get(benchmark)
        return statistics.mean(scores) if scores else None

    def deviation(self, benchmark: str) -> float | None:
        """The published deviation, or the sample standard deviation over our seeds; None for one seed."""
        if self.published:
            return self.deviations.get(benchmark)
        scores = self.scores.get(benchmark, [])
        return statistics.stdev(scores) if len(scores) > 1 else None

    def average(self, columns: dict[str, Column]) -> float | None:
        """The mean over all benchmarks; None if one is missing."""
        means = [self.mean(name) for name in columns]
        return None if None in means else statistics.mean(means)

    def absence(self, *benchmarks: str) -> str:
        """The reason why a score is missing: NOT_RUN, unless all missing scores have the same other reason."""
        reasons = {reason for name in benchmarks if not self.scores.get(name) for reason in self._reasons(name)}
        return reasons.pop() if len(reasons) == 1 else NOT_RUN

    @property
    def num_seeds(self) -> int:
        """The most seeds behind a score."""
        return max((len(scores) for scores in self.scores.values()), default=0)

    def unlike(self) -> str:
        """A line with the conditions that differ between the row's runs; "" if none does."""
        runs = {run.folder: run.conditions for members in self.origins.values() for run in members}
        found = differing(runs.values())
        return f"{self.method}: its runs differ in: {found}" if found else ""

    def _reasons(self, benchmark: str) -> list[str]:
        return self.without.get(benchmark) or [NOT_PUBLISHED if self.published else NOT_RUN]


@dataclass
class Table:
    model: str
    columns: dict[str, Column]
    rows: list[Row]
    captions: list[str] = field(default_factory=list)  # the sources of the published rows


def published_row(version: str, method: str, cells: dict[str, Any], columns: dict[str, Column]) -> Row:
    """A row of data/published.json; a null there is a score that is not published."""
    row = Row(method, cells["params"] or "", version, printed_average=cells["average"])
    for name in columns:
        if cells[name] is not None:
            value, *deviation = cells[name]
            row.scores[name] = [value]
            row.deviations[name] = deviation[0] if deviation else None
    return row


def make_tables(runs: list[ReportedRun]) -> list[Table]:
    """One table per model, published rows first where the model has some; without runs all published tables.

    Raises:
        UserError: two runs that would be seeds of one row differ in more than the seed, or not in the seed.
    """
    published = published_tables()
    by_model: dict[str, list[ReportedRun]] = {} if runs else {table.model: [] for table in published}
    for run in runs:
        known = [table.model for table in published if PARTS[table.part] is run.columns]
        by_model.setdefault(_published_name(run.model, known), []).append(run)
    return [
        make_table(model, members, [table for table in published if table.model == model])
        for model, members in by_model.items()
    ]


def make_table(model: str, runs: list[ReportedRun], published: list[PublishedTable]) -> Table:
    """A model's table; seeds of one method become one row."""
    table = Table(model, PARTS[published[0].part] if published else {}, [])
    versions = formulations(runs) if runs else {source.version for source in published}
    for source, method, cells in published_rows(published, versions):
        table.rows.append(published_row(source.version, method, cells, table.columns))
        if source.caption not in table.captions:
            table.captions.append(source.caption)
    ours: dict[str, Row] = {}
    for run in runs:
        table.columns = table.columns | run.columns
        name = run.name or run.method
        _add(ours.setdefault(name, Row(name, run.params)), run)
    table.rows += ours.values()
    return table


def formulations(runs: list[ReportedRun]) -> set[str]:
    """The formulations of the runs with regularizers; if no run has any, the formulations of all runs."""
    acting = [run for run in runs if run.settings.get("method") == "ba-lora" or run.settings.get("regularize")]
    return {run.settings["formulation"] for run in acting or runs if "formulation" in run.settings}


def _published_name(model: str, published: list[str]) -> str:
    """The published name of exactly this model: LLaMA-2-7B for meta-llama/Llama-2-7b-hf; none for mdeberta-v3-base."""
    names = (name for name in published if re.search(rf"(^|/){name}(-hf|-v0\.1)?/?$", model, re.IGNORECASE))
    return next(names, model)


def _require_seeds(row: Row, benchmark: str, run: ReportedRun) -> None:
    """Raises UserError if `run` is not a further seed of the row's runs of this benchmark."""
    remedy = "name rows by hand: NAME=FOLDER"
    ours = scoring(run.summaries[benchmark])
    for other in row.origins.get(benchmark, []):
        theirs = scoring(other.summaries[benchmark])
        difference = first_difference(other.settings, run.settings, {"seed"}, common=True)
        of_a_seed = {"seed", "completions"}
        difference = difference or first_difference(theirs, ours, of_a_seed, common=True)
        difference = difference or changed_content(other.summaries[benchmark], run.summaries[benchmark], of_a_seed)
        if difference:
            raise UserError(f"{run.folder} and {other.folder} are no seeds of one {row.method}: {difference}; {remedy}")
        if (other.settings.get("seed"), theirs.get("seed")) == (run.settings.get("seed"), ours.get("seed")):
            raise UserError(f"{other.folder} and {run.folder} are the same run, of {row.method}: give one, or {remedy}")


def _add(row: Row, run: ReportedRun) -> None:
    for name, error in run.failures.items():
        row.without.setdefault(name, []).append(FAILED)
        label = (NLG | BESIDE)[name].label if name in NLG | BESIDE else name
        row.remarks.append(f"{run.folder}: {label} failed: {error}")
    for name, summary in run.summaries.items():
        column = (run.columns | BESIDE)[name]
        score = summary[column.score]
        if score["value"] is None:  # MT-Bench without a judge
            row.without.setdefault(name, []).append(NOT_JUDGED)
            continue
        if run.name is None:
            _require_seeds(row, name, run)
        row.origins.setdefault(name, []).append(run)
        row.scores.setdefault(name, []).append(score["value"] * column.scale)
        notes = []
        if len(row.scores[name]) == 1:
            low, high = (column.form.format(bound * column.scale) for bound in score["interval_95"])
            notes.append(f"[{low}, {high}]")
        counts = {other.summaries[name][column.score]["of"] for other in row.origins[name]}
        if counts != {column.items}:
            notes.append(f"n = {', '.join(map(str, sorted(counts)))}")
        row.notes[name] = ", ".join(notes)


# ------------------------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------------------------


def cells(table: Table) -> list[list[str]]:
    """The table's text: a head, then a row per method, and one for every published method that we have not run."""
    beside = {name: column for name, column in BESIDE.items() if any(row.scores.get(name) for row in table.rows)}
    labels = [column.label for column in table.columns.values()]
    head = ["method", "whose", "parameters", *labels, "average", *(column.label for column in beside.values())]
    rows = list(table.rows)
    ours = [row.method for row in rows if not row.published]
    rows += [Row(method) for method in METHODS.values() if table.captions and method not in ours]
    body = []
    for row in rows:
        count = row.num_seeds
        whose = f"published, {row.published}" if row.published else "ours" + (f", {count} seeds" if count > 1 else "")
        texts = [_cell(row, name, column) for name, column in table.columns.items()]
        texts.append(_average_cell(row, table.columns))
        texts += ["" if row.published else _cell(row, name, column) for name, column in beside.items()]
        body.append([row.method, whose, row.params, *texts])
    return [head, *body]


def _cell(row: Row, benchmark: str, column: Column) -> str:
    mean, deviation = row.mean(benchmark), row.deviation(benchmark)
    if mean is None:
        return row.absence(benchmark)
    text = column.form.format(mean) + (f"±{column.form.format(deviation).lstrip('+')}" if deviation is not None else "")
    missing = row.without.get(benchmark, [])
    count = len(row.scores[benchmark])
    few = f"{count} of {row.num_seeds} seeds" if count < row.num_seeds else ""
    notes = [row.notes.get(benchmark, ""), few, *(f"{missing.count(why)} {why}" for why in dict.fromkeys(missing))]
    return f"{text} {', '.join(filter(None, notes))}".rstrip()


def _average_cell(row: Row, columns: dict[str, Column]) -> str:
    average, printed = row.average(columns), row.printed_average
    if average is None:
        return row.absence(*columns) if printed is None else f"(printed: {printed:.2f})"
    is_printed = printed is None or f"{printed:.2f}" == f"{average:.2f}"
    return f"{average:.2f}" if is_printed else f"{average:.2f} (printed: {printed:.2f})"


LEGEND = (
    "± is the standard deviation over seeds, [ ] the 95 % interval of a single run, n the number of items where it is "
    "not the whole benchmark. Averages are recomputed from their rows."
)
FORGETTING_LEGEND = (
    "Forgetting is the loss after training less that before, in nats per token of text that has nothing to do with "
    "the task."
)


def legend(tables: list[Table]) -> str:
    shown = any(row.scores.get("forgetting") for table in tables for row in table.rows)
    return f"{LEGEND} {FORGETTING_LEGEND}" if shown else LEGEND


def notes(table: Table) -> list[str]:
    """The lines below the table: the missing scores with their reasons, and the sources of the published numbers."""
    remarks = [remark for row in table.rows for remark in [*row.remarks, row.unlike()] if remark]
    return remarks + [f"Published: {caption}." for caption in table.captions]


def markdown_report(tables: list[Table]) -> str:
    """All tables, each with the lines below it."""
    parts = ["\n\n".join([f"## {table.model}", markdown(cells(table)), *notes(table)]) for table in tables]
    return "\n\n".join([*parts, legend(tables)])


LATEX = str.maketrans(
    {char: f"\\{char}" for char in "&%$#_{}"} | {"±": "$\\pm$", "~": "\\~{}", "\\": "\\textbackslash{}"}
)


def latex_report(tables: list[Table]) -> str:
    """All tables for booktabs."""
    parts = []
    for table in tables:
        head, *body = cells(table)
        lines = [" & ".join(cell.translate(LATEX) for cell in row) + r" \\" for row in body]
        change = next((i for i, row in enumerate(body) if row[1].startswith("ours")), 0)
        if 0 < change < len(lines):
            lines.insert(change, r"\midrule")
        lines = [" & ".join(cell.translate(LATEX) for cell in head) + r" \\", r"\midrule", *lines]
        parts += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{table.model.translate(LATEX)}}}",
            rf"\begin{{tabular}}{{lll{'r' * (len(head) - 3)}}}",
            r"\toprule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    return "\n".join([f"% {legend(tables)}", *parts])


COMPARISON = ("model", "problems", "accuracy, 95 % interval", "last number", "answer extracted", "response loss")


def comparison(summaries: dict[str, dict]) -> list[list[str]]:
    """GSM8K in detail: a head, and one row per checkpoint."""
    rows = [list(COMPARISON)]
    for name, summary in summaries.items():
        accuracy, loss = summary["accuracy"], summary.get("response_loss")
        low, high = accuracy["interval_95"]
        rows.append(
            [
                name,
                str(accuracy["of"]),
                f"{accuracy['value']:.1%} [{low:.1%}, {high:.1%}]",
                f"{summary['accuracy_lenient']['value']:.1%}",
                f"{summary['answer_extracted']['value']:.1%}",
                "not measured" if loss is None else f"{loss:.3f}",
            ]
        )
    return rows


def verdict(summaries: dict[str, dict]) -> str:
    """One line: whether the two checkpoints' intervals of accuracy are apart."""
    (first, one), (second, other) = summaries.items()
    difference = first_difference(scoring(one), scoring(other)) or changed_content(one, other)
    if difference:
        return f"The two are not scored alike, {difference}: no comparison."
    (first_low, first_high), (low, high) = one["accuracy"]["interval_95"], other["accuracy"]["interval_95"]
    if low > first_high:
        return f"The accuracy intervals do not overlap: {second} is better than {first}."
    if high < first_low:
        return f"The accuracy intervals do not overlap: {second} is worse than {first}."
    return "The accuracy intervals overlap: no difference is shown."


# ------------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers tell apart; shape and fill say the same once more.
COLOURS = {"Full FT": "#000000", "LoRA": "#E69F00", "PiSSA": "#0072B2", "BA-LoRA": "#D55E00"}
OTHER_COLOUR = "#009E73"


def plot_tables(tables: list[Table]) -> Any:
    """A row of panels per model, a panel per benchmark: hollow points are published, filled ones ours."""
    plt = pyplot()
    tables = [table for table in tables if any(row.scores for row in table.rows)]
    columns = max(len(table.columns) for table in tables)
    heights = [0.7 + 0.26 * len(table.rows) for table in tables]
    figure, axes = plt.subplots(
        len(tables),
        columns,
        figsize=(2.1 + 1.65 * columns, sum(heights) + 0.8),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for table, panels in zip(tables, axes, strict=True):
        names = list(table.columns)
        for panel, name in zip(panels, names, strict=False):
            for place, row in enumerate(table.rows):
                mean = row.mean(name)
                colour = COLOURS.get(row.method, OTHER_COLOUR)
                if mean is None:
                    why = row.absence(name)
                    panel.text(0.02, place, why, transform=panel.get_yaxis_transform(), va="center", fontsize=7)
                    continue
                panel.errorbar(
                    mean,
                    place,
                    xerr=row.deviation(name),
                    fmt="o" if row.published else "D",
                    color=colour,
                    markerfacecolor="white" if row.published else colour,
                    markersize=5,
                    capsize=2,
                )
            panel.set_title(table.columns[name].label, fontsize=9)
            panel.set_ylim(len(table.rows) - 0.5, -0.5)
            panel.set_yticks(range(len(table.rows)), [])
            panel.margins(x=0.15)
            panel.tick_params(labelsize=7)
            panel.grid(axis="x", linewidth=0.4, alpha=0.6)
        for panel in panels[len(names) :]:
            panel.set_axis_off()
        labels = [f"{row.method} ({row.published or 'ours'})" for row in table.rows]
        panels[0].set_yticks(range(len(table.rows)), labels, fontsize=8)
        panels[0].set_ylabel(table.model, fontsize=9, fontweight="bold")
    figure.suptitle("hollow: published; filled: ours; bars: standard deviation over seeds", fontsize=8)
    return figure


WEIGHTS_PANEL = "weights, relative to their largest"
PANELS = {
    "loss and task loss, nats per token": {"loss": "loss", "task": "task"},
    **{name: {name: loss} for name, (loss, _) in TERMS.items()},
    WEIGHTS_PANEL: {f"lambda_{name}": weight for name, (_, weight) in TERMS.items()},
    "learning rate": {"learning_rate": "learning rate"},
}
MAX_CURVES = 12  # most columns of a picture of training curves
STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"), ("#CC79A7", "-."), ("#000000", "-"))


def plot_training(runs: dict[str, list[dict]]) -> Any:
    """Every term and every weight over the steps, a column per run."""
    plt = pyplot()
    logged = {name for metrics in runs.values() for line in metrics for name in line}
    known = dict(PANELS)
    own = [name for name in sorted(logged) if f"lambda_{name}" in logged and name not in known]  # terms that were added
    known[WEIGHTS_PANEL] = known[WEIGHTS_PANEL] | {f"lambda_{name}": f"λ of {name}" for name in own}
    known |= {name: {name: name} for name in own}
    panels = [(title, series) for title, series in known.items() if logged & set(series)]
    figure, axes = plt.subplots(
        len(panels),
        len(runs),
        figsize=(1 + 4.2 * len(runs), 0.6 + 1.55 * len(panels)),
        squeeze=False,
        sharex="col",
        layout="constrained",
    )
    for column, (run, metrics) in zip(axes.T, runs.items(), strict=True):
        for panel, (title, series) in zip(column, panels, strict=True):
            for (name, label), (colour, style) in zip(series.items(), STYLES, strict=False):
                points = [(line["step"], line[name]) for line in metrics if name in line]
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                largest = max(map(abs, values)) or 1.0
                if name.startswith("lambda"):
                    values, label = [value / largest for value in values], f"{label}, at most {largest:.3g}"
                marker = "o" if len(steps) == 1 else None  # a line of one point shows nothing
                panel.plot(steps, values, style, color=colour, label=label, linewidth=1.4, marker=marker)
            panel.set_title(title, fontsize=9, loc="left")
            panel.tick_params(labelsize=7)
            panel.grid(linewidth=0.4, alpha=0.6)
            if panel.has_data() and len(series) > 1:
                panel.legend(fontsize=7, frameon=False)
        column[-1].set_xlabel("optimizer step", fontsize=8)
        column[0].set_title(f"{run}\n{panels[0][0]}", fontsize=9, loc="left")
    return figure


def load_metrics(path: Path) -> list[dict]:
    """The logged training steps of a metrics.jsonl; none if the run was shorter than the logging interval.

    Raises:
        UserError: not such a file.
    """
    try:
        lines = read_jsonl(path)
        return [line for line in lines if "loss" in line and "step" in line]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the metrics {path}: {error}") from error


def main(argv: list[str]) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    output_dir = Path(args.output_dir) if args.output_dir else None
    if output_dir is not None and (output_dir / "report.md").exists() and not args.overwrite:
        raise UserError(f"{output_dir / 'report.md'} is there already: name another folder, or give --overwrite")
    if args.html is not None:
        require_writable(Path(args.html), args.overwrite)

    runs = []
    for text in args.results:
        name, _, folder = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        runs += load_runs(folder, name or None)
    labels = [run.name or Path(run.folder).name for run in runs]
    if len(set(labels)) < len(labels):  # seeds of one method
        labels = [run.folder for run in runs]
    curves = {
        label: load_metrics(run.metrics) for label, run in zip(labels, runs, strict=True) if run.metrics is not None
    }
    for path in map(Path, args.metrics):
        curves[path.resolve().parent.name] = load_metrics(path)
        if not curves[path.resolve().parent.name]:
            raise UserError(f"{path} holds no training step")
    curves = {name: steps for name, steps in curves.items() if steps}
    of_gsm8k = {
        label: run.summaries["gsm8k"] for label, run in zip(labels, runs, strict=True) if "gsm8k" in run.summaries
    }
    if of_gsm8k:
        print(markdown(comparison(of_gsm8k)))
        if len(of_gsm8k) == len(runs) == 2:
            print("\n" + verdict(of_gsm8k))
    tables = make_tables(runs)
    if output_dir is not None or not runs or any(set(run.summaries) != {"gsm8k"} for run in runs):
        print(("\n" if of_gsm8k else "") + markdown_report(tables))
    if output_dir is not None:
        write_report(output_dir, tables, curves)
    if args.html is not None:
        write_page(Path(args.html), tables, dict(zip(labels, runs, strict=True)), of_gsm8k, args.metrics)


def write_page(
    path: Path, tables: list[Table], runs: dict[str, ReportedRun], of_gsm8k: dict[str, dict], metrics: list[str]
) -> None:
    """The report as one page."""
    shown = [{"title": table.model, "cells": cells(table), "notes": notes(table)} for table in tables]
    shown[-1]["notes"].append(legend(tables))
    if of_gsm8k:
        below = [verdict(of_gsm8k)] if len(of_gsm8k) == len(runs) == 2 else []
        shown.insert(0, {"title": "GSM8K in detail", "cells": comparison(of_gsm8k), "notes": below})
    logs = {label: run.metrics for label, run in runs.items() if run.metrics is not None}
    write_html(path, shown, runs, logs | {Path(name).resolve().parent.name: Path(name) for name in metrics})
    print(f"\npage: {path}")


def write_report(output_dir: Path, tables: list[Table], curves: dict[str, list[dict]]) -> None:
    """Tables as Markdown and LaTeX, plots as PNG and SVG."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --output-dir {output_dir}: {error.strerror}") from error
    figures = {"report": plot_tables(tables)} if any(row.scores for table in tables for row in table.rows) else {}
    if len(curves) > MAX_CURVES:
        print(f"\nnote: {len(curves)} runs have training curves: those of the first {MAX_CURVES} are drawn")
    if curves:
        figures["training"] = plot_training(dict(itertools.islice(curves.items(), MAX_CURVES)))
    written = []
    for name, figure in figures.items():
        for suffix in ("png", "svg"):
            written.append(output_dir / f"{name}.{suffix}")
            figure.savefig(written[-1], dpi=160)
    written.append(output_dir / "report.tex")
    write_whole(written[-1], latex_report(tables))
    written.append(output_dir / "report.md")
    write_whole(written[-1], markdown_report(tables) + "\n")
    print(f"\nreport: {', '.join(map(str, written))}")


if __name__ == "__main__":
    run_script(main)
