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
And the "pre-trained" classifier behind Z_P is random. --teacher-head initial leaves it so; --teacher-head probe first
fits a linear probe on the frozen encoder's features, and teacher and student both start from it. The two together leave
L_SVDR without effect on two classes: a probe's two logits are each other's negative, Z_F has rank 1, and stays so.

How to run
    python finetune_bert_l_sst2.py                BERT-large on SST-2 with a GPU and the hub, else MiniLM on the demo
    python finetune_bert_l_sst2.py --task rte --model microsoft/deberta-v3-base
    python finetune_bert_l_sst2.py --model FOLDER --data train.tsv --eval-data dev.tsv --fields 0 --label 1   no header
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
import io
import json
import math
import os
import random
import shlex
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
from transformers import AutoModelForSequenceClassification, Trainer
from transformers.pytorch_utils import Conv1D

from eval.intervals import proportion
from train import (
    ProgressBar,
    RunStopped,
    UserError,
    adaptive_factor,
    add_adapters,
    check_checkpoint,
    clear_folder,
    common_training_arguments,
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
    require_below_one,
    require_fields,
    require_lr_scheduler,
    require_max_steps,
    require_not_negative,
    require_output_dir,
    require_positive,
    require_same_run,
    require_share,
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
    skip_done: bool = option(
        False, "leave a finished run of these settings alone, replace an unfinished one, refuse where there is another"
    )

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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this script trains in one process on one device: start it with python, not torchrun")
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
    require_max_steps(args.max_steps)
    positive = ("rank", "alpha", "max_length", "batch_size", "learning_rate", "temperature", "epochs", "spectral_k")
    require_positive(args, *positive, "evals_per_epoch", "patience", "max_examples")
    require_not_negative(args, "lambda_consistency", "lambda_diversity", "lambda_spectral", "weight_decay")
    require_share(args, "warmup_fraction")
    require_below_one(args, "warmup_ratio")
    if args.data == "demo" and (args.task or args.eval_data):
        raise UserError("--data demo has its own task and test sets: leave out --task and --eval-data")
    if args.data != "demo" and len(args.fields) not in (1, 2):
        raise UserError(f"--fields takes one or two columns of text, not {len(args.fields)}")
    if args.eval_data and args.data is None:
        raise UserError("--eval-data needs --data: without it, --task evaluates on its own validation split")
    require_lr_scheduler(args.lr_scheduler)
    if args.skip_done and not args.overwrite:
        leave_if_done(args)
        args.overwrite = is_unfinished(Path(args.output_dir))
    inputs = (args.config, args.model, args.data, *args.eval_data)
    require_output_dir(args, args.overwrite, "name another one, or use --overwrite", *inputs)
    return args


def leave_if_done(args: Arguments) -> None:
    """Ends the program where --output-dir holds a finished run of these settings.

    Raises:
        UserError: it is a run of other settings, or cannot be read.
    """
    results = Path(args.output_dir) / "results.json"
    if results.is_file():
        require_same_run(Path(args.output_dir), args)
        print(f"done: {results}")
        sys.exit(0)


def is_unfinished(folder: Path) -> bool:
    """Whether the folder is of a run of this script that did not end."""
    try:
        made = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(made, dict) and "teacher_head" in made and not (folder / "results.json").exists()


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
        if any(map(_is_fraction, train[args.label])):
            raise UserError(f"{source} has numbers in {args.label!r}, not classes: --task stsb learns to predict them")
        names = sorted({str(label) for label in train[args.label] if label not in (None, "")}, key=_natural)
        if len(names) < 2:
            raise UserError(f"{source} has {len(names)} class in {args.label!r}: classification needs two or more")
    class_names = None if task.num_classes == 1 else names
    train = to_split(train, args, class_names, source)
    tests = {name: to_split(records, args, class_names, name) for name, records in tests.items()}
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
            with open(sentiment.sentences(split), encoding="utf-8") as file:
                rows = [json.loads(line) for line in file]
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
        with open(path, encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {error}") from error
    if path.suffix == ".tsv":  # a quotation mark is text in a tsv file of GLUE's kind
        rows = [line.rstrip("\r").split("\t") for line in text.removesuffix("\n").split("\n")]
    else:
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise UserError(f"cannot read {source} as csv: {error}") from error
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
            # One text of two may be empty: QQP has such questions.
            if not isinstance(text, str) or not any(map(str.strip, row)):
                raise UserError(f"{source}, example {number}: {name!r} is empty or no text: {text!r}")
        if class_names is None:
            try:
                labels.append(float(label))
                if not math.isfinite(labels[-1]):
                    raise ValueError
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


def _is_fraction(label: Any) -> bool:
    try:
        return math.isfinite(float(label)) and float(label) % 1 != 0
    except (TypeError, ValueError):
        return False


def _natural(name: str) -> tuple[int, int | str]:
    return (0, int(name)) if name.isdecimal() else (1, name)


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
    """The names of the modules on top of the encoder: `classifier`; DeBERTa: `pooler` too; GPT-2: `score`. First what
    the checkpoint lacked of the encoder: the pooler of a BERT that was trained as a language model."""
    return getattr(model, "new_modules", []) + [
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
                if features.dim() == 3:  # GPT-2 scores every token and takes the last that does not pad
                    real = batch["input_ids"] != model.config.pad_token_id
                    places = torch.arange(real.shape[1], device=device)
                    features = features[torch.arange(len(mask), device=device), (places * real).argmax(dim=1)]
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
PROBE_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)


def fit_probe(
    features: np.ndarray,
    labels: list[int | float],
    validation_features: np.ndarray,
    validation_labels: list[int | float],
    *,
    regression: bool = False,
    bias: bool = True,
    penalties: tuple[float, ...] = PROBE_PENALTIES,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression (scikit-learn's) on standardized features; ridge regression for `regression`.

    Args:
        features: (N, d). bias: False where the head has none.
        penalties: inverse strengths C of the L2 penalty; the one with the best validation score is taken.

    Returns:
        weight (D, d) and bias (D,) on the features as they come.
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    labels = np.asarray(labels)
    rows = np.random.default_rng(0).permutation(len(labels))
    if len(rows) > PROBE_EXAMPLES:
        if not regression:  # one of each class first, or a rare one might be left out
            first = np.unique(labels[rows], return_index=True)[1]
            rows = np.concatenate([rows[first], np.delete(rows, first)])
        rows = rows[:PROBE_EXAMPLES]
    features, labels = features[rows].astype(np.float64), labels[rows]
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

    _, weight, offset = max((fitted(C) for C in penalties), key=lambda item: item[0])
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

    Regression: L_task and L_CR are mean squared errors of the predictions; the others are not defined for one column.

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
    if args.lambda_spectral > 0 and args.teacher_head == "probe" and num_classes == 2:
        # The probe's logits add up to 0, and the gradients of all terms with respect to the two do too.
        return (
            "note: L_SVDR is the constant -1 with every k: a probe's logits on two classes are each other's negative, "
            "and training keeps them so; with --teacher-head initial --spectral-k 1 it acts"
        )
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
        self._terms: dict[str, list[Tensor]] = {}  # since the last line of the log
        self.validation = None
        self.pop_callback(transformers.ProgressCallback)
        self.pop_callback(transformers.PrinterCallback)
        if not self.args.disable_tqdm:
            self.add_callback(ProgressBar)
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
            self._terms.setdefault(name, []).append(value.detach())
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # A term may be missing in a step: L_SVDR is not defined for a last batch of one example.
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._terms.items()}
            self._terms = {}
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

    def on_step_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        per_step = self.arguments.evals_per_epoch / len(train_dataloader)
        is_due = int(state.global_step * per_step + 1e-9) > int((state.global_step - 1) * per_step + 1e-9)
        if not is_due and state.global_step < state.max_steps:
            return
        score = self.validate()
        shown = score if math.isfinite(score) else None
        _append(self.file.parent / "metrics.jsonl", {"step": state.global_step, "validation": shown})
        if score > self.best:
            self.best, self.best_step, self.vain = score, state.global_step, 0
            save_file(trained_tensors(model), self.file)
        else:
            self.vain += 1
            control.should_training_stop |= self.vain >= self.arguments.patience

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.best == -math.inf:
            raise RunStopped("the training diverged, NaN or Inf at every validation: lower --learning-rate")
        load_trained_tensors(model, load_file(self.file))
        self.file.unlink()


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
        args=common_training_arguments(
            args,
            train_sampling_strategy="group_by_length",
            logging_strategy="no" if quiet else "steps",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=quiet,
        ),
        train_dataset=examples,
        data_collator=collator,
    )
    trainer.train()
    return trainer


# ------------------------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------------------------

BOOTSTRAP_SAMPLES = 500


def metric(name: str, predicted: np.ndarray, labels: np.ndarray) -> float:
    """A metric of GLUE, both (N,). A correlation with what never changes, or is no number, is 0."""
    if name == "accuracy":
        return float(np.mean(predicted == labels))
    if name == "f1":
        from sklearn.metrics import f1_score

        return float(f1_score(labels, predicted, zero_division=0.0))
    if name == "matthews":
        from sklearn.metrics import matthews_corrcoef

        return float(matthews_corrcoef(labels, predicted))
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        return 0.0
    from scipy import stats

    correlation = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name]
    value = float(correlation(predicted, labels).statistic)
    return value if math.isfinite(value) else 0.0


def predictions(logits: np.ndarray) -> np.ndarray:
    """The class, or with one column the number, that each row of the logits (N, D) predicts."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)


def softmax(logits: np.ndarray) -> np.ndarray:
    return F.softmax(torch.from_numpy(logits).double(), dim=-1).numpy()


def calibration_error(logits: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): Σ_bins n_b/N · |accuracy − mean confidence|, over bins of equal
    width of the confidence, the predicted class's probability. 0: of what it is 80 % sure of, 80 % is right."""
    probabilities = softmax(logits)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(labels))


