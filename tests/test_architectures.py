"""Each class of decoder: train, export, load in PEFT on the unmodified base, merge, generate. Then the dry run's
figures against published counts and measured peaks, and SmolLM2's exports in the real vLLM."""

import json
import re
import subprocess
import sys
from pathlib import Path

import architectures
import greedy_by_vllm
import peft
import pytest
import torch
import transformers
from conftest import PUBLISHED, ROOT, forking, make_tokenizer, relative_error

import train
from common.cli import UserError
from common.targets import TARGET_MODULES
from common.templates import encode_prompt
from data import demo

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 257,
}
SEVEN = TARGET_MODULES
ATTENTION = SEVEN[:4]
# Configuration, and the target modules that are to be found without being named.
ARCHITECTURES = {
    "llama": (transformers.LlamaConfig(**SHAPE), SEVEN),
    "llama-tied": (transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True), SEVEN),
    "llama-biased": (transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True), SEVEN),
    "mistral": (transformers.MistralConfig(**SHAPE, sliding_window=400), SEVEN),
    "gemma": (transformers.GemmaConfig(**SHAPE, head_dim=8), SEVEN),
    "gemma2": (transformers.Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=30.0), SEVEN),
    "qwen2": (transformers.Qwen2Config(**SHAPE), SEVEN),  # biases on queries, keys and values
    "phi3": (transformers.Phi3Config(**SHAPE), ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "mixtral": (transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2), ATTENTION),
}


@pytest.mark.parametrize("method", ["ba-lora", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_exports_loads_in_peft_and_generates(name, method, data_file, tmp_path, capsys):
    config, expected_targets = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)  # biases that are not zero, so that a lost one shows
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    files = ("--model", tmp_path / "base", "--data", data_file, "--output-dir", tmp_path / "out")
    options = ("--method", method, "--rank", 4, "--max-steps", 3, "--learning-rate", "1e-2", "--save-steps", 0)
    train.main([*map(str, files), *map(str, options)])

    adapter_config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert set(adapter_config["target_modules"]) == set(expected_targets)
    assert ("holds whole logits" in capsys.readouterr().out) == (name == "gemma2")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").eval()
    input_ids = torch.tensor([make_tokenizer()("Add 1 and 1")["input_ids"]])
    with torch.no_grad():
        before = base(input_ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
        after = adapted(input_ids).logits
        assert relative_error(after, before) > 1e-3, "nothing was learnt"
        assert relative_error(after, merged(input_ids).logits) < 1e-4
        assert relative_error(adapted.merge_and_unload()(input_ids).logits, after) < 1e-4
    assert merged.config.tie_word_embeddings == config.tie_word_embeddings
    trained = {key for key, value in merged.state_dict().items() if not torch.equal(value, model.state_dict()[key])}
    assert trained == {key for key in trained if key.split(".")[-2] in expected_targets and key.endswith(".weight")}
    generated = [
        m.generate(input_ids, max_new_tokens=8, do_sample=False, pad_token_id=257) for m in (merged, base)
    ]  # `base` has the adapter merged in by now
    assert generated[0].tolist() == generated[1].tolist()
    assert generated[0].shape[1] > input_ids.shape[1]


@pytest.fixture(scope="module")
def committed_rows() -> dict[str, list[str]]:
    """The cells of the table in docs/adapters.md by the architecture's name."""
    lines = (ROOT / "docs" / "adapters.md").read_text().partition("| architecture |")[2].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row for row in rows}


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_an_architecture_has_transformers_loss_and_one_set_of_logits_or_is_refused(name, committed_rows, tmp_path):
    """The trained model, merged/ and base + adapter/ alike, as the committed table says."""
    result = architectures.trained(name, tmp_path)
    assert architectures.cells(name, result) == committed_rows[name]
    if "refused" in result:
        assert not (tmp_path / "out" / "metrics.jsonl").exists()
        return
    loss, of_transformers = result["loss"]
    assert loss == pytest.approx(of_transformers, rel=2e-5)
    assert max(result["errors"]) < 1e-4 < result["moved"]
    for names in result["layers"].values():  # printed before training, too
        assert all(f"{count} {layer}" in result["printed"] for layer, count in names.items())


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
    return dict(zip(["merged", "adapter"], json.loads(out.read_text()), strict=True))


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
