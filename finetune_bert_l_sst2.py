#!/usr/bin/env python3
"""BA-LoRA for classification and regression (arXiv 2408.04556): BERT-large on SST-2, GLUE, or one's own data.

The adapters and the regularizers are train.py's; here they act on the classifier's logits Z (N examples × D classes):

    L = L_task + λ₁·L_CR + λ₂·L_DR + λ₃·L_SVDR
    L_CR    stay near the pre-trained model's logits     T² · KL( softmax(Z_P/T) ‖ softmax(Z_F/T) )
    L_DR    decorrelate the classes' logits              (1/D) Σ_{i≠j} Cov(Z_F)_ij²
    L_SVDR  concentrate the batch's logits               − Σ_{i≤k} σ_i(Z_F) / Σ_j σ_j(Z_F)

One item of SST-2, and of a task with two texts (RTE):

    {"sentence": "one long string of cliches", "label": 0}
    {"sentence1": "No weapons were found in Iraq.", "sentence2": "Weapons were found in Iraq.", "label": 1}

Two traps of the published form. With k ≥ D (5, on two or three classes) L_SVDR is the constant -1: --spectral-k 1 acts.
And the "pre-trained" classifier behind Z_P is random: --teacher-head probe first fits a linear probe on the frozen
encoder's features, and gives it to teacher and student as the head they start from; --teacher-head initial is as published.

How to run
    python finetune_bert_l_sst2.py                     BERT-large on SST-2 with a GPU and the hub, else the demo: MiniLM
    python finetune_bert_l_sst2.py --task rte --model microsoft/deberta-v3-base
    python finetune_bert_l_sst2.py --data train.tsv --eval-data dev.tsv --fields 0 --label 1        a file without header
    python finetune_bert_l_sst2.py --config configs/glue_deberta_v3_base.yaml --task mrpc --learning-rate 5e-4

What comes out, in --output-dir
    adapter/            adapters and classifier in PEFT's format, for the published base model (not with --method full)
    merged/             a plain checkpoint with its tokenizer
    results.json        scores of the linear probe and of the trained model on every evaluation set, settings, versions
    predictions.jsonl   label, prediction and confidence of every evaluated example
    metrics.jsonl       loss and each term over training, the validation score
    config.yaml         every argument as it was used; `--config` takes it

The state that scores best on a held-out part of the training data (the demo has a file of its own) is kept; the
evaluation sets are read once, at the end.
"""

import csv
import dataclasses
import json
import math
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from eval.results import proportion
from train import (
    UserError,
    adaptive_factor,
    add_adapters,
    check_checkpoint,
    config_text,
    consistency_loss,
    covariance_loss,
    default_target_modules,
    export_adapter,
    find_target_modules,
    load_records,
    load_tokenizer_and_config,
    load_trained_tensors,
    merge_adapters,
    normalized_mse_consistency_loss,
    option,
    package_versions,
    parse_arguments,
    require_fields,
    run_script,
    schedule_factor,
    spectral_loss,
    teacher_confidence,
    trained_tensors,
)

ROOT = Path(__file__).resolve().parent
HUB_MODEL = "google-bert/bert-large-uncased"
HUB_EXPERIMENT, DEMO_EXPERIMENT = ROOT / "configs/bert_large_sst2.yaml", ROOT / "configs/nlu_demo.yaml"

# Published weights of the NLU regularizers (arXiv 2408.04556 v6 and ICLR 2026; v1 to v5). An argument left at None
# takes its value from here.
FORMULATIONS: dict[str, dict[str, float]] = {
    "iclr2026": {
        "lambda_consistency": 0.15,
        "lambda_diversity": 0.03,
        "lambda_spectral": 0.03,
        "temperature": 2.0,
    },
    "arxiv2024": {
        "lambda_consistency": 1e-4,
        "lambda_diversity": 4e-4,
        "lambda_spectral": 1e-4,
        "temperature": 1.0,
    },
}

