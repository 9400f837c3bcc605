"""The data pipeline, the trainer's arithmetic and whole runs, on tiny models; PEFT and transformers are the peers."""

import contextlib
import copy
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import oracle
import peft
import pytest
import torch
import transformers
import yaml
from conftest import MERGED, ROOT, bits, encode_turn, make_model, make_tokenizer, read_jsonl, relative_error
from safetensors.torch import load_file

import train
from common import chunked, estimates
from common.cli import RunStopped
from common.conversations import build_dataset
from common.layers import TARGET_MODULES
from common.packing import enable_packing
from common.ranks import start_ranks
from common.tables import load_records
from common.templates import ALPACA_PROMPT, IGNORE_INDEX, encode_prompt
from common.training import MicroBatches, Training, random_order

# ---------------------------------------------------------------------------------------------- data


def test_the_label_mask_survives_a_merge_across_the_prompts_border(tokenizer):
    response = "The sum"
    prompt = ALPACA_PROMPT.format(instruction="Add")
    together = tokenizer(prompt + response)["input_ids"]
    assert tokenizer.convert_tokens_to_ids(MERGED) in together  # the trap is there
    example = encode_turn(tokenizer, "Add", response, 512)
    learnt = [token for token in example["labels"] if token != IGNORE_INDEX]
    assert tokenizer.decode(learnt[:-1]) == response
    assert learnt[-1] == tokenizer.eos_token_id
    unlearnt = [t for t, label in zip(*example.values(), strict=True) if label == IGNORE_INDEX]
    assert tokenizer.decode(unlearnt) == prompt


def test_valid_positions_predict_exactly_the_response(tokenizer):
    """Against the plain reading: position i is valid where label i + 1 is not ignored. The token that pads is attended
    and predicted where it ends a response."""
    examples = [encode_turn(tokenizer, "a" * n, "b" * (7 - 2 * n), 512) for n in range(1, 4)]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    batch = train.PaddingCollator(tokenizer.pad_token_id)(examples)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(example["input_ids"]) for example in examples]
    width = batch["input_ids"].shape[1]
    expected = [
        (row * width + i, example["labels"][i + 1])
        for row, example in enumerate(examples)
        for i in range(len(example["labels"]) - 1)
        if example["labels"][i + 1] != IGNORE_INDEX
    ]
    assert list(zip(batch["valid_positions"].tolist(), batch["targets"].tolist(), strict=True)) == expected
    for made in (batch, train.PackingCollator()(examples)):  # the beginning that they share counts in each of them
        assert train.num_positions(made) == sum(len(example["input_ids"]) for example in examples)
    prompt_end = len(encode_prompt(tokenizer, "a")) - 1
    assert batch["valid_positions"][0] == prompt_end  # the last prompt token predicts the first response token


def test_padding_changes_neither_logits_nor_which_are_taken(model, tokenizer):
    examples = [encode_turn(tokenizer, "a", "b" * n, 512) for n in (1, 6)]
    logits = train.BALoRAModel(model).logits
    together = logits(train.PaddingCollator(3)(examples))
    alone = torch.cat([logits(train.PaddingCollator(3)([example])) for example in examples])
    assert relative_error(together, alone) < 1e-5


def test_examples_without_a_response_token_are_dropped_and_counted(tokenizer):
    rows = [
        {"q": "short", "a": "kept"},
        {"q": "x" * 600, "a": "cut away by max_length"},
        {"q": "empty", "a": "  "},
        {"q": None, "a": "no instruction"},
    ]
    dataset, dropped = build_dataset(datasets.Dataset.from_list(rows), tokenizer, ["q", "a"], 512)
    assert (len(dataset), dropped) == (1, 3)


