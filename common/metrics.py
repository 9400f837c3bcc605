"""Scores of classification and regression: GLUE's metrics with their 95 % intervals, calibration."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from common.intervals import markdown, proportion

if TYPE_CHECKING:
    from common.labelled import Data

BOOTSTRAP_SAMPLES = 500
ERRORS = ("rmse", "mae")  # in the units of the labels


def metric(name: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    """A metric of GLUE, or an error; both arrays are (N,). A correlation with a constant, or with NaN, is 0. Macro F1
    is the mean over the classes that are labelled or predicted."""
    if name == "accuracy":
        return float(np.mean(predicted == labels))
    if name == "rmse":
        return float(np.sqrt(np.mean((predicted - labels) ** 2)))
    if name == "mae":
        return float(np.mean(np.abs(predicted - labels)))
    if name in ("f1", "macro_f1"):
        from sklearn.metrics import f1_score

        average = "macro" if name == "macro_f1" else "binary"
        return float(f1_score(labels, predicted, average=average, zero_division=0.0))
    if name == "matthews":
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(labels, predicted))
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0
    from scipy import stats

    correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name]
    value = float(correlation(predicted, labels).statistic)
    return value if math.isfinite(value) else 0.0


def macro_f1(predicted: np.ndarray, labels: np.ndarray, num_classes: int) -> float:
    """The mean over the classes of F1 = 2·TP / (predicted + labelled); 0 for a class that is neither."""
    right = np.bincount(labels[predicted == labels], minlength=num_classes)
    both = np.bincount(predicted, minlength=num_classes) + np.bincount(labels, minlength=num_classes)
    return float(np.mean(2 * right / np.maximum(both, 1)))


def area_under_curve(logits: np.ndarray, labels: np.ndarray) -> float:
    """AUC: how often a random example of a class gets a higher probability of that class than a random example of the
    others (ties: half). For more than two classes, the mean of each against the rest. NaN if a class lacks examples."""
    from scipy.stats import rankdata

    probabilities = softmax(logits)
    columns = [1] if logits.shape[1] == 2 else range(logits.shape[1])
    areas = []
    for column in columns:
        own = labels == column
        pairs = own.sum() * (len(own) - own.sum())
        if pairs == 0:
            return math.nan
        ranks = rankdata(probabilities[:, column])
        areas.append((ranks[own].sum() - own.sum() * (own.sum() + 1) / 2) / pairs)
    return float(np.mean(areas))


def predictions(logits: np.ndarray) -> np.ndarray:
    """The class, or with one column the number, that each row of the logits (N, D) predicts."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """The softmax of each row, in float64."""
    return F.softmax(torch.from_numpy(logits).double(), dim=-1).numpy()


def calibration_error(logits: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): Σ_bins n_b/N · |accuracy − mean confidence|, over bins of equal
    width of the confidence, the predicted class's probability. 0: 80 % of the 80 % confident predictions are right."""
    probabilities = softmax(logits)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def score(
    logits: np.ndarray, labels: list[int | float], metrics: tuple[str, ...], class_names: list[str]
) -> dict[str, Any]:
    """Every metric with its 95 % interval (accuracy: Wilson's, others: bootstrap over the examples). Numbers get
    their errors too. Classes get macro F1, AUC, the confusion matrix (rows: labels), the accuracy on each class, and
    the calibration error.

    Args:
        logits: (N, D).
        class_names: D of them; none: numbers are predicted.
    """
    labels, predicted = np.asarray(labels), predictions(logits)
    result: dict[str, Any] = {}
    for name in (*metrics, *(() if class_names else ERRORS)):
        if name == "accuracy":
            result[name] = proportion(int((predicted == labels).sum()), len(labels))
        else:
            result[name] = _with_interval(lambda rows, name=name: metric(name, predicted[rows], labels[rows]), labels)
    if class_names:
        count = len(class_names)
        result["macro_f1"] = _with_interval(lambda rows: macro_f1(predicted[rows], labels[rows], count), labels)
        result["auc"] = _with_interval(lambda rows: area_under_curve(logits[rows], labels[rows]), labels)
        confusion = np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)
        result["confusion_matrix"] = confusion.tolist()
        result["class_accuracy"] = {
            name: proportion(int(confusion[row, row]), int(confusion[row].sum()))
            for row, name in enumerate(class_names)
        }
        result["calibration_error"] = calibration_error(logits, labels)
    return result


