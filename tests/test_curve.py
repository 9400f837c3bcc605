"""Learning against forgetting by checkpoint: every number by its formula on the exported model, in float64."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import make_tokenizer, read_jsonl, save_tiny, sums, write_jsonl
from test_forgetting import by_formula
from test_user_errors import error_of

import train
from common.conversations import build_dataset
from common.tables import load_records
from eval import backends
from eval.generation import Completion
from experiments import curve

TEXTS = {"prose": ["Sea turtles are rare.", "A long night."], "code": ["def f(x):\n    return x"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, data to train on, and texts."""
    folder = tmp_path_factory.mktemp("curve")
    save_tiny(folder / "base")
    write_jsonl(folder / "data.jsonl", sums(16))
    for name, lines in TEXTS.items():
        write_jsonl(folder / f"{name}.jsonl", [{"text": line} for line in [*lines, ""]])
    return folder


@pytest.fixture(params=["ba-lora", "lora", "full"], scope="module")
def run_folder(request, folder):
    """A run with a checkpoint at steps 2, 4 and 6."""
    out = folder / request.param
    words = ["--model", folder / "base", "--data", folder / "data.jsonl", "--method", request.param, "--rank", 2]
    words += ["--batch-size", 4, "--gradient-accumulation", 1, "--learning-rate", 1e-2, "--max-steps", 6]
    words += ["--save-steps", 2, "--keep-checkpoints", 3, "--epochs", 9, "--output-dir", out]
    train.main(list(map(str, words)))
    return out


def measured(run_folder, folder, out, *options):
    texts = [folder / f"{name}.jsonl" for name in TEXTS]
    words = ["--ckpt", run_folder / "merged", "--data", folder / "data.jsonl", "--texts", *texts, "--output-dir", out]
    curve.main([str(word) for word in [*words, "--batch-size", 3, "--overwrite", *options]])
    return read_jsonl(out / "curve.jsonl"), json.loads((out / "curve.json").read_text())


def test_every_point_by_its_formula(run_folder, folder, tmp_path):
    """The last point against merged/ and the base, each text and example alone in float64; an earlier one against
    --export-from of a folder that ends there."""
    points, summary = measured(run_folder, folder, tmp_path)
    assert [point["step"] for point in points] == [0, 2, 4, 6]
    shutil.copytree(run_folder, tmp_path / "ended", ignore=shutil.ignore_patterns("checkpoint-6"))
    train.main(["--export-from", str(tmp_path / "ended"), "--output-dir", str(tmp_path / "earlier")])
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
    tokenizer = make_tokenizer()
    for made, point in ((run_folder / "merged", points[3]), (tmp_path / "earlier" / "merged", points[2])):
        tuned = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float64)
        check_texts(point, base, tuned, tokenizer)
        check_responses(point, tuned, tokenizer, folder / "data.jsonl")
    assert summary["forgetting@4"] == points[2]["forgetting"]["value"]
    assert summary["kl_base_tuned.code@6"] == points[3]["kl_base_tuned.code"]["value"]
    assert summary["response_loss"] == points[3]["response_loss"]
    assert points[0]["forgetting"]["value"] == points[0]["kl_base_tuned"]["value"] == 0


def test_points_over_scales_are_the_scaled_weights(run_folder, folder, tmp_path):
    """The end of the run alone, each α against W₀ + α (W − W₀) of the base and merged/, put together in float64."""
    data_file, halves = folder / "data.jsonl", folder / "validation.jsonl"
    halves.write_text("\n".join(data_file.read_text().splitlines()[:3]))
    points, summary = measured(run_folder, folder, tmp_path, "--scales", 1, 0.4, "--validation", halves)
    assert [point["scale"] for point in points] == [0, 1, 0.4]
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(made) for made in (folder / "base", run_folder / "merged")
    ]
    base, tuned = (model.double() for model in models)
    for weight, before in zip(tuned.parameters(), base.parameters(), strict=True):
        weight.data = before.data + 0.4 * (weight.data - before.data)
    check_texts(points[2], base, tuned, make_tokenizer())
    check_responses(points[2], tuned, make_tokenizer(), data_file)
    check_responses({"response_loss": points[2]["validation_loss"]}, tuned, make_tokenizer(), halves)
    assert summary["validation_loss@0.4"] == points[2]["validation_loss"]["value"]


