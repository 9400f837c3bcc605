"""docs/own-model.md's way to llama.cpp: its commands on a run of SmolLM2, and what stands in the GGUF files.

`. scripts/setup.sh; setup_llama_cpp` fetches the converters, as scripts/test.sh does.
"""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, start_script
from safetensors.numpy import load_file
from test_docs import fences, shell_lines

from data import demo

LLAMA_CPP = ROOT / ".llama.cpp"
pytestmark = pytest.mark.skipif(not (LLAMA_CPP / "convert_lora_to_gguf.py").is_file(), reason="no .llama.cpp")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with what the page's converters make beside it."""
    folder = tmp_path_factory.mktemp("gguf")
    options = ["--model", "demo", "--data", "demo", "--fields", "question", "response", "--template", "chat"]
    options += ["--rank", 4, "--max-steps", 2, "--limit", 4, "--batch-size", 2, "--gradient-accumulation", 1]
    options += ["--save-steps", 0, "--learning-rate", 1e-3, "--dtype", "float32", "--output-dir", folder]
    process = start_script("train", options, folder.with_suffix(".log"))
    process.join()
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()[-2000:]
    page = (ROOT / "docs" / "own-model.md").read_text().partition("## Take it to llama.cpp")[2]
    words = [shlex.split(line) for line in shell_lines(fences(page)[0][1])]
    converters = [line for line in words if line[0] == "python"]
    assert [line[1] for line in converters] == ["$LLAMA/convert_hf_to_gguf.py", "$LLAMA/convert_lora_to_gguf.py"]
    places = {"$LLAMA": str(LLAMA_CPP), "output/mine": str(folder), "BASE": str(demo.model())}
    for line in converters:
        for place, real in places.items():
            line = [word.replace(place, real) for word in line]
        result = subprocess.run([sys.executable, *line[1:]], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
    return folder


def opened(path, monkeypatch):
    """Fields and tensors of a GGUF file, as llama.cpp's own reader has them."""
    monkeypatch.syspath_prepend(str(LLAMA_CPP / "gguf-py"))
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    return fields, {tensor.name: tensor.data for tensor in reader.tensors}  # not read before they are used


def test_merged_has_the_template_and_the_end_token_of_training(run, monkeypatch):
    fields, tensors = opened(run / "merged.gguf", monkeypatch)
    config = json.loads((run / "merged" / "config.json").read_text())
    assert fields["tokenizer.chat_template"] == (run / "merged" / "chat_template.jinja").read_text()
    ends = json.loads((run / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert fields["tokenizer.ggml.eos_token_id"] == ends
    assert fields["llama.rope.freq_base"] == config["rope_parameters"]["rope_theta"] != 10000
    merged = load_file(run / "merged" / "model.safetensors")
    assert np.array_equal(tensors["blk.3.ffn_down.weight"], merged["model.layers.3.mlp.down_proj.weight"])


def in_order(matrix: np.ndarray) -> np.ndarray:
    """The rows by a number that tells them apart: llama.cpp has those of queries and keys in an order of its own."""
    return matrix[(matrix @ np.random.default_rng(0).normal(size=matrix.shape[1])).argsort()]


def test_merged_is_the_base_with_the_adapter(run, monkeypatch):
    _, merged = opened(run / "merged.gguf", monkeypatch)
    fields, factors = opened(run / "adapter.gguf", monkeypatch)
    base = load_file(demo.model() / "model.safetensors")
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_output": "self_attn.o_proj"}
    names |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    assert len(factors) == 2 * 7 * 30
    for theirs, ours in names.items():
        A, B = (factors[f"blk.7.{theirs}.weight.lora_{which}"].astype(np.float64) for which in "ab")
        W = merged[f"blk.7.{theirs}.weight"] - fields["adapter.lora.alpha"] / len(A) * (B @ A)
        published = base[f"model.layers.7.{ours}.weight"].astype(np.float64)
        assert np.abs(in_order(W) - in_order(published)).max() < 1e-5
        assert np.abs(B @ A).max() > 1e-4, "nothing was learnt"
