"""The report as one page that a browser opens from disk: tables, training curves, and every item side by side.

eval/report.html is the page: its style, its script, and a line that the data take the place of. The data are JSON, in
an element that no browser runs. The script sets what a model wrote as text, never as HTML.

What the page shows of a benchmark's items, a dictionary each:
    row           id, about, instruction, gold, completions: one per checkpoint, None where it has none
    completion    prompt: one or two places in `strings`, the instruction between two; completion, tokens, finished;
                  values: by each rule 1 or 0, or MT-Bench's score; lacks: no answer was found, say; facts; texts
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.cli import UserError
from common.runs import write_whole
from eval.benchmark import read_jsonl
from eval.results import TERMS, ReportedRun

TEMPLATE = Path(__file__).with_suffix(".html").with_name("report.html")
PLACE = "<!-- data -->"

# The rules that grade an item, by benchmark; the table has the first rule.
RULES = {
    "gsm8k": {
        "correct_strict": "the published rule",
        "correct": "the number after the mark",
        "correct_lenient": "the last number",
    },
    "hendrycks_math": {"correct_strict": "the published rule", "correct": "math-verify"},
    "humaneval": {"correct": "the tests"},
    "mbpp": {"correct": "the tests"},
    "mt_bench": {"score": "the judge"},
}
# Other things than a right answer that an item may lack.
LACKS = {"humaneval": "timed out", "mbpp": "timed out", "mt_bench": "no rating"}
NO_ANSWER = "no answer found"
ABOUT = ("task_id", "subject", "level", "question_id", "category")  # fields of an item that no model changes
FACTS = {"extracted": "extracted", "last_number": "last number", "verdict": "program", "detail": "why"}
FACTS |= {"problem": "problem", "score": "score", "judge": "judge"}
TEXTS = {"program": "program", "output": "what the program printed", "judgment": "judgment"}

CURVES = {"loss": "loss, nats per token", "task": "task loss, nats per token"}
CURVES |= {name: f"{name}, {loss}" for name, (loss, _) in TERMS.items()}
CURVES |= {f"lambda_{name}": f"{weight}, weight of {loss}" for name, (loss, weight) in TERMS.items()}
CURVES |= {"learning_rate": "learning rate", "grad_norm": "gradient norm", "validation": "validation score"}
MOST_POINTS = 500  # most points of a curve; a longer curve is averaged over neighbours


def require_writable(path: Path, overwrite: bool) -> None:
    """Raises a UserError where the page cannot be written there; makes its folder."""
    if path.is_dir():
        raise UserError(f"--html {path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already: name another file, or give --overwrite")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path.with_name(f".{path.name}.part"), "")
        path.with_name(f".{path.name}.part").unlink()
    except OSError as error:
        raise UserError(f"cannot write to --html {path}: {error.strerror}") from error


def write_html(path: Path, tables: list[dict], runs: dict[str, ReportedRun], metrics: dict[str, Path]) -> None:
    """Writes the page.

    Args:
        tables: each with title, cells (a head and rows) and notes (lines below it).
        runs: the checkpoints by their labels, the base first.
        metrics: metrics.jsonl of training runs by their labels.

    Raises:
        UserError: an items file is damaged, or the page cannot be written.
    """
    benchmarks = {
        name: benchmark_of(name, runs) for name in RULES if any(name in run.summaries for run in runs.values())
    }
    about = {
        "tables": tables,
        "checkpoints": list(runs),
        "curves": curves(metrics),
        "benchmarks": {name: content["about"] for name, content in benchmarks.items()},
    }
    blocks = [data_block("report", about)]
    blocks += [data_block(f"items-{name}", content["items"]) for name, content in benchmarks.items()]
    before, _, after = TEMPLATE.read_text(encoding="utf-8").partition(PLACE)
    try:
        write_whole(path, before + "\n".join(blocks) + after)
    except OSError as error:
        raise UserError(f"cannot write to --html {path}: {error.strerror}") from error


def data_block(name: str, value: Any) -> str:
    """JSON in an element of the page. With no "<" in it, no text of a model's ends the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


# ------------------------------------------------------------------------------------------------------------------
# Items
# ------------------------------------------------------------------------------------------------------------------


def benchmark_of(name: str, runs: dict[str, ReportedRun]) -> dict[str, Any]:
    """A benchmark's items side by side, and the facts that the page needs before it reads them."""
    found, missing = {}, {}
    for label, run in runs.items():
        path = Path(run.folder) / f"{name}.jsonl"
        if name in run.failures:
            missing[label] = f"failed: {run.failures[name]}"
        elif name not in run.summaries:
            missing[label] = "not run"
        elif not path.is_file():
            missing[label] = f"no items: {path} is not there"
        else:
            found[label] = _read_items(path, name)
    about = {
        "label": next(run.columns[name].label for run in runs.values() if name in run.columns),
        "rules": list(RULES[name].values()),
        "scored": name == "mt_bench",  # by a number, not by right and wrong
        "lacks": LACKS.get(name, NO_ANSWER),
        "missing": missing,
    }
    return {"about": about, "items": side_by_side(name, found, list(runs))}


