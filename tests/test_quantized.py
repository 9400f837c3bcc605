"""tests/quantized_layers.py in the environment that has bitsandbytes."""

import subprocess

import pytest
from conftest import ROOT

PYTHON = ROOT / ".venv-harness" / "bin" / "python"


def has_bitsandbytes() -> bool:
    code = "import importlib.util; assert importlib.util.find_spec('bitsandbytes')"
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", code], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_bitsandbytes(), reason="no bitsandbytes: sh scripts/test.sh installs it")
def test_quantized_bases_on_the_branches_that_cuda_takes():
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/quantized_layers.py"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "12 passed" in finished.stdout
