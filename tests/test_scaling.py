"""ΔW scaled after training: exports, choices and measures against W₀ + α (W − W₀), put together here in float64."""

import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import make_tokenizer, save_tiny, sums, write_jsonl
from test_forgetting import by_formula
from test_user_errors import error_of

import train
from common import exports
from common.cli import RunStopped
from common.conversations import build_dataset
from common.tables import load_records
from eval import forgetting

IDS = torch.arange(24).view(2, 12) * 10
METHODS = ["lora", "ba-lora", "full"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, data, and a run of each method that moved far; four of the sixteen examples are held out."""

    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "base")
    rows = sums(16)
    write_jsonl(folder / "data.jsonl", rows)
    for method in METHODS:
        words = ["--model", folder / "base", "--data", folder / "data.jsonl", "--method", method, "--rank", 4]
        words += ["--alpha", 8, "--max-steps", 6, "--epochs", 9, "--learning-rate", 1e-2, "--gradient-accumulation", 1]
        train.main([str(word) for word in [*words, "--eval-share", 0.25, "--output-dir", folder / method]])
    return folder


def export(runs, method, *options):
    out = runs / f"{method}-{'-'.join(str(option).strip('-') for option in options)}".replace("/", "_")[:200]
    words = ["--export-from", runs / method, "--output-dir", out, "--overwrite", *options]
    train.main([str(word) for word in words])
    return out


def in_float64(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).double()


def between(runs, method, alpha):
    """The base with α times what the unscaled export differs from it by."""
    base, tuned = in_float64(runs / "base"), in_float64(runs / method / "merged")
    with torch.no_grad():
        for weight, after in zip(base.parameters(), tuned.parameters(), strict=True):
            weight += alpha * (after - weight)
    return base


def distance(ours, theirs):
    with torch.no_grad():
        ours, theirs = ours(IDS).logits.double(), theirs(IDS).logits
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("method", METHODS)
def test_an_export_at_a_scale_is_that_far_from_the_base(runs, method):
    out = export(runs, method, "--scale", 0.65)
    expected = between(runs, method, 0.65)
    assert distance(in_float64(out / "merged"), expected) < 1e-5
    assert distance(in_float64(out / "merged"), between(runs, method, 1)) > 1e-2
    assert json.loads((out / "run.json").read_text())["export"]["scale"] == 0.65
    if method == "full":
        return
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(0.65 * 8 / 4)
    base = transformers.AutoModelForCausalLM.from_pretrained(runs / "base")
    assert distance(peft.PeftModel.from_pretrained(base, out / "adapter"), expected) < 1e-5
    assert "ΔW times 0.65" in (out / "adapter" / "README.md").read_text()


def test_an_adapter_written_at_another_scale_is_found(runs, monkeypatch):
    """The files are read back against the scaled function, not against the trained one."""

    def unscaled(layers, *args, **options):
        for layer in layers.values():
            layer.scaling = 2.0
        return exports.export_adapter(layers, *args, **options)

    monkeypatch.setattr(train, "export_adapter", unscaled)
    with pytest.raises(RunStopped, match="the logits of merged/ are"):
        export(runs, "lora", "--scale", 0.5)
    monkeypatch.setattr(exports, "probe_logits", lambda model: torch.ones(2, 12, 258))
    export(runs, "lora", "--scale", 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_auto_takes_the_smallest_scale_within_the_tolerance(runs, method, capsys, monkeypatch):
    """With LoRA, the base's log-probabilities of one example at a time."""
    monkeypatch.setattr(exports, "MOST_NUMBERS", 1 if method == "lora" else exports.MOST_NUMBERS)
    tolerance = 0.2
    out = export(runs, method, "--scale", "auto", "--scale-tolerance", tolerance)
    found = json.loads((out / "run.json").read_text())["export"]
    assert found["held_out_examples"] == 4
    rows = load_records(str(runs / "data.jsonl"))
    examples, _ = build_dataset(rows, make_tokenizer(), ["instruction", "output"], 512)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(42)).tolist()
    curve = {}
    base = in_float64(runs / "base")
    for tenths in range(1, 11):
        model, losses, kls = between(runs, method, tenths / 10), [], []
        for row in sorted(order[:4]):
            ids, labels = (torch.tensor(examples[row][name]) for name in ("input_ids", "labels"))
            with torch.no_grad():
                p, q = (each(ids[None]).logits[0, :-1].log_softmax(-1) for each in (base, model))
            valid = labels[1:] != -100
            losses.append(F.nll_loss(q[valid], labels[1:][valid], reduction="none"))
            kls.append((p.exp() * (p - q)).sum(-1)[valid])
        curve[str(tenths / 10)] = (torch.cat(losses).mean().item(), torch.cat(kls).mean().item())
    for which, name in enumerate(("losses", "kl_base_tuned")):
        assert found[name] == pytest.approx({scale: pair[which] for scale, pair in curve.items()}, rel=1e-4)
    lowest = min(loss for loss, _ in curve.values())
    assert found["scale"] == min(float(scale) for scale, (loss, _) in curve.items() if loss <= lowest + tolerance) < 1
    assert f"chosen: {found['scale']:g}, the smallest scale" in capsys.readouterr().out
    assert distance(in_float64(out / "merged"), between(runs, method, found["scale"])) < 1e-5


