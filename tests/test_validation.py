"""Validation while training: its numbers, nothing changed by it, the best state, an end by patience, trackers."""

import copy
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import oracle
import pytest
import torch
import transformers
from accelerate import tracking
from conftest import ROOT, bits, make_model, make_tokenizer, read_jsonl, run_apart, save_tiny, sums, write_jsonl

import train
from common.conversations import build_dataset
from common.packing import enable_packing
from common.ranks import start_ranks
from common.tables import load_records
from common.templates import IGNORE_INDEX, encode_prompt
from common.training import Training, random_order
from common.validation import hold_out, is_out_of_patience, read_prompts, vain_validations

STEPS, EVAL_STEPS = 12, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model with dropout, so that a random number too many shows, and with settings that no greedy answer has; data
    to train on, and as much to validate on."""
    folder = tmp_path_factory.mktemp("validation")
    save_tiny(folder / "base", attention_dropout=0.1)
    own = transformers.GenerationConfig(do_sample=True, repetition_penalty=5.0, eos_token_id=257, pad_token_id=257)
    own.save_pretrained(folder / "base")
    rows = sums(71, 7)
    for name, part in (("all", rows[:60]), ("held_out", rows[60:71])):
        write_jsonl(folder / f"{name}.jsonl", part)
    (folder / "prompts.txt").write_text("Add 3 and 1\n\nAdd 90 and 1\n")
    return folder


def arguments(folder: Path, output: Path, *options) -> list[str]:
    fixed = ["--model", folder / "base", "--data", folder / "all.jsonl", "--rank", 4, "--learning-rate", 1e-2]
    fixed += ["--max-steps", STEPS, "--batch-size", 2, "--gradient-accumulation", 2, "--logging-steps", 1]
    fixed += ["--max-length", 210]  # short samples: random weights do not come to an end
    return [str(word) for word in (*fixed, "--save-steps", 4, "--output-dir", output, *options)]


def run(folder: Path, output: Path, *options) -> str:
    """What a whole run printed."""
    code, text = run_apart("train", arguments(folder, output, *options), output.parent)
    assert code == 0, text
    return text


def validated(folder: Path) -> tuple:
    """Options of a run with everything that a validation can do."""
    held_out = ("--validation-data", folder / "held_out.jsonl", "--eval-steps", EVAL_STEPS, "--keep-best")
    return (*held_out, "--sample-prompts", folder / "prompts.txt")


@pytest.fixture(scope="module")
def without(folder: Path) -> Path:
    run(folder, folder / "without")
    return folder / "without"


@pytest.fixture(scope="module")
def watched(folder: Path) -> Path:
    run(folder, folder / "watched", *validated(folder))
    return folder / "watched"


def last_state(output: Path) -> dict[str, bytes]:
    return bits(output / "checkpoints" / f"checkpoint-{STEPS}" / "trained.safetensors")


def adapter_of(output: Path) -> dict[str, bytes]:
    return bits(output / "adapter" / "adapter_model.safetensors")


def lines_of(output: Path, name: str = "metrics.jsonl") -> list[dict]:
    return read_jsonl(output / name)


def validations(output: Path) -> list[dict]:
    """Without what the clock says."""
    lines = [line for line in lines_of(output) if "eval_loss" in line]
    return [{name: value for name, value in line.items() if name != "eval_seconds"} for line in lines]


# ---------------------------------------------------------------------------------------------- right numbers


def logits_of_each(model: torch.nn.Module, examples: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Logits at the valid positions and their targets in float64: one example at a time, transformers' own forward."""
    logits, targets = [], []
    for example in examples:
        labels = torch.tensor(example["labels"])[1:]
        valid = labels != IGNORE_INDEX
        with torch.no_grad():
            whole = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        logits.append(whole[valid].numpy())
        targets.append(labels[valid].numpy())
    return np.concatenate(logits), np.concatenate(targets)


def halved(module: torch.nn.Module, inputs: tuple, output: dict) -> dict:
    output["logits"] = output["logits"] * 0.5
    return output