def test_a_folder_that_tells_splits_apart_gives_the_one_that_is_asked_for(tmp_path):
    """Test questions must not end up in the training; names and folders of the usual kinds."""
    names = ["python/train.jsonl", "python/test.jsonl", "python/held_out.jsonl", "python/eval.jsonl"]
    names += ["code/data.jsonl", "code/eval.jsonl"]  # a name without a split's word counts as train, beside no train
    for name in (*names, "metamath/train-00000.jsonl", "metamath/dev.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"from": name}) + "\n")

    def sources(*args):
        return sorted(load_records(str(tmp_path), *args)["from"][:])

    assert sources() == ["metamath/train-00000.jsonl", "python/train.jsonl"]
    assert sources("train", "python") == ["python/train.jsonl"]
    assert sources("train", "code") == ["code/data.jsonl"]
    assert sources("test") == ["python/test.jsonl"]
    assert sources("validation", "metamath") == ["metamath/dev.jsonl"]
    assert sources("validation", "python") == ["python/eval.jsonl", "python/held_out.jsonl"]


@pytest.mark.parametrize(("suffix", "sep"), [("csv", ","), ("tsv", "\t")])
def test_every_cell_is_text_as_it_is_written(suffix, sep, tmp_path):
    """What looks like a missing value, a number, a truth value or a date."""
    answers = ["NA", "null", "None", "nan", "N/A", "2", "007", "1.50", "true", "2020-01-01", "1e5"]
    path = tmp_path / f"data.{suffix}"
    path.write_text(f"question{sep}answer\n" + "".join(f"q{i}{sep}{answer}\n" for i, answer in enumerate(answers)))
    assert load_records(str(path))["answer"][:] == answers
    path.write_text(f"question{sep}answer\nq{sep}\nq{sep}a\n")
    assert load_records(str(path))["answer"][:] == ["", "a"]
    path.write_text(f"question{sep}answer\nq{sep}2\nq{sep}\n")  # pandas alone would make 2.0 of it
    assert load_records(str(path))["answer"][:] == ["2", ""]


# ---------------------------------------------------------------------------------------------- trainer


@dataclass
class Trainer:
    """What `train.fit` takes."""

    arguments: train.Arguments
    model: train.BALoRAModel
    train_dataset: datasets.Dataset
    data_collator: Callable

    def train(self, order=None, watch=None) -> Training:
        """Trains on this process; `watch` is called before gradients are clipped."""
        Path(self.arguments.output_dir).mkdir(parents=True, exist_ok=True)
        count = len(self.train_dataset)
        order = order or random_order(count, self.arguments.seed)
        training = Training(
            self.arguments, start_ranks(self.arguments), self.arguments.gradient_accumulation, count, order
        )
        clip = training.clip_gradients
        training.clip_gradients = lambda: (watch and watch(), clip())[1]
        train.fit(training, self.model, self.train_dataset, None, self.data_collator)
        return training


def make_trainer(model, tokenizer, data_file, output_dir, **overrides) -> Trainer:
    settings = {
        "model": "m",
        "data": "d",
        "output_dir": str(output_dir),
        "rank": 4,
        "batch_size": 4,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "max_steps": 5,
        "logging_steps": 1,
        "consistency_schedule": "constant",
        "regularizer_schedule": "constant",
    }
    args = train.resolve_arguments(train.Arguments(**(settings | overrides)))
    records = load_records(str(data_file))
    dataset, _ = build_dataset(records, tokenizer, args.fields, args.max_length)
    transformers.set_seed(args.seed)
    train.add_adapters(model, args.method, args.rank, args.alpha, args.target_modules)
    assert not args.packing or enable_packing(model)
    collator = train.PackingCollator() if args.packing else train.PaddingCollator(tokenizer.pad_token_id)
    return Trainer(args, train.BALoRAModel(model, args.objective_memory), dataset, collator)


def one_step(trainer, count, sizes, monkeypatch) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The log and the gradients of one optimizer step over the first examples, in micro-batches of `sizes`; the model
    stays as it is."""
    before, gradients = copy.deepcopy(trainer.model.state_dict()), {}
    rows = iter(range(count))
    batches = [([next(rows) for _ in range(size)], True) for size in sizes]
    monkeypatch.setattr(MicroBatches, "of_step", lambda self, step: batches)
    trainer.arguments.max_steps = 1

    def watch() -> None:
        gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    training = trainer.train(watch=watch)
    trainer.model.load_state_dict(before)
    return training.progress.history[-1], gradients


@pytest.mark.parametrize("formulation", ["iclr2026", "arxiv2024"])
def test_splitting_a_batch_changes_nothing(formulation, tokenizer, data_file, tmp_path, monkeypatch):
    """8 sequences at once, as 2 x 4, and as 5 + 3: task, L_CR and L_DR; L_SVDR belongs to a micro-batch."""
    trainer = make_trainer(
        make_model(),
        tokenizer,
        data_file,
        tmp_path / "out",
        formulation=formulation,
        lambda_consistency=0.5,
        lambda_diversity=0.5,
        lambda_spectral=0.0,
    )
    for layer in train.adapter_layers(trainer.model.model).values():
        layer.lora_B.data += 0.05  # away from the teacher, so that L_CR has a gradient
    whole_log, whole = one_step(trainer, 8, [8], monkeypatch)
    for sizes in ([4, 4], [5, 3]):
        log, gradients = one_step(trainer, 8, sizes, monkeypatch)
        assert log["loss"] == pytest.approx(whole_log["loss"], rel=1e-5)
        for name, gradient in gradients.items():
            assert relative_error(gradient, whole[name]) < 1e-4, name


def test_the_spectral_term_is_the_mean_over_micro_batches(tokenizer, data_file, tmp_path, monkeypatch):
    trainer = make_trainer(
        make_model(), tokenizer, data_file, tmp_path / "out", lambda_consistency=0.0, lambda_diversity=0.0
    )
    examples = [trainer.train_dataset[i] for i in range(8)]
    log, _ = one_step(trainer, 8, [4, 4], monkeypatch)
    expected = 0.0
    for rows in (examples[:4], examples[4:]):
        logits = trainer.model.logits(trainer.data_collator(rows))
        expected += oracle.spectral(logits.detach().double().numpy(), 10, "frobenius")[0] / 2
    assert log["spectral"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("off", ["consistency", "diversity", "spectral"])
def test_a_term_that_is_off_costs_nothing(off, tokenizer, data_file, tmp_path, monkeypatch):
    """What would compute it is not called; the gradient is that of the definition without it."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"{off} is off")

    costs = {"consistency": (train.BALoRAModel, "of_teacher"), "diversity": (chunked, "top_k")}
    monkeypatch.setattr(*costs.get(off, (chunked, "spectral_value_and_gradient")), refuse)
    if off == "spectral":
        monkeypatch.setattr(train, "head_factor", refuse)
    trainer = make_trainer(make_model(), tokenizer, data_file, tmp_path / "out", **{f"lambda_{off}": 0.0})
    log, _ = one_step(trainer, 4, [4], monkeypatch)
    terms = {"consistency", "diversity", "spectral"}
    on = terms - {off}
    of_terms = set(log) & (terms | {f"lambda_{name}" for name in terms} | {"task"})
    assert of_terms == {"task"} | on | {f"lambda_{name}" for name in on}


def test_the_terms_on_loras_start(tokenizer, data_file, tmp_path, monkeypatch):
    """LoRA's adapter, of rank r on export, and BA-LoRA's objective: at the start the student is the teacher."""
    trainer = make_trainer(
        make_model(), tokenizer, data_file, tmp_path / "out", method="lora", regularize=True, lambda_consistency=1.0
    )
    examples = [trainer.train_dataset[i] for i in range(8)]
    sums, _ = one_step(trainer, 8, [8], monkeypatch)
    assert sums["consistency"] == pytest.approx(0.0, abs=1e-6)
    logits = trainer.model.logits(trainer.data_collator(examples)).detach().double().numpy()
    targets = trainer.data_collator(examples)["targets"].numpy()
    expected = {
        "task": oracle.task(logits, targets)[0],
        "diversity": oracle.topk_entropy(logits, 20)[0],
        "spectral": oracle.spectral(logits, 10, "frobenius")[0],
    }
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value, rel=1e-4), name
    assert sums["loss"] == pytest.approx(
        expected["task"] + 0.005 * expected["diversity"] + 0.005 * expected["spectral"], rel=1e-4
    )
    assert all(len(layer.stacked_factors()[0]) == 4 for layer in train.adapter_layers(trainer.model.model).values())


