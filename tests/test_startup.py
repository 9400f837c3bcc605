"""A script that has nothing to compute imports nothing heavy. No times: those waver (bench/startup.py has them)."""

import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = {"torch", "transformers", "datasets", "vllm", "peft", "train", "finetune_bert_l_sst2"}
EVALUATIONS = ("gsm8k", "hendrycks_math", "humaneval", "mbpp", "mt_bench", "suite", "forgetting", "crows_pairs")


def imported_by(*command: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """How a command ended, and the modules that it imported, by the interpreter's own account on stderr."""
    words = [sys.executable, "-X", "importtime", *command]
    finished = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in finished.stderr.splitlines() if line.startswith("import time:")]
    return finished, {line.rpartition("|")[2].strip() for line in lines}


def errors_of(finished: subprocess.CompletedProcess) -> list[str]:
    """What a command wrote to stderr beside the account of its imports."""
    return [line for line in finished.stderr.splitlines() if not line.startswith("import time:")]


@pytest.mark.parametrize("name", [*EVALUATIONS, "report"])
def test_help_imports_nothing_heavy(name):
    finished, modules = imported_by(f"eval/{name}.py", "--help")
    assert finished.returncode == 0
    assert "--output-dir" in finished.stdout
    assert "How to run" in finished.stdout
    assert "common.cli" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("name", [*EVALUATIONS, "report"])
def test_a_mistyped_option_gets_its_line_before_anything_heavy_is_imported(name):
    finished, modules = imported_by(f"eval/{name}.py", "--output-dri", "x")
    assert finished.returncode == 2
    expected = f"{name}.py: error: unknown option --output-dri; did you mean --output-dir? (--help lists the options)"
    assert errors_of(finished) == [expected]
    assert "common.cli" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("name", ["train", "finetune_bert_l_sst2"])
def test_a_training_reads_its_options_before_it_imports_models(name):
    """torch and the names of transformers are there; no model's code, no Trainer, nothing of another package."""
    later = {"datasets", "accelerate", "deepspeed", "peft", "sklearn", "scipy", "pandas", "tensorboard"}
    later |= {"transformers.trainer", "transformers.modeling_utils", "transformers.generation", "torch._dynamo"}
    for words, code in (("--help",), 0), (("--rnak", "3"), 2):
        finished, modules = imported_by(f"{name}.py", *words)
        assert finished.returncode == code
        assert "common.training" in modules
        assert not modules & later
        if code == 0:  # what is set first stands first
            assert finished.stdout.index("--learning-rate") < finished.stdout.index("data options")


def test_the_published_tables_need_nothing_heavy():
    finished, modules = imported_by("eval/report.py")
    assert finished.returncode == 0
    assert errors_of(finished) == []
    assert "| BA-LoRA | published, arxiv2024 |" in finished.stdout
    assert "eval.benchmark" in modules
    assert not modules & (HEAVY | {"matplotlib"})


def test_the_account_of_imports_would_show_a_heavy_one(tmp_path):
    """Of a script that imports torch only inside of a function."""
    script = tmp_path / "script.py"
    script.write_text("def main():\n    import torch.nn\nmain()\n")
    finished, modules = imported_by(str(script))
    assert finished.returncode == 0
    assert "torch" in modules