def test_held_out_examples_may_be_others_and_changed_data_are_refused(runs, monkeypatch, capsys):
    others = runs / "others.jsonl"
    others.write_text("\n".join((runs / "data.jsonl").read_text().splitlines()[:3]))
    out = export(runs, "lora", "--scale", "auto", "--validation-data", others)
    assert json.loads((out / "run.json").read_text())["export"]["held_out_examples"] == 3
    text = (runs / "data.jsonl").read_text()
    (runs / "data.jsonl").write_text(text.replace("Add 3", "Add three"))
    words = ["--export-from", runs / "lora", "--output-dir", runs / "x", "--scale", "auto"]
    assert "data changed since" in error_of(train, words, monkeypatch, capsys)
    (runs / "data.jsonl").write_text(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scale", "0.5"], "--scale acts after training: name the run by --export-from"),
        (["--export-from", "RUN", "--scale", "half"], "--scale is half: give a number above 0 and up to 1, or auto"),
        (["--export-from", "RUN", "--scale", "1.5"], "--scale is 1.5: give a number"),
        (["--export-from", "RUN", "--scale", "nan"], "--scale is nan: give a number"),
        (["--export-from", "RUN", "--scale", "auto", "--scale-tolerance", "-1"], "--scale-tolerance is -1.0"),
    ],
)
def test_scales_that_are_none_are_one_line(runs, options, message, monkeypatch, capsys):
    words = [runs / "lora" if word == "RUN" else word for word in options]
    words += ["--model", runs / "base", "--data", runs / "data.jsonl", "--output-dir", runs / "none"]
    assert message in error_of(train, words, monkeypatch, capsys)


@pytest.mark.parametrize("kind", ["ckpt", "adapter"])
def test_forgetting_at_several_scales_in_one_load(runs, kind, tmp_path):
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "Sea turtles are rare."}) + "\n")
    tuned = runs / "ba-lora" / ("merged" if kind == "ckpt" else "adapter")
    words = [f"--{kind}", tuned, "--base", runs / "base", "--data", tmp_path / "texts.jsonl", "--output-dir", tmp_path]
    forgetting.main([str(word) for word in [*words, "--scales", 0.5, 1, "--overwrite"]])
    found = json.loads((tmp_path / "forgetting.json").read_text())
    ids = make_tokenizer()("Sea turtles are rare.")["input_ids"]
    for scale in ("0.5", "1"):
        models = (in_float64(runs / "base"), between(runs, "ba-lora", float(scale)))
        with torch.no_grad():
            expected = by_formula(*(model(torch.tensor([ids])).logits[0].numpy() for model in models), ids)
        for name, value in expected.items():
            assert found["by_scale"][scale][name]["value"] == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert found["kl_base_tuned"] == found["by_scale"]["0.5"]["kl_base_tuned"]