def test_the_teacher_is_the_untouched_base(tokenizer, data_file, tmp_path):
    trainer = make_trainer(make_model(), tokenizer, data_file, tmp_path / "out")
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[0]])
    teacher = trainer.model.of_teacher(trainer.model.logits, batch)
    assert not teacher.requires_grad
    base = make_model()
    enable_packing(base)
    assert torch.equal(teacher, train.BALoRAModel(base).logits(batch))
    assert relative_error(trainer.model.logits(batch), teacher) > 1e-3


@pytest.mark.parametrize(
    ("method", "alpha", "weight_decay", "max_grad_norm"),
    [
        ("pissa", 4, 0.0, 1.0),
        ("pissa", 8, 0.5, 0.0),
        ("lora", 4, 0.5, 1.0),
        ("lora", 8, 0.0, 0.0),
        ("full", 4, 0.5, 0.0),
    ],
)
def test_five_steps_equal_pefts(method, alpha, weight_decay, max_grad_norm, tokenizer, data_file, tmp_path):
    """PEFT's adapter, or the whole model, under the stock Trainer and the stock loss, same data, seed and optimizer."""
    optimizer = {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
    settings = {"method": method, "alpha": float(alpha)} | optimizer
    ours = make_trainer(make_model(), tokenizer, data_file, tmp_path / "ours", **settings)
    theirs = make_model()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=alpha,
        target_modules=TARGET_MODULES,
        init_lora_weights="pissa" if method == "pissa" else True,
        task_type="CAUSAL_LM",
    )
    theirs = theirs if method == "full" else peft.get_peft_model(theirs, config)
    if method == "lora":  # the same random start
        for name, layer in train.adapter_layers(ours.model.model).items():
            theirs.base_model.model.get_submodule(name).lora_A["default"].weight.data = layer.lora_A.data.clone()

    def collate(examples):
        width = max(len(example["input_ids"]) for example in examples)
        pad = lambda ids, value: ids + [value] * (width - len(ids))  # noqa: E731
        return {
            "input_ids": torch.tensor([pad(e["input_ids"], 0) for e in examples]),
            "attention_mask": torch.tensor([pad([1] * len(e["input_ids"]), 0) for e in examples]),
            "labels": torch.tensor([pad(e["labels"], -100) for e in examples]),
        }

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        **optimizer,
        warmup_steps=1,
        lr_scheduler_type="cosine",
        max_steps=5,
        seed=42,
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        save_strategy="no",
    )
    reference = transformers.Trainer(model=theirs, args=args, train_dataset=ours.train_dataset, data_collator=collate)
    start = {name: layer.merged_weight() for name, layer in train.adapter_layers(ours.model.model).items()}
    start |= {name: weight.clone() for name, weight in ours.model.model.named_parameters() if method == "full"}
    our_loss = ours.train().mean_loss()
    transformers.set_seed(args.seed)  # accelerate's order of examples hangs on the last seed of the process
    their_loss = reference.train().training_loss
    assert our_loss == pytest.approx(their_loss, rel=1e-4)
    for name, layer in train.adapter_layers(ours.model.model).items():
        their_layer = theirs.base_model.model.get_submodule(name)
        expected = their_layer.base_layer.weight + their_layer.get_delta_weight("default")
        assert relative_error(layer.merged_weight(), expected) < 1e-4, name
        assert relative_error(layer.merged_weight(), start[name]) > 1e-3, "nothing was learnt"
    for name, weight in ours.model.model.named_parameters() if method == "full" else ():
        assert relative_error(weight, theirs.get_parameter(name)) < 1e-4, name
        assert relative_error(weight, start[name]) > 1e-3, "nothing was learnt"


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_nan_in_the_gradients_alone_changes_no_bit(on_nonfinite, tokenizer, data_file, tmp_path, monkeypatch):
    """Every term is finite, and in the second step one gradient is not: no weight and no moment of Adam moves."""
    options = {"max_steps": 2, "gradient_accumulation": 1, "on_nonfinite": on_nonfinite}
    trainer = make_trainer(make_model(), tokenizer, data_file, tmp_path / "out", **options)
    first, calls = next(p for p in trainer.model.parameters() if p.requires_grad), itertools.count()
    first.register_hook(lambda gradient: gradient * (math.nan if next(calls) else 1))
    states, trainings, clip = [], [], Training.clip_gradients

    def state(training) -> list[torch.Tensor]:
        moments = [value for of_one in training.optimizer.state_dict()["state"].values() for value in of_one.values()]
        return [tensor.clone() for tensor in (*training.trained.state_dict().values(), *moments)]

    def watched(training):
        states.append(state(training))
        trainings[:] = [training]
        return clip(training)

    monkeypatch.setattr(Training, "clip_gradients", watched)
    stops = pytest.raises(RunStopped, match="NaN or Inf in step 2: the gradients")
    with stops if on_nonfinite == "stop" else contextlib.nullcontext():
        trainer.train()
    assert trainings[0].progress.skipped_steps == (on_nonfinite == "skip")
    assert len(states) == 2 and len(states[1]) > len(states[0])  # there are moments
    assert all(torch.equal(now, before) for now, before in zip(state(trainings[0]), states[1], strict=True))


