"""Each class of decoder: train, export, load in PEFT on the unmodified base, merge, generate. Then the dry run's
figures against published counts and measured peaks, and SmolLM2's exports in the real vLLM."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import architectures
import greedy_by_vllm
import pytest
import torch
import transformers
from architectures import SHAPE
from conftest import PUBLISHED, ROOT, forking, make_tokenizer
from safetensors.torch import load_file

import train
from common import estimates
from common.cli import UserError
from common.templates import encode_prompt
from data import demo

ARCHITECTURES = [(name, "ba-lora") for name in architectures.ARCHITECTURES]
ARCHITECTURES += [(name, "lora") for name in ("Llama, tied", "Llama, biased", "Mistral", "Gemma-2", "Phi-3", "Mixtral")]
WHOLE_LOGITS = {  # they are no plain product of hidden states and the output layer
    *("Gemma-2", "Gemma-3n", "VaultGemma", "Phi", "GPT-J", "Granite", "GraniteMoE", "Cohere", "Cohere-2", "MiniCPM-3"),
    *("CodeGen", "RecurrentGemma", "BERT, is_decoder", "nanochat"),
}


@pytest.fixture(scope="module")
def committed_rows() -> dict[str, list[str]]:
    """The cells of the table in docs/adapters.md by the architecture's name."""
    lines = (ROOT / "docs" / "adapters.md").read_text().partition("| architecture |")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row for row in rows}


@pytest.mark.parametrize(("name", "method"), ARCHITECTURES)
def test_an_architecture_trains_and_goes_out_as_trained_or_is_refused(name, method, committed_rows, tmp_path):
    """transformers' loss; the trained model, merged/ and base + adapter/ alike; and all as the committed table says."""
    result = architectures.trained(name, tmp_path, method)
    assert architectures.cells(name, result) == committed_rows[name]
    if "refused" in result:
        assert "\n" not in result["refused"]
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
        return
    loss, of_transformers = result["loss"]
    assert loss == pytest.approx(of_transformers, rel=2e-5)
    assert max(result["errors"]) < 1e-4 < result["moved"]
    assert result["generated"][0] == result["generated"][1]
    for names in result["layers"].values():  # printed before training, too
        assert all(f"{count} {layer}" in result["printed"] for layer, count in names.items())
    assert ("holds whole logits" in result["printed"]) == (name in WHOLE_LOGITS)
    base, merged = (load_file(tmp_path / where / "model.safetensors") for where in ("base", "out/merged"))
    assert base.keys() == merged.keys()
    moved = {key for key in base if not torch.equal(base[key], merged[key])}
    assert {key.split(".")[-2] for key in moved if key.endswith(".weight")} == set(result["layers"]["adapted"])
    assert all(key.endswith(".weight") for key in moved)


def test_every_row_of_the_table_is_tried(committed_rows):
    assert committed_rows.keys() == architectures.ARCHITECTURES.keys()


def test_sequences_beyond_a_sliding_window_are_padded(data_file, tmp_path, capsys):
    config = transformers.MistralConfig(**SHAPE, sliding_window=64)  # the prompt alone is longer
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    files = ("--model", tmp_path / "base", "--data", data_file, "--output-dir", tmp_path / "out")
    train.main([*map(str, files), "--rank", "4", "--max-steps", "1"])
    assert re.search(r"attends 64 tokens of \d+; batches are padded", capsys.readouterr().out)
    assert (tmp_path / "out" / "adapter").is_dir()


