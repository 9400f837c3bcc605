#!/usr/bin/env python3
"""BA-LoRA (Bias-Alleviating Low-Rank Adaptation, arXiv 2408.04556): fine-tunes a causal language model.

BA-LoRA trains a low-rank adapter that starts from the weights' principal singular vectors (PiSSA, arXiv 2404.02948) and
adds three regularizers on the model's *outputs*: consistency with the pre-trained model, diversity of the predictions,
and concentration of the logits' singular values. Plain PiSSA, LoRA and full fine-tuning are the same script with
another --method.

How to run
    python train.py --config configs/demo.yaml                              on any machine, no model hub needed
    python train.py --model FOLDER --data FILE.jsonl --fields question answer
    torchrun --nproc_per_node 8 train.py --config configs/llama2_7b_metamath.yaml
    deepspeed train.py --config configs/llama2_7b_metamath.yaml --deepspeed configs/ds_zero2.json

What comes out, in --output-dir
    adapter/        an ordinary LoRA adapter in PEFT's format, for the published base model
    merged/         a plain checkpoint with its tokenizer, for transformers, vLLM and eval/
    config.yaml     every argument as it was used; `--config` takes it
    run.json        seed, versions, command, counts and times
    metrics.jsonl   one line per logging step; the same in tensorboard/

Read from top to bottom: arguments, adapters, regularizers, objective, data, model, trainer, export, main.
"""

import contextlib
import csv
import dataclasses
import difflib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

IGNORE_INDEX = -100  # the label of a token that is not to be predicted; cross_entropy's own default

# The prompt that BA-LoRA, PiSSA and MetaMath train and evaluate with (Stanford Alpaca's, without input).
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

# The attention and feed-forward projections of Llama, Mistral, Gemma and Qwen2, and their fused forms in Phi-3. The
# experts of Mixtral are no linear layers in transformers: there, attention alone.
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED_TARGET_MODULES = ["qkv_proj", "gate_up_proj"]

# Published defaults of the two formulations (arXiv 2408.04556 v6 and ICLR 2026; v1 to v5). An argument left at None
# takes its value from here.
FORMULATIONS: dict[str, dict[str, Any]] = {
    "iclr2026": {
        "lambda_consistency": 0.025,
        "lambda_diversity": 0.005,
        "lambda_spectral": 0.005,
        "temperature": 2.0,
        "entropy_top_k": 20,
        "spectral_norm": "frobenius",
        "consistency_schedule": "cosine",
        "regularizer_schedule": "two_phase",
    },
    "arxiv2024": {
        "lambda_consistency": 1e-4,
        "lambda_diversity": 3e-4,
        "lambda_spectral": 1e-4,
        "temperature": 1.0,
        "entropy_top_k": 0,
        "spectral_norm": "nuclear",
        "consistency_schedule": "constant",
        "regularizer_schedule": "constant",
    },
}


# ------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------


def option(default: Any, text: str) -> Any:
    """A dataclass field that is also a command-line option with the help `text`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Arguments:
    # What is trained, on what
    config: str | None = option(None, "YAML file with any of these options by name; the command line overrides it")
    model: str | None = option(None, "hub name or folder of the pre-trained model; 'demo': the embedded SmolLM2-135M")
    model_revision: str | None = option(None, "hub revision of the model")
    trust_remote_code: bool = option(False, "run code that the model's repository ships")
    data: str | None = option(
        None, "hub name, json, jsonl, csv or parquet file, or a folder of them; 'demo': the embedded problems"
    )
    data_subset: str | None = option(None, "folder inside --data, such as metamath in fxmeng/pissa-dataset")
    data_config: str | None = option(None, "configuration of a hub data set, such as main of openai/gsm8k")
    split: str = option("train", "split of a hub data set or of a folder whose files are named after splits")
    fields: list[str] = option(["instruction", "output"], "the data's two fields: instruction and response")
    max_examples: int | None = option(None, "use the first N examples")
    max_length: int = option(512, "tokens per example, prompt included; longer ones are cut at the end")
    output_dir: str = option("output/ba-lora", "folder for everything this run writes")
    overwrite: bool = option(False, "replace an output folder that already holds something")
    dry_run: bool = option(False, "print the configuration, parameters, steps, memory and disk to come, then stop")
    export_from: str | None = option(
        None, "an earlier run's folder: write its adapter/ and merged/ again from its newest checkpoint, then stop"
    )

    # Adapter
    method: Literal["full", "lora", "pissa", "ba-lora"] = option("ba-lora", "what to train")
    rank: int = option(128, "adapter rank r")
    alpha: float | None = option(None, "adapter scale: it acts with s = alpha / rank; None: alpha = rank")
    target_modules: list[str] | None = option(
        None, "names of the linear layers that get an adapter; None: the model's attention and feed-forward projections"
    )
    init_adapter: str | None = option(None, "start from this LoRA or PiSSA adapter of PEFT's format, or one of ours")
    init_cache: str | None = option(None, "folder that keeps PiSSA's initial factors for the next run")

    # Regularizers, for --method ba-lora only; None: the formulation's published value
    formulation: Literal["iclr2026", "arxiv2024"] = option("iclr2026", "which published form of the regularizers")
    lambda_consistency: float | None = option(None, "weight λ₁ of L_CR, consistency with the pre-trained model")
    lambda_diversity: float | None = option(None, "weight λ₂ of L_DR, diversity of the predictions")
    lambda_spectral: float | None = option(None, "weight λ₃ of L_SVDR, concentration of the singular values")
    temperature: float | None = option(None, "distillation temperature T of L_CR")
    entropy_top_k: int | None = option(None, "K of L_DR: entropy among the K largest logits; 0: the whole vocabulary")
    spectral_k: int = option(10, "k of L_SVDR: the leading singular values")
    spectral_norm: Literal["frobenius", "nuclear"] | None = option(None, "what L_SVDR divides by")
    consistency_schedule: Literal["constant", "cosine", "adaptive"] | None = option(
        None, "λ₁ over training; adaptive: by the teacher's confidence on each micro-batch"
    )
    regularizer_schedule: Literal["constant", "two_phase", "linear_warmup", "quadratic_warmup"] | None = option(
        None, "λ₂ and λ₃ over training"
    )
    warmup_fraction: float = option(0.1, "part of training over which linear_warmup and quadratic_warmup rise")

    # Optimization; the defaults are the paper's, for 8 GPUs: 4 x 4 x 8 = 128 sequences per step
    epochs: float = option(1.0, "passes over the data")
    max_steps: int = option(-1, "stop after this many optimizer steps; -1: --epochs decides")
    batch_size: int = option(4, "sequences per device and micro-batch; L_SVDR is the spectrum of one micro-batch")
    gradient_accumulation: int = option(4, "micro-batches per optimizer step")
    learning_rate: float = option(2e-5, "peak learning rate of AdamW")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    warmup_ratio: float = option(0.03, "part of training over which the learning rate rises")
    lr_scheduler: str = option("cosine", "learning-rate schedule after warm-up, a name that transformers knows")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped")
    seed: int = option(42, "seed of initialisation and data order")

    # Interruptions
    resume: bool = option(
        False,
        "go on from the newest complete checkpoint in --output-dir, or start where none is; a finished run stays",
    )
    save_steps: int = option(100, "optimizer steps between two checkpoints; 0: none, except on SIGTERM and SIGINT")
    keep_checkpoints: int = option(2, "how many checkpoints are kept")
    on_nonfinite: Literal["stop", "skip"] = option("stop", "what a NaN or Inf in loss or gradients does to the run")

    # Machine
    teacher_cache: str | None = option(
        None, "folder that keeps the teacher's hidden states, so that further epochs, seeds and λs skip its pass"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "type of base weights and activations; auto: bfloat16 where the GPU has it, else float32"
    )
    load_in: Literal["4bit", "8bit"] | None = option(None, "quantize the frozen base by bitsandbytes; needs a GPU")
    attn_implementation: str | None = option(None, "attention of transformers: sdpa, eager, flash_attention_2")
    packing: bool = option(True, "lay sequences end to end instead of padding them, where the model can")
    objective_memory: float = option(128.0, "MiB for the objective's chunks of logits; more is a little faster")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    deepspeed: str | None = option(None, "DeepSpeed configuration (JSON); start through deepspeed or torchrun")
    logging_steps: int = option(10, "optimizer steps between two lines of metrics.jsonl")


class UserError(ValueError):
    """A mistake of the user's. The message is one line that names the thing and the remedy; scripts exit with 2."""


class RunStopped(RuntimeError):
    """The run cannot go on, for no mistake of the user's. One line on stderr and exit code 1; checkpoints are kept."""


ArgumentsType = TypeVar("ArgumentsType")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the options)")


def parse_arguments(arguments_type: type[ArgumentsType], description: str, argv: list[str]) -> ArgumentsType:
    """Reads `argv` into the dataclass; a `--config` file's entries come first, so that the command line wins.

    Raises:
        UserError: an unknown option or key, or a value that does not fit.
    """
    parser = _Parser(
        arguments_type, description=description, formatter_class=_HelpFormatter, allow_abbrev=False, add_help=True
    )
    parser.add_argument("--local_rank", "--local-rank", help="==SUPPRESS==")  # the deepspeed launcher adds it
    config = parser.parse_known_args(argv)[0].__dict__.get("config")
    if config:
        argv = _config_as_argv(Path(config), [item.name for item in dataclasses.fields(arguments_type)]) + argv
    values = vars(parser.parse_args(argv))
    values.pop("local_rank")
    return arguments_type(**values)


class _HelpFormatter(transformers.hf_argparser.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text


def _config_as_argv(path: Path, names: list[str]) -> list[str]:
    try:
        entries = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the configuration {path}: {_first_line(error)}") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path} is not a configuration: expected lines of the form 'option: value'")
    argv = []
    for key, value in entries.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise UserError(f"unknown key {key!r} in {path}" + (f"; did you mean {near[0]!r}?" if near else ""))
        if value is None or value == []:
            continue
        argv += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return argv


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def run_script(main: Callable[[list[str]], None]) -> None:
    """Runs `main` on the command line; a UserError becomes one line on stderr and exit code 2."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed would find too, with a warning in every process
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunStopped as error:
        print(f"{Path(sys.argv[0]).name}: stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def require_positive(args: Any, *names: str) -> None:
    """Raises a UserError where one of these arguments is given and not above 0."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be above 0")