# ---------------------------------------------------------------------------------------------- whole runs


def run(checkpoint, data_file, output_dir, *options) -> None:
    train.main(
        [
            *("--model", str(checkpoint), "--data", str(data_file), "--output-dir", str(output_dir)),
            *("--rank", "4", "--max-steps", "3", "--logging-steps", "1", "--learning-rate", "1e-2"),
            *options,
        ]
    )


@pytest.mark.parametrize("method", ["full", "lora", "pissa", "ba-lora"])
@torch.no_grad()
def test_a_run_leaves_what_it_promises(method, checkpoint, data_file, tmp_path, capsys):
    out = tmp_path / "out"
    with open(data_file, "a") as file:
        file.write(json.dumps({"instruction": "Add 1 and 1", "output": ""}) + "\n")
    with torch.enable_grad():
        run(checkpoint, data_file, out, "--method", method)
    input_ids = torch.tensor([make_tokenizer()("Add 1 and 1")["input_ids"]])
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    assert transformers.AutoTokenizer.from_pretrained(out / "merged").eos_token_id == 257
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    linear = [module for module in base.model.modules() if isinstance(module, torch.nn.Linear)]
    factors = 0 if method == "full" else 4 * sum(sum(module.weight.shape) for module in linear)
    whole = sum(weight.numel() for weight in base.parameters())
    assert relative_error(merged(input_ids).logits, base(input_ids).logits) > 1e-3
    unchanged = {k: v for k, v in base.config.to_dict().items() if k != "_name_or_path"}
    assert unchanged == {k: v for k, v in merged.config.to_dict().items() if k != "_name_or_path"}
    if method == "full":
        assert not (out / "adapter").exists()
    else:
        adapted = peft.PeftModel.from_pretrained(base, out / "adapter")
        assert relative_error(adapted(input_ids).logits, merged(input_ids).logits) < 1e-4
        assert peft.PeftConfig.from_pretrained(out / "adapter").base_model_name_or_path == str(checkpoint)

    lines = read_jsonl(out / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    names = {"loss", "task", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib"}
    if method == "ba-lora":
        names |= {"consistency", "diversity", "spectral"}
        names |= {"lambda_consistency", "lambda_diversity", "lambda_spectral"}
    assert names <= steps[0].keys()
    if method != "ba-lora":
        assert "consistency" not in steps[0]
    assert list((out / "tensorboard").glob("events*"))

    record = json.loads((out / "run.json").read_text())
    assert record["seed"] == 42
    assert (record["examples"], record["dropped_examples"]) == (16, 1)
    assert (record["trainable_parameters"], record["total_parameters"]) == (factors or whole, whole + factors)
    assert record["versions"]["torch"] == torch.__version__
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["method"] == method
    printed = capsys.readouterr().out
    assert str(out / "merged") in printed
    assert "eval/gsm8k.py --ckpt" in printed


def test_the_written_configuration_repeats_the_run(checkpoint, data_file, tmp_path):
    run(checkpoint, data_file, tmp_path / "one")
    train.main(["--config", str(tmp_path / "one" / "config.yaml"), "--output-dir", str(tmp_path / "two")])
    one, two = (bits(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one == two


def test_logged_terms_add_up_to_the_logged_loss(checkpoint, data_file, tmp_path):
    run(checkpoint, data_file, tmp_path / "out", "--consistency-schedule", "adaptive", "--formulation", "arxiv2024")
    steps = [line for line in read_jsonl(tmp_path / "out" / "metrics.jsonl") if "loss" in line]
    assert len(steps) == 3
    for step in steps:
        terms = (step[f"lambda_{name}"] * step[name] for name in ("consistency", "diversity", "spectral"))
        assert step["loss"] == pytest.approx(step["task"] + sum(terms), rel=1e-4)


def test_the_mean_loss_is_over_every_step(checkpoint, data_file, tmp_path):
    """However seldom they are logged; five steps are no multiple."""
    means = {}
    for logging_steps in ("1", "2", "10"):
        run(checkpoint, data_file, tmp_path / logging_steps, "--max-steps", "5", "--logging-steps", logging_steps)
        means[logging_steps] = json.loads((tmp_path / logging_steps / "run.json").read_text())["train_loss"]
    losses = [line["loss"] for line in read_jsonl(tmp_path / "1" / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 5
    assert means == pytest.approx(dict.fromkeys(means, sum(losses) / 5), rel=1e-4)


def test_another_seed_is_another_run(checkpoint, data_file, tmp_path, monkeypatch):
    """Another random start, and another order of the 16 examples in each of two epochs. Dropout is seeded anew in every
    micro-batch."""
    orders, dropout, starts, forward = {}, [], [], train.BALoRAModel.forward
    for seed in ("1", "3"):  # an epoch's order is that of seed + epoch
        order = orders[seed] = []

        def watched(self, inputs, *rest, order=order):
            order.extend(inputs["example_ids"])
            dropout.append(torch.initial_seed())
            return forward(self, inputs, *rest)

        monkeypatch.setattr(train.BALoRAModel, "forward", watched)
        options = ("--method", "lora", "--batch-size", "4", "--gradient-accumulation", "2", "--max-steps", "4")
        run(checkpoint, data_file, tmp_path / seed, "--seed", seed, *options, "--learning-rate", "1e-9")
        tensors = load_file(tmp_path / seed / "adapter" / "adapter_model.safetensors")
        starts.append(torch.cat([tensor.flatten() for name, tensor in tensors.items() if "lora_A" in name]))
    assert relative_error(*starts) > 1
    epochs = [tuple(order[first : first + 16]) for order in orders.values() for first in (0, 16)]
    assert len(set(epochs)) == 4
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len(set(dropout)) == len(dropout) == 16


def test_a_step_stays_in_few_files_and_no_library_calls_back(checkpoint, data_file, tmp_path):
    """Between two steps without a line of the log. What a library may call are modules, autograd's functions, saved
    tensors' hooks, and the attention that packed batches have."""
    calls = []

    def ours(frame) -> str | None:
        path = Path(frame.f_code.co_filename)
        inside = path.is_relative_to(ROOT) and "site-packages" not in path.parts
        return str(path.relative_to(ROOT)) if inside else None

    def watch(frame, event, _):
        if event == "call" and ours(frame):
            caller = frame.f_back
            while caller and caller.f_code.co_filename.endswith("contextlib.py"):  # our functions' `with`
                caller = caller.f_back
            outside = caller and not ours(caller) and caller.f_code.co_filename.partition("site-packages/")[2]
            calls.append((ours(frame), frame.f_code.co_qualname, outside or None))

    options = ["--model", checkpoint, "--data", data_file, "--output-dir", tmp_path / "out", "--rank", 4]
    options += ["--max-steps", 5, "--batch-size", 2, "--gradient-accumulation", 2, "--save-steps", 0]
    sys.setprofile(watch)
    try:
        train.main([str(word) for word in options])
    finally:
        sys.setprofile(None)
    begins = [number for number, call in enumerate(calls) if call[1] == "MicroBatches.of_step"]
    step = calls[begins[2] : begins[3]]
    assert {name for _, name, _ in step} >= {"BALoRAModel.forward", "Training.backward", "Training.end_step"}
    room = {"common/chunked.py", "common/token_kernel.py"}  # the objective without logits
    assert len({"the objective's room" if file in room else file for file, _, _ in step}) <= 6
    places = ("torch/nn/modules/", "torch/autograd/", "transformers/models/", "transformers/masking_utils.py")
    assert {outside for _, _, outside in step if outside and not outside.startswith(places)} == set()


def test_the_last_lines_of_a_training_ask_the_model(checkpoint, data_file, tmp_path, capsys):
    """The printed command answers as the merged model does when it generates behind the template's prompt. The command
    that serves it starts vLLM on the merged model."""
    run(checkpoint, data_file, tmp_path / "run")
    serve, command = capsys.readouterr().out.rstrip().splitlines()[-2:]
    assert command.startswith("ask it:") and serve.startswith("serve it:")
    words = shlex.split(serve.removeprefix("serve it:"))
    dry = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"DRY_RUN": "1"})
    assert f"--model {tmp_path / 'run' / 'merged'}" in dry.stdout, dry.stderr
    words = shlex.split(command.removeprefix("ask it:"))
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    merged = tmp_path / "run" / "merged"
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    chat = [{"role": "user", "content": "What is 3 and 4?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]
    answer = tokenizer.decode(output, skip_special_tokens=True)
    assert len(answer) > 20
    assert done.stdout.split() == answer.split()  # what a pipe makes of line ends aside


@pytest.mark.parametrize(
    ("options", "steps", "total", "said"),
    [
        ({}, 19, 7e9, ["19 optimizer steps are few"]),
        ({}, 200, 7e9, []),
        ({}, 200, 135e6, ["--learning-rate 2e-05 is low for a model of 135 M"]),
        ({"method": "lora"}, 200, 7e9, ["low for LoRA's start"]),
        ({"method": "full"}, 200, 135e6, []),
        ({"learning_rate": 1e-4}, 2, 135e6, ["2 optimizer steps are few", "the warm-up takes 1 of 2 steps"]),
        ({"warmup_ratio": 0.0}, 20, 7e9, []),
    ],
)
def test_defaults_that_do_not_fit_are_said(options, steps, total, said):
    notes = estimates.notes_on_defaults(train.Arguments(**options), steps, int(total))
    assert len(notes) == len(said)
    assert all(part in note and note.startswith("note: ") for part, note in zip(said, notes, strict=True))


def test_no_graph_lives_on_through_the_next_forward_pass(checkpoint, data_file, tmp_path, monkeypatch):
    """At each forward pass the loss before is gone, and with it what its graph holds."""
    losses, alive, forward = [], [], train.BALoRAModel.forward

    def watched(self, *args):
        alive.extend(reference() is not None for reference in losses)
        loss, terms = forward(self, *args)
        losses.append(weakref.ref(loss))
        return loss, terms

    monkeypatch.setattr(train.BALoRAModel, "forward", watched)
    run(checkpoint, data_file, tmp_path / "run")
    assert len(losses) > 6 and not any(alive)
