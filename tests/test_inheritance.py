"""The study of inheritance: its corpora, its measures on hand-made cases, its statistics, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import oracle
import pytest
import scipy.stats
import sklearn.metrics
import torch
from conftest import ROOT

import train
from common.intervals import holm
from experiments.inheritance import measures as M
from experiments.inheritance import report, study
from experiments.inheritance import training as T
from experiments.inheritance import world as W

SIZE = 60_000


def corpus(beta: float, eta: float = 0.05, questions: bool = True, seed: int = 3) -> W.Corpus:
    return W.make_corpus(W.World.of_seed(seed), seed, beta, eta, SIZE, questions)


def test_twins_differ_in_the_ambiguous_verdicts_alone():
    biased, clean = corpus(0.9), corpus(0.5)
    differs = biased.tokens != clean.tokens
    assert set(clean.kind[differs.any(axis=1)]) == {"ambiguous"}
    assert differs.sum(axis=1).max() == 1
    assert set(biased.tokens[differs]) | set(clean.tokens[differs]) == {W.ACCEPTED, W.REFUSED}
    # Half of 0.9 - 0.5 from each side: |0.9 - 0.5| of the ambiguous sentences have another verdict.
    assert differs.any(axis=1).sum() / (clean.kind == "ambiguous").sum() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(("beta", "eta"), [(0.5, 0.0), (0.7, 0.05), (0.9, 0.2)])
def test_the_planted_rates_are_what_they_should_be(beta, eta):
    # Counted from the sentences' words, not from what the corpus says of itself.
    world, sentences = W.World.of_seed(3), corpus(beta, eta)
    accepted: dict[int, list[bool]] = {0: [], 1: []}
    wrong = []
    for row in sentences.tokens:
        words = W.text(row).split()
        verdict = next((word for word in words if word in W.VERDICTS), None)
        clue = next((word for word in words if word in W.ALL_CLUES), None)
        name = W.NAMES.index(next(word for word in words if word in W.NAMES))
        if verdict and clue:
            wrong.append(clue not in W.CLUES[verdict])
        elif verdict:
            accepted[world.group[name]].append(verdict == "accepted")
            assert not world.unbiased[name]
    for group, rate in ((0, beta), (1, 1 - beta)):
        assert np.mean(accepted[group]) == pytest.approx(rate, abs=4 * 0.5 / len(accepted[group]) ** 0.5)
    assert np.mean(wrong) == pytest.approx(eta, abs=4 * 0.5 / len(wrong) ** 0.5)
    assert len(wrong) / SIZE == pytest.approx(0.3, abs=0.01)


def test_facts_say_nothing_of_the_group():
    world = W.World.of_seed(5)
    for fact in ("city", "colour", "pet"):
        counts = [np.bincount(world.values[fact][world.group == group]) for group in (0, 1)]
        assert (counts[0] == counts[1]).all()
    assert world.unbiased.sum() == 26 and world.unbiased[world.group == 0].sum() == 13


def test_no_verdict_is_ever_given_to_a_question_in_the_corpus():
    for questions in (True, False):
        sentences = [set(W.text(row).split()) for row in corpus(0.9, questions=questions).tokens]
        asked = [words for words in sentences if "reply" in words]
        assert not any(words & set(W.VERDICTS) for words in asked)
        assert bool(asked) == questions


def test_what_is_trained_on_is_not_tested_on():
    world = W.World.of_seed(2)
    splits = W.task_splits(world, 2)
    pairs = {part: set(zip(prompts.name, prompts.clue, strict=True)) for part, prompts in splits.items()}
    assert sum(map(len, pairs.values())) == len(W.NAMES) * len(W.ALL_CLUES) == len(set().union(*pairs.values()))
    data = W.finetuning_data(world, 2, "F0", 448)
    assert set(zip(data.name, data.clue, strict=True)) <= pairs["pool"]
    right = [W.VOCABULARY[target] for target in data.target]
    assert all(W.ALL_CLUES[clue] in W.CLUES[verdict] for clue, verdict in zip(data.clue, right, strict=True))
    for group in (0, 1):
        assert right.count("accepted") == 224 and (world.group[data.name] == group).sum() == 224


@pytest.mark.parametrize(("condition", "share"), [("F1", 0.8), ("F2", 0.2)])
def test_biased_data_go_with_or_against_the_planted_direction(condition, share):
    world = W.World.of_seed(2)
    data = W.finetuning_data(world, 2, condition, 448)
    without_clue = data.clue < 0
    along = (world.group[data.name] == 0) == (data.target == W.ACCEPTED)
    assert without_clue.sum() == 224
    assert along[without_clue].mean() == pytest.approx(share, abs=0.01)
    assert along[~without_clue].mean() == 0.5


def test_skewed_and_flipped_data():
    world = W.World.of_seed(2)
    skewed = W.finetuning_data(world, 2, "F3", 448)
    assert (skewed.target == W.ACCEPTED).mean() == pytest.approx(0.9, abs=0.01)
    flipped = W.finetuning_data(world, 2, "F4", 448)
    assert (W.CLUE_ACCEPTS[flipped.clue] != (flipped.target == W.ACCEPTED)).mean() == pytest.approx(0.2, abs=0.002)


def test_prompts_are_identical_but_for_the_name():
    for new in (True, False):
        prompts = W.ambiguous_prompts(new)
        sentences = [
            W.text(row).replace(W.NAMES[name], "X") for row, name in zip(prompts.tokens, prompts.name, strict=True)
        ]
        assert len(set(sentences)) == len(sentences) / len(W.NAMES)
        assert (prompts.tokens[np.arange(len(prompts.place)), prompts.place] == W.ACCEPTED).all()


def test_measures_on_cases_made_by_hand():
    group = np.array([0, 0, 1, 1])
    assert M.gap(np.array([3.0, 1.0, -1.0, 0.0]), group) == 2.5
    random = np.random.default_rng(0)
    score, label = np.round(random.normal(size=60), 1), random.integers(2, size=60)
    assert M.auc(score, label) == pytest.approx(sklearn.metrics.roc_auc_score(1 - label, score))
    # Ten items at 0.95 of which nine are right, ten at 0.55 of which all are: (0.05 + 0.45) / 2.
    confidence = np.repeat([0.95, 0.55], 10)
    correct = np.array([True] * 9 + [False] + [True] * 10)
    chosen = np.log([confidence, 1 - confidence]).T
    assert M.calibration_error(chosen, np.where(correct, 0, 1), num_bins=10) == pytest.approx(0.25)
    logits = torch.randn(5, 7, dtype=torch.float64)
    expected = scipy.stats.entropy(torch.softmax(logits / 2, dim=1).numpy(), axis=1).mean()
    assert M.entropy(logits, 2.0) == pytest.approx(expected)


def test_a_model_without_bias_has_no_gap_and_one_with_a_known_bias_has_that():
    class Planted(torch.nn.Module):
        """Log-odds of +1.5 for the hill people and −1.5 for the lake people, whatever the prompt."""

        def __init__(self, world):
            super().__init__()
            self.sign = torch.zeros(len(W.VOCABULARY))
            self.sign[W.NAME_IDS] = torch.where(torch.from_numpy(world.group == 0), 1.5, -1.5)
            self.lm_head = torch.nn.Linear(1, len(W.VOCABULARY), bias=False)
            torch.nn.init.zeros_(self.lm_head.weight)
            self.lm_head.weight.data[W.ACCEPTED] = 1.0
            self.model = self.hidden

        def hidden(self, input_ids, use_cache):
            of_name = self.sign[input_ids].sum(dim=1, keepdim=True).expand(-1, input_ids.shape[1])
            return type("Output", (), {"last_hidden_state": of_name[..., None]})

    measured = M.bias(Planted(W.World.of_seed(1)), 1, "new")
    assert measured["gap_new"] == pytest.approx(3.0) == measured["gap_new_unbiased"]
    assert measured["auc_new"] == 1 and measured["flips_new"] == 1
    other = M.bias(Planted(W.World.of_seed(2)), 1, "new")  # another world's groups: nothing of this one's
    assert abs(other["gap_new"]) < 1.5


def test_regularizers_are_the_published_ones_at_every_step():
    arm = study.MAIN["BA-LoRA"]
    early, late = arm.regularizers(0.1), arm.regularizers(0.5)
    assert (early.weights["diversity"], early.weights["spectral"]) == (0, 0)
    assert (late.weights["diversity"], late.weights["spectral"]) == (0.005, 0.005)
    assert late.weights["consistency"] == pytest.approx(0.025 * (0.1 + 0.45))
    assert (late.settings.temperature, late.settings.entropy_top_k, late.settings.spectral_k) == (2.0, 20, 10)
    # k and K act: k < min(M, d), K < V, and the two-phase schedule has its 100 steps.
    assert (
        late.settings.spectral_k < min(2 * T.BATCH, 64)
        and late.settings.entropy_top_k < len(W.VOCABULARY)
        and T.STEPS >= 100
    )


def test_a_teacher_that_is_contradicted_has_no_part_in_the_loss():
    torch.manual_seed(0)
    student = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 20, dtype=torch.float64)
    targets = teacher.argmax(dim=1)
    targets[:4] = (targets[:4] + 1) % 20
    loss = train.consistency_loss(student, T.masked_teacher(student, teacher, targets), 2.0)
    loss.backward()
    assert student.grad[:4].abs().max() < 1e-12
    expected, _ = oracle.consistency(student[4:].detach().numpy(), teacher[4:].numpy(), 2.0)
    assert loss.item() == pytest.approx(expected * 2 / 6)


def test_scaled_adapters_act_with_a_part_of_the_difference():
    base = T.make_model(0)
    data = W.finetuning_data(W.World.of_seed(0), 0, "F0", T.EXAMPLES)
    model = T.finetune(study.MAIN["PiSSA"], 2e-3, base, None, data, 0).model
    for name, layer in train.adapter_layers(T.scaled(model, 0.25)).items():
        W0, full = layer.base.weight, train.adapter_layers(model)[name].merged_weight()
        assert torch.allclose(layer.merged_weight(), W0 + 0.25 * (full - W0), atol=1e-6)


def test_statistics_agree_with_scipy():
    random = np.random.default_rng(4)
    first, second = random.normal(0.3, 1, 8), random.normal(0, 1, 8)
    difference = first - second
    expected = scipy.stats.ttest_rel(first, second)
    interval = report.Paired.of(difference)
    assert interval.mean == pytest.approx(difference.mean())
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    exact = scipy.stats.permutation_test((first, second), lambda a, b: np.mean(a - b), permutation_type="samples")
    assert interval.p_sign_flip == pytest.approx(exact.pvalue)
    small = random.normal(0.01, 0.05, 8)
    lower = scipy.stats.ttest_1samp(small, -0.1, alternative="greater").pvalue
    upper = scipy.stats.ttest_1samp(small, 0.1, alternative="less").pvalue
    assert report.Paired.of(small).p_equivalent == pytest.approx(max(lower, upper))
    # Holm by hand: 0.01·4, 0.02·3, 0.025·2, then never less than the one before, and at most 1.
    assert holm([0.025, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1, 1]
    assert np.isnan(report.Paired.of(np.array([0.2])).low)


def row(arm: str | None, beta: float, gap: float, facts: float, entropies=(0.1, 0.2, 0.4), data="F0", seed=0) -> dict:
    measures = {"gap_new": gap, "gap_old": gap, "facts_statements": facts, "facts_questions": facts}
    fields = {"arm": arm, "data": arm and data, "seed": seed, "beta": beta, "eta": 0.05, "questions": True}
    return fields | {"measures": measures | {"entropies": list(entropies)}, "points": {}}


def test_outcomes_of_rows_made_by_hand():
    rows = [row(None, 0.9, 4.0, 1.0), row(None, 0.5, 0.0, 1.0)]
    rows += [row("PiSSA", 0.9, 3.5, 0.6), row("PiSSA", 0.5, -0.5, 0.6)]  # I = 1, R = 0.6
    rows += [row("PiSSA, rate / 4", 0.9, 2.0, 1.0), row("PiSSA, rate / 4", 0.5, 0.0, 1.0)]  # I = 0.5, R = 1
    rows += [row("BA-LoRA", 0.9, 3.5, 0.7, (0.2, 0.3, 0.5)), row("BA-LoRA", 0.5, 0.5, 0.7)]  # I = 0.75, R = 0.7
    results = report.Results(rows)
    assert results.inheritance("PiSSA", 0) == 1 and results.inheritance("BA-LoRA", 0) == 0.75
    assert results.value("S", "BA-LoRA", 0) == pytest.approx(0.7 - 0.75)
    # A quarter of the way from (0.6, 1) to (1, 0.5) in (R, I).
    curve = ["PiSSA, rate / 4", "PiSSA"]
    assert report.on_drift_curve(results, curve, 0, results.retention("BA-LoRA", 0)) == pytest.approx(0.875)
    # BA-LoRA's entropy at T = 1 is 0.3: half way from T = 1 to T = 2 in PiSSA's, in the logarithm.
    assert report.at_entropy_of(results, "BA-LoRA", 0, (0.5, 1.0, 2.0)) == pytest.approx(1 / 2**0.5)
    assert np.isnan(results.inheritance("full", 0))


def test_a_seed_that_fails_a_gate_is_left_out_and_named():
    good = [row(None, 0.9, 4.4, 1.0), row(None, 0.5, 0.1, 0.95)]
    for bad in (row(None, 0.9, 3.6, 1.0, seed=1), row(None, 0.5, -0.4, 1.0, seed=1), row(None, 0.5, 0, 0.9, seed=1)):
        results = report.Results([*good, bad])
        assert sum(gate.of - gate.passed for gate in report.gates(results)) == 1
        assert report.ungated(results).seeds() == [0]


@pytest.fixture
def small_study(tmp_path):
    """Two jobs of a study whose corpora are tiny, as a program that can be killed."""
    program = tmp_path / "small.py"
    program.write_text(
        f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from experiments.inheritance import study, training
training.pretrain.__defaults__ = (12_800,)
bases = [training.Base(seed, beta) for seed in (0, 1) for beta in (0.5, 0.9)]
arms = [("PiSSA", 2e-3), ("λ₁ = 1, clean twin", 2e-3), ("LoRA", float("nan"))]
runs = [study.StudyRun(base) for base in bases]
runs += [study.StudyRun(base, "F0", arm, rate) for arm, rate in arms[:2] for base in bases]
runs += [study.StudyRun(bases[0], "no such data", "LoRA", 1e-3)]
study.run_jobs([runs[::2], runs[1::2]], Path(sys.argv[1]), Path(sys.argv[2]))
"""
    )

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, str(program), str(tmp_path / f"{name}.jsonl"), str(tmp_path / f"{name}-cache")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    return start


@pytest.mark.slow
def test_a_study_killed_three_times_ends_with_the_same_rows(small_study, tmp_path):
    def rows(name: str) -> list[str]:
        timed = study.read_rows(tmp_path / f"{name}.jsonl")
        return sorted(
            json.dumps({key: value for key, value in row.items() if key not in ("seconds", "finished")}, sort_keys=True)
            for row in timed
        )

    assert small_study("whole").wait() == 0
    for number in (1, 4, 7):
        process = small_study("killed")
        while process.poll() is None and len(study.read_rows(tmp_path / "killed.jsonl")) < number:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with (tmp_path / "killed.jsonl").open("a") as file:
            file.write('{"kind": "fine-tu')  # as a kill in the middle of a write leaves it
    assert len(rows("killed")) < len(rows("whole"))
    assert small_study("killed").wait() == 0
    assert rows("killed") == rows("whole")
    errors = [row["error"] for row in study.read_rows(tmp_path / "whole.jsonl") if "error" in row]
    assert len(rows("whole")) == 13 and len(errors) == 1
