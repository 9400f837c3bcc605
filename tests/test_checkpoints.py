"""Interruptions: whatever ends a run, what is left is complete, and --resume ends where an uninterrupted run ends."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from conftest import (
    PATIENCE,
    ROOT,
    bits,
    free_port,
    make_tokenizer,
    read_jsonl,
    run_apart,
    save_tiny,
    start_script,
    sums,
    write_jsonl,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import train
from common import exports, pretrained
from common.checkpoints import (
    MANIFEST,
    TRAINED_TENSORS,
    Progress,
    best_checkpoint,
    checkpoint_to_export,
    complete_checkpoints,
    load_progress,
    load_tensors,
    newest_checkpoint,
    require_same_contents,
    write_checkpoint,
)
from common.cli import RunStopped, UserError, parse_arguments
from common.exports import read_adapter
from common.layers import find_target_modules
from common.runs import INCOMPLETE, LOCK, JsonLines, held_alone
from common.training import Interruption, Training

SAVE_STEPS = 4
STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and data whose run takes a few seconds: long enough to be killed in."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(folder / "base", hidden_size=64, intermediate_size=128, num_hidden_layers=4)
    write_jsonl(folder / "data.jsonl", sums(64, 9))
    return folder


def arguments(folder: Path, output: Path, *options) -> list[str]:
    fixed = ["--model", folder / "base", "--data", folder / "data.jsonl", "--rank", 8, "--learning-rate", 1e-3]
    fixed += ["--max-steps", STEPS, "--batch-size", 2, "--gradient-accumulation", 2, "--logging-steps", 1]
    return [str(word) for word in (*fixed, "--save-steps", SAVE_STEPS, "--output-dir", output, *options)]


def run(folder: Path, output: Path, *options, **how) -> tuple[int, str]:
    """A run to its end: its exit code and what it printed."""
    return run_apart("train", arguments(folder, output, *options), output.parent, **how)


def unfinished(whole: Path, output: Path, *gone: str) -> Path:
    """A copy of a run that was ended before its record, and before what is `gone`."""
    shutil.copytree(whole, output)
    for name in ("run.json", *gone):
        path = output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return output


LAST = f"checkpoints/checkpoint-{STEPS}"


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    output = folder / "uninterrupted"
    code, text = run(folder, output)
    assert code == 0, text
    return output


def adapter_of(output: Path) -> dict[str, bytes]:
    return bits(output / "adapter" / "adapter_model.safetensors")


def steps_done(output: Path) -> int:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def saved_step(output: Path) -> int:
    newest = newest_checkpoint(output)
    return int(newest.name.partition("-")[2]) if newest else 0


# ---------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("trial", range(10))
def test_kill_9_at_any_moment_and_resume_is_an_uninterrupted_run(trial, folder, uninterrupted):
    """Five random steps, and five of the 175 moments at which a checkpoint or an export touches a file."""
    output, draw = folder / f"killed-{trial}", random.Random(trial)
    place = ("metrics.jsonl", draw.randrange(1, STEPS)) if trial < 5 else (INCOMPLETE, draw.randrange(1, 170))
    code, text = run(folder, output, ends=(signal.SIGKILL, *place))
    assert code == -signal.SIGKILL, text
    assert steps_done(output) - saved_step(output) <= SAVE_STEPS
    code, text = run(folder, output, "--resume")
    assert code == 0, text
    assert adapter_of(output) == adapter_of(uninterrupted)
    assert [line["step"] for line in read_jsonl(output / "metrics.jsonl")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGHUP, 129)]
)
def test_a_signal_finishes_the_step_saves_and_loses_nothing(number, code, folder, uninterrupted):
    output = folder / f"signal-{number}"
    ended, text = run(folder, output, ends=(number, "metrics.jsonl", 6))
    assert ended == code
    stopped_at = steps_done(output)
    assert 5 <= stopped_at < STEPS
    assert saved_step(output) == stopped_at
    assert f"interrupted after step {stopped_at}" in text
    assert not (output / "adapter").exists()
    assert run(folder, output, "--resume")[0] == 0
    assert adapter_of(output) == adapter_of(uninterrupted)


def test_an_interruption_saves_though_nobody_reads_the_output(folder):
    """Ctrl-C under `2>&1 | tee log` ends tee at once; a lost ssh ends the terminal."""
    output, pipe = folder / "unread", folder / "unread.pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    process = start_script("train", arguments(folder, output, "--save-steps", 4000, "--max-steps", 4000), pipe)
    while steps_done(output) < 2:
        assert process.is_alive(), os.read(reader, 2**16)
        time.sleep(0.01)
    os.close(reader)
    os.kill(process.pid, signal.SIGINT)
    process.join(PATIENCE)
    assert process.exitcode == 130
    assert 2 <= steps_done(output) == saved_step(output) < 4000


PRINTING = """
import sys
from common.runs import lasting_output
with lasting_output():
    for stream in (sys.stdout, sys.stderr):
        print("a line", file=stream, flush=True)
    sys.exit(138)