def test_a_held_out_prompt_that_is_trained_with_another_answer_is_counted(tmp_path, capsys):
    def examples(name: str, *pairs: tuple[str, str]):
        rows = [json.dumps({"instruction": prompt, "output": answer}) for prompt, answer in pairs]
        (tmp_path / name).write_text("\n".join(rows))
        return build_dataset(load_records(str(tmp_path / name)), make_tokenizer(), ["instruction", "output"], 512)[0]

    trained = examples("a.jsonl", ("p", "one"), ("p", "two"), ("q", "one"), ("r", "one"))
    watched = examples("b.jsonl", ("p", "two"), ("q", "two"), ("r", "three"), ("s", "one"))
    hold_out(train.Arguments(validation_data="b.jsonl"), trained, watched)
    said = "1 of the 4 examples of what is held out are trained on too; 2 of the 4 examples of what is held out are"
    assert f"note: {said} trained on with another label or answer\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("batch_size", "packing", "head"), [(1, True, "tied"), (4, True, "tied"), (4, False, "scaled")]
)
def test_a_validation_is_the_mean_over_valid_tokens_in_float64(batch_size, packing, head, folder, tmp_path):
    """Whatever the batches; with a head that is no plain linear map too, by the definition with whole logits."""
    settings = {
        "model": "m",
        "data": "d",
        "validation_data": "e",
        "output_dir": str(tmp_path),
        "rank": 4,
        "report_to": ["none"],
    }
    args = train.resolve_arguments(train.Arguments(**settings, batch_size=batch_size, packing=packing))
    tokenizer, base = make_tokenizer(), make_model()
    if head == "scaled":
        base.register_forward_hook(halved)
    records = load_records(str(folder / "held_out.jsonl"))
    held_out, _ = build_dataset(records, tokenizer, ["instruction", "output"], 512)
    model = train.add_adapters(copy.deepcopy(base), "ba-lora", 4, 4.0, None)
    for layer in train.adapter_layers(model).values():
        layer.lora_B.data += 0.02  # away from the teacher
    plain = train.merge_adapters(copy.deepcopy(model)).double()
    assert not packing or enable_packing(model)
    wrapped = train.BALoRAModel(model)
    assert wrapped.is_fused == (head == "tied")
    collator = train.PackingCollator() if packing else train.PaddingCollator(0)
    training = Training(args, start_ranks(args), 1, len(held_out), random_order(len(held_out), 0))
    training.prepare(wrapped, model)
    train.validate(training, wrapped, held_out, collator, None)
    metrics = training.progress.history[-1]

    examples = list(held_out)
    logits, targets = logits_of_each(plain, examples)
    teacher, _ = logits_of_each(base.double(), examples)
    parts = [examples[row : row + batch_size] for row in range(0, len(examples), batch_size)]
    spectra = [oracle.spectral(logits_of_each(plain, part)[0], 10, "frobenius")[0] for part in parts]
    expected = {
        "eval_loss": oracle.task(logits, targets)[0],
        "eval_consistency": oracle.consistency(logits, teacher, 2.0)[0],
        "eval_diversity": oracle.topk_entropy(logits, 20)[0],
        "eval_spectral": np.mean(spectra),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name
    assert metrics["eval_accuracy"] == pytest.approx((logits.argmax(axis=1) == targets).mean(), abs=1e-9)
    assert expected["eval_consistency"] > 0.01
    assert metrics.keys() == expected.keys() | {"eval_accuracy", "eval_seconds", "epoch", "step"}


def test_samples_are_the_merged_models_greedy_answers(watched):
    """Of the last validation, whose state is a checkpoint: by transformers alone, without packing and adapters."""
    last = [line for line in lines_of(watched, "samples.jsonl") if line["step"] == STEPS]
    assert [line["prompt"] for line in last] == ["Add 3 and 1", "Add 90 and 1"]
    assert json.loads((watched / "run.json").read_text())["validation"]["exported_step"] == STEPS
    model = transformers.AutoModelForCausalLM.from_pretrained(watched / "merged")
    tokenizer = make_tokenizer()
    for line in last:
        input_ids = torch.tensor([encode_prompt(tokenizer, line["prompt"])])
        length = len(line["answer"].encode())
        output = model.generate(input_ids, do_sample=False, repetition_penalty=1.0, max_new_tokens=length)
        answer = tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
        assert answer[:8] == line["answer"][:8]  # random weights: later tokens may hang on rounding
        assert line["answer"]


# ---------------------------------------------------------------------------------------------- nothing changes


def test_with_and_without_validation_a_run_ends_in_the_same_bits(without, watched):
    assert last_state(watched) == last_state(without)
    assert [line["step"] for line in validations(watched)] == [3, 6, 9, 12]
    theirs, ours = ([line["loss"] for line in lines_of(path) if "loss" in line] for path in (without, watched))
    assert ours == theirs
    assert validations(without) == []
    assert json.loads((without / "run.json").read_text())["validation"] is None


def test_a_teacher_cache_holds_the_held_out_examples_too(folder, watched):
    """The first run fills it with the 48 examples of its steps and the 11 held out, the second reads it."""
    for name in ("filling", "reading"):
        text = run(folder, folder / name, *validated(folder), "--teacher-cache", folder / "states")
        assert validations(folder / name) == validations(watched)
    assert "59 of 71 examples are there" in text


def test_a_share_is_the_run_on_what_remains(folder):
    """The same bits as a run whose file lacks the held-out examples; and the others are what is validated on."""
    share = folder / "share"
    run(folder, share, "--eval-share", 0.2, "--eval-steps", 6)
    record = json.loads((share / "run.json").read_text())
    assert (record["examples"], record["held_out_examples"]) == (48, 12)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(42)).tolist()
    rows = (folder / "all.jsonl").read_text().splitlines(keepends=True)
    (folder / "rest.jsonl").write_text("".join(rows[i] for i in sorted(order[12:])))
    (folder / "drawn.jsonl").write_text("".join(rows[i] for i in sorted(order[:12])))
    options = ("--data", folder / "rest.jsonl", "--validation-data", folder / "drawn.jsonl", "--eval-steps", 6)
    run(folder, folder / "apart", *options)
    assert last_state(share) == last_state(folder / "apart")
    assert validations(share) == validations(folder / "apart")


