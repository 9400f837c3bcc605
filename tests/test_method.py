"""docs/method.md: the term that the page adds, carried out on a copy of train.py, and beside the fused objective."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, read_jsonl, relative_error
from test_objective import SETTINGS, definition, fused, make_inputs

import train
from eval import html_report, report

OPTION, FUNCTION = re.findall(r"```python\n(.*?)```", (ROOT / "docs/method.md").read_text(), re.DOTALL)


def run(script, *words, cwd):
    finished = subprocess.run([sys.executable, script, *map(str, words)], cwd=cwd, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_the_pages_term_trains_and_stands_in_log_card_and_report(tmp_path, checkpoint, data_file):
    copy = tmp_path / "copy"
    for name in ("common", "eval"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "train.py").read_text()
    text = re.sub(
        r"(class RegularizerArguments:\n.*?\n\n)", lambda match: match[0] + OPTION, text, count=1, flags=re.DOTALL
    )
    text = text.replace("@dataclass\nclass Regularizers:", f"{FUNCTION}\n\n@dataclass\nclass Regularizers:", 1)
    (copy / "train.py").write_text(text)

    options = ["--model", checkpoint, "--data", data_file, "--rank", 4, "--max-steps", 3, "--logging-steps", 1]
    options += ["--eval-share", 0.25, "--eval-steps", 1, "--learning-rate", 1e-2, "--report-to", "none"]
    options += ["--regularizer-schedule", "constant"]
    logs = {}
    for weight in (0, 100):
        folder = tmp_path / str(weight)
        printed = run("train.py", *options, "--lambda-mean", weight, "--output-dir", folder, cwd=copy)
        assert ("lacks the term mean" in printed) == (weight > 0)
        logs[weight] = read_jsonl(folder / "metrics.jsonl")
    assert not any("mean" in line or "eval_mean" in line for line in logs[0])
    steps = [line for line in logs[100] if "mean" in line]
    assert len(steps) == 3
    for line in steps:
        terms = ("consistency", "diversity", "spectral", "mean")
        assert line["lambda_mean"] == 100
        expected = line["task"] + sum(line[f"lambda_{name}"] * line[name] for name in terms)
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    validated = [line["eval_mean"] for line in logs[100] if "eval_mean" in line]
    assert len(validated) == 3 and validated[-1] < validated[0]  # the weight pulls the means to 0
    assert "mean 100" in (tmp_path / "100" / "adapter" / "README.md").read_text()
    titles = [panel["title"] for panel in html_report.curves({"run": tmp_path / "100" / "metrics.jsonl"})]
    assert {"mean", "lambda_mean", "validation, mean"} <= {*titles}
    figure = report.plot_training({"run": logs[100]})
    drawn = {line.get_label() for axis in figure.axes for line in axis.get_lines()}
    assert "mean" in drawn and any(label.startswith("λ of mean") for label in drawn)


def test_a_term_that_is_not_fused_is_added_to_the_fused_ones(monkeypatch):
    """Value and gradient as the definition's; the term itself as its formula in NumPy."""
    function = {}
    exec(FUNCTION.partition("\n")[2], vars(train), function)
    monkeypatch.setitem(train.TERMS, "mean", train.Term(function["_mean_penalty"]))
    for name in ("iclr2026", "adaptive", "no_teacher"):
        settings = train.Regularizers(SETTINGS[name].weights | {"mean": 0.7}, SETTINGS[name].settings)
        inputs = make_inputs((40, 300, 16))
        loss, terms, gradient = fused(inputs, settings)
        expected_loss, expected_terms, expected_gradient = definition(inputs, settings)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert terms == pytest.approx(expected_terms, rel=1e-5, abs=1e-6)
        assert relative_error(gradient, expected_gradient) < 1e-5
        logits = (inputs[0].double() @ inputs[2].double().T).numpy()
        formula = np.square(logits.mean(axis=1)).mean() * 40 / 81  # 40 of the step's 81 tokens
        assert terms["mean"] == pytest.approx(formula, rel=1e-5)


def test_a_term_without_a_weight_is_refused():
    with pytest.raises(TypeError, match="add the option lambda_unknown"):
        train.term("unknown")(torch.mean)
