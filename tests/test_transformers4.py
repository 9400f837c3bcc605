"""What goes out, read by transformers 4.57 and PEFT 0.17: the logits of transformers 5, the same tokens.

`. scripts/setup.sh; setup_peer transformers4` makes the environment, as scripts/test.sh does.
"""

import json
import subprocess

import pytest
import torch
import transformers
from architectures import SHAPE
from conftest import ROOT, make_tokenizer, relative_error
from read_by_transformers4 import read
from safetensors.torch import load_file

import train
from common import exports
from common.classifiers import settle_tokenizer
from common.templates import save_tokenizer

PYTHON = ROOT / ".venv-transformers4" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-transformers4")
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {name: [first + i / 10 for i in range(16)] for name, first in (("short_factor", 1), ("long_factor", 2))}
LLAMA, PHI = transformers.LlamaConfig, transformers.Phi3Config
CONFIGURATIONS = {  # and the rotary settings of each, in the form of transformers 5
    "llama": (LLAMA, {}, {"rope_type": "default", "rope_theta": 5e5}),
    "llama3": (LLAMA, {}, {"rope_type": "llama3", "rope_theta": 5e5} | LLAMA3),
    "yarn": (LLAMA, {}, {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4, "original_max_position_embeddings": 128}),
    "linear": (LLAMA, {}, {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "qwen2": (transformers.Qwen2Config, {}, {"rope_type": "default", "rope_theta": 1e6}),
    "gemma2": (transformers.Gemma2Config, {"head_dim": 8}, {"rope_type": "default", "rope_theta": 1e5}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 400}, {"rope_type": "default", "rope_theta": 1e6}),
    "phi3": (PHI, {}, {"rope_type": "default", "rope_theta": 1e5}),
    "longrope": (PHI, {"original_max_position_embeddings": 64}, {"rope_type": "longrope", "rope_theta": 1e4} | LONG),
    "partial": (
        transformers.StableLmConfig,
        {},
        {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5},
    ),
    "neox": (
        transformers.GPTNeoXConfig,
        {},
        {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 1.0},
    ),
    "neox, linear": (
        transformers.GPTNeoXConfig,
        {},
        {"rope_type": "linear", "rope_theta": 1e5, "partial_rotary_factor": 0.5, "factor": 4.0},
    ),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each configuration, its base as transformers 4 publishes it, all read by transformers 4."""
    folder = tmp_path_factory.mktemp("transformers4")
    (folder / "data.jsonl").write_text(json.dumps({"instruction": "Add 1 and 1", "output": "2"}) + "\n")
    for name, (kind, settings, rope) in CONFIGURATIONS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind(**SHAPE | settings, rope_parameters=rope))
        exports.save_merged(model, folder / name / "base", torch.float32)
        make_tokenizer().save_pretrained(folder / name / "base")
        files = ("--model", folder / name / "base", "--data", folder / "data.jsonl")
        options = ("--rank", 4, "--max-steps", 2, "--learning-rate", "1e-2", "--save-steps", 0)
        options += ("--target-modules", "all-linear")
        train.main([*map(str, files), "--output-dir", str(folder / name / "out"), *map(str, options)])
        for part in ("merged", "adapter"):
            (folder / name / "out" / part).rename(folder / name / part)
    script = ROOT / "tests" / "read_by_transformers4.py"
    words = [str(folder / name) for name in CONFIGURATIONS]
    result = subprocess.run([str(PYTHON), str(script), *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_transformers_4_reads_what_transformers_5_does(name, runs):
    theirs, ours = load_file(runs / name / "read.safetensors"), read(runs / name)
    assert theirs.keys() == ours.keys()
    for what, tensor in ours.items():
        if tensor.is_floating_point():
            assert relative_error(theirs[what], tensor) < 1e-5, what
        else:
            assert torch.equal(theirs[what], tensor), what
    assert torch.equal(ours["tokens"], ours["tokens of adapter"])
    config = json.loads((runs / name / "base" / "config.json").read_text())  # transformers 5's form alone is not enough
    assert config["rope_theta"] == CONFIGURATIONS[name][2]["rope_theta"]


READ = """import sys, torch, transformers
from safetensors.torch import save_file
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(["What is it?", "Say"], ["It is long.", "so"], padding=True, return_tensors="pt")
save_file({"logits": model(**inputs).logits.detach(), **inputs}, sys.argv[2])"""


def test_transformers_4_reads_a_classifiers_tokenizer_and_its_rotary_settings_under_its_own_names(tmp_path):
    """ModernBERT takes no token_type_ids, which transformers 4 gives every model whose tokenizer names no inputs."""
    rope = {name: {"rope_type": "default", "rope_theta": theta} for name, theta in (("full", 1e6), ("sliding", 50.0))}
    rope = {f"{name}_attention": settings for name, settings in rope.items()}
    config = transformers.ModernBertConfig(**SHAPE | {"bos_token_id": 1}, rope_parameters=rope)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    exports.save_merged(model, tmp_path / "merged", torch.float32)
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    settle_tokenizer(tokenizer, config, "ModernBERT")
    save_tokenizer(tokenizer, tmp_path / "merged")
    words = [str(PYTHON), "-c", READ, str(tmp_path / "merged"), str(tmp_path / "read.safetensors")]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = load_file(tmp_path / "read.safetensors")
    texts = [[220 if byte == 32 else byte - 33 for byte in text] for text in (b"What is it?It is long.", b"Sayso")]
    rows = [row + [tokenizer.pad_token_id] * (22 - len(row)) for row in texts]  # a token is a byte, in GPT-2's order
    mask = [[1] * len(row) + [0] * (22 - len(row)) for row in texts]
    assert [tensor.tolist() for tensor in (found["input_ids"], found["attention_mask"])] == [rows, mask]
    expected = model(torch.tensor(rows), attention_mask=torch.tensor(mask)).logits.detach()
    assert relative_error(found["logits"], expected) < 1e-5