def score(logits: np.ndarray, labels: list[int | float], data: Data) -> dict[str, Any]:
    """Every metric of the task with its 95 % interval (accuracy: Wilson's, others: bootstrap over the examples); for
    classes also the confusion matrix (rows: labels), the accuracy on each class, and the calibration error."""
    labels, predicted = np.asarray(labels), predictions(logits)
    result: dict[str, Any] = {}
    for name in data.metrics:
        if name == "accuracy":
            result[name] = proportion(int((predicted == labels).sum()), len(labels))
            continue
        rng = np.random.default_rng(0)
        samples = (rng.integers(len(labels), size=len(labels)) for _ in range(BOOTSTRAP_SAMPLES))
        values = [metric(name, predicted[rows], labels[rows]) for rows in samples]
        result[name] = {
            "value": metric(name, predicted, labels),
            "of": len(labels),
            "interval_95": np.quantile(values, (0.025, 0.975)).tolist(),
        }
    if not data.is_regression:
        count = len(data.class_names)
        confusion = np.bincount(labels * count + predicted, minlength=count**2).reshape(count, count)
        result["confusion_matrix"] = confusion.tolist()
        result["class_accuracy"] = {
            name: proportion(int(confusion[row, row]), int(confusion[row].sum()))
            for row, name in enumerate(data.class_names)
        }
        result["calibration_error"] = calibration_error(logits, labels)
    return result


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------