def _read_items(path: Path, name: str) -> list[dict]:
    """Raises a UserError where the file is not an items file of the benchmark's script."""
    made = ("index", "sample", "instruction", "prompt", "completion", "num_tokens", "finished", *RULES[name])
    try:
        items = read_jsonl(path)
        for item in items:
            for key in made:
                item[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"python eval/{name}.py --rescore {path} --output-dir {path.parent} --overwrite, or without --rescore"
        raise UserError(f"{path} is damaged or older than this script: {remedy}") from error
    return items


def side_by_side(name: str, found: dict[str, list[dict]], labels: list[str]) -> dict[str, Any]:
    """One row per item, sample and turn, in their order, with a completion per checkpoint.

    Two checkpoints may have been asked in different words (`--prompt raw` adds some to a question): they have the same
    item if one instruction contains the other.
    """
    groups: dict[tuple, list[dict[str, dict]]] = {}
    for label, items in found.items():
        for item in items:
            rows = groups.setdefault((item["index"], item["sample"], item.get("turn", 0)), [])
            for row in rows:
                one, other = next(iter(row.values()))["instruction"], item["instruction"]
                if label not in row and (one in other or other in one):
                    row[label] = item
                    break
            else:
                rows.append({label: item})
    samples = len({sample for _, sample, _ in groups}) > 1
    strings: dict[str, int] = {}
    rows = []
    for (index, sample, turn), alike in sorted(groups.items()):
        for number, row in enumerate(alike):
            first = next(iter(row.values()))
            instruction = min((item["instruction"] for item in row.values()), key=len)
            parts = [str(index), *([f"sample {sample}"] if samples else [])]
            parts += [f"turn {turn + 1}"] if "turn" in first else []
            parts += [f"other {number}"] if number else []
            rows.append(
                {
                    "id": ", ".join(parts),
                    "about": ", ".join(f"{key.replace('_', ' ')} {first[key]}" for key in ABOUT if key in first),
                    "instruction": instruction,
                    "gold": first.get("gold"),
                    "completions": [
                        _completion(name, row[label], instruction, strings) if label in row else None
                        for label in labels
                    ],
                }
            )
    return {"strings": list(strings), "rows": rows}


def _completion(name: str, item: dict[str, Any], instruction: str, strings: dict[str, int]) -> dict[str, Any]:
    before, found, after = item["prompt"].rpartition(instruction) if instruction else ("", "", item["prompt"])
    values = [item[rule] for rule in RULES[name]]
    if name in ("humaneval", "mbpp"):
        lacks = item.get("verdict") == "timed out"
    else:
        lacks = item["score" if name == "mt_bench" else "extracted"] is None
    return {
        "prompt": [strings.setdefault(text, len(strings)) for text in ([before, after] if found else [after])],
        "completion": item["completion"],
        "tokens": item["num_tokens"],
        "finished": item["finished"],
        "values": [int(value) if isinstance(value, bool) else value for value in values],
        "lacks": lacks,
        "facts": {label: str(item[key]) for key, label in FACTS.items() if item.get(key) not in (None, "")}
        | ({"extracted": "nothing"} if item.get("extracted", "") is None else {}),
        "texts": {label: item[key] for key, label in TEXTS.items() if item.get(key)},
    }


# ------------------------------------------------------------------------------------------------------------------
# Curves
# ------------------------------------------------------------------------------------------------------------------


def curves(metrics: dict[str, Path]) -> list[dict[str, Any]]:
    """A panel per logged quantity: title, and for each run its points (step, value)."""
    logged = {label: read_jsonl(path) for label, path in metrics.items()}
    names = dict.fromkeys(name for lines in logged.values() for line in lines for name in line)
    validated = [name for name in names if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))]
    own = [name for name in names if f"lambda_{name}" in names]  # a term that somebody added
    titles = CURVES | {title: title for name in own for title in (name, f"lambda_{name}") if title not in CURVES}
    titles |= {name: f"validation, {name.removeprefix('eval_').replace('_', ' ')}" for name in validated}
    panels = []
    for name, title in titles.items():
        series = {label: thinned(points(lines, name)) for label, lines in logged.items()}
        series = {label: line for label, line in series.items() if line}
        if series:
            panels.append({"title": title, "series": series})
    return panels


def points(lines: Iterable[dict], name: str) -> list[tuple[int, float]]:
    """The points at which the quantity is logged and is a number."""
    of_steps = ((line.get("step"), line.get(name)) for line in lines)
    return [(x, y) for x, y in of_steps if x is not None and isinstance(y, (int, float)) and math.isfinite(y)]


def thinned(line: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, each the mean of as many neighbours; to six digits."""
    size = math.ceil(len(line) / MOST_POINTS)
    parts = [line[start : start + size] for start in range(0, len(line), size or 1)]
    return [tuple(float(f"{sum(values) / len(part):.6g}") for values in zip(*part, strict=True)) for part in parts]
