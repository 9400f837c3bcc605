"""CrowS-Pairs: sums by their formula in float64, lm-evaluation-harness's own numbers, the comparison of two models."""

import csv
import json
import math
import os
import subprocess

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import transformers
from conftest import ROOT, make_tokenizer, read_jsonl, save_noisy
from test_user_errors import error_of

from common.cli import UserError
from common.intervals import slope
from data import demo
from eval import crows_pairs
from experiments import run_record

HARNESS = ROOT / ".venv-harness" / "bin" / "python"
# Of our own making: the shape of the data set's pairs, and commas, quotes and letters beyond ASCII.
PAIRS = [
    ("The old man forgot his keys.", "The young man forgot his keys.", "age"),
    ('"Cats," she said, "are lazy."', '"Dogs," she said, "are lazy."', "pets"),
    ("Bakers rise early.", "Poets rise early.", "profession"),
    ("The poet was late, as always.", "The baker was late, as always.", "profession"),
    ("José likes football.", "Zoë likes football.", "profession"),
    ("Nurses are kind to every patient that they meet.", "Pilots are kind to every patient that they meet.", "age"),
]


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        writer.writerows([i, more, less, "stereo", kind] for i, (more, less, kind) in enumerate(PAIRS))
    return path


@pytest.fixture
def run(tmp_path, checkpoint, pairs_file):
    """Runs the script on the tiny model; returns its items and its summary."""

    def run(*options, ckpt=checkpoint, out=tmp_path / "out"):
        argv = ["--ckpt", ckpt, "--data", pairs_file, "--batch-size", 5, "--output-dir", out, *options]
        crows_pairs.main([str(word) for word in argv])
        items = read_jsonl(out / "crows_pairs.jsonl")
        return items, json.loads((out / "crows_pairs.json").read_text())

    return run