def model_path(args: Arguments) -> str:
    """What --model names; 'demo' is the embedded encoder."""
    if args.model != "demo":
        return args.model
    from data import sentiment

    try:
        return str(sentiment.encoder())
    except (RuntimeError, OSError) as error:
        raise UserError(f"cannot make the demo's encoder: {error}") from error


def load_tokenizer(args: Arguments, path: str, num_classes: int) -> tuple[Any, transformers.PretrainedConfig]:
    """The tokenizer, and the configuration of the model with a head of `num_classes`; reads no weights.

    Raises:
        UserError: not a readable checkpoint, or one whose head, targets or positions do not fit `args`, which also gets
            its target modules here.
    """
    check_checkpoint(path)
    tokenizer, config = load_tokenizer_and_config(path, args.model_revision, needs_all=False)
    if tokenizer is None:
        raise UserError(f"{args.model} has no tokenizer that can be read: copy it beside the weights")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.num_labels, config.pad_token_id = num_classes, tokenizer.pad_token_id
    config.problem_type = "regression" if num_classes == 1 else "single_label_classification"
    try:
        with torch.device("meta"):  # shapes only: a rank or target that does not fit is found before any weight is read
            skeleton = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise UserError(f"{args.model} ({config.model_type}) has no classifier in transformers") from error
    longest = getattr(config, "max_position_embeddings", args.max_length)
    for name, module in skeleton.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            longest -= module.padding_idx + 1  # RoBERTa counts positions from there
    if args.max_length > longest:
        raise UserError(f"--max-length is {args.max_length}, and {args.model} has {longest} positions")
    if args.method != "full":
        linear_for_conv1d(skeleton)
        if args.target_modules is None:
            args.target_modules = default_targets(skeleton)
        for name in find_target_modules(skeleton, args.target_modules, args.rank):
            if name.startswith(tuple(f"{head}." for head in head_modules(skeleton))):
                raise UserError(f"--target-modules names {name} too, which is trained whole: give longer names")
    return tokenizer, config