# The linear layers of BERT and RoBERTa, DeBERTa, GPT-2 that get an adapter: attention, its output, the feed-forward.
TARGET_MODULES = ["query", "key", "value", "query_proj", "key_proj", "value_proj", "intermediate.dense", "output.dense"]
TARGET_MODULES += ["c_attn", "c_fc", "c_proj"]


@dataclass(frozen=True)
class Task:
    """A GLUE task: its texts' columns on the hub, its number of classes (1: a number is predicted), its metrics, of
    which the first selects the best state, and its evaluation splits."""

    fields: tuple[str, ...]
    num_classes: int
    metrics: tuple[str, ...] = ("accuracy",)
    eval_splits: tuple[str, ...] = ("validation",)


TASKS = {
    "cola": Task(("sentence",), 2, ("matthews", "accuracy")),
    "sst2": Task(("sentence",), 2),
    "mrpc": Task(("sentence1", "sentence2"), 2, ("accuracy", "f1")),
    "qqp": Task(("question1", "question2"), 2, ("accuracy", "f1")),
    "stsb": Task(("sentence1", "sentence2"), 1, ("pearson", "spearman")),
    "mnli": Task(("premise", "hypothesis"), 3, eval_splits=("validation_matched", "validation_mismatched")),
    "qnli": Task(("question", "sentence"), 2),
    "rte": Task(("sentence1", "sentence2"), 2),
}

INPUTS = ("input_ids", "attention_mask", "token_type_ids")


# ------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Arguments:
    # What is trained, on what
    config: str | None = option(None, "YAML file with any of these options by name; the command line overrides it")
    model: str | None = option(None, "hub name or folder of the pre-trained model; 'demo': the embedded MiniLM")
    model_revision: str | None = option(None, "hub revision of the model")
    task: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"] | None = option(
        None, "GLUE task: its fields and metrics, and without --data its data from the hub (nyu-mll/glue)"
    )
    data: str | None = option(None, "csv, tsv, jsonl or parquet file to train on; 'demo': the embedded movie reviews")
    eval_data: list[str] = option([], "files to evaluate on, one score each; none: a tenth of --data is set aside")
    fields: list[str] | None = option(
        None, "the data's one or two columns of text; numbers count the columns of a file without header, from 0"
    )
    label: str = option("label", "the data's column of labels, by name or number")
    max_examples: int | None = option(None, "train on the first N examples")
    max_length: int = option(128, "tokens per example; longer ones are cut")
    output_dir: str = option("output/nlu", "folder for everything this run writes")
    overwrite: bool = option(False, "replace an output folder that already holds something")

    # Adapter and head; the classifier is trained with every method
    method: Literal["full", "lora", "pissa", "ba-lora"] = option("ba-lora", "what to train beside the classifier")
    rank: int = option(8, "adapter rank r")
    alpha: float | None = option(None, "adapter scale: it acts with s = alpha / rank; None: alpha = rank")
    target_modules: list[str] | None = option(
        None, "names of the linear layers that get an adapter; None: attention and feed-forward"
    )
    teacher_head: Literal["initial", "probe"] = option(
        "initial", "head that the teacher keeps and training starts from: random (as published), or a fitted probe"
    )

    # Regularizers, for --method ba-lora only; None: the formulation's published value
    formulation: Literal["iclr2026", "arxiv2024"] = option("iclr2026", "which published form of the regularizers")
    lambda_consistency: float | None = option(None, "weight λ₁ of L_CR, consistency with the pre-trained model")
    lambda_diversity: float | None = option(None, "weight λ₂ of L_DR, decorrelation of the logits")
    lambda_spectral: float | None = option(None, "weight λ₃ of L_SVDR, concentration of the singular values")
    temperature: float | None = option(None, "distillation temperature T of L_CR")
    spectral_k: int = option(5, "k of L_SVDR, the leading singular values; acts where k < min(batch, classes)")
    consistency_schedule: Literal["constant", "cosine", "adaptive"] = option(
        "constant", "λ₁ over training; adaptive: by the teacher's confidence on each batch"
    )
    regularizer_schedule: Literal["constant", "two_phase", "linear_warmup", "quadratic_warmup"] = option(
        "constant", "λ₂ and λ₃ over training"
    )
    warmup_fraction: float = option(0.1, "part of training over which linear_warmup and quadratic_warmup rise")

    # Optimization
    epochs: float = option(3.0, "passes over the data")
    max_steps: int = option(-1, "stop after this many optimizer steps; -1: --epochs decides")
    batch_size: int = option(32, "examples per step; L_DR and L_SVDR are those of one batch")
    learning_rate: float = option(5e-4, "peak learning rate of AdamW")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    warmup_ratio: float = option(0.06, "part of training over which the learning rate rises")
    lr_scheduler: str = option("linear", "learning-rate schedule after warm-up, a name that transformers knows")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped")
    evals_per_epoch: int = option(1, "validations per epoch; the best state so far is kept")
    patience: int = option(5, "stop after this many validations without a better score")
    seed: int = option(42, "seed of the head, the adapters, dropout and data order")