def check_texts(point, base, tuned, tokenizer):
    totals = {}
    for name, lines in TEXTS.items():
        for line in lines:
            ids = tokenizer(line)["input_ids"]
            with torch.no_grad():
                means = by_formula(*(model(torch.tensor([ids])).logits[0].numpy() for model in (base, tuned)), ids)
            totals.setdefault(name, []).append((means, len(ids) - 1))
    totals["all"] = [pair for pairs in totals.values() for pair in pairs]
    for name, pairs in totals.items():
        ending = "" if name == "all" else f".{name}"
        count = sum(n for _, n in pairs)
        for score, value in {
            "forgetting": lambda means: means["loss_after"] - means["loss_before"],
            "kl_base_tuned": lambda means: means["kl_base_tuned"],
            "kl_tuned_base": lambda means: means["kl_tuned_base"],
            "entropy_change": lambda means: means["entropy_after"] - means["entropy_before"],
        }.items():
            expected = sum(value(means) * n for means, n in pairs) / count
            assert point[f"{score}{ending}"]["value"] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def check_responses(point, tuned, tokenizer, data_file):
    losses, rows = [], []
    examples, _ = build_dataset(load_records(str(data_file)), tokenizer, ["instruction", "output"], 512)
    for example in examples:  # the prompt's border is common/templates.py's business, tested there
        ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"])
        with torch.no_grad():
            logits = tuned(ids[None]).logits[0, :-1]
        valid = labels[1:] != -100
        losses += torch.nn.functional.cross_entropy(logits[valid], labels[1:][valid], reduction="none").tolist()
        rows.append(logits[valid])
    assert point["response_loss"]["value"] == pytest.approx(np.mean(losses), rel=1e-4)
    squares = torch.linalg.svdvals(torch.cat(rows)).numpy() ** 2
    for k in (1, 5, 20) if "energy.1" in point else ():
        assert point[f"energy.{k}"] == pytest.approx(squares[:k].sum() / squares.sum(), rel=1e-4)


def test_distinct_answers_are_counted(run_folder, folder, tmp_path, monkeypatch):
    written = ["The answer is: 4", "So 4. The answer is: 4", "The answer is: 5", "no number"]

    def generate(self, prompts, sampling, seeds):
        assert len(set(seeds)) == len(prompts) == 4 and sampling.temperature == 0.8
        return [Completion(text, 3, True) for text in written]

    monkeypatch.setattr(backends.TransformersBackend, "generate", generate)
    _, summary = measured(run_folder, folder, tmp_path, "--questions", 2, "--samples", 4)
    assert summary["distinct_answers"]["value"] == 3 / 4
    assert summary["distinct_texts"]["value"] == 1.0


def test_bad_input(checkpoint, data_file, folder, tmp_path, monkeypatch, capsys):
    def error(*options, ckpt=checkpoint):
        capsys.readouterr()
        argv = [
            "--ckpt",
            ckpt,
            "--data",
            data_file,
            "--output-dir",
            tmp_path / "out",
        ]
        argv += [] if "--texts" in options else ["--texts", folder / "prose.jsonl"]
        return error_of(curve, [*argv, *options], monkeypatch, capsys)

    assert "no config.yaml beside it" in error()
    assert "--limit is 0" in error("--limit", 0)
    assert "--scales 0.5 0.0: give different ones, above 0" in error("--scales", 0.5, 0)
    assert "give --ckpt, --data and --texts" in error("--texts")
    (tmp_path / "config.yaml").write_text(f"model: {checkpoint}\ndata: {data_file}\n")
    assert "has no complete checkpoint" in error()
    assert not (tmp_path / "out").exists()