def load_classifier(path: str, config: transformers.PretrainedConfig, seed: int, revision: str | None = None) -> Any:
    """The pre-trained model with a head that is random where the checkpoint has none: the same for the same seed.

    What the checkpoint lacks of the encoder itself becomes its attribute `new_modules`: see `head_modules`.
    """
    transformers.set_seed(seed)
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it reports the missing head, which is meant
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=config,
            revision=revision,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # a classifier of other classes makes room for a new one
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot load the model {path!r}: {str(error).splitlines()[0]}") from error
    finally:
        transformers.logging.set_verbosity(level)
    head = tuple(f"{name}." for name in head_modules(model))
    mismatched = [item[0] if isinstance(item, tuple) else item for item in info["mismatched_keys"]]
    lacking = [name for name in (*info["missing_keys"], *mismatched) if not name.startswith(head)]
    model.new_modules = sorted({name.rpartition(".")[0] for name in lacking})
    return model


def main(argv: list[str]) -> None:
    started = time.time()
    args = resolve_arguments(argv)
    data = load_data(args)
    num_classes = len(data.class_names) or 1
    path = model_path(args)
    tokenizer, config = load_tokenizer(args, path, num_classes)
    if not data.is_regression:
        config.id2label = dict(enumerate(data.class_names))
        config.label2id = {name: number for number, name in enumerate(data.class_names)}
    if note := note_on_regularizers(args, num_classes):
        print(note, flush=True)
    # The model before training: the teacher, and the features of the linear probe.
    model = load_classifier(path, config, args.seed, args.model_revision)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if model.new_modules:
        print(f"note: {args.model} has no {', '.join(model.new_modules)}: random, and trained with the classifier")
    output_dir = Path(args.output_dir)
    clear_folder(output_dir)
    (output_dir / "config.yaml").write_text(config_text(args))
    counts = ", ".join(f"{name} {len(split)}" for name, split in data.tests.items())
    print(
        f"{args.model}: {len(data.train)} examples to train on, {len(data.validation)} to select by; to test: {counts}",
        flush=True,
    )
    collator = Collator(tokenizer.pad_token_id)
    train, validation, *tests = (
        encode(tokenizer, config, split.texts, args.max_length)
        for split in (data.train, data.validation, *data.tests.values())
    )

    before = run_model(model, train, collator, title="pre-trained model")
    before_validation = run_model(model, validation, collator)
    before_tests = [run_model(model, examples, collator) for examples in tests]
    probes = {}
    for name in ("features", "mean_states"):
        inputs = (getattr(before, name), data.train.labels, getattr(before_validation, name), data.validation.labels)
        has_bias = name == "mean_states" or final_linear(model).bias is not None
        probes[name] = fit_probe(*inputs, regression=data.is_regression, bias=has_bias)
    teacher_logits = before.logits
    if args.teacher_head == "probe":
        set_head(model, probes["features"])
        teacher_logits = apply_probe(probes["features"], before.features)
    results = {
        name: {
            "probe": score(apply_probe(probes["features"], outputs.features), split.labels, data),
            "probe_mean_states": score(apply_probe(probes["mean_states"], outputs.mean_states), split.labels, data),
        }
        for (name, split), outputs in zip(data.tests.items(), before_tests, strict=True)
    }

    for row, (example, label) in enumerate(zip(train, data.train.labels, strict=True)):
        example["labels"] = label
        if args.method == "ba-lora":
            example["teacher_logits"] = teacher_logits[row]
    conv1d = [] if args.method == "full" else conv1d_names(model)
    if conv1d:
        linear_for_conv1d(model)
    add_trainable(model, args)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    head = sum(
        parameter.numel() for name in head_modules(model) for parameter in model.get_submodule(name).parameters()
    )
    print(f"{args.method}: {trainable - head:,} trained parameters and {head:,} of the head", flush=True)

    def validate() -> float:
        logits = run_model(model, validation, collator).logits
        if not np.isfinite(logits).all():
            return -math.inf
        return metric(data.metrics[0], predictions(logits), np.asarray(data.validation.labels))

    trainer = fit(model, train, collator, args, validate)

    rows = []
    for (name, split), examples in zip(data.tests.items(), tests, strict=True):
        logits = run_model(model, examples, collator, title=name).logits
        results[name][args.method] = score(logits, split.labels, data)
        rows += prediction_rows(name, logits, split.labels, data)
    (output_dir / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = {
        "results": results,
        "validation": {data.metrics[0]: trainer.validation.best, "step": trainer.validation.best_step},
        "steps": trainer.state.global_step,
        "adapter_parameters": trainable - head,
        "head_parameters": head,
        "class_names": data.class_names,
        "examples": {"train": len(data.train), "validation": len(data.validation)},
        "arguments": asdict(args),
        "versions": package_versions(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "seconds": round(time.time() - started, 1),
    }
    export(model, tokenizer, args, path, conv1d)
    (output_dir / "results.json").write_text(json.dumps(summary, indent=2) + "\n")  # last: a run that has it is done
    print(report(summary, data, args))


def prediction_rows(name: str, logits: np.ndarray, labels: list[int | float], data: Data) -> list[dict[str, Any]]:
    """One dictionary per example for predictions.jsonl."""
    if data.is_regression:
        predicted = predictions(logits).tolist()
        return [
            {"data": name, "index": index, "label": label, "predicted": value}
            for index, (label, value) in enumerate(zip(labels, predicted, strict=True))
        ]
    return [
        {
            "data": name,
            "index": index,
            "label": data.class_names[label],
            "predicted": data.class_names[int(row.argmax())],
            "confidence": round(float(row.max()), 6),
        }
        for index, (label, row) in enumerate(zip(labels, softmax(logits), strict=True))
    ]


def export(model: transformers.PreTrainedModel, tokenizer: Any, args: Arguments, path: str, conv1d: list[str]) -> None:
    """Writes adapter/ and merged/; the adapters are merged away in `model`."""
    output_dir = Path(args.output_dir)
    if args.method != "full":
        export_adapter(model, output_dir / "adapter", path, args.target_modules, "SEQ_CLS", head_modules(model))
        tokenizer.save_pretrained(output_dir / "adapter")
    merge_adapters(model)
    conv1d_for_linear(model, conv1d)
    model.save_pretrained(output_dir / "merged")
    tokenizer.save_pretrained(output_dir / "merged")


def report(summary: dict[str, Any], data: Data, args: Arguments) -> str:
    """The summary for the terminal: a row per evaluation set and metric, then what lies behind the first set's."""
    header = ["test set", "examples", "metric", "linear probe", "probe, mean states", args.method]
    table = [header]
    for name, result in summary["results"].items():
        for metric_name in data.metrics:
            cells = [result[kind][metric_name] for kind in ("probe", "probe_mean_states", args.method)]
            texts = [
                f"{100 * cell['value']:.1f} [{100 * cell['interval_95'][0]:.1f}, {100 * cell['interval_95'][1]:.1f}]"
                for cell in cells
            ]
            table.append([name, str(cells[0]["of"]), metric_name, *texts])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    lines = ["", *lines, "", "(in percent, with 95 % intervals; both probes read the frozen encoder)"]
    name, result = next(iter(summary["results"].items()))
    if not data.is_regression:
        result = result[args.method]
        lines.append(f"{args.method} on {name}: calibration error {result['calibration_error']:.3f}; rows are labels")
        width = max(map(len, data.class_names))
        for label, row in zip(data.class_names, result["confusion_matrix"], strict=True):
            right = result["class_accuracy"][label]
            share = "none" if right["value"] is None else f"{right['value']:.1%} right"
            lines.append(f"  {label:{width}}  {'  '.join(f'{count:6d}' for count in row)}   {share}")
    output_dir = Path(args.output_dir)
    best, name = summary["validation"], data.metrics[0]
    lines += [
        f"best state: step {best['step']} of {summary['steps']}, validation {name} {best[name]:.3f}",
        f"{summary['seconds']:.0f} s in all; {output_dir}/: results.json, predictions.jsonl, config.yaml, merged/"
        + ("" if args.method == "full" else ", adapter/ (PEFT's format)"),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