@pytest.mark.parametrize(
    "moment",  # lines of the log: steps 1 to 6, a validation after the third and the sixth; a sample for each
    [("metrics.jsonl", 8), ("samples.jsonl", 2), ("metrics.jsonl", 13)],
    ids=["at the validation", "while it samples", "after it"],
)
def test_killed_around_a_validation_and_resumed_is_an_uninterrupted_run(moment, folder, watched):
    output = folder / f"killed-{moment[0]}-{moment[1]}"
    words = arguments(folder, output, *validated(folder))
    code, text = run_apart("train", words, folder, ends=(signal.SIGKILL, *moment))
    assert code == -signal.SIGKILL, text
    run(folder, output, *validated(folder), "--resume")
    assert last_state(output) == last_state(watched)
    assert adapter_of(output) == adapter_of(watched)
    assert validations(output) == validations(watched)
    assert lines_of(output, "samples.jsonl") == lines_of(watched, "samples.jsonl")
    theirs, ours = (json.loads((path / "run.json").read_text())["validation"] for path in (watched, output))
    assert ours["best"]["eval_loss"] == theirs["best"]["eval_loss"]


# ---------------------------------------------------------------------------------------------- the best, and the end

# Ever worse on other data: nothing but "The sum is 1" is learnt, and what is held out says something else.
OVERFITTING = ("--method", "pissa", "--lr-scheduler", "constant", "--warmup-ratio", 0, "--learning-rate", 0.02)


@pytest.fixture(scope="module")
def overfitting(folder: Path) -> tuple:
    """Options of a run that gets better on the held-out examples at first, then worse."""
    rows = [{"instruction": f"Add {i} and 1", "output": "The sum is 1"} for i in range(40)]
    write_jsonl(folder / "one.jsonl", rows)
    rows = [{"instruction": f"Add {i} and 1", "output": f"The sum is {i + 1}, or so they say"} for i in range(8)]
    write_jsonl(folder / "other.jsonl", rows)
    data = ("--data", folder / "one.jsonl", "--validation-data", folder / "other.jsonl", "--eval-steps", 2)
    return (*OVERFITTING, *data, "--max-steps", 40, "--epochs", 20, "--save-steps", 3, "--keep-checkpoints", 1)


def test_the_best_state_is_exported_and_patience_ends_the_run(folder, overfitting):
    output = folder / "best"
    text = run(folder, output, *overfitting, "--keep-best", "--patience", 3)
    losses = {line["step"]: line["eval_loss"] for line in validations(output)}
    best = min(losses, key=losses.get)
    assert 2 < best < 34
    record = json.loads((output / "run.json").read_text())
    assert record["steps"] == max(losses) == best + 6  # three validations later
    assert record["validation"]["exported_step"] == record["validation"]["best"]["step"] == best
    assert record["validation"]["last"]["step"] == best + 6
    assert f"the state of step {best}" in text
    names = {path.name for path in (output / "checkpoints").iterdir()}
    assert names == {f"checkpoint-{best}", f"checkpoint-{best + 6}"}
    # A run that ends there by itself: the schedules are constant.
    run(folder, folder / "short", *overfitting, "--max-steps", best)
    assert adapter_of(output) == adapter_of(folder / "short")
    theirs, ours = (bits(path / "merged" / "model.safetensors") for path in (folder / "short", output))
    assert ours == theirs
    # The model is written again from the best checkpoint too.
    code, text = run_apart("train", ["--export-from", output, "--output-dir", folder / "exported"], folder)
    assert code == 0, text
    assert adapter_of(folder / "exported") == adapter_of(output)