"""


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["full", "unread"])
def test_an_output_that_fails_changes_neither_exit_code_nor_the_other_output(kind, stream):
    """A full disk is /dev/full. Python's own exit would be 120."""
    reader, unread = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full, open(unread, "w") as nobody:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full if kind == "full" else nobody}
        done = subprocess.run([sys.executable, "-c", PRINTING], cwd=ROOT, text=True, **streams)
    assert done.returncode == 138
    reason = os.strerror(errno.ENOSPC if kind == "full" else errno.EPIPE)
    said = [f"note: {stream} lacks lines that could not be written ({reason})"] if stream == "stdout" else []
    assert (done.stderr or done.stdout).splitlines() == ["a line", *said]


def test_a_line_of_the_log_spans_an_interruption(folder):
    """Means over seven steps, and run.json's mean loss: a checkpoint holds what the next line has gathered so far."""
    options, lines, losses = ("--logging-steps", 7, "--save-steps", 1), {}, {}
    output = folder / "spans"
    assert run(folder, output, *options, ends=(signal.SIGTERM, "checkpoint-9", 1))[0] == 143
    assert 9 <= saved_step(output) < STEPS
    assert run(folder, output, *options, "--resume")[0] == 0
    assert run(folder, folder / "spans-whole", *options)[0] == 0
    for each in (output, folder / "spans-whole"):
        machine = ("tokens_per_second", "peak_memory_gib")
        rows = read_jsonl(each / "metrics.jsonl")
        lines[each] = [{name: value for name, value in row.items() if name not in machine} for row in rows]
        losses[each] = json.loads((each / "run.json").read_text())["train_loss"]
    assert lines[output] == lines[folder / "spans-whole"]
    assert losses[output] == losses[folder / "spans-whole"]


LAUNCHER = """
import os, subprocess, sys
environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1]}
subprocess.run([sys.executable, *sys.argv[2:]], env=environment)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_do_not_outlive_their_launcher(number, folder):
    """Whatever ends the launcher, which passes nothing on: the rank saves and ends as after SIGTERM."""
    output = folder / f"launched-{number}"
    launcher = folder / "deepspeed.py"  # a launcher is known by its command
    launcher.write_text(LAUNCHER)
    words = [ROOT / "train.py", *arguments(folder, output, "--max-steps", 4000, "--save-steps", 4000)]
    command = [sys.executable, launcher, free_port(), *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while steps_done(output) < 6:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=PATIENCE)  # until nobody is left who could write
    assert steps_done(output) == saved_step(output) < 4000, printed


def test_one_run_at_a_time_writes_to_a_folder(folder):
    output = folder / "shared"
    output.mkdir()
    (output / "before").touch()
    first = start_script("train", arguments(folder, output, "--max-steps", 4000, "--overwrite"), folder / "shared.log")
    while steps_done(output) < 1:
        assert first.is_alive(), (folder / "shared.log").read_text()
        time.sleep(0.01)
    before = (output / "config.yaml").stat().st_mtime_ns
    code, text = run(folder, output, "--resume", "--max-steps", 4000)
    assert code == 2
    last = text.strip().splitlines()[-1]
    assert f"another run is writing to {output}" in last
    assert f"process {first.pid} on {platform.node()}" in last
    assert first.is_alive()
    with open(output / LOCK, "r+") as file, pytest.raises(BlockingIOError):  # a lock that NFS passes to its server
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert (output / "config.yaml").stat().st_mtime_ns == before
    first.kill()
    first.join()
    with held_alone(output):  # a dead run holds nothing
        assert (output / "config.yaml").is_file()
    assert not (output / LOCK).exists()


def test_a_file_system_without_locks_is_announced(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with held_alone(tmp_path / "out"):
        (tmp_path / "out" / "a file").touch()
    assert capsys.readouterr().err == (
        f"note: no lock on {tmp_path / 'out'} (No locks available): start no other run there\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a file"]


def test_a_run_of_one_step_trains(folder):
    """Its warm-up would be the whole of it."""
    output = folder / "one-step"
    assert run(folder, output, "--max-steps", 1)[0] == 0
    trained = load_file(output / "checkpoints" / "checkpoint-1" / TRAINED_TENSORS)
    name = next(name for name in trained if name.endswith(".lora_B"))
    assert not torch.equal(trained[name], trained[name.replace("lora_B", "initial_B")])


def test_settings_of_the_resumed_start_act(folder, uninterrupted):
    """How often it logs and saves is this start's, not the checkpoint's."""
    output = unfinished(uninterrupted, folder / "other-intervals", LAST)
    code, text = run(folder, output, "--resume", "--logging-steps", 2, "--save-steps", 1, "--keep-checkpoints", 9)
    assert code == 0, text
    assert [line["step"] for line in read_jsonl(output / "metrics.jsonl")] == [*range(1, 21), 22, 24]
    steps = [int(path.name.partition("-")[2]) for path in complete_checkpoints(output)]
    assert steps == [24, 23, 22, 21, 20]
    assert adapter_of(output) == adapter_of(uninterrupted)


def test_data_and_base_are_known_by_their_content(folder, uninterrupted, tmp_path):
    """Changed in place they are refused, moved they are the same, and the user may insist."""
    output = unfinished(uninterrupted, tmp_path / "out", LAST)
    shutil.copytree(folder / "base", tmp_path / "moved")
    rows = (folder / "data.jsonl").read_text()
    (tmp_path / "moved.jsonl").write_text(rows.replace("Add 63 and 1", "Add 63 and 2"))
    options = ("--resume", "--model", tmp_path / "moved", "--data", tmp_path / "moved.jsonl")
    code, text = run(folder, output, *options)
    assert code == 2
    assert "the data changed since" in text.strip().splitlines()[-1]
    (tmp_path / "moved.jsonl").write_text(rows)
    weights = tmp_path / "moved" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-2] + b"\x00\x01")
    code, text = run(folder, output, *options)
    assert code == 2
    assert "the base model changed since" in text.strip().splitlines()[-1]
    weights.write_bytes(before)
    code, text = run(folder, output, *options)
    assert code == 0, text
    assert adapter_of(output) == adapter_of(uninterrupted)


@pytest.mark.parametrize("count", [96, 40])
def test_data_that_grew_or_shrank_give_the_run_another_length_and_its_schedule(count, folder, tmp_path):
    """64 examples are 16 steps. The rates are warm-up's one step and the cosine over the new length."""
    output, data, options = tmp_path / "out", tmp_path / "data.jsonl", ["--max-steps", -1, "--data"]
    write_jsonl(data, sums(64, 9))
    assert run(folder, output, *options, data, ends=(signal.SIGTERM, "metrics.jsonl", 6))[0] == 143
    first, length = saved_step(output), count // 4
    assert 0 < first < length
    write_jsonl(data, sums(count, 9))
    code, text = run(folder, output, *options, data, "--resume", "--accept-changes")
    assert code == 0, text
    rows = [row for row in read_jsonl(output / "metrics.jsonl") if row["step"] > first]
    assert [row["step"] for row in rows] == list(range(first + 1, length + 1))
    cosine = [1e-3 * (1 + math.cos(math.pi * (row["step"] - 2) / (length - 1))) / 2 for row in rows]
    assert [row["learning_rate"] for row in rows] == pytest.approx(cosine, rel=1e-6)


