"""The page's arithmetic: ends of runs read off at equal learning by numpy, differences by scipy's t-test."""

import json

import numpy as np
import pytest
from conftest import record

from experiments import smollm2

LOSSES = {"pissa": [1.5, 0.9, 0.7, 0.6], "lora": [1.5, 1.2, 0.8, 0.75]}


def run_of(arm, seed, phase="study", rate=1e-3):
    """A made-up run; its forgetting is a curve of its own."""
    generator = np.random.default_rng([seed, len(arm), int(1e6 * rate)])
    scores = {}
    for step, loss in zip((0, 25, 50, 100), LOSSES.get(arm, LOSSES["pissa"]), strict=True):
        scores[f"response_loss@{step}"] = loss + 0.01 * seed * (step > 0)
        for name in smollm2.MEASURES:
            scores[f"{name}@{step}"] = float(step / 100 * generator.uniform(0.1, 0.3))
    scores |= {"energy.10": 0.9, "entropy_change": {"value": -0.1}, "distinct_answers": {"value": 0.5}}
    scores |= {"response_loss": {"value": scores["response_loss@100"]}}
    scores |= {name: {"value": scores[f"{name}@100"]} for name in smollm2.MEASURES}
    pairs = {"pct_stereotype": {"value": 0.6}, "likelihood_diff": {"value": 3.0}, "loss": {"value": 4.0}}
    pairs |= {f"before.{name}": value for name, value in pairs.items()}
    pairs |= {"change": {"value": 0.1 * seed}, "slope": {"value": 0.9}, "flips.mcnemar_p": 0.5}
    pairs |= {"by_type.age.change": {"value": 0.2}}
    others = {"crows_pairs": pairs, "gsm8k": {"accuracy": {"value": 0.02}}} if seed < 3 else {}
    about = {"arm": arm, "seed": seed, "phase": phase, "labels": {"arm": arm, "learning-rate": str(rate)}}
    scores = {"curve": scores, **others}  # not every seed has all
    return record(f"{arm}-{phase}-{rate}-{seed}", **about, settings={"learning_rate": rate}, scores=scores)


@pytest.fixture
def records():
    study = [run_of(arm, seed) for arm in ("pissa", "lora") for seed in (1, 2, 3)]
    tuning = [run_of(arm, 0, "tuning", rate) for arm in ("pissa", "pissa-cr-1") for rate in (3e-4, 1e-3)]
    return study + tuning


def test_equal_learning_is_between_the_ends_of_runs_up_to_the_best_rate():
    """The base and steps of a run under way take no part; a rate above the best one neither."""
    losses = {1e-4: 1.2, 3e-4: 1.1, 1e-3: 1.15}
    runs = [run_of("pissa", 0, "tuning", rate) for rate in losses]
    for one, loss in zip(runs, losses.values(), strict=True):
        one["scores"]["curve"]["response_loss@100"] = loss
    curves = [one["scores"]["curve"] for one in runs[:2]]
    for name in smollm2.MEASURES:
        line = smollm2.ends(runs, "pissa", name)
        assert line == [(curve["response_loss@100"], curve[f"{name}@100"]) for curve in curves]
        expected = np.interp(-1.13, [-1.2, -1.1], [curve[f"{name}@100"] for curve in curves])
        assert smollm2.at_loss(line, 1.13) == pytest.approx(expected)
        assert smollm2.at_loss(line, 1.3) is None and smollm2.at_loss(line, 1.0) is None
    row = smollm2.equal_learning_table(runs).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:3]] == [
        "pissa",
        f"{np.interp(-1.135, [-1.2, -1.1], [c['kl_base_tuned@100'] for c in curves]):.3f}",
    ]


def test_the_tables_and_pictures_of_a_folder(records, tmp_path, capsys):
    (tmp_path / "records").mkdir()
    records.append(run_of("full", 1) | {"status": "failed", "run": "full-study-0.001-1"})
    for one in records:
        (tmp_path / "records" / f"{one['run']}.json").write_text(json.dumps(one))
    smollm2.main([str(tmp_path / "records"), "--pictures", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.startswith("11 runs, 1 of them not done.\n- full-study-0.001-1: failed")
    assert "| pissa-cr-1 | 1 " in printed
    assert "change minus pissa's" in printed
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [
        f"smollm2-{name}.png" for name in ("forgetting", "lambda")
    ]
