"""bench/gpu.py on tiny shapes: every check is green here, and what goes wrong in one part stops no other."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

ABSENT = ("datasets", "accelerate", "peft", "trl", "deepspeed", "bitsandbytes", "tyro", "scipy", "sklearn", "pandas")


# What tests, vLLM and GPUs add to the environment that scripts/ba-lora.sh makes on a machine without one.
ADDED = ("triton", "bitsandbytes", "flash_attn", "liger_kernel", "vllm")


def run(bench, *words, program=(sys.executable, "gpu.py"), **environment):
    command = [program[0], str(bench / program[1]), "--device", "cpu", "--small", *words]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def without(folder, names):
    """A variable under which these packages are kept out of every process."""
    blocked = "\n".join(f"sys.modules[{name!r}] = None" for name in names)
    (folder / "sitecustomize.py").write_text(f"import sys\n{blocked}\n")
    return {"PYTHONPATH": str(folder)}


def test_every_part_is_green_in_the_environment_that_the_demo_leaves(tmp_path):
    words = ("--output", str(tmp_path / "gpu.json"))
    finished = run(ROOT / "scripts", *words, program=("sh", "gpu-check.sh"), **without(tmp_path, ADDED))
    assert finished.returncode == 0, finished.stdout + finished.stderr[-2000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    versions = result["machine"]["versions"]
    assert {versions["triton"], versions["vllm"]} == {"not installed"} != {versions["accelerate"]}
    assert len(result["parts"]) == 14
    for name, part in result["parts"].items():
        assert part["problem"] is None
        assert part["rows"], name
        assert f"{name}: ok" in finished.stdout
    errors = {row["check"]: row["error"] for row in result["parts"]["right.resume"]["rows"]}
    assert errors["largest difference of a trained factor"] == 0.0
    contenders = {row["contender"] for row in result["parts"]["fast.step"]["rows"] if isinstance(row["ms"], float)}
    assert len(contenders) == 5


def test_it_needs_torch_transformers_and_safetensors_alone(tmp_path):
    """What needs another is named, the rest runs."""
    parts = ("right.objective", "right.adapter", "right.step", "right.packing", "right.resume", "profile")
    absent = without(tmp_path, ABSENT)
    finished = run(ROOT / "bench", *parts, "--output", str(tmp_path / "gpu.json"), **absent)
    assert finished.returncode == 0, finished.stdout + finished.stderr[-2000:]
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["machine"]["versions"]["accelerate"] == result["machine"]["versions"]["peft"] == "not installed"
    notes = {row["check"]: row["error"] for part in parts[:-1] for row in result["parts"][part]["rows"]}
    assert notes["PEFT"] == "not installed"
    assert notes["killed and resumed"].startswith("accelerate not installed")
    assert notes["written out: loss"] < 1e-5


def test_a_part_that_fails_or_dies_is_named_and_the_others_go_on(tmp_path):
    bench = tmp_path / "bench"
    shutil.copytree(ROOT / "bench", bench)
    text = (bench / "gpu_right.py").read_text()
    for before, after in (
        ("s, W, X, G = layer.scaling,", "s, W, X, G = 1.01 * layer.scaling,"),  # another formula
        ('    """PiSSA\'s A₀ and B₀', '    os._exit(3)\n    """PiSSA\'s A₀ and B₀'),
    ):
        assert before in text
        text = text.replace(before, after, 1)
    (bench / "gpu_right.py").write_text(text)
    parts = ("right.spectral", "right.adapter", "right.factors", "init")
    finished = run(bench, *parts, "--output", str(tmp_path / "gpu.json"), PYTHONPATH=str(ROOT))
    assert finished.returncode == 1
    problems = {
        name: part["problem"] for name, part in json.loads((tmp_path / "gpu.json").read_text())["parts"].items()
    }
    assert problems["right.spectral"] is problems["init"] is None
    assert problems["right.adapter"].endswith("checks outside their limits")
    assert problems["right.factors"] == "its process ended (3)"
    assert f"right.factors: {problems['right.factors']}" in finished.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [(["left"], "no part 'left': choose from right.objective"), (["--output", "/no/x"], "no folder /no")],
)
def test_a_mistake_gets_its_line(words, line):
    finished = run(ROOT / "bench", *words)
    assert finished.returncode == 2
    assert line in finished.stderr.splitlines()[-1]


def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "init"]
    finished = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "no CUDA GPU here; --device cpu --small" in finished.stderr