def test_an_architecture_without_known_names_says_which_there_are(data_file, tmp_path, monkeypatch, capsys):
    config = transformers.GPTNeoXConfig(
        vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=r"--target-modules.*query_key_value"):
        train.main(["--model", str(tmp_path / "base"), "--data", str(data_file), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- before it starts


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_dry_run_needs_the_configuration_alone(name, tmp_path, capsys):
    config, rank, adapter, total = PUBLISHED[name]
    config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    train.main(
        [
            *("--model", str(tmp_path / "model"), "--data", "metamath", "--rank", str(rank)),
            *("--output-dir", str(out), "--dry-run", "--dtype", "bfloat16", "--max-steps", "100"),
        ]
    )
    printed = capsys.readouterr().out
    assert f"{adapter} M trainable, {total} M in the model" in printed
    weights = float(re.search(r"weights +([\d.]+) GiB", printed)[1])
    assert weights == pytest.approx(total * 1e6 * 2 / 2**30, rel=1e-2)  # two bytes each
    assert "100 steps" in printed
    assert "disk:" in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("config", "layer", "parts"),
    [
        (transformers.GPTNeoConfig(num_layers=2, attention_types=[[["global"], 2]]), "mlp.c_fc", 1),  # None
        (transformers.Gemma3nTextConfig(num_hidden_layers=5, num_kv_shared_layers=0), "mlp.gate_proj", 1),  # a list
        (transformers.MambaConfig(num_hidden_layers=2), "mixer.in_proj", 2),  # no attention heads
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_memory_estimate_knows_the_feed_forwards_width(config, layer, parts):
    """As the model that transformers makes of the configuration has it."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    widest = max(module.out_features for name, module in model.named_modules() if name.endswith(layer)) // parts
    args = SimpleNamespace(deepspeed=None, dry_run_gpu=80, method="ba-lora", load_in=None, rank=8)
    args.gradient_checkpointing, args.objective_memory = False, None
    sizes = {"total": 10**9, "trainable": 10**6, "num_adapters": 9, "tokens": 512, "valid": 256, "num_processes": 1}
    found = estimates.estimated_memory(args, config, torch.bfloat16, **sizes)
    assert found["transient"] == 4 * 512 * widest * 2


SETTINGS = {  # each with as many examples as one micro-batch has: the largest is the only one
    "ba-lora, packed": ["--limit", "4"],
    "lora, padded": ["--limit", "4", "--method", "lora", "--no-packing", "--max-length", "384"],
    "ba-lora, checkpointing": ["--limit", "8", "--batch-size", "8", "--gradient-checkpointing"],
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_memory_estimate_is_within_15_percent_of_the_measured_peak(setting, tmp_path, shared_data, capsys):
    """SmolLM2 on GSM8K, a process of its own; the peak that the kernel counted, whatever the starting process holds."""
    options = ["--model", "demo", "--data", shared_data / "gsm8k_train.jsonl", "--fields", "question", "answer"]
    options += ["--rank", "32", "--max-steps", "2", "--gradient-accumulation", "1"]
    options += ["--output-dir", tmp_path / "out", "--save-steps", "0", *SETTINGS[setting]]
    options = list(map(str, options))
    train.main([*options, "--dry-run"])
    estimate = float(re.search(r"together +([\d.]+) GiB", capsys.readouterr().out)[1])
    settings = (ROOT / "scripts" / "setup.sh").read_text()
    tunables = re.search(r"^cpu_allocator=(.*)$", settings, re.MULTILINE)[1]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "GLIBC_TUNABLES": tunables, "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(ROOT / "train.py"), *options]
    held = b"x" * (3 * 2**30)
    subprocess.run(command, capture_output=True, check=True, env=environment)
    del held
    measured = json.loads((tmp_path / "out" / "run.json").read_text())["peak_memory_gib"]
    assert estimate == pytest.approx(measured, rel=0.15)


# ---------------------------------------------------------------------------------------------- the real vLLM


@pytest.fixture(scope="module")
def trained_smollm2(tmp_path_factory):
    """The folder of a run: SmolLM2 after three steps that change what it says."""
    folder = tmp_path_factory.mktemp("smollm2")
    files = ("--model", demo.model(), "--data", demo.problems("train"), "--fields", "question", "response")
    options = ("--rank", 16, "--max-steps", 3, "--batch-size", 2, "--gradient-accumulation", 1, "--save-steps", 0)
    options += ("--learning-rate", "1e-3", "--output-dir", folder / "out", "--dtype", "float32")
    train.main([*map(str, files), *map(str, options)])
    return folder / "out"


@pytest.fixture(scope="module")
def prompts(trained_smollm2):
    """Twenty real ones."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained_smollm2 / "merged")
    lines = demo.problems("test").read_text().splitlines()[:20]
    return [encode_prompt(tokenizer, json.loads(line)["question"]) for line in lines]


@pytest.fixture(scope="module")
def vllm_tokens(trained_smollm2, prompts):
    """vLLM's greedy tokens, from merged/, and from adapter/ as a LoRA of rank 2r on the published base."""
    pytest.importorskip("vllm")
    models = [(trained_smollm2 / "merged", None), (Path(demo.model()), trained_smollm2 / "adapter")]
    out = trained_smollm2 / "tokens.json"
    process = forking().Process(target=greedy_by_vllm.main, args=(prompts, 16, out, models))
    process.start()
    process.join()
    assert process.exitcode == 0
    return {
        form: [made["tokens"] for made in found]
        for form, found in zip(["merged", "adapter"], json.loads(out.read_text()), strict=True)
    }


def choices(path: Path, prompts: list[list[int]], tokens: list[list[int]]) -> list[list[int]]:
    """transformers' likeliest token at the place of each of `tokens`; equal to them, they are its greedy tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = []
    for prompt, response in zip(prompts, tokens, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0]
        found.append(logits[len(prompt) - 1 : -1].argmax(-1).tolist())
    return found


@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_vllm_gives_transformers_greedy_tokens(form, trained_smollm2, prompts, vllm_tokens):
    tokens = vllm_tokens[form]
    assert [len(row) for row in tokens] == [16] * 20
    assert choices(trained_smollm2 / "merged", prompts, tokens) == tokens
    assert choices(Path(demo.model()), prompts[:4], tokens[:4]) != tokens[:4], "nothing was learnt"


@pytest.mark.slow  # an engine for each form of each model
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Phi-3", "Gemma-2"])
def test_vllm_gives_what_the_table_says(name, tmp_path):
    pytest.importorskip("vllm")
    result = architectures.trained(name, tmp_path)
    found = architectures.in_vllm(result, tmp_path)
    assert architectures.verdict(found) == architectures.verdict(architectures.recorded()[name])
