"""Shares of the gradient against the oracle's gradients of the logits, led back to the factors of each checkpoint."""

import json

import oracle
import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file
from test_user_errors import error_of

import train
from common.conversations import build_dataset
from common.tables import load_records
from experiments import gradients


def test_shares_along_a_run_are_those_of_the_oracle(checkpoint, data_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = ["--model", checkpoint, "--data", data_file, "--output-dir", out, "--rank", 2, "--max-steps", 4]
    words += ["--epochs", 9, "--batch-size", 4, "--gradient-accumulation", 1, "--learning-rate", 1e-2]
    words += ["--save-steps", 2, "--lambda-consistency", 0.15, "--lambda-diversity", 0, "--spectral-k", 3]
    train.main(list(map(str, words)))
    gradients.main([str(out), "--examples", "1", "--json", str(tmp_path / "shares.json")])
    found = json.loads((tmp_path / "shares.json").read_text())
    assert list(found) == ["2", "4"]
    rows = load_records(str(data_file)).select([0])
    example, _ = build_dataset(rows, make_tokenizer(), ["instruction", "output"], 512)
    ids, labels = (torch.tensor(example[0][name]) for name in ("input_ids", "labels"))
    valid, args = labels[1:] != -100, train.parse_arguments(train.Arguments, "", ["--config", str(out / "config.yaml")])
    for step, shares in found.items():
        tensors = load_file(out / "checkpoints" / f"checkpoint-{step}" / "trained.safetensors")
        model = train.rebuilt_model(args, str(checkpoint), torch.float32, tensors).double()
        logits = model(ids[None]).logits[0, :-1][valid]
        with torch.no_grad(), train.adapters_disabled(model):
            teacher = model(ids[None]).logits[0, :-1][valid].numpy()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        z = logits.detach().numpy()
        terms = {
            "task": oracle.task(z, labels[1:][valid].numpy()),
            "consistency": oracle.consistency(z, teacher, 2.0),
            "diversity": oracle.topk_entropy(z, 20),
            "spectral": oracle.spectral(z, 3, "frobenius"),
        }
        norms = {}
        for name, (_, gradient) in terms.items():
            parts = torch.autograd.grad(logits, parameters, torch.tensor(gradient), retain_graph=True)
            norms[name] = sum(float(part.square().sum()) for part in parts) ** 0.5
        assert shares["task"] == pytest.approx(norms["task"], rel=1e-3)
        for name, weight in {"consistency": 0.15, "diversity": 0.005, "spectral": 0.005}.items():
            assert shares[name] == pytest.approx(weight * norms[name] / norms["task"], rel=1e-3), name
    assert "no config.yaml there" in error_of(gradients, [tmp_path], monkeypatch, capsys)