def test_a_run_ended_by_patience_and_killed_before_its_export_takes_no_further_step(folder, overfitting):
    output = folder / "ended"
    options = (*overfitting, "--patience", 2)
    run(folder, output, *options)
    steps, adapter = json.loads((output / "run.json").read_text())["steps"], adapter_of(output)
    assert steps < 40
    (output / "run.json").unlink()
    (output / "adapter" / "adapter_model.safetensors").unlink()
    run(folder, output, *options, "--resume")
    assert json.loads((output / "run.json").read_text())["steps"] == steps
    assert adapter_of(output) == adapter


def test_patience_counts_validations_without_a_lower_loss():
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate([3.0, 2.0, 2.0, 2.5, float("nan")])]
    counts = [vain_validations(history[:length]) for length in range(1, 6)]
    assert counts == [0, 0, 1, 2, 3]
    assert [is_out_of_patience(history, patience) for patience in (2, 3, 4, None)] == [True, True, False, False]
    assert vain_validations([{"step": 1, "loss": 1.0}]) == 0


# ---------------------------------------------------------------------------------------------- trackers and the hub


class Tracker:
    """A tracker of accelerate's, and what it is told."""

    requires_logging_directory = False
    logged: ClassVar[list[dict]] = []
    finished: ClassVar[list[int]] = []  # how many lines each was told until then

    def __init__(self, project):
        self.options = None

    def start(self):
        pass

    def store_init_configuration(self, values):
        self.options = values

    def log(self, values, step):
        assert self.options["rank"] == 4
        self.logged.append(dict(values))

    def finish(self):
        self.finished.append(len(self.logged))


class BrokenTracker(Tracker):
    """A tracker on a full disk."""

    def log(self, values, step):
        raise OSError(28, "No space left on device")


def test_a_tracker_that_is_asked_for_is_told_the_validation(folder, monkeypatch, tmp_path):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard", "wandb"])
    options = ("--eval-share", 0.1, "--max-steps", 2, "--report-to", "wandb")
    train.main(arguments(folder, tmp_path / "out", *options))
    assert any("eval/loss" in logs for logs in Tracker.logged)
    assert any("train/task" in logs for logs in Tracker.logged)
    assert not (tmp_path / "out" / "tensorboard").exists()
    assert Tracker.finished == [len(Tracker.logged)]


def test_a_tracker_that_fails_costs_a_warning_and_not_the_run(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", BrokenTracker)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["wandb"])
    train.main(arguments(folder, tmp_path / "out", "--max-steps", 2, "--report-to", "wandb"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == 2
    assert capsys.readouterr().err.count("the trackers stopped at step 1 ([Errno 28] No space left on device)") == 1


def test_a_failed_push_loses_nothing_and_is_made_again_by_resume(folder, monkeypatch, tmp_path):
    """HF_HUB_OFFLINE stands for a network that is down."""
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    output = tmp_path / "out"
    options = ("--max-steps", 2, "--push-to-hub", "me/mine")
    words = [sys.executable, str(ROOT / "train.py"), *map(str, arguments(folder, output, *options))]
    finished = subprocess.run(words, capture_output=True, text=True, check=False)  # a new process, which has the token
    text = finished.stdout + finished.stderr
    assert finished.returncode == 1
    line = text.strip().splitlines()[-1]
    assert "stopped: could not push to me/mine" in line
    assert "the same command with --resume pushes again" in line
    assert "Traceback" not in text
    assert json.loads((output / "run.json").read_text())["steps"] == 2
    assert (output / "merged" / "model.safetensors").is_file()

    pushed = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **how: pushed.append((name, how)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **how: pushed.append(how))
    train.main(arguments(folder, output, *options, "--resume"))
    assert pushed[0] == ("me/mine", {"private": True, "exist_ok": True})
    assert (pushed[1]["repo_id"], pushed[1]["folder_path"]) == ("me/mine", output / "adapter")
    assert (output / "adapter" / "README.md").is_file()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "\ufeffHow \u2028many?\r\n\r\n Who?\r\n".encode()),
        ("a.txt", "How \u2028many?\n Who?\n".encode("utf-16")),
        ("a.jsonl", '{"prompt": "How \u2028many?"}\n" Who?"\n'.encode()),
        ("a.csv", '"prompt"\n"How \u2028many?"\n" Who?"\n'.encode()),
    ],
)
def test_prompts_are_read_as_they_are_written(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_prompts(str(tmp_path / name), "instruction") == ["How \u2028many?", " Who?"]