def require_not_negative(args: Any, *names: str) -> None:
    """Raises a UserError where one of these arguments is below 0."""
    for name in names:
        if getattr(args, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must not be negative")


def require_share(args: Any, *names: str) -> None:
    """Raises a UserError where one of these arguments is no part of a whole."""
    for name in names:
        if not 0 < getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be above 0 and at most 1")


def require_below_one(args: Any, *names: str) -> None:
    """Raises a UserError where one of these arguments is no part of a whole, nor 0."""
    for name in names:
        if not 0 <= getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 0 and below 1")


def require_output_dir(args: Any, may_hold: bool, remedy: str, *inputs: str | None) -> None:
    """Raises UserError where --output-dir is a file, holds something that it may not, or, with --overwrite, one of
    the `inputs` or the working directory: they would be deleted."""
    path = Path(args.output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output-dir {path} is a file")
    if path.is_dir() and any(path.iterdir()) and not may_hold:
        raise UserError(f"--output-dir {path} is not empty: {remedy}")
    for name in (".", *filter(None, inputs)):
        if args.overwrite and Path(name).exists() and Path(name).resolve().is_relative_to(path.resolve()):
            what = "the working directory" if name == "." else name
            raise UserError(f"--output-dir {path} holds {what}, which --overwrite would delete: name another folder")


def clear_folder(folder: Path) -> None:
    """Makes `folder`, or deletes what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def first_difference(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], but: Collection[str] = (), *, common: bool = False
) -> str | None:
    """How the settings of something that is there differ from `ours`, in a few words; None where they do not.

    Args:
        but: names that may differ.
        common: compare those names alone that both have, not every one of ours.
    """
    for name, value in ours.items():
        if name not in but and (name in theirs or not common) and theirs.get(name) != value:
            return f"{name} = {theirs.get(name)}, not {value}"
    return None


# Those of transformers' schedules that need no settings of their own.
LR_SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial")
LR_SCHEDULERS += ("cosine_with_restarts",)


def require_lr_scheduler(name: str) -> None:
    """Raises a UserError where `name` is not one of LR_SCHEDULERS."""
    if name not in LR_SCHEDULERS:
        raise UserError(f"unknown --lr-scheduler {name!r}: one of {', '.join(LR_SCHEDULERS)}")


def require_max_steps(value: int) -> None:
    """Raises a UserError where --max-steps is neither a number of steps nor -1."""
    if value != -1 and value <= 0:
        raise UserError(f"--max-steps is {value}: it must be above 0, or -1 for --epochs to decide")


def resolve_arguments(args: Arguments) -> Arguments:
    """Returns `args` with every open value filled in, after checking all that can be checked without reading anything.

    Raises:
        UserError: a value out of range, or nothing to train or to train on.
    """
    args = dataclasses.replace(args)
    for name in ("model", "data"):
        if getattr(args, name) is None:
            raise UserError(f"no --{name}: give a hub name or a path, or try --config configs/demo.yaml")
    if args.alpha is None:
        args.alpha = float(args.rank)
    for name, value in FORMULATIONS[args.formulation].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    positive = ("rank", "alpha", "max_length", "batch_size", "gradient_accumulation", "learning_rate", "temperature")
    positive += ("epochs", "logging_steps", "spectral_k", "objective_memory", "keep_checkpoints", "max_examples")
    require_positive(args, *positive)
    require_not_negative(
        args, "lambda_consistency", "lambda_diversity", "lambda_spectral", "entropy_top_k", "save_steps"
    )
    require_share(args, "warmup_fraction")
    require_below_one(args, "warmup_ratio")
    if len(args.fields) != 2:
        raise UserError(f"--fields takes two names, instruction and response, not {len(args.fields)}")
    require_lr_scheduler(args.lr_scheduler)
    require_max_steps(args.max_steps)
    if args.deepspeed:
        try:
            json.loads(Path(args.deepspeed).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"no DeepSpeed configuration in {args.deepspeed}: {_first_line(error)}") from error
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with what --overwrite deletes: give one of the two")
    may_hold = args.overwrite or args.resume or args.dry_run
    remedy = "name another one, go on with --resume, or use --overwrite"
    inputs = (args.config, args.model, args.data, args.init_adapter, args.deepspeed, args.init_cache)
    require_output_dir(args, may_hold, remedy, *inputs, args.teacher_cache)
    if args.load_in is not None and args.method == "full":
        raise UserError("--load-in quantizes a frozen base, and --method full trains it")
    if args.load_in is not None and not torch.cuda.is_available() and not args.dry_run:
        raise UserError(f"--load-in {args.load_in} needs a CUDA GPU and bitsandbytes")
    if args.init_adapter is not None and args.method == "full":
        raise UserError("--init-adapter needs a method with adapters, not full")
    return args


# ------------------------------------------------------------------------------------------------------------------
# Adapters
# ------------------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A linear layer W, unchanged and frozen, with a trainable low-rank term: y = W x + ΔW x.

    LoRA (arXiv 2106.09685):   ΔW = s·B A,  A Kaiming-uniform, B zero.
    PiSSA (arXiv 2404.02948):  ΔW = s·(B A − B₀ A₀),  s·B₀A₀ the best rank-r approximation of W; A, B start at A₀, B₀.

    PiSSA's paper subtracts s·B₀A₀ from W once and for all. Subtracted here instead, W stays the published weight: the
    pre-trained model is this model with the adapters off, and the trained adapter is a LoRA of rank 2r on W.

    Attributes:
        base: the layer itself, nn.Linear, (out × in).
        lora_A, lora_B: the trainable factors, fp32, (r × in) and (out × r).
        initial_A, initial_B: PiSSA's A₀ and B₀, fp32; None for LoRA.
        scaling: s = alpha / r.
        enabled: False while `adapters_disabled` is in force.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, initial: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.enabled = True
        factory = {"dtype": torch.float32, "device": base.weight.device}
        if initial is not None:
            initial_A, initial_B = initial
            self.register_buffer("initial_A", initial_A)
            self.register_buffer("initial_B", initial_B)
            self.lora_A = nn.Parameter(initial_A.clone())
            self.lora_B = nn.Parameter(initial_B.clone())
        else:
            self.initial_A = self.initial_B = None
            self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **factory))
            self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **factory))
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def stacked_factors(self) -> tuple[Tensor, Tensor]:
        """A' (R × in) and B' (out × R) with ΔW = s·B'A'. PiSSA: [A; A₀] and [B, −B₀], R = 2r. LoRA: A and B, R = r."""
        return _stack(self.lora_A, self.lora_B, self.initial_A, self.initial_B)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        return _AddLowRank.apply(y, x, self.lora_A, self.lora_B, self.initial_A, self.initial_B, self.scaling)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW (out × in), added in fp32 and rounded once to W's own type."""
        A, B = (factor.float() for factor in self.stacked_factors())
        return torch.addmm(self.base.weight.float(), B, A, alpha=self.scaling).to(self.base.weight.dtype)

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, scaling={self.scaling:g}, principal={self.initial_A is not None}"


def _stack(A: Tensor, B: Tensor, initial_A: Tensor | None, initial_B: Tensor | None) -> tuple[Tensor, Tensor]:
    if initial_A is None:
        return A, B
    return torch.cat([A, initial_A]), torch.cat([B, -initial_B], dim=1)


class _AddLowRank(torch.autograd.Function):
    """y + s·B'A' x in place of y; keeps x and the low-rank A'x for the backward pass, and stacks the factors anew.

    y: (…, out), x: (…, in). The products run in x's type, the factors' gradients come back in theirs.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, initial_A, initial_B, scaling):
        stacked_A, stacked_B = (factor.to(x.dtype) for factor in _stack(A, B, initial_A, initial_B))
        rows = x.reshape(-1, x.shape[-1])
        low_rank = rows @ stacked_A.T  # (tokens, R)
        y.view(-1, y.shape[-1]).addmm_(low_rank, stacked_B.T, alpha=scaling)
        ctx.mark_dirty(y)
        # Only the trainable half of A'x has a gradient to give.
        ctx.save_for_backward(x, low_rank[:, : len(A)].contiguous(), A, B, initial_A, initial_B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, low_rank, A, B, initial_A, initial_B = ctx.saved_tensors
        stacked_A, stacked_B = (factor.to(x.dtype) for factor in _stack(A, B, initial_A, initial_B))
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        grad_low_rank = (grad_rows @ stacked_B).mul_(ctx.scaling)  # (tokens, R)
        grad_x = (grad_low_rank @ stacked_A).view_as(x) if ctx.needs_input_grad[1] else None
        grad_A = (grad_low_rank[:, : len(A)].T @ rows).to(A.dtype)
        grad_B = (grad_rows.T @ low_rank).mul_(ctx.scaling).to(B.dtype)
        return grad_y, grad_x, grad_A, grad_B, None, None, None


@torch.no_grad()
def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """PiSSA's initial factors A₀ (r × in) and B₀ (out × r): s·B₀A₀ is the best rank-r approximation of `weight`.

    With W = U S Vᵀ: A₀ = (S_r/s)^{1/2} V_rᵀ, B₀ = U_r (S_r/s)^{1/2} (arXiv 2404.02948, eq. 2 and 3, where s = 1; for
    other s this is PEFT's reading, under which the residual W − s·B₀A₀ does not depend on alpha).

    The leading singular vectors are the leading eigenvectors of the smaller Gram matrix, several times cheaper than the
    whole decomposition. Squaring loses what lies below σ₁·√ε: where σ_r comes within two digits of that in fp32, fp64.
    """
    W = weight.detach().float()
    wide = W if W.shape[0] <= W.shape[1] else W.T  # (n, m), n ≤ m
    eigenvalues, vectors = torch.linalg.eigh(wide @ wide.T)
    if eigenvalues[-rank] < 1e4 * torch.finfo(torch.float32).eps * eigenvalues[-1]:
        _, vectors = torch.linalg.eigh(wide.double() @ wide.double().T)
    basis = vectors[:, -rank:].to(W.dtype)
    # Exact within the basis, so that values and balance do not carry the squared rounding.
    rotation, S, Vh = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    root = (S / scaling).sqrt()
    left, right = (basis @ rotation) * root, root[:, None] * Vh
    A, B = (right, left) if wide is W else (left.T, right.T)
    return A.contiguous(), B.contiguous()


def _principal_factors_of_all(
    weights: dict[str, Tensor], rank: int, scaling: float, cache: Path | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """`principal_factors` of each weight in order: shared out among the ranks, or one thread per core."""

    def factors(weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = _dequantized(weight)
        if cache is None:
            return principal_factors(weight, rank, scaling)
        # Under the weight's own content: a stale entry cannot be met.
        file = cache / f"pissa-{fingerprint([weight])[:32]}-r{rank}-s{scaling:g}.safetensors"
        if not file.exists():
            A, B = principal_factors(weight, rank, scaling)
            cache.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
            save_file({"A": A.cpu(), "B": B.cpu()}, partial)
            partial.rename(file)
        stored = load_file(file, device=str(weight.device))
        return stored["A"], stored["B"]

    if _num_ranks() > 1:
        yield from _shared_among_ranks(list(weights.values()), factors, rank)
        return
    num_threads = torch.get_num_threads()
    # One decomposition alone cannot use all cores.
    workers = num_threads if all(weight.device.type == "cpu" for weight in weights.values()) else 1
    try:
        torch.set_num_threads(num_threads // workers)
        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(factors, weights.values())
    finally:
        torch.set_num_threads(num_threads)


def _shared_among_ranks(
    weights: list[Tensor], factors: Callable[[Tensor], tuple[Tensor, Tensor]], rank: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each process decomposes every n-th weight and sends the factors to the others; at most one whole weight each."""
    me, count = dist.get_rank(), dist.get_world_size()
    for first in range(0, len(weights), count):
        group = weights[first : first + count]
        own = None
        for owner, weight in enumerate(group):
            whole = _gathered_by(owner, weight)
            own = whole if owner == me else own
        pair = None if own is None else factors(own)
        del own, whole
        for owner, weight in enumerate(group):
            num_out, num_in = shape_of(weight)
            if owner == me:
                A, B = pair
            else:
                A, B = (torch.empty(shape, device=_device_of(weight)) for shape in ((rank, num_in), (num_out, rank)))
            dist.broadcast(A, owner)
            dist.broadcast(B, owner)
            yield A, B


def _dequantized(weight: Tensor) -> Tensor:
    """A weight of bitsandbytes as plain numbers, any other as it is."""
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):  # 8 bit: each row times its scale
        return weight.CB.float() * weight.SCB[:, None] / 127
    return weight


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_partitioned(parameter: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds this parameter in parts, one on each rank."""
    return hasattr(parameter, "ds_tensor")


def shape_of(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape, partitioned, packed, or as it is."""
    if is_partitioned(parameter):
        return parameter.ds_shape
    state = getattr(parameter, "quant_state", None)  # bitsandbytes packs 4 bits
    return parameter.shape if state is None else state.shape


def _device_of(parameter: Tensor) -> torch.device:
    """Where this process computes with the parameter; a partitioned one may be kept elsewhere."""
    if is_partitioned(parameter) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


def _gathered_by(owner: int, parameter: Tensor) -> Tensor | None:
    """The whole parameter on process `owner`, None on the others, which hold no more than their part. Collective."""
    mine = dist.get_rank() == owner
    if not is_partitioned(parameter):
        return parameter if mine else None
    part = parameter.ds_tensor.detach().to(_device_of(parameter))
    parts = part.new_empty(dist.get_world_size() * part.numel()) if mine else None
    # As bytes, which every backend can send, whatever the type.
    receive = list(parts.view(torch.uint8).chunk(dist.get_world_size())) if mine else None
    dist.gather(part.view(torch.uint8), receive, dst=owner)
    return parts[: parameter.ds_numel].view(parameter.ds_shape) if mine else None


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, every process holds these parameters whole. Collective; nothing to do but under ZeRO-3."""
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(partitioned):
        yield


@contextlib.contextmanager
def gathered_module_by_module(model: nn.Module) -> Iterator[None]:
    """Inside, `model` runs before DeepSpeed has wrapped it: each module holds its own parameters while it runs."""
    held: dict[nn.Module, contextlib.ExitStack] = {}

    def enter(module: nn.Module, _: Any) -> None:
        held[module] = contextlib.ExitStack()
        held[module].enter_context(gathered(module.parameters(recurse=False)))

    def leave(module: nn.Module, *_: Any) -> None:
        held.pop(module).close()

    handles = []
    for module in model.modules():
        if any(is_partitioned(parameter) for parameter in module.parameters(recurse=False)):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' types, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def default_target_modules(model: nn.Module) -> list[str]:
    """The names of TARGET_MODULES and their fused forms that `model` has.

    Raises:
        UserError: it has none of them.
    """
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = [name for name in (*TARGET_MODULES, *FUSED_TARGET_MODULES) if name in linear]
    if not found:
        known = ", ".join(sorted(linear))
        raise UserError(f"no known projection in {type(model).__name__}: name --target-modules among {known}")
    return found


def _whole(parameter: Tensor) -> Tensor:
    """The whole parameter on every process: itself, or under ZeRO-3 a copy. Collective."""
    with gathered([parameter]):
        return parameter.detach().clone() if is_partitioned(parameter) else parameter.detach()


def find_target_modules(model: nn.Module, target_modules: list[str] | None, rank: int) -> dict[str, nn.Linear]:
    """The linear layers of `model` that an entry of `target_modules` names, by their last name or a dotted suffix.

    Args:
        target_modules: None: `default_target_modules`.

    Raises:
        UserError: an entry matches nothing, or `rank` is larger than a layer's smaller side.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for target in default_target_modules(model) if target_modules is None else target_modules:
        matches = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matches:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(f"target module {target!r} names no linear layer of {type(model).__name__}; it has {known}")
        found.update((name, linear[name]) for name in matches)
    embeddings = model.get_input_embeddings()
    for name, module in found.items():
        if embeddings is not None and module.weight is embeddings.weight:
            raise UserError(f"target module {name} has its weight in common with the input embeddings: leave it out")
        smaller = min(module.in_features, module.out_features)
        if rank > smaller:
            raise UserError(f"rank {rank} is larger than {name} allows ({smaller}): use a smaller --rank")
    return dict(sorted(found.items(), key=lambda item: list(linear).index(item[0])))


def add_adapters(
    model: nn.Module,
    method: str,
    rank: int,
    alpha: float,
    target_modules: list[str] | None,
    *,
    initial: dict[str, tuple[Tensor, Tensor]] | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> nn.Module:
    """Freezes `model` and puts a LoRALinear in the place of each target layer, in place; returns `model`.

    Under torch.distributed every process calls this: PiSSA's decompositions are shared out among them.

    Args:
        method: lora; pissa or ba-lora (the same adapter: PiSSA's); full adds nothing and leaves everything trainable.
        alpha: the adapter acts with s = alpha / rank.
        initial: PiSSA's A₀ and B₀ by layer name, where they are known already.
        cache: folder in which PiSSA's initial factors are kept for the next run.

    Raises:
        UserError: see `find_target_modules`.
    """
    if method not in ("full", "lora", "pissa", "ba-lora"):
        raise UserError(f"unknown method {method!r}: one of full, lora, pissa, ba-lora")
    if method == "full":
        return model.requires_grad_(True)
    found = find_target_modules(model, target_modules, rank)
    model.requires_grad_(False)
    factors: Iterable[tuple[Tensor, Tensor] | None] = itertools.repeat(None)
    if method != "lora" and initial is not None:
        factors = [initial[name] for name in found]
    elif method != "lora":
        weights = {name: module.weight for name, module in found.items()}
        factors = _principal_factors_of_all(weights, rank, alpha / rank, cache)
    bar = tqdm(total=len(found), desc=f"{method} initialisation", unit="layer", disable=not progress)
    # `factors` first: zip then runs it to its end, where it gives the threads back.
    for pair, (name, module) in zip(factors, found.items(), strict=False):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha, pair))
        bar.update()
    bar.close()
    return model


def adapter_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The model's LoRALinear layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is the pre-trained model, bit for bit."""
    layers = list(adapter_layers(model).values())
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


# ------------------------------------------------------------------------------------------------------------------
# Regularizers: each formula of the paper once, on (M, V) logits, differentiable, computed in fp32 or better.
# Degenerate input has a value, never NaN: no rows, one row, a zero matrix.
# ------------------------------------------------------------------------------------------------------------------


def consistency_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """L_CR = T² · mean over rows of KL( softmax(Z_P / T) ‖ softmax(Z_F / T) ); `arxiv2024`: T = 1.

    Args:
        student_logits, teacher_logits: Z_F and Z_P, (M, V).
    """
    student = F.log_softmax(_at_least_fp32(student_logits) / temperature, dim=-1)
    teacher = F.log_softmax(_at_least_fp32(teacher_logits) / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)  # (M,)
    return temperature**2 * _mean(divergence)


def normalized_mse_consistency_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """L_CR of `arxiv2024` for NLU: mean squared error between the L2-normalised rows of Z_F and Z_P, both (M, V)."""
    student = F.normalize(_at_least_fp32(student_logits), dim=-1)
    teacher = F.normalize(_at_least_fp32(teacher_logits), dim=-1)
    return _mean((student - teacher).square())


def topk_entropy_loss(logits: Tensor, top_k: int | None) -> Tensor:
    """L_DR for NLG: minus the mean over rows of the entropy of softmax over each row's `top_k` largest logits.

    Args:
        logits: Z_F, (M, V).
        top_k: K, at most V of them are taken; None: the whole vocabulary (`arxiv2024`).
    """
    logits = _at_least_fp32(logits)
    if top_k is not None:
        logits = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values
    log_p = F.log_softmax(logits, dim=-1)
    return _mean((log_p.exp() * log_p).sum(dim=-1))


def covariance_loss(logits: Tensor) -> Tensor:
    """L_DR for NLU: (1/D) Σ_{i≠j} C_ij², C = Z_cᵀ Z_c / (N − 1) the covariance of the (N, D) logits; 0 for N ≤ 1."""
    logits = _at_least_fp32(logits)
    num_rows, num_classes = logits.shape
    if num_rows <= 1:
        return logits.sum() * 0.0
    centred = logits - logits.mean(dim=0)
    covariance = centred.T @ centred / (num_rows - 1)
    return (covariance - covariance.diagonal().diag()).square().sum() / num_classes


def spectral_loss(logits: Tensor, k: int, norm: str) -> Tensor:
    """L_SVDR = −Σ_{i≤k} σ_i / ‖Z‖_F (norm "frobenius") or −Σ_{i≤k} σ_i / Σ_j σ_j (norm "nuclear", `arxiv2024` and NLU).

    With "nuclear" and k ≥ min(M, V) this is the constant −1. A zero matrix gives 0. A singular value that is rounding
    noise counts as zero and has no gradient: its singular vectors are arbitrary.

    Args:
        logits: Z, (M, V), singular values σ descending.
    """
    logits = _at_least_fp32(logits)
    if logits.numel() == 0:
        return logits.sum() * 0.0
    if not torch.isfinite(logits).all():  # of which the decomposition may raise an error
        return logits.sum() * math.nan
    sigma = torch.linalg.svdvals(logits)  # (min(M, V),)
    noise = 4 * len(sigma) ** 0.5 * torch.finfo(sigma.dtype).eps * sigma[0].detach()
    sigma = torch.where(sigma > noise, sigma, torch.zeros_like(sigma))
    if norm == "frobenius":
        # From the values, not the entries: the gradient of both then runs through one decomposition.
        total = sigma.square().sum()
        total = torch.where(total > 0, total, torch.ones_like(total)).sqrt()
    elif norm == "nuclear":
        total = sigma.sum()
        total = torch.where(total > 0, total, torch.ones_like(total))
    else:
        raise ValueError(f"unknown norm {norm!r}: 'frobenius' or 'nuclear'")
    return -sigma[:k].sum() / total


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean(x: Tensor) -> Tensor:
    return x.sum() / max(x.numel(), 1)


def schedule_factor(schedule: str, progress: float, warmup_fraction: float) -> float:
    """What a weight λ is multiplied with at `progress`, the fraction of training done in [0, 1] (the authors' code).

    constant: 1. cosine: 1 to 0.1. two_phase: 0 for the first 20 %, a linear ramp over the next 5 %, then 1.
    linear_warmup, quadratic_warmup: rises over `warmup_fraction`. adaptive depends on the teacher: see `objective`.
    """
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))
        case "two_phase":
            return min(max((progress - 0.20) / 0.05, 0.0), 1.0)
        case "linear_warmup":
            return min(progress / warmup_fraction, 1.0)
        case "quadratic_warmup":
            return min(progress / warmup_fraction, 1.0) ** 2
    raise ValueError(f"unknown schedule {schedule!r}")