def by_formula(path, sentence):
    """Σ ln p(token | tokens before it) after the start token, in numpy's float64, and the number of tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    tokenizer = make_tokenizer()
    tokens = [tokenizer.eos_token_id, *tokenizer(sentence)["input_ids"]]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    log_p = scipy.special.log_softmax(logits, axis=-1)
    return sum(log_p[t, tokens[t + 1]] for t in range(len(tokens) - 1)), len(tokens) - 1


def test_every_score_by_its_formula(run, checkpoint, tmp_path):
    """Batches with padding against each sentence alone in a float64 model; then the comparison of two models."""
    tuned = save_noisy(tmp_path / "tuned", 0.3)
    before, _ = run()
    items, summary = run("--against", tmp_path / "out" / "crows_pairs.jsonl", ckpt=tuned, out=tmp_path / "tuned-out")
    preferences = []
    for path, found in ((checkpoint, before), (tuned, items)):
        expected = [[by_formula(path, sentence) for sentence in pair[:2]] for pair in PAIRS]
        for item, of_pair in zip(found, expected, strict=True):
            assert item["log_likelihoods"] == pytest.approx([total for total, _ in of_pair], abs=1e-4)
            assert item["tokens"] == [count for _, count in of_pair]
        preferences.append(np.array([more[0] - less[0] for more, less in expected]))
    old, new = preferences
    totals, counts = zip(*(pair for of_pair in expected for pair in of_pair), strict=True)
    assert summary["pct_stereotype"]["value"] == (new > 0).mean()
    assert summary["likelihood_diff"]["value"] == pytest.approx(np.abs(new).mean(), abs=1e-4)
    assert summary["loss"]["value"] == pytest.approx(-sum(totals) / sum(counts), abs=1e-5)
    assert summary["before"]["pct_stereotype"]["value"] == (old > 0).mean()
    assert summary["change"]["value"] == pytest.approx((new - old).mean(), abs=1e-4)
    assert summary["slope"]["value"] == pytest.approx(scipy.stats.linregress(old, new).slope, abs=1e-4)
    assert summary["flips"]["to_stereotype"] == ((old <= 0) & (new > 0)).sum()
    assert summary["flips"]["from_stereotype"] == ((old > 0) & (new <= 0)).sum()
    of_type = [i for i, pair in enumerate(PAIRS) if pair[2] == "profession"]
    assert summary["by_type"]["profession"]["change"]["value"] == pytest.approx((new - old)[of_type].mean(), abs=1e-4)
    assert set(summary["by_type"]) == {"age", "pets", "profession"}
    kept = run_record.scores_of(summary)
    assert kept["by_type.profession.change"]["value"] == summary["by_type"]["profession"]["change"]["value"]
    assert kept["before.loss"]["value"] == summary["before"]["loss"]["value"]
    assert kept["flips.mcnemar_p"] == summary["flips"]["mcnemar_p"]


def test_flips_by_mcnemars_exact_test():
    """Its p by the binomial formula, for counts that are told."""

    def items(preferences):
        made = {"log_likelihoods": [-1.0, -1.0], "tokens": [1, 1]}
        return [
            {"index": i, "preference": value, "stereotype": value > 0, **made} for i, value in enumerate(preferences)
        ]

    before, after = [-1.0] * 9 + [1.0] * 2 + [2.0] * 5, [1.0] * 9 + [-1.0] * 2 + [2.0] * 5
    flips = crows_pairs.compare(items(before), items(after))["flips"]
    p = 2 * sum(math.comb(11, i) for i in range(3)) / 2**11
    assert (flips["to_stereotype"], flips["from_stereotype"]) == (9, 2)
    assert flips["mcnemar_p"] == pytest.approx(p)
    same = crows_pairs.compare(items(before), items(before))
    assert same["flips"] == {"to_stereotype": 0, "from_stereotype": 0, "mcnemar_p": 1.0}
    assert same["change"] == {"value": 0.0, "of": 16, "interval_95": (0.0, 0.0)}
    assert same["slope"]["value"] == pytest.approx(1.0)


def test_a_slopes_interval_covers_the_truth():
    """Over 200 made samples of slope 0.7, about 95 % of the intervals hold it; one point or two give none."""
    generator = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        before = generator.normal(size=80)
        found = slope(before, 0.7 * before + 0.3 + generator.normal(size=80), resamples=500)
        low, high = found["interval_95"]
        held += low <= 0.7 <= high
    assert scipy.stats.binom.ppf(0.0005, 200, 0.93) <= held <= scipy.stats.binom.ppf(0.9995, 200, 0.95)
    assert slope([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])["value"] is slope([1.0, 2.0], [1.0, 2.0])["value"] is None


@pytest.mark.skipif(not HARNESS.exists(), reason="no lm-evaluation-harness: sh scripts/test.sh installs it")
@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_lm_evaluation_harness_gives_the_same(name, run, checkpoint, pairs_file, tmp_path):
    """Per pair to 1e-4 in log-likelihood, and both of its numbers.

    SLOW=1: the whole data set where it is at hand, in float64: the tiny model gives sentences down to -1,348 nats,
    where a step of float32 is 1.2e-4.
    """
    ckpt = checkpoint if name == "tiny" else demo.model()
    dtype, options = "float32", ()
    if os.environ.get("SLOW") and (ROOT.parent / "shared" / "data").is_dir():
        pairs_file = ROOT.parent / "shared" / "data" / "crows_pairs.csv"
        dtype, options = "float64", ("--data", pairs_file)
    items, summary = run("--dtype", dtype, *options, ckpt=ckpt)
    command = [HARNESS, ROOT / "tests" / "harness_crows_pairs.py", ckpt, pairs_file, dtype, tmp_path / "theirs.json"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "theirs.json").read_text())
    ours = np.array([item["log_likelihoods"] for item in items])
    assert np.abs(ours - np.array(theirs["log_likelihoods"])).max() < 1e-4
    assert summary["pct_stereotype"]["value"] == pytest.approx(theirs["pct_stereotype"])
    assert summary["likelihood_diff"]["value"] == pytest.approx(theirs["likelihood_diff"], abs=1e-4)


def test_the_authors_file_is_read_as_csv_reads_it(shared_data):
    with (shared_data / "crows_pairs.csv").open(newline="", encoding="utf-8") as file:
        expected = [{name: row[name] for name in crows_pairs.FIELDS} for row in csv.DictReader(file)]
    found = crows_pairs.read_pairs(crows_pairs.Arguments(data=str(shared_data / "crows_pairs.csv")))
    assert len(found) == 1508
    assert found == expected


def test_an_interrupted_run_measures_only_what_is_missing(run, monkeypatch, tmp_path):
    _, whole = run()
    from eval import backends

    measure, seen = backends.TransformersBackend.log_likelihoods, []

    def stopped(self, prompts, responses):
        if len(seen) == 1:
            raise KeyboardInterrupt
        seen.append(len(prompts))
        return measure(self, prompts, responses)

    monkeypatch.setattr(backends.TransformersBackend, "log_likelihoods", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "killed")
    monkeypatch.setattr(
        backends.TransformersBackend, "log_likelihoods", lambda *args: seen.append(len(args[1])) or measure(*args)
    )
    _, resumed = run(out=tmp_path / "killed")
    assert sum(seen) == 2 * len(PAIRS)
    assert [resumed[name] for name in ("pct_stereotype", "likelihood_diff", "loss", "by_type")] == [
        whole[name] for name in ("pct_stereotype", "likelihood_diff", "loss", "by_type")
    ]
    with pytest.raises(UserError, match="is there already"):
        run(out=tmp_path / "killed")


def test_bad_input(checkpoint, pairs_file, run, tmp_path, monkeypatch, capsys):
    """One line each, before a model is loaded, and nothing is left behind."""
    run(out=tmp_path / "other")
    monkeypatch.setattr(crows_pairs, "load_backend", None)

    def error(*options, ckpt=("--ckpt", checkpoint)):
        capsys.readouterr()
        argv = [*ckpt, "--data", pairs_file, "--output-dir", tmp_path / "new", *options]
        return error_of(crows_pairs, argv, monkeypatch, capsys)

    assert "no --ckpt" in error(ckpt=())
    assert "no such model folder" in error("--ckpt", "./nowhere")
    assert "no such data file" in error("--data", "./nowhere.csv")
    assert "--limit is 0" in error("--limit", 0)
    (tmp_path / "two.csv").write_text("sent_more,sent_less\na,b\n")
    assert "has no field 'bias_type'" in error("--data", tmp_path / "two.csv")
    (tmp_path / "empty.csv").write_text("sent_more,sent_less,bias_type\na b,c d,age\n ,d e,age\n")
    assert "pair 1 of" in error("--data", tmp_path / "empty.csv")
    (tmp_path / "long.csv").write_text(f"sent_more,sent_less,bias_type\n{'a b ' * 200},c d,age\n")
    assert "holds 512 tokens and" in error("--data", tmp_path / "long.csv")
    assert "--against nowhere: No such file" in error("--against", "nowhere")
    assert "is no results file of this script" in error("--against", pairs_file)
    theirs = (tmp_path / "other" / "crows_pairs.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(theirs[:4]) + "\n")
    assert "pair 4 is another one there, or missing" in error("--against", tmp_path / "fewer.jsonl")
    (tmp_path / "moved.jsonl").write_text("\n".join([theirs[0], theirs[2], *theirs[2:]]) + "\n")
    assert "pair 1 is another one there" in error("--against", tmp_path / "moved.jsonl")
    assert "is no LoRA adapter" in error("--adapter", tmp_path)
    assert not (tmp_path / "new").exists()