def test_a_base_is_known_by_its_configuration_and_by_every_tensor(tmp_path):
    """Two tensors of 256 MiB in a file without blocks on the disk, by the published format of safetensors."""
    size = 2**28
    header = {
        name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate("ab")
    }
    text = json.dumps(header).encode()
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    with open(weights, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2 * size)
    config.write_text(json.dumps({"rope_theta": 1e4, "transformers_version": "5.0"}))
    first = pretrained.weights_digest(str(tmp_path), None)
    config.write_text(json.dumps({"transformers_version": "5.1", "_name_or_path": "here", "rope_theta": 1e4}))
    assert pretrained.weights_digest(str(tmp_path), None) == first
    seen = {first}
    for value in (5e5, 1e4):
        config.write_text(json.dumps({"rope_theta": value}))
        seen.add(pretrained.weights_digest(str(tmp_path), None))
    with open(weights, "r+b") as file:
        file.seek(8 + len(text) + size + 100)  # in the second tensor
        file.write(b"x")
    seen.add(pretrained.weights_digest(str(tmp_path), None))
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("made", "refused"), [("0" * 64, False), ("0" * 40, True), ("2:" + "0" * 64, True), ("2:" + "1" * 64, False)]
)
def test_a_digest_of_an_earlier_form_is_announced_and_not_compared(made, refused, tmp_path, capsys):
    """Not a commit on the hub, which has 40 digits; and the data is compared all the same."""
    (tmp_path / MANIFEST).write_text(json.dumps({"identity": {"contents": {"base model": made, "data": "d"}}}))
    ours = {"base model": "2:" + "1" * 64, "data": "d"}
    with pytest.raises(UserError, match="the base model changed") if refused else contextlib.nullcontext():
        require_same_contents(tmp_path, ours, False)
    assert ("is older than this digest of the base model" in capsys.readouterr().err) == (made == "0" * 64)
    with pytest.raises(UserError, match="the data changed" if not refused else "the base model and the data changed"):
        require_same_contents(tmp_path, ours | {"data": "e"}, False)


