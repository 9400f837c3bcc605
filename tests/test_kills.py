"""Forty kills at random moments: whatever they hit, the resumed run ends where an uninterrupted one ends.

Both scripts, as one process, as two ranks of torchrun, and as two of the `deepspeed` launcher. The launcher and its
ranks are killed together, as by a loss of power. It takes an hour on two cores, so it runs with SLOW=1 alone:

    SLOW=1 python -m pytest -s tests/test_kills.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, bits, free_port, make_tokenizer, save_tiny, sums, write_jsonl
from transformers import BertConfig, BertForSequenceClassification

from common.runs import INCOMPLETE

KILLS = 5  # of each campaign
LAUNCHERS = {
    "one process": [sys.executable],
    "torchrun": ["torchrun", "--nproc_per_node", "2"],
    "zero2": ["deepspeed", "--no_local_rank", "--num_accelerators", "2"],
    "zero3": ["deepspeed", "--no_local_rank", "--num_accelerators", "2"],
}
CAMPAIGNS = [("train", name) for name in LAUNCHERS] + [("train, best state", name) for name in ("one process", "zero2")]
CAMPAIGNS += [("finetune_bert_l_sst2", name) for name in ("one process", "torchrun")]

pytestmark = pytest.mark.skipif("SLOW" not in os.environ, reason="an hour; SLOW=1 runs it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    save_tiny(folder / "base")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=258, **sizes)).save_pretrained(folder / "encoder")
    make_tokenizer().save_pretrained(folder / "encoder")
    rows = sums(96, 9)
    reviews = [{"sentence": f"{i} a {('bad', 'good')[i % 2]} film", "label": i % 2} for i in range(96)]
    for name, lines in (("data", rows[:64]), ("held_out", rows[64:]), ("reviews", reviews)):
        write_jsonl(folder / f"{name}.jsonl", lines)
    return folder


def command(script: str, launcher: str, folder: Path, output: Path) -> list[str]:
    program, *variant = script.split(", ")
    ranks = 1 if launcher == "one process" else 2
    port = ["--master_port", free_port()] if ranks > 1 else []  # other runs may have the usual one
    words = [*LAUNCHERS[launcher], *port, ROOT / f"{program}.py", "--output-dir", output, "--rank", 4]
    words += ["--batch-size", 2, "--save-steps", 3, "--gradient-accumulation", 4 // ranks, "--resume"]
    if program == "train":
        words += ["--model", folder / "base", "--data", folder / "data.jsonl", "--max-steps", 40, "--logging-steps", 1]
        words += ["--validation-data", folder / "held_out.jsonl", "--eval-steps", 4, "--learning-rate", 1e-2]
    else:
        words += ["--model", folder / "encoder", "--data", folder / "reviews.jsonl", "--epochs", 4]
        words += ["--evals-per-epoch", 3, "--patience", 99, "--learning-rate", 1e-3]
    words += ["--keep-best"] if variant else []
    words += ["--deepspeed", ROOT / "configs" / f"ds_{launcher}.json"] if launcher.startswith("zero") else []
    return [str(word) for word in words]


def start(words: list[str], log: Path) -> subprocess.Popen:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "a") as file:
        return subprocess.Popen(
            words, stdout=file, stderr=file, env=environment, cwd=log.parent, start_new_session=True
        )


def kill(process: subprocess.Popen) -> None:
    """The launcher and all that it started, which `deepspeed` gives sessions of their own."""
    tree, fresh = {process.pid}, True
    while fresh:
        lines = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, line.split())) for line in lines.splitlines()]
        fresh = {pid for pid, parent in pairs if parent in tree} - tree
        tree |= fresh
    for number in tree:
        try:
            os.kill(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait(60)


def lines_of(output: Path, *names: str) -> list[tuple]:
    """Of every line of metrics.jsonl what does not depend on the machine."""
    file = output / "metrics.jsonl"
    lines = file.read_text(errors="replace").splitlines(keepends=True) if file.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [tuple(row.get(name) for name in ("step", "loss", "eval_loss", "validation", *names)) for row in rows]


def moment(output: Path, what: str, number: int, last_step: int) -> bool:
    """Whether the run is where it is to be killed: `number` in [0, 1) is a place in its steps."""
    match what:
        case "checkpoint":
            return (output / "checkpoints" / INCOMPLETE).is_dir() and last_step * number < len(lines_of(output))
        case "export":
            return (output / INCOMPLETE).is_dir()
        case "validation":  # the line of its step is there, its own is not
            rows = lines_of(output)
            return bool(rows) and rows[-1][0] % 4 == 0 and rows[-1][1] is not None and rows[-1][0] > last_step * number
    rows = lines_of(output)
    return bool(rows) and rows[-1][0] > last_step * number


@pytest.mark.parametrize(("script", "launcher"), CAMPAIGNS)
def test_kills_at_random_moments_lose_nothing(script, launcher, folder):
    name = f"{script}-{launcher}".replace(" ", "-").replace(",", "")
    whole, killed, log = folder / f"{name}-whole", folder / f"{name}-killed", folder / f"{name}.log"
    assert start(command(script, launcher, folder, whole), log).wait(1500) == 0, log.read_text()[-3000:]
    last_step = max(row[0] for row in lines_of(whole))
    random_ = random.Random(name)
    moments = ["checkpoint", "validation" if script.startswith("train") else "step", "step", "step", "export"][:KILLS]
    places = sorted(random_.uniform(0.0, 0.9) for _ in moments)
    met = []
    for what, place in zip(moments, places, strict=True):
        process = start(command(script, launcher, folder, killed), log)
        while process.poll() is None and not moment(killed, what, place, last_step):
            time.sleep(0.001)
        time.sleep(random_.uniform(0, 0.02) if what != "step" else random_.uniform(0, 0.3))
        if process.poll() is None:
            kill(process)
            met.append(f"{what} after step {max((row[0] for row in lines_of(killed)), default=0)}")
        else:
            assert process.returncode == 0, log.read_text()[-3000:]
    assert start(command(script, launcher, folder, killed), log).wait(1500) == 0, log.read_text()[-3000:]
    print(f"\n| {script} | {launcher} | {len(met)} | {'; '.join(met)} |")
    assert met, "it was never killed"
    for file in whole.glob("*/*.safetensors"):
        assert bits(killed / file.relative_to(whole)) == bits(file), file
    assert lines_of(killed) == lines_of(whole)