def _with_interval(value: Callable[[np.ndarray], float], labels: np.ndarray) -> dict[str, Any]:
    """`value` on all rows, with its bootstrap interval; None where it is not defined. There is no interval where a
    tenth of the resamples has no value: the others, which hold every class, would be a choice."""
    rng = np.random.default_rng(0)
    values = [value(rng.integers(len(labels), size=len(labels))) for _ in range(BOOTSTRAP_SAMPLES)]
    whole, defined = value(np.arange(len(labels))), [number for number in values if not math.isnan(number)]
    has_interval = not math.isnan(whole) and len(defined) > 0.9 * BOOTSTRAP_SAMPLES
    return {
        "value": None if math.isnan(whole) else whole,
        "of": len(labels),
        "interval_95": np.quantile(defined, (0.025, 0.975)).tolist() if has_interval else None,
    }


def prediction_rows(
    name: str, logits: np.ndarray, labels: list[int | float], class_names: list[str]
) -> list[dict[str, Any]]:
    """One dictionary per example for predictions.jsonl."""
    if not class_names:
        predicted = predictions(logits).tolist()
        return [
            {"data": name, "index": index, "label": label, "predicted": value}
            for index, (label, value) in enumerate(zip(labels, predicted, strict=True))
        ]
    return [
        {
            "data": name,
            "index": index,
            "label": class_names[label],
            "predicted": class_names[int(row.argmax())],
            "confidence": round(float(row.max()), 6),
        }
        for index, (label, row) in enumerate(zip(labels, softmax(logits), strict=True))
    ]


def score_table(results: dict[str, Any], method: str, metrics: tuple[str, ...], class_names: list[str]) -> str:
    """A row per evaluation set and metric: both probes and the trained model, with intervals."""
    table = [["test set", "examples", "metric", "linear probe", "probe, mean states", method]]
    for name, result in results.items():
        for metric_name in dict.fromkeys((*metrics, *(("macro_f1", "auc") if class_names else ERRORS))):
            cells = [result[kind][metric_name] for kind in ("probe", "probe_mean_states", method)]
            factor, digits = (1, 3) if metric_name in ERRORS else (100, 1)
            table.append([name, str(cells[0]["of"]), metric_name, *(_cell(cell, factor, digits) for cell in cells)])
    return markdown(table)


def _cell(score: dict[str, Any], factor: int, digits: int) -> str:
    if score["value"] is None:  # AUC without an example of each class
        return "none"
    bounds = score["interval_95"]
    interval = ", ".join(f"{factor * bound:.{digits}f}" for bound in bounds) if bounds else "no interval"
    return f"{factor * score['value']:.{digits}f} [{interval}]"


def score_report(summary: dict[str, Any], data: "Data", args: Any) -> str:
    """The summary for the terminal: a row per evaluation set and metric, then the first set's confusion matrix."""
    table = score_table(summary["results"], args.method, data.metrics, data.class_names)
    lines = [
        "",
        table,
        "",
        "(in percent, errors in the labels' units; with 95 % intervals; both probes read the frozen encoder)",
    ]
    name, result = next(iter(summary["results"].items()))
    if not data.is_regression:
        result = result[args.method]
        lines.append(f"{args.method} on {name}: calibration error {result['calibration_error']:.3f}; rows are labels")
        width = max(map(len, data.class_names))
        for label, row in zip(data.class_names, result["confusion_matrix"], strict=True):
            right = result["class_accuracy"][label]
            share = "none" if right["value"] is None else f"{right['value']:.1%} right"
            lines.append(f"  {label:{width}}  {'  '.join(f'{count:6d}' for count in row)}   {share}")
    output_dir = Path(args.output_dir)
    best, name = summary["validation"], data.metrics[0]
    scores = {
        test: [of[kind][name]["value"] for kind in (args.method, "probe")] for test, of in summary["results"].items()
    }
    if below := [test for test, (ours, probe) in scores.items() if ours < probe]:
        lines.append(
            f"note: {args.method} ends below the linear probe of the untouched encoder on {', '.join(below)}: train "
            "longer, or with another --learning-rate"
        )
    if best["step"] == 0:
        lines.append("note: no state of the training was better by validation than the model before it, which is kept")
    lines += [
        f"best state: step {best['step']} of {summary['steps']}, validation {name} {best[name]:.3f}",
        f"{summary['seconds']:.0f} s in all; {output_dir}/: results.json, predictions.jsonl, config.yaml, merged/"
        + ("" if args.method == "full" else ", adapter/ (PEFT's format)"),
    ]
    return "\n".join(lines)