def resolve_arguments(argv: list[str]) -> Arguments:
    """Reads the command line, chooses the experiment where it names none, and checks what needs no file.

    Raises:
        UserError: a value out of range, or an output folder that holds something.
    """
    args = parse_arguments(Arguments, __doc__, argv)
    if args.task is None and args.data is None:
        if args.config is not None:
            raise UserError(f"{args.config} names neither a task nor data: add --task or --data")
        experiment, reason = default_experiment()
        print(f"{reason}: {experiment.relative_to(ROOT)}", flush=True)
        args = parse_arguments(Arguments, __doc__, ["--config", str(experiment), *argv])
    if args.model is None:
        raise UserError("no --model: a hub name or a folder, or 'demo' for the embedded MiniLM")
    if args.alpha is None:
        args.alpha = float(args.rank)
    if args.fields is None and args.data != "demo":
        args.fields = list(TASKS[args.task].fields) if args.task else ["sentence"]
    for name, value in FORMULATIONS[args.formulation].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    positive = ("rank", "alpha", "max_length", "batch_size", "learning_rate", "temperature", "epochs", "spectral_k")
    for name in (*positive, "evals_per_epoch", "patience"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be above 0")
    for name in ("lambda_consistency", "lambda_diversity", "lambda_spectral", "weight_decay"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must not be negative")
    if not 0 < args.warmup_fraction <= 1:
        raise UserError(f"--warmup-fraction is {args.warmup_fraction}: it must be above 0 and at most 1")
    if args.max_examples is not None and args.max_examples <= 0:
        raise UserError(f"--max-examples is {args.max_examples}: it must be above 0")
    if args.data != "demo" and len(args.fields) not in (1, 2):
        raise UserError(f"--fields takes one or two columns of text, not {len(args.fields)}")
    if args.eval_data and args.data is None:
        raise UserError("--eval-data needs --data: without it, --task evaluates on its own validation split")
    if args.lr_scheduler not in list(transformers.SchedulerType):
        known = ", ".join(item.value for item in transformers.SchedulerType)
        raise UserError(f"unknown --lr-scheduler {args.lr_scheduler!r}: one of {known}")
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {output_dir} is a file")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not args.overwrite:
        raise UserError(f"--output-dir {output_dir} is not empty: name another one, or use --overwrite")
    return args


def default_experiment() -> tuple[Path, str]:
    """The experiment of a command line that names none, and why it is that one."""
    if not torch.cuda.is_available():
        return DEMO_EXPERIMENT, "no CUDA GPU, so the demo instead of BERT-large on SST-2"
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(HUB_MODEL, timeout=10)
    except Exception:  # offline mode, no network, a proxy's page: each has its own kind
        return DEMO_EXPERIMENT, "the model hub cannot be reached, so the demo instead of BERT-large on SST-2"
    return HUB_EXPERIMENT, "a CUDA GPU and the model hub"



# ------------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Split:
    """Texts (each a tuple of one or two) and labels: class numbers, or numbers to predict."""

    texts: list[tuple[str, ...]]
    labels: list[int | float]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: list[int]) -> "Split":
        return Split([self.texts[row] for row in rows], [self.labels[row] for row in rows])


@dataclass
class Data:
    """What a run reads: the state is selected on `validation`; `tests` are scored once, at the end, by name."""

    train: Split
    validation: Split
    tests: dict[str, Split]
    class_names: list[str]  # empty: a number is predicted
    metrics: tuple[str, ...]

    @property
    def is_regression(self) -> bool:
        return not self.class_names


def load_data(args: Arguments) -> Data:
    """Reads, checks and splits the data that `args` names.

    Raises:
        UserError: a missing column, an empty text, a label that training does not know, fewer than two classes.
    """
    if args.data == "demo":
        return demo_data(args.max_examples)
    task = TASKS.get(args.task, Task((), 0))
    if args.data is None:
        train = load_records("nyu-mll/glue", "train", name=args.task)
        tests = {name: load_records("nyu-mll/glue", name, name=args.task) for name in task.eval_splits}
        source = f"nyu-mll/glue, {args.task}"
    else:
        train, source = read_table(args.data, args.fields, args.label), args.data
        tests = {}
        for path in args.eval_data:
            name = Path(path).stem if Path(path).stem not in tests else path
            tests[name] = read_table(path, args.fields, args.label)
    remedy = "name the columns with --fields and --label"
    for records, name in ((train, source), *((records, name) for name, records in tests.items())):
        require_fields(records, [*args.fields, args.label], name, remedy)
    if args.max_examples is not None:
        train = train.select(range(min(args.max_examples, len(train))))
    if task.num_classes == 1:
        names = []
    elif task.num_classes:
        names = [str(number) for number in range(task.num_classes)]
    else:
        names = sorted({str(label) for label in train[args.label] if label is not None}, key=_natural)
        if len(names) < 2:
            raise UserError(f"{source} has {len(names)} class in {args.label!r}: classification needs two or more")
    splits = {
        name: to_split(records, args, None if task.num_classes == 1 else names, name)
        for name, records in {source: train, **tests}.items()
    }
    train, tests = splits.pop(source), splits
    if not tests:
        train, tests["held out"] = set_aside(train, source)
    train, validation = set_aside(train, source)
    for number, name in enumerate(names):
        if number not in train.labels:
            raise UserError(f"{source}: no training example of class {name!r} is left among {len(train)}: add some")
    return Data(train, validation, tests, names, task.metrics)


def demo_data(max_examples: int | None = None) -> Data:
    """The embedded movie reviews, with their own validation split, and three other domains to test on."""
    from data import sentiment

    names = ["negative", "positive"]

    def read(split: str) -> Split:
        try:
            rows = [json.loads(line) for line in sentiment.sentences(split).read_text().splitlines()]
        except (RuntimeError, OSError) as error:
            raise UserError(f"cannot make the demo's sentences: {error}") from error
        return Split([(row["sentence"],) for row in rows], [names.index(row["label"]) for row in rows])

    first, *others = sentiment.DOMAINS
    tests = {first: read("test")} | {domain: read(domain) for domain in others}
    train = read("train")
    if max_examples is not None:
        train = train.select(list(range(min(max_examples, len(train)))))
    return Data(train, read("validation"), tests, names, ("accuracy",))


def read_table(source: str, fields: list[str], label: str) -> datasets.Dataset:
    """`load_records`; where all columns are given as numbers, a csv or tsv file without header, read line by line."""
    path = Path(source)
    if not all(name.isdigit() for name in (*fields, label)) or path.suffix not in (".csv", ".tsv"):
        return load_records(source)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {error}") from error
    # A quotation mark is text in a tsv file of GLUE's kind.
    rows = [line.split("\t") for line in lines] if path.suffix == ".tsv" else list(csv.reader(lines))
    width = len(rows[0]) if rows else 0
    for number, row in enumerate(rows, 1):
        if len(row) != width:
            raise UserError(f"{source}, line {number}: {len(row)} columns, where the first line has {width}")
    return datasets.Dataset.from_dict({str(column): [row[column] for row in rows] for column in range(width)})


def to_split(records: datasets.Dataset, args: Arguments, class_names: list[str] | None, source: str) -> Split:
    """Checks every row. `class_names` None: labels are numbers to predict."""
    if len(records) == 0:
        raise UserError(f"{source} holds no example")
    columns = [records[name] for name in args.fields]
    texts, labels = list(zip(*columns, strict=True)), []
    for number, (row, label) in enumerate(zip(texts, records[args.label], strict=True), 1):
        for name, text in zip(args.fields, row, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{source}, example {number}: {name!r} is empty or no text: {text!r}")
        if class_names is None:
            try:
                labels.append(float(label))
            except (TypeError, ValueError) as error:
                raise UserError(f"{source}, example {number}: {args.label!r} is no number: {label!r}") from error
        elif str(label) in class_names:
            labels.append(class_names.index(str(label)))
        else:
            raise UserError(
                f"{source}, example {number}: label {label!r} is none of the training classes {', '.join(class_names)}"
            )
    return Split(texts, labels)


def set_aside(split: Split, source: str) -> tuple[Split, Split]:
    """A fixed random tenth, at most 2,000 examples, taken out: what is left, and the tenth."""
    rows = list(range(len(split)))
    random.Random(0).shuffle(rows)
    count = min(max(len(rows) // 10, 1), 2000)
    if len(rows) <= count:
        raise UserError(f"{source} has {len(rows)} example: too few to set some aside")
    return split.select(sorted(rows[count:])), split.select(sorted(rows[:count]))


def _natural(name: str) -> tuple[int, int | str]:
    return (0, int(name)) if name.isdigit() else (1, name)


def encode(
    tokenizer: transformers.PreTrainedTokenizerBase,
    config: transformers.PretrainedConfig,
    texts: list[tuple[str, ...]],
    max_length: int,
) -> list[dict[str, list[int]]]:
    """The model's inputs of each example, without padding."""
    encoded = tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=max_length)
    names = [name for name in INPUTS if name in encoded]
    if getattr(config, "type_vocab_size", 0) < 2 and "token_type_ids" in names:
        names.remove("token_type_ids")  # some tokenizers give them to models that know none
    return [dict(zip(names, row, strict=True)) for row in zip(*(encoded[name] for name in names), strict=True)]


@dataclass
class Collator:
    """Pads a batch to its longest example, on the right."""

    pad_token_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = max(len(example["input_ids"]) for example in examples)
        batch = {}
        for name in examples[0]:
            values = [example[name] for example in examples]
            if name in INPUTS:
                fill = self.pad_token_id if name == "input_ids" else 0
                values = [row + [fill] * (length - len(row)) for row in values]
            batch[name] = torch.tensor(np.array(values))
        return batch


# ------------------------------------------------------------------------------------------------------------------
# Model: an encoder with a classifier, and what is trained of it
# ------------------------------------------------------------------------------------------------------------------


def head_modules(model: transformers.PreTrainedModel) -> list[str]:
    """The names of the modules on top of the encoder: `classifier`; DeBERTa: `pooler` too; GPT-2: `score`."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def final_linear(model: transformers.PreTrainedModel) -> nn.Linear:
    """The layer whose outputs are the logits."""
    modules = [module for name in head_modules(model) for module in model.get_submodule(name).modules()]
    return [module for module in modules if isinstance(module, nn.Linear)][-1]


def default_targets(model: nn.Module) -> list[str]:
    """The entries of TARGET_MODULES that `model` has, or else train.py's."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [target for target in TARGET_MODULES if any(name.endswith(f".{target}") for name in names)]
    return found or default_target_modules(model)


def add_trainable(model: transformers.PreTrainedModel, args: Arguments) -> transformers.PreTrainedModel:
    """Makes `model` ready to train by --method, in place: adapters in the encoder, the head as it is."""
    add_adapters(model, args.method, args.rank, args.alpha, args.target_modules)
    for name in head_modules(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def linear_for_conv1d(model: nn.Module) -> nn.Module:
    """Puts an equal nn.Linear in the place of each of GPT-2's Conv1D (weight in × out), in place."""
    return _replace(model, Conv1D, lambda layer: _with(nn.Linear(*layer.weight.shape, device="meta"), layer))


def conv1d_for_linear(model: nn.Module, names: list[str]) -> nn.Module:
    """Undoes `linear_for_conv1d` for the layers `names`, in place."""
    return _replace(model, nn.Linear, lambda layer: _with(Conv1D(*layer.weight.shape), layer), names)


def _replace(
    model: nn.Module, kind: type, make: Callable[[nn.Module], nn.Module], names: list[str] | None = None
) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, kind) and (names is None or name in names):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


def _with(layer: nn.Module, source: nn.Module) -> nn.Module:
    """`layer` with the transposed weight of `source`, and its bias."""
    layer.weight = nn.Parameter(source.weight.detach().T.contiguous())
    layer.bias = nn.Parameter(source.bias.detach())
    return layer


def conv1d_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Conv1D)]


@dataclass
class Outputs:
    """What a model says of N examples.

    Attributes:
        logits: (N, D).
        features: what the final linear layer is given, (N, d).
        mean_states: the encoder's last hidden states, averaged over each example's tokens, (N, h).
    """

    logits: np.ndarray
    features: np.ndarray
    mean_states: np.ndarray


@torch.no_grad()
def run_model(
    model: transformers.PreTrainedModel,
    examples: list[dict[str, Any]],
    collator: Collator,
    batch_size: int = 64,
    title: str | None = None,
) -> Outputs:
    """Runs `model` on `examples` without dropout, those of like length together.

    Args:
        title: of the progress bar; None: no bar.
    """
    captured = {}
    handles = [
        final_linear(model).register_forward_pre_hook(lambda _, inputs: captured.update(features=inputs[0])),
        model.base_model.register_forward_hook(lambda *call: captured.update(states=call[2].last_hidden_state)),
    ]
    training, device = model.training, next(model.parameters()).device
    model.eval()
    order = sorted(range(len(examples)), key=lambda row: len(examples[row]["input_ids"]))
    parts: list[tuple[Tensor, ...]] = []
    try:
        with tqdm(total=len(examples), desc=title, unit="example", disable=title is None) as bar:
            for first in range(0, len(order), batch_size):
                chosen = [examples[row] for row in order[first : first + batch_size]]
                batch = collator([{name: row[name] for name in INPUTS if name in row} for row in chosen])
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                logits = model(**batch).logits
                mask, features = batch["attention_mask"], captured["features"]
                if features.dim() == 3:  # GPT-2 scores every token and takes the last
                    features = features[torch.arange(len(mask)), mask.sum(dim=1) - 1]
                means = (captured["states"] * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
                parts.append(tuple(tensor.float().cpu() for tensor in (logits, features, means)))
                bar.update(len(chosen))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    place = np.argsort(order)
    return Outputs(*(torch.cat(tensors).numpy()[place] for tensors in zip(*parts, strict=True)))


# ------------------------------------------------------------------------------------------------------------------
# The linear probe: what the frozen encoder knows already
# ------------------------------------------------------------------------------------------------------------------

PROBE_EXAMPLES = 20_000  # more change a probe little
PROBE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # inverse strength C of the L2 penalty, chosen on the validation split


def fit_probe(
    features: np.ndarray,
    labels: list[int | float],
    validation_features: np.ndarray,
    validation_labels: list[int | float],
    *,
    regression: bool = False,
    bias: bool = True,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression (scikit-learn's) on standardized features; ridge regression for `regression`.

    Args:
        features: (N, d). bias: False where the head has none.

    Returns:
        weight (D, d) and bias (D,) on the features as they come.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    rows = np.random.default_rng(0).permutation(len(labels))[:PROBE_EXAMPLES]
    features, labels = features[rows].astype(np.float64), np.asarray(labels)[rows]
    mean = features.mean(axis=0) if bias else np.zeros(features.shape[1])
    scale = features.std(axis=0)
    scale[scale < 1e-8] = 1.0

    def fitted(C: float) -> tuple[float, np.ndarray, np.ndarray]:
        if regression:
            probe = Ridge(alpha=1 / C, fit_intercept=bias)
        else:
            probe = LogisticRegression(C=C, max_iter=2000, fit_intercept=bias)
        probe.fit((features - mean) / scale, labels)
        weight, offset = np.atleast_2d(probe.coef_), np.atleast_1d(probe.intercept_)
        if not regression and len(weight) == 1:  # two classes: one logit's difference, shared out between both
            weight, offset = np.concatenate([-weight, weight]) / 2, np.concatenate([-offset, offset]) / 2
        weight = weight / scale
        return probe.score((validation_features - mean) / scale, validation_labels), weight, offset - weight @ mean

    _, weight, offset = max((fitted(C) for C in PROBE_PENALTIES), key=lambda item: item[0])
    return torch.tensor(weight, dtype=torch.float32), torch.tensor(offset, dtype=torch.float32)


def apply_probe(probe: tuple[Tensor, Tensor], features: np.ndarray) -> np.ndarray:
    """Logits (N, D)."""
    weight, bias = probe
    return F.linear(torch.from_numpy(features), weight, bias).numpy()


@torch.no_grad()
def set_head(model: transformers.PreTrainedModel, probe: tuple[Tensor, Tensor]) -> None:
    """Makes the probe the model's final linear layer."""
    layer, (weight, bias) = final_linear(model), probe
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(bias)


# ------------------------------------------------------------------------------------------------------------------
# Objective and training
# ------------------------------------------------------------------------------------------------------------------


def nlu_objective(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, args: Arguments, progress: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_task + λ₁·L_CR + λ₂·L_DR + λ₃·L_SVDR over one batch, and its terms. λs of 0 cost nothing.

    Regression: L_task and L_CR are mean squared errors of the predictions; the other two are not defined for one column.

    Args:
        logits, teacher_logits: Z_F and Z_P, (N, D); the teacher's are None for methods without regularizers.
        labels: (N,), class numbers, or numbers to predict.
        progress: the fraction of training done, for the schedules.
    """
    regression = logits.shape[1] == 1
    task = F.mse_loss(logits[:, 0], labels.to(logits.dtype)) if regression else F.cross_entropy(logits, labels)
    terms = {"task": task}
    if teacher_logits is None:
        return task, terms
    schedule = args.consistency_schedule
    factor = 1.0 if schedule == "adaptive" else schedule_factor(schedule, progress, args.warmup_fraction)
    if schedule == "adaptive" and not regression:
        factor = adaptive_factor(teacher_confidence(teacher_logits))
    loss = task
    if args.lambda_consistency > 0:
        if regression:
            terms["consistency"] = F.mse_loss(logits, teacher_logits)
        elif args.formulation == "arxiv2024":
            terms["consistency"] = normalized_mse_consistency_loss(logits, teacher_logits)
        else:
            terms["consistency"] = consistency_loss(logits, teacher_logits, args.temperature)
        loss = loss + args.lambda_consistency * factor * terms["consistency"]
    factor = schedule_factor(args.regularizer_schedule, progress, args.warmup_fraction)
    if args.lambda_diversity > 0 and not regression:
        terms["diversity"] = covariance_loss(logits)
        loss = loss + args.lambda_diversity * factor * terms["diversity"]
    if args.lambda_spectral > 0 and not regression and args.spectral_k < min(logits.shape):
        terms["spectral"] = spectral_loss(logits, args.spectral_k, "nuclear")
        loss = loss + args.lambda_spectral * factor * terms["spectral"]
    return loss, terms


def note_on_regularizers(args: Arguments, num_classes: int) -> str | None:
    """One line where a regularizer cannot act on this data, with the remedy; None where all do."""
    if args.method != "ba-lora":
        return None
    if num_classes == 1:
        return "note: regression: consistency is a mean squared error of predictions; L_DR and L_SVDR are off"
    if args.lambda_spectral > 0 and args.spectral_k >= min(num_classes, args.batch_size):
        return (
            f"note: L_SVDR with k = {args.spectral_k} on {num_classes} classes is the constant -1 and has no gradient; "
            f"--spectral-k {min(num_classes, args.batch_size) - 1} or less acts"
        )
    return None


class NLUTrainer(Trainer):
    """The transformers Trainer with the objective, its terms in metrics.jsonl, and the best state kept.

    Args:
        validate: gives the score of the model as it is; the state with the highest is put back at the end.
    """

    def __init__(self, *, arguments: Arguments, validate: Callable[[], float] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.arguments = arguments
        self._sums: dict[str, Tensor] = {}
        self._last_log = 0
        self.validation = None
        self.pop_callback(transformers.ProgressCallback)
        self.pop_callback(transformers.PrinterCallback)
        if not self.args.disable_tqdm:
            self.add_callback(_ProgressBar)
        if validate is not None:
            self.validation = KeepBest(validate, arguments)
            self.add_callback(self.validation)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor:
        labels, teacher_logits = inputs.pop("labels"), inputs.pop("teacher_logits", None)
        progress = self.state.global_step / self.state.max_steps
        loss, terms = nlu_objective(model(**inputs).logits, teacher_logits, labels, self.arguments, progress)
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            steps = self.state.global_step - self._last_log
            logs |= {name: float(value) / steps for name, value in self._sums.items()}
            self._sums, self._last_log = {}, self.state.global_step
        super().log(logs, start_time)
        _append(Path(self.args.output_dir) / "metrics.jsonl", self.state.log_history[-1])


class KeepBest(transformers.TrainerCallback):
    """Validates --evals-per-epoch times per epoch, keeps the best state, stops after --patience vain attempts.

    Attributes:
        best: the highest score so far. best_step: when.
    """

    def __init__(self, validate: Callable[[], float], arguments: Arguments):
        self.validate, self.arguments = validate, arguments
        self.file = Path(arguments.output_dir) / "best.safetensors"
        self.best, self.best_step, self.vain = -math.inf, 0, 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        steps_per_epoch = state.max_steps / max(state.num_train_epochs, 1)
        every = max(1, math.ceil(steps_per_epoch / self.arguments.evals_per_epoch))
        if state.global_step % every and state.global_step < state.max_steps:
            return
        score = self.validate()
        _append(self.file.parent / "metrics.jsonl", {"step": state.global_step, "validation": score})
        if score > self.best:
            self.best, self.best_step, self.vain = score, state.global_step, 0
            save_file(trained_tensors(model), self.file)
        else:
            self.vain += 1
            control.should_training_stop |= self.vain >= self.arguments.patience

    def on_train_end(self, args, state, control, model=None, **kwargs):
        load_trained_tensors(model, load_file(self.file))
        self.file.unlink()


class _ProgressBar(transformers.ProgressCallback):
    """The Trainer's progress bar without its print-outs; metrics.jsonl has them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4g}")


def _append(file: Path, row: dict[str, Any]) -> None:
    with open(file, "a") as stream:
        stream.write(json.dumps(row) + "\n")


def fit(
    model: transformers.PreTrainedModel,
    examples: list[dict[str, Any]],
    collator: Collator,
    args: Arguments,
    validate: Callable[[], float] | None = None,
    quiet: bool = False,
) -> NLUTrainer:
    """Trains `model` (see `add_trainable`) on encoded examples with `labels`, and `teacher_logits` for BA-LoRA."""
    trainer = NLUTrainer(
        arguments=args,
        validate=validate,
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            warmup_steps=args.warmup_ratio,  # below 1: a fraction of all steps
            lr_scheduler_type=args.lr_scheduler,
            max_grad_norm=args.max_grad_norm,
            optim="adamw_torch",
            seed=args.seed,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="group_by_length",
            logging_strategy="no" if quiet else "steps",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=quiet,
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=examples,
        data_collator=collator,
    )
    trainer.train()
    return trainer