def adaptive_factor(confidence: Tensor) -> Tensor:
    """λ₁'s factor under the `adaptive` schedule: 0.1 + 0.9·c, c the mean of the teacher's `confidence` (M,)."""
    return 0.1 + 0.9 * _mean(confidence)


def teacher_confidence(teacher_logits: Tensor) -> Tensor:
    """1 − H(softmax(Z_P)) / ln V for each row of Z_P (M, V): 0 knows nothing, 1 is certain. Returns (M,)."""
    log_p = F.log_softmax(_at_least_fp32(teacher_logits), dim=-1)
    return 1 + (log_p.exp() * log_p).sum(dim=-1) / math.log(teacher_logits.shape[-1])


# ------------------------------------------------------------------------------------------------------------------
# Objective: L = L_task + λ₁·L_CR + λ₂·L_DR + λ₃·L_SVDR
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Regularizers:
    """The regularizers' settings at one step of training; `Arguments` names and explains them."""

    lambda_consistency: float | Tensor
    lambda_diversity: float
    lambda_spectral: float
    temperature: float
    entropy_top_k: int | None
    spectral_k: int
    spectral_norm: str
    adaptive: bool = False

    @classmethod
    def at(cls, args: Arguments, progress: float) -> "Regularizers":
        """The settings of `args` at `progress`, the fraction of training done."""
        adaptive = args.consistency_schedule == "adaptive"
        consistency_schedule = "constant" if adaptive else args.consistency_schedule
        consistency = schedule_factor(consistency_schedule, progress, args.warmup_fraction)
        others = schedule_factor(args.regularizer_schedule, progress, args.warmup_fraction)
        return cls(
            lambda_consistency=args.lambda_consistency * consistency,
            lambda_diversity=args.lambda_diversity * others,
            lambda_spectral=args.lambda_spectral * others,
            temperature=args.temperature,
            entropy_top_k=args.entropy_top_k or None,
            spectral_k=args.spectral_k,
            spectral_norm=args.spectral_norm,
            adaptive=adaptive,
        )

    def scaled_consistency(self, factor: Tensor) -> "Regularizers":
        """The same with λ₁ multiplied by `factor`."""
        return dataclasses.replace(self, lambda_consistency=self.lambda_consistency * factor)