def test_lines_that_a_disk_does_not_take_follow_later(tmp_path, capsys):
    """A folder that is not there stands for a full disk; half a line of a failed attempt goes."""
    lines = JsonLines(tmp_path / "gone" / "metrics.jsonl")
    lines.append([{"step": 1}])
    lines.append([{"step": 2}])
    assert capsys.readouterr().err.count("training goes on") == 1
    lines.path.parent.mkdir()
    lines.append([{"step": 3}])
    with open(lines.path, "a") as file:
        file.write('{"st')
    lines.append([{"step": 4}])
    assert [json.loads(line)["step"] for line in lines.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_damaged_lines_and_records_are_named_and_passed_over(folder, uninterrupted):
    output = unfinished(uninterrupted, folder / "damaged-records", LAST)
    (output / "run.json").write_text('{"steps": 2')
    lines = (output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (output / "metrics.jsonl").write_text("".join([*lines[:20], "\0\0\0\n", *lines[20:]]))
    code, text = run(folder, output, "--resume")
    assert code == 0, text
    assert "run.json is damaged and passed over" in text
    assert "metrics.jsonl: 1 damaged lines are left out" in text
    assert [line["step"] for line in read_jsonl(output / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert adapter_of(output) == adapter_of(uninterrupted)


def test_a_second_signal_leaves_at_once(folder, tmp_path):
    """In a step of a thousand micro-batches, which takes half a minute."""
    rows = [{"instruction": f"Add {i}", "output": "The sum" + "!" * 300} for i in range(2000)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    log, output = tmp_path / "twice.log", tmp_path / "twice"
    options = ("--data", tmp_path / "data.jsonl", "--gradient-accumulation", 1000)
    process = start_script("train", arguments(folder, output, *options), log)
    for expected in ("0/24", "SIGTERM: stopping after this step"):  # the progress bar: training has begun
        while expected not in log.read_text():
            assert process.is_alive(), log.read_text()
            time.sleep(0.05)
        if expected == "0/24":
            os.kill(process.pid, signal.SIGTERM)
    assert process.is_alive()
    while process.is_alive():  # what comes within two seconds is the first signal, passed on by a launcher
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        process.join(0.5)
    assert process.exitcode == 143
    assert steps_done(output) == saved_step(output) == 0


def test_nohup_outlives_its_terminal():
    """A hang-up that the process ignored before training is ignored in it, and counts as no signal."""
    before, interruption = signal.signal(signal.SIGHUP, signal.SIG_IGN), Interruption()
    try:
        with interruption.awaited():
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.signal == 0
            os.kill(os.getpid(), signal.SIGUSR1)
            assert interruption.signal == signal.SIGUSR1
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("method", ["full", "ba-lora"])
def test_a_run_killed_before_its_export_takes_no_further_step(method, folder):
    """With a learning rate that is not 0 at the end, within an epoch: all steps are done, and the files are missing."""
    options = ("--method", method, "--lr-scheduler", "constant_with_warmup", "--max-steps", 6, "--save-steps", 3)
    whole, output = folder / f"whole-{method}", folder / f"killed-before-export-{method}"
    assert run(folder, whole, *options)[0] == 0
    unfinished(whole, output, "merged", *["adapter"] * (method != "full"))
    code, text = run(folder, output, *options, "--resume")
    assert code == 0, text
    assert bits(output / "merged" / "model.safetensors") == bits(whole / "merged" / "model.safetensors")
    assert json.loads((output / "run.json").read_text())["steps"] == 6
    assert saved_step(output) == 6


def test_a_finished_run_is_left_alone(folder, uninterrupted):
    output = folder / "finished"
    shutil.copytree(uninterrupted, output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    code, text = run(folder, output, "--resume")
    assert code == 0
    assert "trained already" in text
    code, text = run(folder, output, "--resume", "--learning-rate", 1e-4)
    assert code == 2
    assert "learning_rate = 0.001, not 0.0001" in text
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    for name in ("merged", "checkpoints"):  # to save the disk
        shutil.rmtree(output / name)
    code, text = run(folder, output, "--resume")
    assert code == 0
    assert "its merged/ is gone" in text
    assert not (output / "merged").exists()
    assert adapter_of(output) == adapter_of(uninterrupted)


def test_a_base_with_sampling_settings_but_no_sampling_is_exported(folder, tmp_path):
    """As several Llama chat models have it: transformers reads such a generation_config.json, and does not write it."""
    shutil.copytree(folder / "base", tmp_path / "base")
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 257}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    code, text = run(folder, tmp_path / "out", "--model", tmp_path / "base", "--max-steps", 2)
    assert code == 0, text
    made = json.loads((tmp_path / "out" / "merged" / "generation_config.json").read_text())
    assert made["eos_token_id"] == 257
    assert not made.keys() & {"temperature", "top_p"}, "and without do_sample: greedy, as the base is"
    assert not made.get("do_sample")
    settings = {"pad_token_id": -1, "eos_token_id": 257, "length_penalty": 2.0}  # not of sampling
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    code, text = run(folder, tmp_path / "second", "--model", tmp_path / "base", "--max-steps", 2)
    assert code == 0, text
    made = json.loads((tmp_path / "second" / "merged" / "generation_config.json").read_text())
    assert made["eos_token_id"] == 257


def test_resume_without_a_checkpoint_starts(folder, uninterrupted):
    output = folder / "fresh"
    output.mkdir()
    (output / "note.txt").write_text("the user's own")
    code, text = run(folder, output, "--resume")
    assert code == 0
    assert "no usable checkpoint" in text
    assert adapter_of(output) == adapter_of(uninterrupted)
    assert (output / "note.txt").exists()


# ---------------------------------------------------------------------------------------------- what is on disk


def test_a_checkpoint_holds_no_base_weight_and_is_small(uninterrupted):
    checkpoint = newest_checkpoint(uninterrupted)
    names = set(load_file(checkpoint / TRAINED_TENSORS))
    assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B", "initial_A", "initial_B"}
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    assert size <= 5 * (uninterrupted / "adapter" / "adapter_model.safetensors").stat().st_size + 10**6
    assert [path.name for path in complete_checkpoints(uninterrupted)] == ["checkpoint-24", "checkpoint-20"]


def test_truncated_and_foreign_checkpoints_are_named_and_passed_over(folder, uninterrupted, capsys):
    output = unfinished(uninterrupted, folder / "damaged")
    with open(output / "checkpoints" / "checkpoint-24" / "exp_avg.safetensors", "r+b") as file:
        file.truncate(100)
    shutil.copytree(output / "checkpoints" / "checkpoint-20", output / "checkpoints" / "checkpoint-22")
    manifest = output / "checkpoints" / "checkpoint-22" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"rank": 8', '"rank": 16'))
    shutil.copytree(output / "checkpoints" / "checkpoint-20", output / "checkpoints" / "checkpoint-21")
    with open(output / "checkpoints" / "checkpoint-21" / TRAINED_TENSORS, "r+b") as file:  # of the right size
        file.seek(-400, os.SEEK_END)
        file.write(bytes(400))
    code, text = run(folder, output, "--resume")
    assert code == 0, text
    assert "checkpoint-24 is passed over: exp_avg.safetensors is cut short" in text
    assert f"checkpoint-21 is passed over: {TRAINED_TENSORS} is damaged" in text
    assert "checkpoint-22 is passed over: it belongs to a run with rank = 16, not 8" in text
    assert "going on from" in text
    assert "checkpoint-20" in text.partition("going on from")[2].splitlines()[0]
    assert "checkpoint-24" in [path.name for path in complete_checkpoints(output)]  # written again
    assert adapter_of(output) == adapter_of(uninterrupted)


def damage(file: Path) -> None:
    """Other bytes, as many as before."""
    content = bytearray(file.read_bytes())
    content[-8:] = bytes(byte ^ 255 for byte in content[-8:])
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_not_counted_among_those_that_are_kept(folder, uninterrupted):
    """With one to keep, the step that is damaged is written anew, and no good one is deleted in its favour."""
    output = unfinished(uninterrupted, folder / "damaged-newest")
    damage(output / LAST / TRAINED_TENSORS)
    code, text = run(folder, output, "--resume", "--save-steps", 2, "--keep-checkpoints", 1)
    assert code == 0, text
    assert "checkpoint-24 is damaged, and called checkpoint-24.damaged now" in text
    assert [path.name for path in complete_checkpoints(output, read_all=True)] == ["checkpoint-24"]
    assert (output / f"{LAST}.damaged" / MANIFEST).is_file()
    assert adapter_of(output) == adapter_of(uninterrupted)


def validated_run(output: Path, losses: list[float], keep: int) -> tuple[SimpleNamespace, list[set[int]]]:
    """A run of --keep-best with a checkpoint for each validation loss; the steps of those that stay after each step."""
    args = train.Arguments(model="m", data="d", output_dir=str(output), keep_best=True, keep_checkpoints=keep)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    progress, there = Progress(max_steps=len(losses)), []
    state = SimpleNamespace(args=args, progress=progress, trained=model, is_main=True, agree=lambda value: value)
    state.identity, state.optimizer, state.extra = {}, SimpleNamespace(optimizer=optimizer), dict
    for step, loss in enumerate(losses, 1):
        progress.step = step
        progress.history.append({"step": step, "eval_loss": loss})
        write_checkpoint(state)
        there.append({int(path.name.partition("-")[2]) for path in (output / "checkpoints").iterdir()})
    return state, there


def test_every_checkpoint_that_is_kept_keeps_the_best_state_of_its_own_past(tmp_path):
    """Two are kept. After step 3 a resumed run may go on from step 2, whose best state is step 1's."""
    assert validated_run(tmp_path, [2.0, 3.0, 1.0, 4.0], keep=2)[1] == [{1}, {1, 2}, {1, 2, 3}, {3, 4}]
    equal = [{"step": step, "eval_loss": 2.0} for step in (1, 2)]
    assert best_checkpoint(equal, [Path("checkpoint-2"), Path("checkpoint-1")]) == Path("checkpoint-1")


def test_the_best_state_is_read_whole_before_it_is_exported(tmp_path, capsys):
    """Of the losses 1, 2 and 3 the first one's checkpoint is damaged: the second is exported, and the note says so."""
    state, _ = validated_run(tmp_path, [1.0, 2.0, 3.0], keep=3)
    assert Training.checkpoint_to_export(state).name == "checkpoint-1"
    damage(tmp_path / "checkpoints" / "checkpoint-1" / TRAINED_TENSORS)
    assert Training.checkpoint_to_export(state).name == "checkpoint-2"
    assert checkpoint_to_export(tmp_path, None, keep_best=True) == (tmp_path / "checkpoints" / "checkpoint-2", None)
    assert capsys.readouterr().err.count(f"checkpoint-1 is passed over: {TRAINED_TENSORS} is damaged") == 2


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lambda-consistency", "0.5", "lambda_consistency = 0.025, not 0.5"),
        ("--weight-decay", "0.1", "weight_decay = 0.0, not 0.1"),
        ("--spectral-k", "3", "spectral_k = 10, not 3"),
        ("--method", "pissa", "method = ba-lora, not pissa"),
    ],
)
def test_another_runs_checkpoints_are_not_started_over(folder, uninterrupted, tmp_path, option, value, message):
    """With other settings --resume has nothing to go on from, and beginning anew would delete what is there."""
    output = unfinished(uninterrupted, tmp_path / "unfinished")
    before = contents(output)
    code, text = run(folder, output, "--resume", option, value)
    assert code == 2
    last = text.strip().splitlines()[-1]
    assert message in last
    assert "--overwrite instead of --resume" in last
    assert contents(output) == before


def test_a_finished_run_on_data_that_changed_is_refused(folder, uninterrupted, tmp_path, capsys):
    """A file that was touched is the same; one with another row is not. An older run has no digest, says a note."""
    output, data = tmp_path / "finished", tmp_path / "data.jsonl"
    shutil.copytree(uninterrupted, output)
    shutil.copy(folder / "data.jsonl", data)
    summary = json.loads((output / "run.json").read_text())
    digests = [hashlib.sha256(data.read_bytes()).hexdigest()]  # one file
    assert summary["contents"] == {"data": hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]}
    settings = (output / "config.yaml").read_text()
    (output / "config.yaml").write_text(settings.replace(str(folder / "data.jsonl"), str(data)))
    argv = [str(data) if word == str(folder / "data.jsonl") else word for word in arguments(folder, output, "--resume")]
    before = contents(output)
    os.utime(data)
    train.main(argv)
    assert "trained already" in capsys.readouterr().out
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match="holds a run with another content of --data: name another --output-dir"):
        train.main(argv)
    assert contents(output) == before
    del summary["contents"]
    (output / "run.json").write_text(json.dumps(summary))
    train.main(argv)
    assert "older than the digests of data files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("processes", "accumulation", "message"),
    [
        (3, 2, "has 2 micro-batches, which 3 processes cannot share equally: start as many as divide it, 1, 2"),
        (1, 3, "--gradient-accumulation 3 on 1 processes is not the 2 micro-batches that a step of"),
        (2, 4, "give 1"),
    ],
)
def test_micro_batches_that_cannot_stay_are_refused(
    folder, uninterrupted, tmp_path, monkeypatch, processes, accumulation, message
):
    output = unfinished(uninterrupted, tmp_path / "unfinished")
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", "0")
    before = contents(output)
    with pytest.raises(UserError, match=re.escape(message)):
        train.main(arguments(folder, output, "--gradient-accumulation", accumulation, "--resume"))
    assert contents(output) == before