def objective(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    regularizers: Regularizers | None,
    num_tokens: int | Tensor,
    num_micro_batches: int,
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """One micro-batch's part of an optimizer step's loss, and of each term; the parts add up to the step's values.

    The step's mean is over all its valid tokens, whatever micro-batch and rank they fall in, so that splitting a batch
    differently changes nothing. L_SVDR has no such mean: it is the spectrum of one micro-batch's logits, averaged over
    micro-batches.

    Args:
        student_logits: Z_F at the valid positions (those whose next token is a response token), (M, V).
        teacher_logits: Z_P at the same positions, (M, V); not needed when λ₁ is 0.
        targets: the next tokens, (M,).
        regularizers: None: the task's loss alone.
        num_tokens: valid tokens of the whole optimizer step, over all micro-batches and ranks.
        num_micro_batches: micro-batches of the whole optimizer step, over all ranks.
    """
    token_share = len(targets) / num_tokens
    task = F.cross_entropy(_at_least_fp32(student_logits), targets, reduction="sum") / num_tokens
    terms: dict[str, float | Tensor] = {"task": task.detach()}
    if regularizers is None:
        return task, terms
    if regularizers.adaptive and teacher_logits is not None:
        regularizers = regularizers.scaled_consistency(adaptive_factor(teacher_confidence(teacher_logits)))

    loss = task
    if teacher_logits is not None:
        consistency = consistency_loss(student_logits, teacher_logits, regularizers.temperature) * token_share
        terms["consistency"] = consistency.detach()
        loss = loss + regularizers.lambda_consistency * consistency

    # A weight of zero still reports its term, but does not pay for its gradient.
    with torch.set_grad_enabled(torch.is_grad_enabled() and regularizers.lambda_diversity > 0):
        diversity = topk_entropy_loss(student_logits, regularizers.entropy_top_k) * token_share
    terms["diversity"] = diversity.detach()
    loss = loss + regularizers.lambda_diversity * diversity

    with torch.set_grad_enabled(torch.is_grad_enabled() and regularizers.lambda_spectral > 0):
        spectral = spectral_loss(student_logits, regularizers.spectral_k, regularizers.spectral_norm)
    spectral = spectral / num_micro_batches
    terms["spectral"] = spectral.detach()
    loss = loss + regularizers.lambda_spectral * spectral

    return loss, terms | _lambda_shares(regularizers, num_micro_batches)


def _lambda_shares(regularizers: Regularizers, num_micro_batches: int) -> dict[str, float | Tensor]:
    """Each λ as this micro-batch's part of its mean over the step."""
    names = ("lambda_consistency", "lambda_diversity", "lambda_spectral")
    return {name: getattr(regularizers, name) / num_micro_batches for name in names}


# ------------------------------------------------------------------------------------------------------------------
# The same objective without logits: from hidden states, in chunks of tokens, its gradient computed in the same pass.
# `objective` above is the definition that this is tested against.
# ------------------------------------------------------------------------------------------------------------------


def objective_from_hidden(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    head_weight: Tensor,
    head_factor: Tensor | None,
    targets: Tensor,
    regularizers: Regularizers | None,
    num_tokens: int | Tensor,
    num_micro_batches: int,
    memory_mib: float = 128.0,
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """`objective` for logits Z = H Eᵀ with a frozen head E, without ever holding Z: the same values and gradient.

    Args:
        hidden: H_F at the valid positions, (M, d), any floating type; sums and the gradient are kept in fp32 (fp64).
        teacher_hidden: H_P at the same positions, (M, d), or None.
        head_weight: E, (V, d), without gradient.
        head_factor: from `head_factor`, (d, d); needed when there are regularizers.
        targets, regularizers, num_tokens, num_micro_batches: see `objective`.
        memory_mib: what the chunks' buffers may take; the number of tokens per chunk follows from it.
    """
    if regularizers is not None and regularizers.adaptive and teacher_hidden is not None:
        confidence = _confidence_from_hidden(teacher_hidden, head_weight, memory_mib)
        regularizers = regularizers.scaled_consistency(adaptive_factor(confidence))
    loss, task, consistency, diversity, spectral = _ObjectiveFromHidden.apply(
        hidden,
        teacher_hidden,
        head_weight,
        head_factor,
        targets,
        regularizers,
        num_tokens,
        num_micro_batches,
        memory_mib,
    )
    terms: dict[str, float | Tensor] = {"task": task}
    if regularizers is not None:
        if teacher_hidden is not None:
            terms["consistency"] = consistency
        terms |= {"diversity": diversity, "spectral": spectral} | _lambda_shares(regularizers, num_micro_batches)
    return loss, terms


CACHED_BYTES = 2**21  # of one operand of a block on a CPU


class _ObjectiveFromHidden(torch.autograd.Function):
    """The forward pass returns the loss and its terms, and keeps ∂loss/∂H, (M, d), for the backward pass."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        teacher_hidden,
        head_weight,
        head_factor,
        targets,
        regularizers,
        num_tokens,
        num_micro_batches,
        memory_mib,
    ):
        needs_gradient = ctx.needs_input_grad[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(3, dtype=dtype, device=hidden.device)  # task, consistency, diversity
        gradient = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if needs_gradient else None
        for rows in _chunks(hidden, head_weight, 1 if teacher_hidden is None else 2, memory_mib):
            z = _logits(hidden[rows], head_weight, dtype)
            teacher = None if teacher_hidden is None else _logits(teacher_hidden[rows], head_weight, dtype)
            for block in _blocks(z):
                _token_terms(
                    z[block],
                    None if teacher is None else teacher[block],
                    targets[rows][block],
                    regularizers,
                    sums,
                    needs_gradient,
                )
            del teacher
            if needs_gradient:
                gradient[rows] = z.to(head_weight.dtype) @ head_weight
        sums /= num_tokens
        spectral = sums.new_zeros(())
        loss = sums[0]
        if needs_gradient:
            gradient /= num_tokens
        if regularizers is not None:
            loss = loss + regularizers.lambda_consistency * sums[1] + regularizers.lambda_diversity * sums[2]
            factor = head_factor.to(dtype)
            spectral, spectral_gradient = spectral_value_and_gradient(
                hidden.to(dtype) @ factor, regularizers.spectral_k, regularizers.spectral_norm
            )
            spectral = spectral.to(dtype) / num_micro_batches
            loss = loss + regularizers.lambda_spectral * spectral
            if needs_gradient and regularizers.lambda_spectral > 0:
                gradient += (regularizers.lambda_spectral / num_micro_batches) * (spectral_gradient @ factor.T)
        if needs_gradient:
            ctx.save_for_backward(gradient)
            ctx.input_dtype = hidden.dtype
        terms = sums[0].clone(), sums[1].clone(), sums[2].clone(), spectral
        ctx.mark_non_differentiable(*terms)
        return loss, *terms

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss).to(ctx.input_dtype), *[None] * 8


def _token_terms(
    z: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    regularizers: Regularizers | None,
    sums: Tensor,
    needs_gradient: bool,
) -> None:
    """Adds one block's L_task, L_CR and L_DR, summed over its tokens, to `sums`; z becomes the gradient of all three.

    Overwrites `z` and `teacher`, (m, V): next to the two there is one more buffer of their size, and nothing else.

        ∂L_task/∂z = softmax(z) − onehot(y)
        ∂L_CR/∂z   = T·(softmax(z/T) − softmax(z_P/T))
        ∂L_DR/∂z   = p·(log p + H(p)) on the top-K entries (all of them where K is None), p their softmax
    """
    onehot = targets[:, None]
    top_values = None
    if regularizers is not None and regularizers.entropy_top_k is not None:
        top_values, top_indices = _top_k(z, regularizers.entropy_top_k)
        z -= top_values[:, :1].clone()  # shifted by the row's maximum, softmax is the same and exp does not overflow
        top_values = top_values - top_values[:, :1]
    else:
        z -= z.amax(dim=1, keepdim=True)
    at_target = z.gather(1, onehot)
    buffer = torch.empty_like(z)

    if teacher is not None:
        T, weight = regularizers.temperature, regularizers.lambda_consistency * regularizers.temperature
        teacher -= teacher.amax(dim=1, keepdim=True)
        difference = torch.sub(teacher, z, out=buffer)
        teacher_p = teacher.div_(T).exp_()
        teacher_sum = teacher_p.sum(dim=1, keepdim=True)
        cross = torch.linalg.vecdot(difference, teacher_p)[:, None] / (T * teacher_sum)
        student_p = torch.div(z, T, out=buffer).exp_()
        student_sum = student_p.sum(dim=1, keepdim=True)
        sums[1] += T**2 * (cross + student_sum.log() - teacher_sum.log()).sum()
        if needs_gradient:
            # T·(softmax(z/T) − softmax(z_P/T)), in the teacher's buffer
            consistency_gradient = teacher_p.mul_(-weight / teacher_sum).addcmul_(student_p, weight / student_sum)

    over_vocabulary = regularizers is not None and regularizers.entropy_top_k is None
    if over_vocabulary:
        buffer.copy_(z)
    p = z.exp_()
    p_sum = p.sum(dim=1, keepdim=True)
    sums[0] += (p_sum.log() - at_target).sum()
    p /= p_sum
    if over_vocabulary:
        log_p = buffer.sub_(p_sum.log())
        negative_entropy = torch.linalg.vecdot(p, log_p)[:, None]
        sums[2] += negative_entropy.sum()
        if regularizers.lambda_diversity > 0:
            # p + λ₂·p·(log p + H), still without the one-hot
            p.mul_(log_p.sub_(negative_entropy).mul_(regularizers.lambda_diversity).add_(1.0))
    if needs_gradient:
        p.scatter_add_(1, onehot, p.new_full((), -1.0).expand_as(onehot))
        if teacher is not None:
            p += consistency_gradient
    if top_values is not None:
        log_q = F.log_softmax(top_values, dim=1)  # (m, K)
        q = log_q.exp()
        negative_entropy = (q * log_q).sum(dim=1, keepdim=True)
        sums[2] += negative_entropy.sum()
        if needs_gradient and regularizers.lambda_diversity > 0:
            p.scatter_add_(1, top_indices, regularizers.lambda_diversity * q * (log_q - negative_entropy))


def _top_k(z: Tensor, k: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """`z.topk(k)` of wide rows in two steps, exact: the k largest entries lie in the k blocks of the largest maxima."""
    rows, width = z.shape
    k = min(k, width)
    whole = width // block * block
    if k * block >= width // 4:
        return z.topk(k, dim=1)
    maxima = z[:, :whole].view(rows, -1, block).amax(dim=2)
    chosen = maxima.topk(k, dim=1).indices  # (m, k)
    candidates = (chosen[:, :, None] * block + torch.arange(block, device=z.device)).flatten(1)
    if whole < width:
        rest = torch.arange(whole, width, device=z.device).expand(rows, -1)
        candidates = torch.cat([candidates, rest], dim=1)
    values, positions = z.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, positions)


def _logits(hidden: Tensor, head_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Z = H Eᵀ (m, V), rounded as the model's own head rounds it, then held in `dtype`."""
    return (hidden.to(head_weight.dtype) @ head_weight.T).to(dtype)


def _chunks(hidden: Tensor, head_weight: Tensor, num_buffers: int, memory_mib: float) -> Iterator[slice]:
    """Equal chunks of rows whose (m, V) logits, `num_buffers` of them, fit into the budget."""
    itemsize = torch.promote_types(hidden.dtype, torch.float32).itemsize
    rounded = 0 if head_weight.dtype.itemsize >= itemsize else head_weight.dtype.itemsize  # what the head itself gives
    whole_buffer = itemsize if hidden.is_cuda else 0  # see _blocks
    bytes_per_row = len(head_weight) * (num_buffers * itemsize + rounded + whole_buffer)
    most = max(1, int(memory_mib * 2**20 / bytes_per_row))
    count = math.ceil(len(hidden) / most)
    for index in range(count):
        yield slice(len(hidden) * index // count, len(hidden) * (index + 1) // count)


def _blocks(z: Tensor) -> Iterator[slice]:
    """Blocks of a chunk's rows: the product with the head wants many rows, a dozen passes over them want the cache."""
    if z.is_cuda:  # as fast as its memory in one block, and each further one is a dozen kernels more
        yield slice(None)
        return
    size = max(1, CACHED_BYTES // (z.shape[1] * z.element_size()))
    for first in range(0, len(z), size):
        yield slice(first, first + size)


def _confidence_from_hidden(teacher_hidden: Tensor, head_weight: Tensor, memory_mib: float) -> Tensor:
    """`teacher_confidence` in chunks: one more product with the head, because the whole mean is needed first."""
    dtype = torch.promote_types(teacher_hidden.dtype, torch.float32)
    confidence = torch.empty(len(teacher_hidden), dtype=dtype, device=teacher_hidden.device)
    for rows in _chunks(teacher_hidden, head_weight, 3, memory_mib):
        confidence[rows] = teacher_confidence(_logits(teacher_hidden[rows], head_weight, dtype))
    return confidence


@torch.no_grad()
def head_factor(head_weight: Tensor) -> Tensor:
    """L (d × d) with L Lᵀ = EᵀE: H L has the singular values of the logits H Eᵀ, whatever the vocabulary's size.

    Computed once, in fp64. Where E has dependent columns, the symmetric root of EᵀE takes the place of Cholesky's.
    """
    gram = head_weight.new_zeros(head_weight.shape[1], head_weight.shape[1], dtype=torch.float64)
    for rows in head_weight.split(8192):
        rows = rows.double()
        gram.addmm_(rows.T, rows)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info != 0:
        eigenvalues, vectors = torch.linalg.eigh(gram)
        factor = vectors * eigenvalues.clamp(min=0).sqrt()
    return factor.to(torch.promote_types(head_weight.dtype, torch.float32))


SPECTRAL_EXACT_SIZE = 512  # up to here a full eigendecomposition is as fast as an iteration


@torch.no_grad()
def spectral_value_and_gradient(Y: Tensor, k: int, norm: str) -> tuple[Tensor, Tensor]:
    """`spectral_loss` of Y (M × d) and its gradient, from the leading eigenpairs of Y Yᵀ or YᵀY.

    With Y = U S Vᵀ the gradient of Σ_{i≤k} σ_i is U_k V_kᵀ. Where σ_k = σ_{k+1} it is one of the subgradients.
    """
    if Y.numel() == 0 or not Y.any():
        return Y.new_zeros(()), torch.zeros_like(Y)
    if not torch.isfinite(Y).all():  # of which the decomposition may raise an error
        return Y.new_full((), math.nan), torch.full_like(Y, math.nan)
    if norm == "frobenius":
        total = torch.linalg.vector_norm(Y, dtype=torch.float64)
        iterate = min(Y.shape) > max(SPECTRAL_EXACT_SIZE, 4 * k)
        sigma, polar = _leading_by_iteration(Y, k) if iterate else _leading_by_eigh(Y, k)
        total_gradient = Y / total.to(Y.dtype)
    elif norm == "nuclear":
        sigma, polar, total_gradient = _leading_by_eigh(Y, k, min(Y.shape))
        total = sigma.sum()
    else:
        raise ValueError(f"unknown norm {norm!r}: 'frobenius' or 'nuclear'")
    ratio = sigma[:k].sum() / total
    gradient = (polar - total_gradient * ratio.to(Y.dtype)) / total.to(Y.dtype)
    return -ratio.to(Y.dtype), -gradient


def _leading_by_eigh(Y: Tensor, *counts: int) -> tuple[Tensor, ...]:
    """All singular values of Y in fp64, and U_k V_kᵀ for each k in `counts`.

    By an eigendecomposition of the smaller Gram matrix in fp64.
    """
    wide = Y.shape[0] <= Y.shape[1]
    exact = Y.double() if wide else Y.double().T
    eigenvalues, vectors = torch.linalg.eigh(exact @ exact.T)
    sigma, U = eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    # Y itself is rounded: below this a singular value is noise, its vectors arbitrary.
    noise = 4 * len(sigma) ** 0.5 * torch.finfo(Y.dtype).eps * sigma[0]
    sigma = torch.where(sigma > noise, sigma, torch.zeros_like(sigma))
    inverse = torch.where(sigma > 0, 1 / sigma, torch.zeros_like(sigma))
    polars = ((U[:, :k] * inverse[:k]) @ (U[:, :k].T @ exact) for k in counts)
    return sigma, *((polar if wide else polar.T).to(Y.dtype) for polar in polars)


def _leading_by_iteration(
    Y: Tensor, k: int, tolerance: float = 1e-5, max_iterations: int = 60
) -> tuple[Tensor, Tensor]:
    """The k leading singular values of Y in fp64, and U_k V_kᵀ, by block subspace iteration with Rayleigh–Ritz.

    Converged when every leading pair's residual ‖Y Yᵀ u − σ² u‖ is at most `tolerance`·σ². Where that does not come,
    the eigendecomposition takes over.
    """
    generator = torch.Generator(Y.device).manual_seed(0)
    basis = torch.randn(Y.shape[0], 3 * k + 10, generator=generator, device=Y.device, dtype=Y.dtype)
    basis = torch.linalg.qr(Y @ (Y.T @ basis)).Q
    for _ in range(max_iterations):
        projected = Y.T @ basis  # (d, b)
        eigenvalues, rotation = torch.linalg.eigh((projected.T @ projected).double())
        eigenvalues, rotation = eigenvalues.flip(0), rotation.flip(1).to(Y.dtype)
        image = Y @ (projected @ rotation)  # Y Yᵀ u for the Ritz vectors u, (M, b)
        U = basis @ rotation[:, :k]
        squares = eigenvalues[:k].to(Y.dtype)
        residual = torch.linalg.vector_norm(image[:, :k] - U * squares, dim=0)
        if (residual <= tolerance * squares).all():
            sigma = eigenvalues[:k].sqrt()
            return sigma, (U / sigma.to(Y.dtype)) @ (projected @ rotation[:, :k]).T
        basis = torch.linalg.qr(image).Q
    return _leading_by_eigh(Y, k)


# ------------------------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------------------------

DATA_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
SPLIT_OF_WORD = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_OF_WORD |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def load_records(
    source: str, split: str = "train", subset: str | None = None, name: str | None = None
) -> datasets.Dataset:
    """Reads a data set from a local file, a folder of files of one kind, or the hub.

    Args:
        split, subset: of a hub data set or a folder: its split, a folder inside it.
        name: configuration of a hub data set.

    Raises:
        UserError: nothing there, or nothing readable.
    """
    path = Path(source)
    if path.is_dir():
        files = files_of_split(path / (subset or ""), split)
    elif path.is_file():
        files = [path]
        if path.suffix not in DATA_BUILDERS:
            raise UserError(f"cannot tell the format of {source}: expected {', '.join(DATA_BUILDERS)}")
    elif path.suffix in DATA_BUILDERS or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UserError(f"no such data file or folder: {source}")
    else:
        try:
            return datasets.load_dataset(source, name, data_dir=subset, split=split)
        except Exception as error:  # the hub's client has dozens of kinds
            raise UserError(f"cannot load the data set {source!r} from the hub: {_first_line(error)}") from error
    suffixes = sorted({file.suffix for file in files})
    if len({DATA_BUILDERS[suffix] for suffix in suffixes}) > 1:
        raise UserError(f"{source} mixes kinds of files ({', '.join(suffixes)}): name one file")
    extra: dict[str, Any] = {}
    try:
        if DATA_BUILDERS[files[0].suffix] == "csv":
            is_tsv = files[0].suffix == ".tsv"
            quoting = csv.QUOTE_NONE if is_tsv and any(map(quotes_are_text, files)) else csv.QUOTE_MINIMAL
            extra = {"sep": "\t" if is_tsv else ",", "quoting": quoting, "keep_default_na": False}
            # Every cell is text as it is written: pandas would make 7 of "007", 2.0 of "2", nothing of "NA".
            names = {name for file in files for name in header_of(file, extra["sep"], quoting)}
            extra["converters"] = dict.fromkeys(sorted(names), str)
        return datasets.load_dataset(
            DATA_BUILDERS[files[0].suffix], data_files=[str(file) for file in files], split="train", **extra
        )
    except Exception as error:  # each format's reader raises its own
        cause = error.__cause__ or error
        raise UserError(f"cannot read {source}: {_first_line(cause)}") from error


def header_of(file: Path, sep: str, quoting: int) -> list[str]:
    """The column names in the first line of a csv or tsv file."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        return next(csv.reader(stream, delimiter=sep, quoting=quoting), [])


def quotes_are_text(file: Path) -> bool:
    """Whether a tsv file, like GLUE's, was written without quoting: each line is a row, which reading it with quotation
    marks that enclose line ends would join."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        lines = [line for line in stream.read().split("\n") if line.strip("\r")]
    if len({line.count("\t") for line in lines}) > 1:
        return False
    csv.field_size_limit(2**31 - 1)
    return sum(1 for row in csv.reader((line + "\n" for line in lines), delimiter="\t") if row) != len(lines)


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The data files below `folder`; where names or folders tell splits apart, those of `split` alone.

    Raises:
        UserError: there is none.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix in DATA_BUILDERS)
    if not files:
        raise UserError(f"{folder} holds no {', '.join(DATA_BUILDERS)} file")
    splits = {}
    for file in files:
        words = re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())
        splits[file] = next((SPLIT_OF_WORD[word] for word in words if word in SPLIT_OF_WORD), None)
    known = sorted({found for found in splits.values() if found})
    if not known:
        return files
    chosen = [file for file in files if splits[file] == SPLIT_OF_WORD.get(split, split)]
    if not chosen:
        raise UserError(
            f"{folder} has files of {', '.join(known)} and none of {split!r}: choose by --split, or name one"
        )
    return chosen


def require_fields(records: datasets.Dataset, fields: list[str], source: str, remedy: str) -> None:
    """Raises a UserError that lists what there is, where `records` lacks one of `fields`."""
    for name in fields:
        if name not in records.column_names:
            known = ", ".join(records.column_names)
            raise UserError(f"{source} has no field {name!r}; its fields are {known}: {remedy}")


def encode_prompt(tokenizer: transformers.PreTrainedTokenizerBase, instruction: str) -> list[int]:
    """The tokens of ALPACA_PROMPT around an instruction; see `encode_opening`."""
    return encode_opening(tokenizer, ALPACA_PROMPT.format(instruction=instruction))


def encode_opening(tokenizer: transformers.PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on, with the tokenizer's own start token where it has one."""
    ids = tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids  # some tokenizers close every text


def encode_response(tokenizer: transformers.PreTrainedTokenizerBase, response: str) -> list[int]:
    """The response's tokens and the end-of-sequence token."""
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode_example(
    tokenizer: transformers.PreTrainedTokenizerBase, instruction: str, response: str, max_length: int
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one example, cut to `max_length`.

    Prompt and response are tokenised apart and joined: tokenised as one text, a tokenizer may merge across the border,
    and the border that the prompt's own length gives is then wrong. It is also what the model meets when it generates.
    """
    prompt = encode_prompt(tokenizer, instruction)
    tokens = encode_response(tokenizer, response)
    return {
        "input_ids": (prompt + tokens)[:max_length],
        "labels": ([IGNORE_INDEX] * len(prompt) + tokens)[:max_length],
    }


def build_dataset(
    records: datasets.Dataset, tokenizer: transformers.PreTrainedTokenizerBase, fields: list[str], max_length: int
) -> tuple[datasets.Dataset, int]:
    """Tokenises `records`; returns the examples and how many were dropped for having no response token left.

    An example's `index` is its place in what is returned.
    """
    instruction_field, response_field = fields
    for name in fields:
        dtype = getattr(records.features[name], "dtype", "list")
        if not dtype.endswith("string") and not dtype.startswith(("int", "uint", "float", "bool", "null")):
            raise UserError(f"the field {name!r} holds no text but {dtype}: write it as text")

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = {"input_ids": [], "labels": []}
        for instruction, response in zip(batch[instruction_field], batch[response_field], strict=True):
            if None in (instruction, response) or not str(instruction).strip() or not str(response).strip():
                continue
            example = encode_example(tokenizer, str(instruction), str(response), max_length)
            if any(label != IGNORE_INDEX for label in example["labels"][1:]):
                for name, ids in example.items():
                    encoded[name].append(ids)
        return encoded

    encoded = records.map(encode, batched=True, remove_columns=records.column_names, desc="tokenising")
    return encoded.add_column("index", list(range(len(encoded)))), len(records) - len(encoded)


@dataclass
class PackingCollator:
    """Makes a micro-batch of examples without padding: laid end to end in one row, each with its own positions.

    What all prompts begin with (the prompt template's head, at least) stands there once, at the front: causal states
    depend on nothing that follows, so those of a shared beginning are the same in every example.

    `input_ids`, `position_ids`: (1, tokens). `sequence_lengths`: list of ints, each with the shared beginning;
    `shared_length`: tokens of that. `valid_positions`, `targets`: see PaddingCollator.
    """

    share_beginning: bool = True

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Any]:
        shared = shared_beginning(examples) if self.share_beginning else 0
        lengths = [len(example["input_ids"]) for example in examples]
        starts = [0] + [shared] * (len(examples) - 1)
        # The first label of each example is never a target: position i predicts label i + 1 of the same example.
        next_token = [
            label
            for example, start in zip(examples, starts, strict=True)
            for label in [*example["labels"][start + 1 :], IGNORE_INDEX]
        ]
        tokens = [token for e, start in zip(examples, starts, strict=True) for token in e["input_ids"][start:]]
        positions = [torch.arange(start, length) for start, length in zip(starts, lengths, strict=True)]
        valid_positions = torch.tensor([i for i, label in enumerate(next_token) if label != IGNORE_INDEX])
        return {
            "input_ids": torch.tensor([tokens]),
            "position_ids": torch.cat(positions)[None],
            "sequence_lengths": lengths,
            "shared_length": shared,
            "valid_positions": valid_positions,
            "targets": torch.tensor(next_token)[valid_positions],
            "example_ids": [example.get("index") for example in examples],
        }


def shared_beginning(examples: list[dict[str, list[int]]]) -> int:
    """How many tokens all examples begin with, short of the first position that predicts a response token."""
    beginnings = []
    for example in examples:
        first = next((i for i, label in enumerate(example["labels"][1:]) if label != IGNORE_INDEX), 0)
        beginnings.append(example["input_ids"][:first])
    alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*beginnings, strict=False))
    return sum(1 for _ in alike) if len(examples) > 1 else 0


@dataclass
class PaddingCollator:
    """Makes a micro-batch of examples: padded on the right, attention by length. For models that cannot be packed.

    `input_ids`, `attention_mask`: (B, L). `valid_positions`: (M,) indices into the flattened (B·L) positions whose next
    token is a response token. `targets`: (M,) those next tokens. Which token pads never matters: where it is the
    end-of-sequence token too, the real ones stay attended and learnt.
    """

    pad_token_id: int

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        shape = (len(examples), max(len(example["input_ids"]) for example in examples))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORE_INDEX)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            input_ids[row, :length] = torch.tensor(example["input_ids"])
            labels[row, :length] = torch.tensor(example["labels"])
            attention_mask[row, :length] = 1
        next_token = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX).flatten()
        # Found here, on the CPU: a boolean mask on the device would make it wait for the count.
        valid_positions = (next_token != IGNORE_INDEX).nonzero().squeeze(1)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "valid_positions": valid_positions,
            "targets": next_token[valid_positions],
            "example_ids": [example.get("index") for example in examples],
        }


# ------------------------------------------------------------------------------------------------------------------
# Model: student, teacher and objective as one module; packed attention; fewer activations
# ------------------------------------------------------------------------------------------------------------------


class TeacherCache:
    """The teacher's last hidden states at every example's valid positions, on disk: exact, not approximated logits.

    Filled as training meets the examples, read from then on. The file's name is a digest of the base weights and the
    tokenised data, so that a stale cache is never met; an example counts only once all its states are written, so that
    a killed run leaves a cache that the next one goes on with.
    """

    def __init__(self, folder: Path, model: transformers.PreTrainedModel, dataset: datasets.Dataset):
        """Opens or makes the cache of the base weights in `model` (adapters aside) and the tokenised `dataset`.

        Raises:
            UserError: the disk cannot hold it.
        """
        counts = [sum(label != IGNORE_INDEX for label in labels[1:]) for labels in dataset["labels"]]
        self.offsets = [0, *itertools.accumulate(counts)]
        self.width = shape_of(model.get_output_embeddings().weight)[1]
        parameter = model.get_input_embeddings().weight
        self.device, dtype = _device_of(parameter), parameter.dtype
        base = (_whole(tensor) for name, tensor in model.named_parameters() if "lora_" not in name)
        rows = (torch.tensor(row) for name in ("input_ids", "labels") for row in dataset[name])
        path = folder / f"teacher-{fingerprint(itertools.chain(base, rows))[:32]}"
        folder.mkdir(parents=True, exist_ok=True)
        self.num_bytes = self.offsets[-1] * self.width * dtype.itemsize
        states, done = path.with_suffix(".states"), path.with_suffix(".done")
        missing = self.num_bytes - (states.stat().st_blocks * 512 if states.exists() else 0)
        free = shutil.disk_usage(folder).free
        if missing > free:
            raise UserError(
                f"--teacher-cache {folder} needs {self.num_bytes / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} "
                "left: name another folder, or go without"
            )
        shape = (self.offsets[-1], self.width)
        self.states = torch.from_file(str(states), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        self.done = torch.from_file(str(done), shared=True, size=len(counts), dtype=torch.bool)

    def get(self, example_ids: list[int]) -> Tensor | None:
        """The states of these examples, in order, (M, d); None where one is missing."""
        if not all(self.done[i] for i in example_ids):
            return None
        return torch.cat([self.states[self.offsets[i] : self.offsets[i + 1]] for i in example_ids]).to(self.device)

    def put(self, example_ids: list[int], states: Tensor) -> None:
        """Keeps the states of these examples, (M, d) in order."""
        sizes = [self.offsets[i + 1] - self.offsets[i] for i in example_ids]
        for i, rows in zip(example_ids, states.split(sizes), strict=True):
            self.states[self.offsets[i] : self.offsets[i + 1]] = rows.to(self.states)
            self.done[i] = True  # after the states: a kill in between costs this example, never its truth


class BALoRAModel(nn.Module):
    """Student, teacher and objective in one forward pass: what the Trainer trains, and DDP and DeepSpeed wrap.

    The objective is computed without logits where the head is a frozen linear map, else by its definition.

    Attributes:
        model: the causal language model.
        teacher_cache: where set, the teacher's hidden states come from there.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        objective_memory: float = 128.0,
        teacher_cache: TeacherCache | None = None,
    ):
        super().__init__()
        self.model = model
        self.config = model.config
        self.teacher_cache = teacher_cache
        self.objective_memory = objective_memory
        self.head_is_linear = head_is_linear(model)
        self._head_factor: Tensor | None = None
        if self.head_is_linear:
            head = model.get_output_embeddings()
            head.forward = functools.partial(_head_forward, head)
        # The last feed-forward mixes no positions, and only the valid ones of what it gives are read.
        self._last_positions: list[Tensor] = []
        last_mlp = getattr(getattr(model.get_decoder(), "layers", [None])[-1], "mlp", None)
        if last_mlp is not None:
            last_mlp.forward = functools.partial(_at_positions, last_mlp.forward, self._last_positions)

    @property
    def is_fused(self) -> bool:
        """Whether the objective is computed from hidden states."""
        return self.head_is_linear and not self.model.get_output_embeddings().weight.requires_grad

    def forward(
        self,
        inputs: dict[str, Any],
        regularizers: Regularizers | None,
        num_tokens: int | Tensor,
        num_micro_batches: int,
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """See `objective`; `inputs` is a batch of PackingCollator or PaddingCollator."""
        states = self.hidden_states if self.is_fused else self.logits
        teacher = None
        if regularizers is not None and regularizers.lambda_consistency > 0:
            teacher = self.teacher_cache and self.teacher_cache.get(inputs["example_ids"])
            if self._lacks_on_any_rank(teacher):
                teacher = self.of_teacher(states, inputs)
                if self.teacher_cache is not None:
                    self.teacher_cache.put(inputs["example_ids"], teacher)
        rest = (inputs["targets"], regularizers, num_tokens, num_micro_batches)
        if not self.is_fused:
            return objective(states(inputs), teacher, *rest)

        def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
            if regularizers is not None and self._head_factor is None:
                self._head_factor = head_factor(weight)
            return objective_from_hidden(hidden, teacher, weight, self._head_factor, *rest, self.objective_memory)

        return self.model.get_output_embeddings()(states(inputs), fused)

    def _lacks_on_any_rank(self, teacher: Tensor | None) -> bool:
        """Whether the teacher's pass is needed: under ZeRO-3, which gathers the weights for it, on all or none."""
        weight = self.model.get_input_embeddings().weight
        if self.teacher_cache is None or _num_ranks() == 1 or not is_partitioned(weight):
            return teacher is None
        lacking = torch.tensor(int(teacher is None), device=_device_of(weight))
        dist.all_reduce(lacking, op=dist.ReduceOp.MAX)
        return bool(lacking)

    def hidden_states(self, inputs: dict[str, Any]) -> Tensor:
        """The last hidden states at the valid positions, (M, d)."""
        positions = inputs["valid_positions"]
        if not self.model.is_gradient_checkpointing:  # whose second pass comes later
            self._last_positions.append(positions)
        try:
            states = self.model.get_decoder()(**_model_inputs(inputs), use_cache=False).last_hidden_state
        finally:
            self._last_positions.clear()
        return states.flatten(0, 1)[positions]

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """The logits at the valid positions, (M, V)."""
        if self.head_is_linear:
            return self.model.get_output_embeddings()(self.hidden_states(inputs))
        logits = self.model(**_model_inputs(inputs), use_cache=False).logits
        return logits.flatten(0, 1)[inputs["valid_positions"]]

    @torch.no_grad()
    def of_teacher(self, states: Callable[[dict], Tensor], inputs: dict[str, Any]) -> Tensor:
        """`states(inputs)` of the pre-trained model: without adapters, dropout and gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with adapters_disabled(self.model):
                return states(inputs)
        finally:
            self.model.train(training)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.model.gradient_checkpointing_enable(**kwargs)


def _at_positions(forward: Callable[[Tensor], Tensor], positions: list[Tensor], x: Tensor) -> Tensor:
    """`forward` at the one tensor of flat positions in `positions`, zeros elsewhere; everywhere where it is empty."""
    if not positions:
        return forward(x)
    rows = x.flatten(0, 1)
    output = forward(rows[positions[0]][None])
    if not isinstance(output, Tensor):  # some mixtures of experts also return how they routed
        return forward(x)
    output = output[0]
    return torch.zeros_like(rows).index_copy(0, positions[0], output).view_as(x)


def _head_forward(head: nn.Linear, hidden: Tensor, function: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
    """Logits, or `function` of states and weight: ZeRO-3 holds a weight whole only while its own module runs."""
    return F.linear(hidden, head.weight) if function is None else function(hidden, head.weight)


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What of a batch the causal language model itself takes."""
    names = ("input_ids", "attention_mask", "position_ids", "sequence_lengths", "shared_length")
    model_inputs = {name: inputs[name] for name in names if name in inputs}
    if inputs["input_ids"].is_cuda and "sequence_lengths" in inputs:  # FlashAttention's own form of the lengths
        lengths = torch.tensor([0, *inputs["sequence_lengths"]], dtype=torch.int32)
        ends = lengths.cumsum(0, dtype=torch.int32).to(inputs["input_ids"].device, non_blocking=True)
        model_inputs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        model_inputs |= {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}
    return model_inputs


@torch.no_grad()
def head_is_linear(model: transformers.PreTrainedModel) -> bool:
    """Whether the logits are H Eᵀ and nothing else: tried out, which finds biases, soft caps and scales alike."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    input_ids = torch.arange(8, device=_device_of(head.weight))[None] % model.config.vocab_size
    with gathered_module_by_module(model):
        hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = model(input_ids=input_ids, use_cache=False).logits
        return torch.allclose(head(hidden).float(), logits.float(), rtol=1e-5, atol=1e-5)


def attend_per_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequence_lengths: list[int] | None = None,
    shared_length: int = 0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each of the sequences that lie end to end; transformers' attention interface.

    Args:
        query: (1, heads, tokens, head size); key, value: (1, groups, tokens, head size).
        sequence_lengths: of each sequence; None: one sequence.
        shared_length: the beginning that all of them have and only the first still holds.
    """
    lengths = sequence_lengths or [query.shape[2]]
    if sliding_window is not None and max(lengths) > sliding_window:
        raise UserError(f"a sequence of {max(lengths)} tokens exceeds the model's window: use --no-packing")
    held = [lengths[0], *(length - shared_length for length in lengths[1:])]
    outputs = []
    for index, states in enumerate(zip(*(x.split(held, dim=2) for x in (query, key, value)), strict=True)):
        missing = shared_length if index > 0 else 0
        if missing:
            # Queries too: is_causal wants a square, and the beginning is short.
            states = [
                torch.cat([x[:, :, :missing], own], dim=2) for x, own in zip((query, key, value), states, strict=True)
            ]
        q, k, v = states
        output = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(output[:, :, missing:].transpose(1, 2))
    return torch.cat(outputs, dim=1), None  # (1, tokens, heads, head size)


PER_SEQUENCE = "per_sequence"
transformers.AttentionInterface.register(PER_SEQUENCE, attend_per_sequence)
transformers.AttentionMaskInterface.register(PER_SEQUENCE, lambda *args, **kwargs: None)


@torch.no_grad()
def enable_packing(model: transformers.PreTrainedModel) -> bool:
    """Lets `model` take PackingCollator's batches, where it can: tried out against one sequence at a time."""
    before = model.config._attn_implementation
    # FlashAttention has a form for packed sequences of its own.
    packable = before if before == "flash_attention_2" else PER_SEQUENCE
    device = _device_of(model.get_input_embeddings().weight)
    examples = [{"input_ids": list(range(2, 2 + n)), "labels": [IGNORE_INDEX] * 3 + [0] * (n - 3)} for n in (5, 8)]
    collate = PackingCollator(share_beginning=packable == PER_SEQUENCE)

    def states(rows: list[dict]) -> Tensor:
        batch = collate(rows)
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        states = model.get_decoder()(**_model_inputs(moved), use_cache=False).last_hidden_state
        return states[0, moved["valid_positions"]].float()

    fits = False
    with contextlib.suppress(TypeError, ValueError, RuntimeError), gathered_module_by_module(model):
        model.set_attn_implementation(packable)
        packed = states(examples)
        model.set_attn_implementation(before)
        alone = torch.cat([states([example]) for example in examples])
        fits = torch.allclose(packed, alone, rtol=1e-2, atol=1e-2 * float(alone.abs().max()))
    model.set_attn_implementation(packable if fits else before)
    return fits


class _SwiGLU(torch.autograd.Function):
    """silu(gate)·up, keeping the two and nothing else."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · weight with a frozen weight, computed in fp32, keeping x and the row's 1 / rms."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.float()
        scale = torch.linalg.vecdot(rows, rows).div_(rows.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        # With g the gradient at x·scale and d the width: scale·g − scale³·(g·x / d)·x
        x, weight, scale = ctx.saved_tensors
        rows, grad_rows = x.float(), (grad * weight).float()
        mean = torch.linalg.vecdot(grad_rows, rows)[..., None] / x.shape[-1]
        return grad_rows.mul_(scale).addcmul_(rows, mean.mul_(scale**3), value=-1).to(x.dtype), None, None


def _lean_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    product = _SwiGLU.apply(gate, up)
    # down_proj's adapter would keep the product for its gradient, and it is cheap to have again.
    kept = gate.detach(), up.detach()

    def pack(tensor: Tensor) -> Any:
        return kept if tensor.data_ptr() == product.data_ptr() else tensor

    def unpack(packed: Any) -> Tensor:
        return F.silu(packed[0]).mul_(packed[1]) if isinstance(packed, tuple) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return mlp.down_proj(product)


def _lean_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


def save_activations(model: nn.Module) -> int:
    """Replaces the forward of gated SiLU MLPs and of frozen RMSNorms by ones that keep half for the backward pass.

    Each is tried against the module's own forward first. Returns how many were replaced.
    """
    count = 0
    for module in model.modules():
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            linear = getattr(module.gate_proj, "base", module.gate_proj)
            lean, width = _lean_mlp, linear.in_features
        elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            if module.weight.requires_grad:
                continue
            lean, width = _lean_norm, shape_of(module.weight)[0]
        else:
            continue
        parameter = next(module.parameters())
        x = torch.linspace(-2, 2, 3 * width, device=_device_of(parameter)).view(3, width).to(parameter.dtype)
        with torch.no_grad(), gathered(module.parameters()):
            if torch.allclose(lean(module, x).float(), module(x).float(), rtol=1e-2, atol=1e-4):
                module.forward = functools.partial(lean, module)
                count += 1
    return count


# ------------------------------------------------------------------------------------------------------------------
# Trainer
# ------------------------------------------------------------------------------------------------------------------


class BALoRATrainer(Trainer):
    """The transformers Trainer with BA-LoRA's objective, one definition of the mean, the terms' metrics, checkpoints of
    what is trained that are complete or not there, and a guard against NaN and Inf."""

    def __init__(self, *, arguments: Arguments, **kwargs: Any):
        super().__init__(**kwargs)
        self.arguments = arguments
        self.loss_is_scaled_for_ga = True  # `objective` normalises over the whole optimizer step
        self.interruption = _Interruption()
        self.add_callback(self.interruption)
        self.skipped_steps = 0
        self._num_micro_batches = 1
        self._staging: Path | None = None
        self._tr_loss = torch.zeros(())  # the Trainer's own, before it starts
        self._micro_batches: list[tuple[dict[str, float | Tensor], list[int]]] = []  # of the step under way
        self._sums: dict[str, float | Tensor] = {}
        self._reset_clock()

    def _reset_clock(self) -> None:
        self._sums = {}
        self._last_log = (time.monotonic(), self.state.global_step)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # DeepSpeed would insist on the base weights, which no checkpoint holds.
        deepspeed = self.is_deepspeed_enabled and resume_from_checkpoint is not None
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, None if deepspeed else resume_from_checkpoint
        )
        if deepspeed:
            self.model_wrapped.load_checkpoint(resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        zero = getattr(self.model_wrapped, "optimizer", None)
        if hasattr(zero, "check_grad_overflow"):
            zero.check_grad_overflow = True  # ZeRO-2 looks for NaN in bf16 alone, and steps on it in fp32
        self._reset_clock()
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], int]:
        """One optimizer step's micro-batches, and its number of valid tokens over all ranks."""
        batches = list(itertools.islice(epoch_iterator, num_batches))
        num_tokens = sum(len(batch["targets"]) for batch in batches)
        counts = torch.tensor([num_tokens, len(batches), self.interruption.signal], device=device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        num_tokens, self._num_micro_batches, signals = counts.tolist()
        self.interruption.agreed = signals > 0  # all ranks stop after the same step
        self._micro_batches = []
        self._before_step = (self._tr_loss.clone(), dict(self._sums))
        return batches, num_tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        regularizers = None
        if self.arguments.method == "ba-lora":
            regularizers = Regularizers.at(self.arguments, self.state.global_step / self.state.max_steps)
        loss, terms = model(inputs, regularizers, num_items_in_batch, self._num_micro_batches)
        self._micro_batches.append((terms, inputs["example_ids"]))
        mask = inputs.get("attention_mask")
        terms = terms | {"tokens": sum(inputs["sequence_lengths"]) if mask is None else mask.sum()}
        # Kept as tensors: reading them here would make the device wait at every micro-step.
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        # Gradients are averaged over ranks, but the parts of the loss add up.
        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        """The norm, after the guard: NaN or Inf anywhere in the step's terms or gradients stops the run or skips the
        step. The one place between the gradients and the optimizer's step that the Trainer leaves open."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        values = [value for terms, _ in self._micro_batches for value in terms.values()]
        total = torch.stack([torch.as_tensor(value, device=self.args.device).float() for value in values]).sum()
        total = total + torch.as_tensor(grad_norm, device=self.args.device).float()
        if getattr(getattr(self.model_wrapped, "optimizer", None), "overflow", False):  # DeepSpeed's own verdict
            total = total + math.inf
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        if math.isfinite(total.item()):
            return grad_norm
        found = self._describe_nonfinite()
        if self.arguments.on_nonfinite == "stop":
            kept = newest_checkpoint(self.args.output_dir)
            raise RunStopped(
                f"NaN or Inf in step {self.state.global_step + 1}: {found}; the last checkpoint is "
                f"{kept if kept else 'none'}; --on-nonfinite skip leaves such steps out"
            )
        self.skipped_steps += 1
        if self.is_world_process_zero():
            print(f"note: step {self.state.global_step + 1} skipped, NaN or Inf in {found}", file=sys.stderr)
        # The log's means leave the step out too.
        self._tr_loss, self._sums = self._before_step
        self._globalstep_last_logged += 1
        self._last_log = (self._last_log[0], self._last_log[1] + 1)
        if not self.is_deepspeed_enabled:  # which has skipped by itself
            model.zero_grad(set_to_none=True)  # AdamW leaves alone what has no gradient
        return 0.0

    def _describe_nonfinite(self) -> str:
        """The terms that are NaN or Inf with their examples' places in the data; this rank's."""
        for terms, example_ids in self._micro_batches:
            names = [name for name, value in terms.items() if not math.isfinite(float(value))]
            if names:
                return f"{', '.join(names)}, in the examples {example_ids}"
        every = [index for _, example_ids in self._micro_batches for index in example_ids]
        where = "the gradients" if self.accelerator.num_processes == 1 else "the gradients, or another rank's terms"
        return f"{where}, in the examples {every}"

    # Checkpoints: the Trainer's own files, but only what is trained; written elsewhere and moved to their place.

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        tensors = trained_tensors(self.model.model, keep=self.args.should_save)
        if self.args.should_save:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(tensors, Path(output_dir) / TRAINED_TENSORS)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:  # transformers' own schedule, of which DeepSpeed knows nothing
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")
        else:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained_tensors(self.model.model, load_file(Path(resume_from_checkpoint) / TRAINED_TENSORS))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / "checkpoints"
        final = folder / f"checkpoint-{self.state.global_step}"
        identity = checkpoint_identity(self.arguments, self.args.world_size)
        if final.exists() and checkpoint_problem(final, identity) is None:
            return
        self._staging = folder / INCOMPLETE
        problems = []

        def attempt(part: Callable[[], Any]) -> None:
            try:
                part()
            except (OSError, RuntimeError, SafetensorError) as error:  # each writer has its own for a full disk
                problems.append(_first_line(error))

        def prepare() -> None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)

        def put_in_place() -> None:
            seal_checkpoint(self._staging / final.name, identity)
            shutil.rmtree(final, ignore_errors=True)  # a damaged one
            (self._staging / final.name).rename(final)

        if self.args.should_save:
            attempt(prepare)
        self.accelerator.wait_for_everyone()
        attempt(lambda: super(BALoRATrainer, self)._save_checkpoint(model, trial))
        if problems and self.is_deepspeed_enabled and self.accelerator.num_processes > 1:
            # The other ranks are inside of DeepSpeed's own writing, and wait for this one there.
            raise RunStopped(f"the checkpoint of step {self.state.global_step} could not be written ({problems[0]})")
        failed = torch.tensor(float(bool(problems)), device=self.args.device)
        if self.accelerator.num_processes > 1:  # which also awaits everyone
            failed = self.accelerator.reduce(failed, reduction="sum")
        if self.args.should_save:
            if not failed:
                attempt(put_in_place)
            shutil.rmtree(self._staging, ignore_errors=True)
        self._staging = None
        if problems or (failed and self.args.should_save):
            kept = newest_checkpoint(self.args.output_dir)
            print(
                f"warning: the checkpoint of step {self.state.global_step} could not be written "
                f"({problems[0] if problems else 'another rank says why'}); "
                f"{'the last one is ' + str(kept) if kept else 'there is none yet'}",
                file=sys.stderr,
            )
        elif self.args.should_save:
            for old in complete_checkpoints(self.args.output_dir)[self.arguments.keep_checkpoints :]:
                shutil.rmtree(old, ignore_errors=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms, the λs, tokens per second and peak memory to a training step's log; writes metrics.jsonl."""
        if "loss" in logs:
            names = sorted(self._sums)
            sums = torch.stack([torch.as_tensor(self._sums[name], device=self.args.device).float() for name in names])
            sums = dict(zip(names, self.accelerator.reduce(sums, reduction="sum").tolist(), strict=True))
            then, step = self._last_log
            tokens = sums.pop("tokens")
            logs |= {name: value / (self.state.global_step - step) for name, value in sums.items()}
            logs["tokens_per_second"] = tokens / (time.monotonic() - then)
            logs["peak_memory_gib"] = peak_memory_gib()
            self._reset_clock()
        super().log(logs, start_time)
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir) / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.state.log_history[-1]) + "\n")


class _Interruption(transformers.TrainerCallback):
    """SIGTERM and SIGINT: the step is finished, a checkpoint saved, the training ended. A second one leaves at once.

    Attributes:
        signal: the number of the signal that came, 0 before.
        agreed: whether it has come to any rank, as of the step under way.
    """

    def __init__(self):
        self.signal = 0
        self.agreed = False
        self._came_at = 0.0

    def _receive(self, number: int, frame: Any) -> None:
        # Launchers pass on what the terminal sends to all of them anyway: the same signal twice at once is one.
        if self.signal and time.monotonic() - self._came_at > 2:
            os._exit(128 + number)
        if not self.signal:
            self.signal, self._came_at = number, time.monotonic()
            print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, the signals are taken this way."""
        handlers = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed or (self.signal and args.world_size == 1):
            self.agreed = control.should_training_stop = control.should_save = True


def peak_memory_gib() -> float:
    """This process's peak so far in GiB: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


class ProgressBar(transformers.ProgressCallback):
    """The Trainer's progress bar with the loss on the bar itself; metrics.jsonl has the rest."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            names = {"loss": "loss", "task": "task", "tok/s": "tokens_per_second"}
            self.training_bar.set_postfix({label: f"{logs[name]:.4g}" for label, name in names.items() if name in logs})


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints: what is trained and PiSSA's initial factors, the optimizer, the scheduler, random states, the position in
# the data. Never the base weights.
# ------------------------------------------------------------------------------------------------------------------

TRAINED_TENSORS = "trained.safetensors"
MANIFEST = "manifest.json"
INCOMPLETE = ".incomplete"


def trained_tensors(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Trainable parameters in full precision and PiSSA's frozen factors, whole, on the CPU.

    Collective, one parameter at a time: no device holds two of them whole. Without `keep` nothing is returned, for a
    rank that only gives its parts.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = _master(parameter)
            if keep:
                tensors[name] = whole.detach().cpu().contiguous()
    for name, layer in adapter_layers(model).items() if keep else ():
        if layer.initial_A is not None:
            tensors[f"{name}.initial_A"] = layer.initial_A.detach().cpu().contiguous()
            tensors[f"{name}.initial_B"] = layer.initial_B.detach().cpu().contiguous()
    return tensors


def _master(parameter: Tensor) -> Tensor:
    """The parameter as the optimizer keeps it: DeepSpeed has a copy in fp32, in parts."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter


@torch.no_grad()
def load_trained_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts `trained_tensors` of a model of the same shape into `model`.

    Raises:
        KeyError: one is missing.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(tensors[name])
    for name, layer in adapter_layers(model).items():
        if layer.initial_A is not None:
            layer.initial_A.copy_(tensors[f"{name}.initial_A"])
            layer.initial_B.copy_(tensors[f"{name}.initial_B"])


def initial_factors(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A₀ and B₀ by layer among `trained_tensors`."""
    names = [name.removesuffix(".initial_A") for name in tensors if name.endswith(".initial_A")]
    return {name: (tensors[f"{name}.initial_A"], tensors[f"{name}.initial_B"]) for name in names}


# What may change from one start of a run to the next: where it runs, what it writes besides, how it uses the machine.
NOT_IDENTITY = {"config", "output_dir", "overwrite", "dry_run", "export_from", "resume", "save_steps"}
NOT_IDENTITY |= {"keep_checkpoints", "on_nonfinite", "logging_steps", "init_cache", "teacher_cache", "deepspeed"}
NOT_IDENTITY |= {"dtype", "attn_implementation", "packing", "objective_memory", "gradient_checkpointing"}
NOT_IDENTITY |= {"trust_remote_code", "skip_done"}


def checkpoint_identity(args: Arguments, world_size: int) -> dict[str, Any]:
    """What must be the same for a run to go on from a checkpoint."""
    identity = {name: value for name, value in dataclasses.asdict(args).items() if name not in NOT_IDENTITY}
    zero = json.loads(Path(args.deepspeed).read_text()).get("zero_optimization", {}) if args.deepspeed else {}
    return identity | {"processes": world_size, "zero_stage": zero.get("stage", 0)}


def seal_checkpoint(folder: Path, identity: dict[str, Any]) -> None:
    """Writes the manifest, and everything through to the disk: what is renamed after this is complete."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"identity": identity, "sizes": sizes}, indent=2) + "\n")
    for file in (*files, manifest, folder):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def last_state(checkpoint: Path) -> transformers.TrainerState:
    """Where the run was when it wrote the checkpoint."""
    return transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def checkpoint_problem(folder: Path, identity: dict[str, Any] | None = None) -> str | None:
    """Why the checkpoint cannot be used, in a few words; None where it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        sizes, theirs = manifest["sizes"], manifest["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no readable manifest"
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            return f"{name} is cut short or missing"
    difference = first_difference(theirs, identity or {})
    return f"it belongs to a run with {difference}" if difference else None


def complete_checkpoints(output_dir: str | Path, identity: dict[str, Any] | None = None) -> list[Path]:
    """The usable checkpoints of a run, the newest first; of `identity`, where it is given."""
    return [folder for folder in _all_checkpoints(output_dir) if checkpoint_problem(folder, identity) is None]


def _all_checkpoints(output_dir: str | Path) -> list[Path]:
    folders = (Path(output_dir) / "checkpoints").glob("checkpoint-*")
    numbered = [folder for folder in folders if folder.name.partition("-")[2].isdigit()]
    return sorted(numbered, key=lambda folder: int(folder.name.partition("-")[2]), reverse=True)


def newest_checkpoint(
    output_dir: str | Path, identity: dict[str, Any] | None = None, *, verbose: bool = False
) -> Path | None:
    """The newest usable checkpoint; with `verbose`, says which newer ones were passed over and why."""
    for folder in _all_checkpoints(output_dir):
        problem = checkpoint_problem(folder, identity)
        if problem is None:
            return folder
        if verbose:
            print(f"note: {folder} is passed over: {problem}", file=sys.stderr)
    return None


# ------------------------------------------------------------------------------------------------------------------
# Export
# ------------------------------------------------------------------------------------------------------------------


def export_adapter(
    model: nn.Module,
    folder: Path,
    base_model: str,
    target_modules: list[str],
    task_type: str,
    modules_to_save: list[str] | None = None,
) -> int:
    """Writes the adapters as an ordinary LoRA on the unmodified base, in PEFT's format; returns its rank, PiSSA's 2r.

    Args:
        modules_to_save: names of trained modules, such as a classifier, that are stored whole beside the adapters.
    """
    layers = adapter_layers(model)
    tensors = {}
    for name, layer in layers.items():
        A, B = layer.stacked_factors()
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.detach().cpu().contiguous()
    for name in modules_to_save or []:
        for key, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"base_model.model.{name}.{key}"] = tensor.detach().cpu().contiguous()
    rank = len(A)
    metadata = {"format": "pt"}
    if layer.initial_A is not None:
        metadata["principal_rank"] = str(len(layer.lora_A))  # of the stacked rank, how much is trained
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": layer.scaling * rank,
        "target_modules": target_modules,
        "modules_to_save": modules_to_save,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata=metadata)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return rank


def adapter_card(args: Arguments, rank: int) -> str:
    """README.md of an exported adapter, stored with `rank`: what it is, on which base, how trained, how loaded."""
    front = {"base_model": args.model, "library_name": "peft", "tags": ["lora", args.method]}
    settings = {
        "base model": args.model + (f", revision {args.model_revision}" if args.model_revision else ""),
        "method": args.method + (f", formulation {args.formulation}" if args.method == "ba-lora" else ""),
        "data": f"{args.data}, fields {', '.join(args.fields)}",
        "rank, alpha": f"{args.rank}, {args.alpha:g}"
        + (f"; stored as a LoRA of rank {rank}" if rank != args.rank else ""),
        "target modules": ", ".join(args.target_modules),
        "learning rate, epochs, seed": f"{args.learning_rate:g}, {args.epochs:g}, {args.seed}",
    }
    if args.method == "ba-lora":
        names = ("lambda_consistency", "lambda_diversity", "lambda_spectral")
        settings["λ₁, λ₂, λ₃"] = ", ".join(f"{getattr(args, name):g}" for name in names)
    rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {args.method} adapter of {args.model}\n\n"
        "An ordinary LoRA adapter in PEFT's format, for the base model as it is published"
        + (": the factors are [A; A₀] and [B, −B₀], A₀ and B₀ PiSSA's start.\n\n" if rank != args.rank else ".\n\n")
        + f"| | |\n|---|---|\n{rows}\n"
        "```python\nmodel = AutoModelForCausalLM.from_pretrained(base)\n"
        'model = peft.PeftModel.from_pretrained(model, "this folder")\n```\n\n'
        f"It was trained behind this prompt:\n\n```text\n{ALPACA_PROMPT}\n```\n\n"
        f"vLLM serves it as a LoRA with `--enable-lora --max-lora-rank {rank}` or more.\n"
    )


@dataclass
class InitialAdapter:
    """An adapter in PEFT's format that a run starts from."""

    folder: Path
    rank: int
    alpha: float
    target_modules: list[str]
    factors: dict[str, tuple[Tensor, Tensor]]  # A (R × in) and B (out × R) by layer name
    principal_rank: int | None  # ours: the first this many of R are trained, the others are PiSSA's start
    is_pissa: bool  # PEFT's PiSSA: A₀ and B₀ are those of the weight

    def require_fit(self, layers: dict[str, nn.Linear]) -> None:
        """Raises a UserError where the adapter does not fit the model's target layers."""
        for name, layer in layers.items():
            if name not in self.factors:
                raise UserError(f"--init-adapter {self.folder} has no factors for {name}: an adapter of another model")
            A, B = self.factors[name]
            if (B.shape[0], A.shape[1]) != (layer.out_features, layer.in_features):
                raise UserError(f"--init-adapter {self.folder}: {name} has another size than this model's")
        beyond = sorted(self.factors.keys() - layers.keys())
        if beyond:
            raise UserError(f"--init-adapter {self.folder} has factors for {beyond[0]}, which this model lacks")

    def trained_tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What `trained_tensors` would give for a model that starts from it."""
        tensors = {}
        for name, (A, B) in self.factors.items():
            r = self.rank
            tensors |= {f"{name}.lora_A": A[:r].contiguous(), f"{name}.lora_B": B[:, :r].contiguous()}
            if self.principal_rank is not None:
                initial = (A[r:].contiguous(), -B[:, r:])
            elif self.is_pissa:
                initial = principal_factors(_whole(model.get_submodule(name).weight), r, self.alpha / r)
            else:
                continue
            tensors |= {f"{name}.initial_A": initial[0].cpu(), f"{name}.initial_B": initial[1].cpu()}
        return tensors


def read_adapter(folder: Path, method: str) -> InitialAdapter:
    """Reads a LoRA adapter in PEFT's format.

    Raises:
        UserError: not such an adapter, or of a kind that this script cannot go on with.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # OSError, JSON's and safetensors' own
        raise UserError(f"--init-adapter {folder} is no adapter in PEFT's format: {_first_line(error)}") from error
    start = config.get("init_lora_weights", True)
    unsupported = [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if config.get(name)]
    if config.get("peft_type") != "LORA" or unsupported or config.get("bias", "none") != "none":
        kind = ", ".join(unsupported) or f"peft_type {config.get('peft_type')}, bias {config.get('bias')}"
        raise UserError(f"--init-adapter {folder}: only plain LoRA can be gone on with, not {kind}")
    if start not in (True, False, "gaussian", "eva", "orthogonal", "pissa"):
        raise UserError(f"--init-adapter {folder}: {start} changed the base's weights; convert it to a LoRA with PEFT")
    others = [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if others:
        raise UserError(f"--init-adapter {folder}: only factors of linear layers can be gone on with, not {others[0]}")
    prefix, factors = "base_model.model.", {}
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            factors[layer.removeprefix(prefix)] = (tensors[name], tensors[f"{layer}.lora_B.weight"])
    principal_rank = int(metadata["principal_rank"]) if "principal_rank" in metadata else None
    is_pissa = start == "pissa"
    if (is_pissa or principal_rank is not None) and method == "lora":
        raise UserError(f"--init-adapter {folder} is a PiSSA adapter: go on with --method pissa or ba-lora")
    rank = principal_rank or config["r"]
    alpha = config["lora_alpha"] * rank / config["r"]
    targets = sorted({name.rpartition(".")[2] for name in factors})
    return InitialAdapter(folder, rank, alpha, targets, factors, principal_rank, is_pissa)


def merge_adapters(model: nn.Module) -> nn.Module:
    """Adds each adapter to its base weight and takes the LoRALinear out, in place; returns the plain model."""
    for name, layer in adapter_layers(model).items():
        parent, _, child = name.rpartition(".")
        layer.base.weight.data = layer.merged_weight()
        setattr(model.get_submodule(parent), child, layer.base)
    return model


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "datasets", "deepspeed", "safetensors", "numpy", "vllm"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------


def check_checkpoint(name: str) -> None:
    """Raises a UserError where the local folder `name` cannot be a checkpoint; reads no weights. Hub names pass."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.is_file() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"no such model folder: {name}")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} has no config.json: not a transformers checkpoint")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{name} has no .safetensors file (pickled weights are not loaded: convert them first)")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = set(json.loads(index.read_text())["weight_map"].values()) - {file.name for file in files}
        if missing:
            raise UserError(f"{name} lacks {sorted(missing)[0]}, which its index names: the checkpoint is incomplete")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except Exception as error:
            raise UserError(f"{file} is damaged ({_first_line(error)}): fetch or copy it again") from error


def load_tokenizer_and_config(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, needs_all: bool = True
) -> tuple[transformers.PreTrainedTokenizerBase | None, transformers.PretrainedConfig]:
    """The tokenizer and configuration of a checkpoint.

    Args:
        needs_all: False: neither weights nor tokenizer need to be there; where it is not, None comes in its place.

    Raises:
        UserError: neither a readable folder nor a hub name that answers, or no end-of-sequence token.
    """
    if needs_all:
        check_checkpoint(name)
    tokenizer = None
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        with contextlib.nullcontext() if needs_all else contextlib.suppress(Exception):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # OSError, ValueError, and the hub client's own
        raise UserError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    if needs_all and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token: set eos_token in its configuration")
    return tokenizer, config


def resolve_demo(name: str | None, kind: Literal["model", "train", "test"]) -> str | None:
    """The path behind the reserved name `demo`; any other name as it is."""
    if name != "demo":
        return name
    from data import demo

    try:
        return str(demo.model() if kind == "model" else demo.problems(kind))
    except (RuntimeError, OSError) as error:
        raise UserError(f"cannot make the demo's {kind}: {_first_line(error)}") from error


def training_arguments(args: Arguments, dtype: torch.dtype) -> TrainingArguments:
    """What the transformers Trainer needs to know of `args`."""
    # Full fine-tuning needs fp32 master weights: bf16 only inside autocast. DeepSpeed keeps masters of its own.
    mixed = dtype == torch.bfloat16 and (args.method == "full" or args.deepspeed is not None)
    return common_training_arguments(
        args,
        gradient_accumulation_steps=args.gradient_accumulation,
        bf16=mixed,
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        deepspeed=args.deepspeed,
        logging_steps=args.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would read the loss from the device at every micro-step
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        report_to="tensorboard",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # PiSSA's frozen factors, which no step changes
    )


def common_training_arguments(args: Any, **settings: Any) -> TrainingArguments:
    """What every training here tells the Trainer, and `settings`."""
    trainer_args = TrainingArguments(
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
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **settings,
    )
    # Started by plain python on a machine of several GPUs, the Trainer would take them all and multiply the batch.
    if trainer_args.n_gpu > 1:
        print(f"note: one of {trainer_args.n_gpu} GPUs is used; torchrun or deepspeed start train.py on all of them")
        trainer_args._n_gpu = 1
    return trainer_args


def resolve_dtype(name: str) -> torch.dtype:
    if name == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    return getattr(torch, name)


def main(argv: list[str]) -> None:
    started = time.time()
    args = parse_arguments(Arguments, __doc__, argv)
    if args.export_from is not None:
        export_again(args)
        return
    args = resolve_arguments(args)
    model_path = resolve_demo(args.model, "model")
    tokenizer, config = load_tokenizer_and_config(
        model_path, args.model_revision, args.trust_remote_code, needs_all=not args.dry_run
    )
    with torch.device("meta"):  # shapes only: a rank or target that does not fit is found before any weight is read
        attention = None if args.dry_run else args.attn_implementation  # which another machine may have
        try:
            skeleton = AutoModelForCausalLM.from_config(
                config, trust_remote_code=args.trust_remote_code, attn_implementation=attention
            )
        except (ImportError, ValueError) as error:
            raise UserError(
                f"cannot make {args.model} as a causal language model with these options: {_first_line(error)}"
            ) from error
    adapter = None
    if args.init_adapter is not None:
        adapter = read_adapter(Path(args.init_adapter), args.method)
        args.rank, args.alpha, args.target_modules = adapter.rank, adapter.alpha, adapter.target_modules
    if args.method != "full":
        if args.target_modules is None:
            args.target_modules = default_target_modules(skeleton)
        found = find_target_modules(skeleton, args.target_modules, args.rank)
        if adapter is not None:
            adapter.require_fit(found)

    if args.dry_run:
        print(dry_run(args, skeleton, tokenizer))
        return
    if args.deepspeed is not None and "RANK" not in os.environ:
        raise UserError("--deepspeed needs its launcher: deepspeed --no_local_rank --num_gpus N train.py ...")
    output_dir = Path(args.output_dir)
    if args.resume and (output_dir / "run.json").is_file():
        require_same_run(output_dir, args)
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"trained already, with these settings: {output_dir}")
            if not (output_dir / "merged").is_dir():
                print(f"note: its merged/ is gone; train.py --export-from {output_dir} --overwrite writes it again")
        return

    records = load_training_records(args)
    dtype = resolve_dtype(args.dtype)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(args.output_dir) / "tensorboard")  # has no argument of its own
    trainer_args = training_arguments(args, dtype)  # before the model: DeepSpeed decides how weights are loaded
    if args.deepspeed is not None:
        import deepspeed

        deepspeed.init_distributed()  # ZeRO-3 partitions the weights while they are loaded, and asks how many ranks
    with trainer_args.main_process_first(desc="tokenising"):
        dataset, num_dropped = build_dataset(records, tokenizer, args.fields, args.max_length)
    is_main = trainer_args.process_index == 0
    if num_dropped and is_main:
        why = f"a field is empty, or no response token is within {args.max_length} tokens"
        print(f"dropped {num_dropped} of {len(records)} examples: {why}")
    if len(dataset) == 0:
        raise UserError(f"no example of {args.data} has a response token within --max-length {args.max_length}")

    checkpoint = None
    if args.resume:
        identity = checkpoint_identity(args, trainer_args.world_size)
        checkpoint = newest_checkpoint(output_dir, identity, verbose=is_main)
        others = complete_checkpoints(output_dir)
        if checkpoint is None and others:  # starting anew would delete them
            raise UserError(
                f"--resume: {others[0]}: {checkpoint_problem(others[0], identity)}; give that run's settings, name "
                "another --output-dir, or replace it with --overwrite instead of --resume"
            )
        if is_main:
            where = f"going on from {checkpoint}" if checkpoint else f"no usable checkpoint in {output_dir}: starting"
            print(where, flush=True)
    if is_main:
        if args.overwrite:
            clear_folder(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "config.yaml").write_text(config_text(args))
        forget_metrics_after(output_dir, checkpoint)
        print(f"training {args.model} on {len(dataset)} examples of {args.data} by {args.method}", flush=True)

    transformers.set_seed(args.seed)
    # The masters that full fine-tuning needs; with adapters the base is frozen and its own type is enough.
    load_dtype = torch.float32 if args.method == "full" and args.deepspeed is None else dtype
    model = load_model(args, model_path, load_dtype)
    use_cache = model.config.use_cache
    partitioned = any(is_partitioned(parameter) for parameter in model.parameters())
    if not partitioned and args.load_in is None:
        model.to(trainer_args.device)  # so that the decompositions run where they are fast
    if checkpoint is not None:
        tensors = load_file(checkpoint / TRAINED_TENSORS)
        attach_adapters(model, args, tensors)
    elif adapter is not None:
        attach_adapters(model, args, adapter.trained_tensors(model))
    else:
        cache = Path(args.init_cache) if args.init_cache else None
        add_adapters(model, args.method, args.rank, args.alpha, args.target_modules, cache=cache, progress=is_main)
    if args.deepspeed is not None:
        round_factors(model, dtype)
    trainable = sum(shape_of(parameter).numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(shape_of(parameter).numel() for parameter in model.parameters())
    if is_main:
        share = f"{trainable / 1e6:.2f} M trainable parameters on a model of {skeleton.num_parameters() / 1e6:.2f} M"
        print(f"{args.method}: {share} ({time.time() - started:.0f} s since start)", flush=True)

    window = getattr(config, "sliding_window", None)
    longest = max(map(len, dataset["input_ids"])) if window else 0
    beyond_window = bool(window) and longest > window
    eager = args.attn_implementation == "eager"  # asked for by name: packing would take another
    packing = args.packing and not beyond_window and not eager and enable_packing(model)
    if args.method != "full" and not args.gradient_checkpointing:  # which keeps next to nothing by itself
        save_activations(model)
    wrapped = BALoRAModel(model, args.objective_memory)
    if args.teacher_cache is not None and args.method == "ba-lora" and args.lambda_consistency > 0:
        if not wrapped.is_fused:
            raise UserError("--teacher-cache keeps hidden states, and this model's head is not a plain linear map")
        wrapped.teacher_cache = TeacherCache(Path(args.teacher_cache), model, dataset)
        if is_main:
            known = int(wrapped.teacher_cache.done.sum())
            size = wrapped.teacher_cache.num_bytes / 2**30
            print(f"teacher cache: {size:.2f} GiB when full, {known} of {len(dataset)} examples are there")
    if is_main and args.packing and not packing:
        why = f"attends {window} tokens of {longest}" if beyond_window else "cannot attend to packed sequences"
        why = "attends eagerly" if eager else why
        print(f"note: {type(model).__name__} {why}; batches are padded")
    if is_main and args.method != "full" and not wrapped.is_fused:
        print(f"note: the head of {type(model).__name__} is not a plain linear map; the objective holds whole logits")
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = BALoRATrainer(
        arguments=args,
        model=wrapped,
        args=trainer_args,
        train_dataset=dataset,
        # FlashAttention's form for packed sequences has none for a beginning that stands there once.
        data_collator=PackingCollator(model.config._attn_implementation == PER_SEQUENCE)
        if packing
        else PaddingCollator(pad_token_id),
    )
    trainer.pop_callback(transformers.ProgressCallback)
    trainer.add_callback(ProgressBar)
    state = None if checkpoint is None else last_state(checkpoint)
    finished = state is not None and state.global_step >= state.max_steps
    try:
        if finished:  # only the export is missing; the Trainer would take one step more
            trainer.state = state
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            train_loss, train_seconds = sum(losses) / max(len(losses), 1), 0.0
        else:
            with trainer.interruption.awaited():
                result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            train_loss, train_seconds = result.training_loss, result.metrics["train_runtime"]
    except RuntimeError as error:  # the backends have no exception of their own for it
        if _num_ranks() > 1 and any(name in str(error) for name in ("gloo", "NCCL", "Connection")):
            kept = newest_checkpoint(output_dir)
            raise RunStopped(
                f"rank {trainer_args.process_index} lost another rank after step {trainer.state.global_step} "
                f"({_first_line(error)}); --resume goes on from {kept if kept else 'the start'}"
            ) from error
        raise
    if trainer.interruption.agreed and trainer.state.global_step < trainer.state.max_steps:
        if is_main:
            kept = newest_checkpoint(output_dir) or "no checkpoint"
            print(f"interrupted after step {trainer.state.global_step}: {kept} is what --resume goes on from")
        sys.exit(128 + (trainer.interruption.signal or signal.SIGTERM))

    # From the published weights, where this model holds parts of them or rounded ones. Every rank has a part to give.
    rebuild = args.deepspeed is not None or args.load_in is not None
    tensors = None
    if rebuild:
        tensors = load_file(checkpoint / TRAINED_TENSORS) if finished else trained_tensors(model, keep=is_main)
    if is_main:
        if tensors is not None:
            model = rebuilt_model(args, model_path, dtype, tensors)
        model.config.use_cache = use_cache  # the Trainer switches it off; the exported model generates with it
        run = {
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "seed": args.seed,
            "versions": package_versions(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
            "processes": trainer_args.world_size,
            "examples": len(dataset),
            "dropped_examples": num_dropped,
            "trainable_parameters": trainable,
            "total_parameters": total,
            "steps": trainer.state.global_step,
            "skipped_steps": trainer.skipped_steps,
            "resumed_from": str(checkpoint) if checkpoint else None,
            "train_loss": train_loss,
            "train_seconds": train_seconds,
            "peak_memory_gib": peak_memory_gib(),
        }
        export_model(model, tokenizer, args, model_path, dtype, output_dir)
        (output_dir / "run.json").write_text(json.dumps(run, indent=2) + "\n")
        print(summary(args, run))


# Resident beside the tensors: Python, torch and transformers, and the holes that the allocator cannot fill. From peaks
# of whole runs on Linux (tests/test_architectures.py measures them again); on a GPU it does not count.
PROGRAM_BYTES = 0.85 * 2**30


def num_trainable(args: Arguments, skeleton: nn.Module) -> int:
    """How many parameters --method trains."""
    if args.method == "full":
        return skeleton.num_parameters()
    layers = find_target_modules(skeleton, args.target_modules, args.rank).values()
    return sum(args.rank * (layer.in_features + layer.out_features) for layer in layers)


def adapter_bytes(args: Arguments, trainable: int) -> int:
    """Of the factors in fp32, PiSSA's frozen ones included."""
    return trainable * 4 * (1 if args.method == "lora" else 2)


def estimated_memory(
    args: Arguments, skeleton: nn.Module, dtype: torch.dtype, tokens: int, valid: int, num_processes: int
) -> dict[str, float]:
    """Bytes per process at the peak of a training step, by part.

    Activations are what the student keeps for its backward pass, counted per token and layer for gated decoders whose
    attention keeps no matrix of scores: d is the residual stream's width, f the feed-forward's, a and g the widths of
    queries and of keys, r the adapter's rank.

    Args:
        skeleton: the model without adapters, on the meta device.
        tokens, valid: of the largest micro-batch; those at which the objective is computed.
    """
    config = skeleton.config
    zero = json.loads(Path(args.deepspeed).read_text()).get("zero_optimization", {}) if args.deepspeed else {}
    stage = zero.get("stage", 0)
    split = {name: num_processes if stage >= needed else 1 for name, needed in (("o", 1), ("g", 2), ("w", 3))}
    total, trainable = skeleton.num_parameters(), num_trainable(args, skeleton)
    full = args.method == "full"
    item = dtype.itemsize
    base_item = {None: 4 if full and not args.deepspeed else item, "8bit": 1, "4bit": 0.56}[args.load_in]
    parts = {"weights": total * base_item / split["w"]}
    if not full:
        parts["adapters"] = adapter_bytes(args, trainable)
    parts["gradients"] = trainable * (item if args.deepspeed else 4) / split["g"]
    masters = 4 if args.deepspeed and item < 4 else 0
    offloaded = zero.get("offload_optimizer", {}).get("device") == "cpu" and torch.cuda.is_available()
    parts["optimizer"] = 0 if offloaded else trainable * (8 + masters) / split["o"]

    d, layers = config.hidden_size, config.num_hidden_layers
    f = getattr(config, "intermediate_size", 4 * d)
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or d // heads
    a, g = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
    num_adapters = 0 if full else len(find_target_modules(skeleton, args.target_modules, args.rank))
    ranks = args.rank * num_adapters / layers
    attention = 3 * a + 2 * g  # queries, keys, values, what comes out, and its copy for the output projection
    # Full fine-tuning has transformers' own norms and activations.
    kept = 8 * d + attention + 4 * f if full else 4 * d + attention + 2 * f + ranks
    if args.gradient_checkpointing:
        parts["activations"] = tokens * item * (layers * d + kept)
    else:
        parts["activations"] = tokens * item * layers * kept
    vocabulary = config.vocab_size
    if full:  # the head is trained: whole logits, their gradient and softmax in fp32
        parts["objective"] = valid * vocabulary * (3 * 4 + item)
    else:
        parts["objective"] = (
            min(args.objective_memory * 2**20, 2 * valid * vocabulary * 4) + 3 * valid * d * 4 + 12 * d * d
        )
    # What a layer's backward pass holds beside: a feed-forward's gradients.
    parts["transient"] = 4 * tokens * f * item
    if not torch.cuda.is_available():
        parts["program"] = PROGRAM_BYTES
    return parts


def dry_run(args: Arguments, skeleton: nn.Module, tokenizer: transformers.PreTrainedTokenizerBase | None) -> str:
    """What a run with these arguments would be: configuration, parameters, memory, disk, steps and tokens."""
    dtype = resolve_dtype(args.dtype)
    num_processes = int(os.environ.get("WORLD_SIZE", max(1, torch.cuda.device_count())))
    lines = [config_text(args), ""]
    total, trainable = skeleton.num_parameters(), num_trainable(args, skeleton)
    lines.append(f"parameters: {trainable / 1e6:.1f} M trainable, {total / 1e6:.1f} M in the model")

    tokens, valid = args.batch_size * args.max_length, args.batch_size * args.max_length
    per_step = args.batch_size * args.gradient_accumulation * num_processes
    try:
        if tokenizer is None:
            raise UserError("the model has no tokenizer here")
        records = load_training_records(args)
        dataset, num_dropped = build_dataset(records, tokenizer, args.fields, args.max_length)
        if len(dataset) == 0:
            raise UserError(f"no example has a response token within {args.max_length} tokens")
        lengths = torch.tensor([len(ids) for ids in dataset["input_ids"]])
        responses = torch.tensor([sum(label != IGNORE_INDEX for label in labels[1:]) for labels in dataset["labels"]])
        # The largest of the micro-batches that one random order gives.
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(args.seed)).split(args.batch_size)
        sizes = [int(lengths[batch].sum() if args.packing else lengths[batch].max() * len(batch)) for batch in order]
        tokens, largest = max(zip(sizes, order, strict=True), key=lambda pair: pair[0])
        valid = int(responses[largest].sum())
        if args.packing:
            tokens -= (len(largest) - 1) * shared_beginning([dataset[int(row)] for row in largest])
        steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(len(dataset) / per_step) * args.epochs)
        mean = lengths.float().mean().item()
        lines.append(
            f"data: {len(dataset)} examples ({num_dropped} dropped), {mean:.0f} tokens on average, at most "
            f"{lengths.max()}; {int(responses.sum())} response tokens"
        )
        lines.append(
            f"steps: {steps} of {per_step} sequences ({args.batch_size} x {args.gradient_accumulation} x "
            f"{num_processes} processes), about {steps * per_step * mean / 1e6:.2f} M tokens"
        )
    except UserError as error:
        known = f"{args.max_steps} steps" if args.max_steps > 0 else "steps not known"
        lines.append(
            f"data: not read ({error}); {known}, {per_step} sequences each of at most {args.max_length} tokens"
        )

    parts = estimated_memory(args, skeleton, dtype, tokens, valid, num_processes)
    device = "GPU" if torch.cuda.is_available() else "process"
    lines.append(f"memory per {device}, estimated for a micro-batch of {tokens} tokens in {str(dtype)[6:]}:")
    lines += [f"  {name:<12} {size / 2**30:8.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'together':<12} {sum(parts.values()) / 2**30:8.2f} GiB")
    adapter = 0 if args.method == "full" else adapter_bytes(args, trainable)
    checkpoint = trainable * 12 + (adapter if args.method in ("pissa", "ba-lora") else 0) / 2
    merged = total * dtype.itemsize
    checkpoints = (args.keep_checkpoints + 1) * checkpoint
    lines.append(
        f"disk: {(checkpoints + adapter + merged) / 2**30:.2f} GiB at most ({args.keep_checkpoints + 1} checkpoints of "
        f"{checkpoint / 2**30:.2f} GiB, adapter {adapter / 2**30:.2f} GiB, merged model {merged / 2**30:.2f} GiB)"
    )
    return "\n".join(lines)


def load_training_records(args: Arguments) -> datasets.Dataset:
    """The examples that --data, --fields and --max-examples name, as they are written."""
    records = load_records(resolve_demo(args.data, "train"), args.split, args.data_subset, args.data_config)
    require_fields(records, args.fields, args.data, "name two of them with --fields")
    if args.max_examples is not None:
        records = records.select(range(min(args.max_examples, len(records))))
    return records


def load_model(args: Arguments, model_path: str, dtype: torch.dtype, **kwargs: Any) -> transformers.PreTrainedModel:
    """The pre-trained model, quantized where --load-in says so."""
    if args.load_in is not None:
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=args.load_in == "4bit",
            load_in_8bit=args.load_in == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        return AutoModelForCausalLM.from_pretrained(
            model_path,
            revision=args.model_revision,
            trust_remote_code=args.trust_remote_code,
            dtype=dtype,
            attn_implementation=args.attn_implementation,
            use_safetensors=True,
            **kwargs,
        )
    except OSError as error:  # on the hub, a model of pickles that has not been converted there either
        raise UserError(f"cannot load the model {args.model!r}: {_first_line(error)}") from error


def attach_adapters(model: nn.Module, args: Arguments, tensors: dict[str, Tensor]) -> nn.Module:
    """`add_adapters` with the factors of `tensors` (see `trained_tensors`) in them, in place; returns `model`."""
    initial = initial_factors(tensors)
    method = "lora" if args.method != "full" and not initial else args.method
    device = next(iter(model.parameters())).device
    initial = {name: (A.to(device), B.to(device)) for name, (A, B) in initial.items()}
    add_adapters(model, method, args.rank, args.alpha, args.target_modules, initial=initial)
    if not any(is_partitioned(parameter) for parameter in model.parameters() if parameter.requires_grad):
        load_trained_tensors(model, tensors)
    return model


def rebuilt_model(
    args: Arguments, model_path: str, dtype: torch.dtype, tensors: dict[str, Tensor]
) -> transformers.PreTrainedModel:
    """The trained model on the CPU, from the published weights and `trained_tensors`."""
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()  # whole weights, not a rank's part
    args = dataclasses.replace(args, load_in=None, attn_implementation=None)
    return attach_adapters(
        load_model(args, model_path, torch.float32 if args.method == "full" else dtype), args, tensors
    )


@torch.no_grad()
def round_factors(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds adapters and PiSSA's frozen factors alike to `dtype`, in which DeepSpeed starts what it trains: rounded
    apart, B A − B₀A₀ would not be zero at the start."""
    for layer in adapter_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B, layer.initial_A, layer.initial_B):
            if factor is not None:
                factor.copy_(factor.to(dtype))


def export_model(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    args: Arguments,
    model_path: str,
    dtype: torch.dtype,
    output_dir: Path,
) -> None:
    """Writes adapter/ and merged/, whole or not at all; the adapters are merged away in `model`.

    Raises:
        RunStopped: the disk does not take them.
    """
    staging = output_dir / INCOMPLETE
    try:
        shutil.rmtree(staging, ignore_errors=True)
        if args.method != "full":
            rank = export_adapter(model, staging / "adapter", model_path, args.target_modules, "CAUSAL_LM")
            (staging / "adapter" / "README.md").write_text(adapter_card(args, rank))
        mend_generation_config(model)
        merge_adapters(model).to(dtype).save_pretrained(staging / "merged")
        tokenizer.save_pretrained(staging / "merged")
        for folder in staging.iterdir():
            shutil.rmtree(output_dir / folder.name, ignore_errors=True)
            folder.rename(output_dir / folder.name)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise RunStopped(
            f"cannot write the trained model to {output_dir} ({_first_line(error)}); "
            f"train.py --export-from {output_dir} writes it again from the newest checkpoint"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def mend_generation_config(model: transformers.PreTrainedModel) -> None:
    """Some published models have settings that transformers reads and does not write: most of sampling, without
    sampling. These are kept, with sampling; of any others nothing is kept but the special tokens."""
    config = model.generation_config

    def can_be_written() -> bool:
        try:
            config.validate(strict=True)
        except ValueError:
            return False
        return True

    if not can_be_written():
        config.do_sample = True
    if not can_be_written():
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
        )


def export_again(args: Arguments) -> None:
    """--export-from: adapter/ and merged/ from an earlier run's newest checkpoint."""
    source = Path(args.export_from)
    if not (source / "config.yaml").is_file():
        raise UserError(f"--export-from {source}: no config.yaml there, so no run of train.py")
    output_dir = source if args.output_dir == Arguments.output_dir else Path(args.output_dir)
    existing = [name for name in ("adapter", "merged") if (output_dir / name).exists()]
    if existing and not args.overwrite:
        raise UserError(f"{output_dir / existing[0]} exists: replace it with --overwrite, or name another --output-dir")
    checkpoint = newest_checkpoint(source, verbose=True)
    if checkpoint is None:
        raise UserError(f"--export-from {source}: no complete checkpoint in {source / 'checkpoints'}")
    run = parse_arguments(Arguments, __doc__, ["--config", str(source / "config.yaml")])
    model_path = resolve_demo(run.model, "model")
    tokenizer, _ = load_tokenizer_and_config(model_path, run.model_revision, run.trust_remote_code)
    dtype = resolve_dtype(run.dtype)
    model = rebuilt_model(run, model_path, dtype, load_file(checkpoint / TRAINED_TENSORS))
    export_model(model, tokenizer, run, model_path, dtype, output_dir)
    print(f"exported {checkpoint} to {output_dir}: merged/" + (", adapter/" if run.method != "full" else ""))


def forget_metrics_after(output_dir: Path, checkpoint: Path | None) -> None:
    """Drops the lines of metrics.jsonl that the resumed run will write again."""
    path = output_dir / "metrics.jsonl"
    if not path.is_file():
        return
    step = int(checkpoint.name.partition("-")[2]) if checkpoint else 0
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["step"] <= step and "loss" in json.loads(line)]
    path.write_text("".join(kept))


def require_same_run(output_dir: Path, args: Any) -> None:
    """Raises a UserError where the finished run in `output_dir` was made with other settings than `args`."""
    open_ones = {"target_modules"} if args.target_modules is None else set()  # which that run has filled in
    try:
        made = dict(yaml.safe_load((output_dir / "config.yaml").read_text()))
        difference = first_difference(made, dataclasses.asdict(args), NOT_IDENTITY | open_ones, common=True)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{output_dir / 'config.yaml'} is damaged: replace the run with --overwrite") from error
    if difference:
        raise UserError(f"{output_dir} holds a run with {difference}: name another --output-dir, or use --overwrite")


def config_text(args: Arguments) -> str:
    """The resolved arguments as YAML that `--config` takes."""
    once = ("config", "overwrite", "skip_done", "resume", "dry_run", "export_from")
    entries = {name: value for name, value in dataclasses.asdict(args).items() if name not in once}
    return "# Every argument of this run, for --config; versions and seed stand in run.json too.\n" + yaml.safe_dump(
        entries, sort_keys=False
    )


def summary(args: Arguments, run: dict[str, Any]) -> str:
    """What the run leaves behind, for the terminal."""
    output_dir = Path(args.output_dir)
    lines = [
        "",
        f"{args.method}: {run['steps']} steps in {run['train_seconds']:.0f} s, mean loss {run['train_loss']:.4f}, "
        f"peak memory {run['peak_memory_gib']:.2f} GiB",
    ]
    if args.method != "full":
        lines.append(f"  adapter         {output_dir / 'adapter'}  (PEFT's format, on {args.model})")
    lines += [
        f"  merged model    {output_dir / 'merged'}",
        f"  configuration   {output_dir / 'config.yaml'}, {output_dir / 'run.json'}",
        f"  metrics         {output_dir / 'metrics.jsonl'}  (tensorboard --logdir {output_dir / 'tensorboard'})",
        f"next: python eval/gsm8k.py --ckpt {output_dir / 'merged'}",
    ]
    return "\n".join(lines)


def leave(code: int) -> None:
    """Ends a rank's process at once. In an ordinary exit the threads that its libraries have left running may abort it,
    and the launcher would then end the other ranks, of which one still writes the model."""
    if dist.is_initialized() and code != 1:  # with 1 another rank may be lost, and with it what closes the connections
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    code = 0
    try:
        run_script(main)
    except SystemExit as end:
        code = end.code
    if "RANK" in os.environ:
        leave(code)
    sys.exit(code)