def test_a_finished_run_is_left_alone_by_another_number_of_processes(
    folder, uninterrupted, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    train.main(arguments(folder, uninterrupted, "--gradient-accumulation", 1, "--resume"))
    assert "trained already" in capsys.readouterr().out
    with pytest.raises(UserError, match="gradient_accumulation = 2, not 4"):
        train.main(arguments(folder, uninterrupted, "--gradient-accumulation", 4, "--resume"))


@pytest.mark.parametrize("ended", [False, True])
def test_a_failed_write_leaves_the_last_checkpoint_and_says_so(ended, folder, uninterrupted):
    """Files above 60 kB cannot be written: neither a checkpoint's nor the exported model's. The export can be made from
    the training's end where that has a checkpoint, else from an earlier step, which then says so."""
    output = folder / f"full-disk-{ended}"
    unfinished(uninterrupted, output, "adapter", "merged", *[LAST] * (not ended))
    newest = newest_checkpoint(output)
    before = contents(output / "checkpoints")
    code, text = run(folder, output, "--resume", file_size=60_000)
    assert ended or "the checkpoint of step 24 could not be written" in text
    assert ended or f"the last one is {newest}" in text
    assert code == 1
    assert "cannot write the trained model" in text
    assert "with --resume" in text
    assert ("--export-from" in text.splitlines()[-1]) == ended
    assert "Traceback" not in text
    assert not [name for name in ("adapter", "merged") if (output / name).exists()], "half an export"
    assert contents(output / "checkpoints") == before
    code, printed = run_apart("train", ["--export-from", output], folder)
    assert code == 0, printed
    for text in (printed, (output / "adapter" / "README.md").read_text()):
        assert ("step 20 of 24" in text) != ended
    checkpoint = load_file(newest / TRAINED_TENSORS)
    exported = load_file(output / "adapter" / "adapter_model.safetensors")
    name = next(name for name in exported if name.endswith("lora_A.weight"))
    trained = checkpoint[name.removeprefix("base_model.model.").removesuffix("weight").rstrip(".")]
    assert torch.equal(exported[name][: len(trained)], trained)


def test_a_teacher_cache_takes_its_room_before_it_is_mapped(folder, tmp_path):
    """A disk that fills up later would end the process by SIGBUS. One that has no room is one line."""
    states = tmp_path / "states"
    code, text = run(folder, tmp_path / "small", "--teacher-cache", states, file_size=60_000)
    assert code == 2
    assert "cannot be made" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert list(states.iterdir()) == []
    code, text = run(folder, tmp_path / "large", "--teacher-cache", states, "--max-steps", 1)
    assert code == 0, text
    (file,) = states.glob("*.states")
    assert file.stat().st_blocks * 512 >= file.stat().st_size


@pytest.mark.parametrize("method", ["full", "lora", "ba-lora"])
def test_export_from_writes_the_same_files_again(method, folder):
    """On the base of the training alone: on another one with the same path it is refused, and nothing is written."""
    output = folder / f"export-{method}"
    assert run(folder, output, "--method", method)[0] == 0
    code, text = run_apart("train", ["--export-from", output], folder)
    assert (code, "exists: replace it with --overwrite" in text) == (2, True)
    words = ["--export-from", output, "--output-dir", folder / f"{method}-again"]
    code, text = run_apart("train", words, folder)
    assert code == 0, text
    written = [file for name in ("adapter", "merged") for file in (output / name).glob("*") if file.is_file()]
    assert written
    base = folder / "base" / "model.safetensors"
    before = base.read_bytes()
    base.write_bytes(before[:-2] + b"\x00\x01")
    words = ["--export-from", output, "--output-dir", folder / f"{method}-other-base"]
    try:
        code, text = run_apart("train", words, folder)
    finally:
        base.write_bytes(before)
    assert (code, "the base model changed since" in text) == (2, True)
    assert not (folder / f"{method}-other-base").exists()
    for file in written:
        again = folder / f"{method}-again" / file.relative_to(output)
        read = bits if file.suffix == ".safetensors" else Path.read_bytes
        assert read(again) == read(file)


def exporting(run: Path, *options):
    return exports.exporting(parse_arguments(train.Arguments, "", ["--export-from", str(run), *map(str, options)]))


def test_an_export_goes_where_it_is_told_to(folder, uninterrupted, tmp_path, monkeypatch):
    """Also where that is the default of a training, whose own folders would be replaced. Nothing told: to the run's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("output_dir: output/ba-lora\n")
    for options in (["--output-dir", "output/ba-lora"], ["--output_dir=output/ba-lora"], ["--config", "config.yaml"]):
        with exporting(uninterrupted, *options) as (source, output_dir, _):
            assert (source, output_dir.resolve()) == (uninterrupted, tmp_path / "output" / "ba-lora")
    with exporting(uninterrupted, "--overwrite") as (source, output_dir, _):
        assert source == output_dir == uninterrupted


HOLDING = """
import sys
from pathlib import Path
from common.runs import held_alone
with held_alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_an_export_waits_for_the_run_that_writes_to_its_folder(uninterrupted, tmp_path):
    command, pipe = [sys.executable, "-c", HOLDING, uninterrupted], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another run is writing to"), exporting(uninterrupted, "--overwrite"):
            pass
        with exporting(uninterrupted, "--output-dir", tmp_path / "elsewhere") as (_, output_dir, _):
            assert output_dir == tmp_path / "elsewhere"
        holder.stdin.close()


@pytest.mark.parametrize("read", [load_tensors, load_progress])
def test_a_checkpoint_that_its_run_deletes_during_an_export_is_one_line(read, uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    refused = pytest.raises(RunStopped, match=r"a checkpoint of .* cannot be read any more .*Give this command again")
    with refused, exporting(run, "--output-dir", tmp_path / "out"):
        shutil.rmtree(run / LAST)
        read(run / LAST)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- NaN and Inf


@pytest.fixture(scope="module")
def poisoned(folder: Path) -> Path:
    """The model with NaN in the embedding of "?", and data in which one example of sixteen has it."""
    poisoned = folder / "poisoned"
    shutil.copytree(folder / "base", poisoned / "base")
    model = AutoModelForCausalLM.from_pretrained(poisoned / "base", tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[make_tokenizer()("?")["input_ids"][0]] = float("nan")
    model.save_pretrained(poisoned / "base")
    rows = [{"instruction": f"Add {i} and 1", "output": f"The sum is {i + 1}" + "?" * (i == 11)} for i in range(16)]
    write_jsonl(poisoned / "data.jsonl", rows)
    return poisoned


def test_nan_stops_the_run_with_step_term_and_example(poisoned):
    output = poisoned / "stop"
    code, text = run(poisoned, output, "--max-steps", 4, "--save-steps", 1)
    assert code == 1
    line = next(line for line in text.splitlines() if "stopped:" in line)
    step = int(line.partition("in step ")[2].partition(":")[0])
    assert "task" in line
    assert "11" in line.partition("in the examples")[2]
    assert saved_step(output) == step - 1 == steps_done(output)
    assert "Traceback" not in text


def test_skip_leaves_the_step_out_and_counts(poisoned):
    output = poisoned / "skip"
    options = ("--max-steps", 4, "--save-steps", 1, "--keep-checkpoints", 9, "--on-nonfinite", "skip")
    code, text = run(poisoned, output, *options)
    assert code == 0, text
    step = int(text.partition("note: step ")[2].split()[0])
    result = json.loads((output / "run.json").read_text())
    assert (result["steps"], result["skipped_steps"]) == (4, 1)
    states = {n: load_file(output / "checkpoints" / f"checkpoint-{n}" / TRAINED_TENSORS) for n in range(1, 5)}
    for n in range(2, 5):
        moved = any(not torch.equal(states[n][name], states[n - 1][name]) for name in states[n])
        assert moved == (n != step)
    assert all(tensor.isfinite().all() for tensor in load_file(output / "adapter/adapter_model.safetensors").values())
    lines = read_jsonl(output / "metrics.jsonl")
    assert all(value == value for line in lines for value in line.values())  # no NaN in the log either


# ---------------------------------------------------------------------------------------------- a given adapter


@pytest.mark.parametrize("kind", ["lora", "pissa", "ours"])
def test_a_run_starts_where_the_given_adapter_is(kind, folder, uninterrupted, tmp_path):
    """PEFT's own logits with that adapter are the reference; pre-trained logits with the adapters off."""
    base = folder / "base"
    model = AutoModelForCausalLM.from_pretrained(base)
    input_ids = torch.arange(40)[None]
    pretrained = model(input_ids).logits
    if kind == "ours":
        adapter = uninterrupted / "adapter"
        peer = peft.PeftModel.from_pretrained(model, adapter)
    else:
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=kind == "lora" or "pissa"
        )
        peer = peft.get_peft_model(model, config)
        for name, parameter in peer.named_parameters():
            if "lora_" in name:
                parameter.data += 0.05 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(name))
                )
        adapter = tmp_path / "adapter"
        peer.save_pretrained(adapter)
    expected = peer(input_ids).logits
    assert (expected - pretrained).norm() > 1e-2 * pretrained.norm()

    started = AutoModelForCausalLM.from_pretrained(base)
    read = read_adapter(adapter, "ba-lora")
    args = train.Arguments(method="ba-lora", rank=read.rank, alpha=read.alpha, target_modules=read.target_modules)
    read.require_fit(find_target_modules(started, read.target_modules, read.rank))

    def principal_factors(name):
        return train.principal_factors(started.get_submodule(name).weight, read.rank, read.alpha / read.rank)

    train.attach_adapters(started, args, read.trained_tensors(principal_factors))
    assert (started(input_ids).logits - expected).norm() < 1e-4 * expected.norm()
    with train.adapters_disabled(started):
        assert torch.equal(started(input_ids).logits, pretrained)
    code, text = run(folder, tmp_path / "out", "--init-adapter", adapter, "--max-steps", 2)
    assert code == 0, text
    assert json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())["r"] == (
        8 if kind == "pissa" else 16 if kind == "ours" else 4
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ],
)
def test_adapters_that_cannot_be_gone_on_with_are_refused(change, expected, uninterrupted, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(uninterrupted / "adapter", adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=expected):
        read_adapter(adapter, "ba-lora")
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="no adapter in PEFT's format"):
        read_adapter(adapter, "ba-lora")


def test_the_adapter_card_says_what_it_is(folder, uninterrupted):
    card = (uninterrupted / "adapter" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")  # a folder of this machine is no base_model for the hub
    for fact in (str(folder / "base"), "ba-lora", "LoRA of rank 16", "--max-lora-rank 16", str(folder / "data.jsonl")):
        assert fact in card
