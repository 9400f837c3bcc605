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
    metrics.jsonl   one line per logging step and validation; the same in tensorboard/

Read from top to bottom: arguments, adapters, regularizers, objective, model, the training loop, the stages of
a run, main. Everything that is not the method stands in common/.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from common import checkpoints, cli, estimates, exports, layers, pretrained, runs, token_kernel, validation
from common.chunked import FUSED_TERMS, chunks, fused_terms, head_factor, logits_of
from common.cli import UserError, first_line, option, parse_arguments
from common.conversations import encoded, first_screen, load_training_records, num_valid, read_template_args
from common.exports import InitialAdapter, adapter_card, export_adapter, read_adapter
from common.layers import default_target_modules, find_target_modules, save_activations
from common.packing import (
    PER_SEQUENCE,
    PackingCollator,
    PaddingCollator,
    model_inputs,
    num_positions,
    obstacle_to_packing,
)
from common.pretrained import resolve_demo, resolve_dtype
from common.ranks import announce_device, first_rank_first, peak_memory_gib, read_deepspeed, run_rank, start_ranks
from common.tables import HubError
from common.teacher_cache import TeacherCache, require_space
from common.templates import Template
from common.tensors import (
    any_rank_lacks,
    dequantized,
    factors_of_all,
    fingerprint,
    gathered,
    is_partitioned,
    kept_in_file,
)
from common.training import (
    ReportArguments,
    Training,
    check_reporting,
    push_adapter,
    random_order,
    resolve_shared_arguments,
)

if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator

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


@dataclass
class DataArguments:
    """The model, its data, and the output folder."""

    config: str | None = option(
        None, "YAML file with any of these options by name; the command line overrides it", first=True
    )
    model: str | None = option(
        None, "hub name or folder of the pre-trained model; 'demo': the embedded SmolLM2-135M", first=True
    )
    model_revision: str | None = option(None, "hub revision of the model")
    trust_remote_code: bool = option(False, "run code that the model's repository ships")
    init_adapter: str | None = option(None, "start from this LoRA or PiSSA adapter of PEFT's format, or one of ours")
    data: str | None = option(
        None,
        "hub name; json, jsonl, csv, tsv or parquet file, or a folder of them; 'demo': the embedded problems",
        first=True,
    )
    data_subset: str | None = option(None, "folder inside --data, such as metamath in fxmeng/pissa-dataset")
    data_config: str | None = option(None, "configuration of a hub data set, such as main of openai/gsm8k")
    split: str = option("train", "split of a hub data set or of a folder whose files are named after splits")
    fields: list[str] = option(
        ["instruction", "output"],
        "two columns (instruction, response), or the column that holds conversations",
        first=True,
    )
    template: Literal["alpaca", "chat", "raw"] | None = option(
        None, "text around the turns: Alpaca's prompt, the chat template, or none; None: by the data's format"
    )
    template_args: str | None = option(None, 'variables of the chat template, as JSON: {"enable_thinking": false}')
    train_on: Literal["all", "last"] = option("all", "which of a conversation's assistant turns are trained")
    skip_bad: bool = option(False, "leave out and count the examples that cannot be read, instead of stopping")
    limit: int | None = option(None, "the first N examples only", formerly="max_examples")
    max_length: int = option(
        512, "most tokens of an example with its prompt; texts are cut, conversations lose their last turns"
    )
    output_dir: str = option("output/ba-lora", "folder for everything this run writes", first=True)
    overwrite: bool = option(False, "replace an output folder that already holds something")
    dry_run: bool = option(False, "print the run's configuration, parameters, steps, memory and disk, then stop")
    dry_run_gpu: float | None = option(None, "GiB of a GPU that --dry-run estimates for, such as 80, on any machine")
    export_from: str | None = option(
        None, "an earlier run's folder: write its adapter/ and merged/ again from its newest checkpoint, then stop"
    )


@dataclass
class AdapterArguments:
    """The part of the model that is trained."""

    method: Literal["full", "lora", "pissa", "ba-lora"] = option(
        "ba-lora", "full fine-tuning, LoRA, PiSSA, or ba-lora: PiSSA with the three terms", first=True
    )
    rank: int = option(128, "adapter rank r", first=True)
    alpha: float | None = option(None, "adapter scale: it acts with s = alpha / rank; None: alpha = rank")
    target_modules: list[str] | None = option(None, "layers that get an adapter; None: attention and feed-forward")


@dataclass
class RegularizerArguments:
    """The three terms of --method ba-lora, or of another with --regularize; None: the formulation's published value."""

    formulation: Literal["iclr2026", "arxiv2024"] = option("iclr2026", "which published form of the regularizers")
    lambda_consistency: float | None = option(None, "weight λ₁ of L_CR, consistency with the pre-trained model")
    lambda_diversity: float | None = option(None, "weight λ₂ of L_DR, diversity of the predictions")
    lambda_spectral: float | None = option(None, "weight λ₃ of L_SVDR, concentration of the singular values")
    temperature: float | None = option(None, "distillation temperature T of L_CR")
    spectral_k: int = option(10, "k of L_SVDR: the leading singular values")
    consistency_schedule: Literal["constant", "cosine", "adaptive"] | None = option(
        None, "λ₁ over training; adaptive: by the teacher's confidence on each micro-batch"
    )
    regularizer_schedule: Literal["constant", "two_phase", "linear_warmup", "quadratic_warmup"] | None = option(
        None, "λ₂ and λ₃ over training"
    )
    warmup_fraction: float = option(0.1, "part of training over which linear_warmup and quadratic_warmup rise")


@dataclass
class TermArguments:
    """The terms' options for language models alone; None: the formulation's published value."""

    regularize: bool = option(False, "add the terms to --method lora or pissa; ba-lora is pissa with terms")
    mask_target: bool = option(False, "leave the target token out of both distributions of L_CR, then renormalise them")
    entropy_top_k: int | None = option(None, "K of L_DR: entropy among the K largest logits; 0: the whole vocabulary")
    spectral_norm: Literal["frobenius", "nuclear"] | None = option(None, "norm that L_SVDR divides by")


@dataclass
class BatchArguments:
    """The size of one step; the defaults are the paper's, for 8 GPUs: 4 x 4 x 8 = 128 sequences."""

    batch_size: int = option(
        4, "sequences per device and micro-batch; L_SVDR is the spectrum of one micro-batch", first=True
    )
    gradient_accumulation: int = option(4, "micro-batches per optimizer step")


@dataclass
class OptimizationArguments:
    """Length and optimizer of the training; the defaults are the paper's."""

    epochs: float = option(1.0, "passes over the data", first=True)
    max_steps: int = option(-1, "stop after this many optimizer steps; -1: --epochs decides")
    learning_rate: float = option(2e-5, "peak learning rate of AdamW; docs/own-model.md has the rates", first=True)
    weight_decay: float = option(0.0, "AdamW's weight decay")
    warmup_ratio: float = option(0.03, "part of training over which the learning rate rises")
    lr_scheduler: str = option("cosine", "learning-rate schedule after warm-up, a name that transformers knows")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0: not clipped")
    seed: int = option(42, "seed of initialisation and data order")


@dataclass
class InterruptionArguments:
    """Checkpoints, and how an interrupted run goes on."""

    resume: bool = option(
        False,
        "go on from the newest complete checkpoint in --output-dir, or from the start; a finished run stays",
    )
    accept_changes: bool = option(False, "resume although the data or the base model changed since the checkpoint")
    save_steps: int = option(100, "optimizer steps between two checkpoints; 0: none, except after a signal")
    keep_checkpoints: int = option(2, "how many checkpoints are kept")
    on_nonfinite: Literal["stop", "skip"] = option("stop", "reaction to NaN or Inf in the loss or gradients")


@dataclass
class MachineArguments:
    """How the machine is used."""

    teacher_cache: str | None = option(
        None, "folder for the teacher's hidden states: later epochs, seeds and λs skip the teacher's forward pass"
    )
    init_cache: str | None = option(None, "folder that keeps PiSSA's initial factors for the next run")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "type of base weights and activations; auto: bfloat16 where the GPU has it, else float32"
    )
    load_in: Literal["4bit", "8bit"] | None = option(None, "quantize the frozen base by bitsandbytes; needs a GPU")
    attn_implementation: str | None = option(None, "attention of transformers: sdpa, eager, flash_attention_2")
    packing: bool = option(True, "lay sequences end to end instead of padding them, where the model can")
    objective_memory: float | None = option(
        None, "MiB for the objective's chunks of logits; None: 128; on a GPU 1/32 of its memory, or 1,024 tokens' size"
    )
    token_kernel: bool = option(
        True, "on a GPU fuse the objective's passes over the logits, by Triton; else plain torch"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    deepspeed: str | None = option(None, "DeepSpeed configuration (JSON); start through deepspeed or torchrun")
    logging_steps: int = option(10, "optimizer steps between two lines of metrics.jsonl")


@dataclass
class Arguments(  # a dataclass takes its bases' fields from the last to the first
    MachineArguments,
    ReportArguments,
    InterruptionArguments,
    validation.ValidationArguments,
    exports.ScaleArguments,
    OptimizationArguments,
    BatchArguments,
    TermArguments,
    RegularizerArguments,
    AdapterArguments,
    DataArguments,
):
    """Everything that a run is told."""

    @property
    def has_terms(self) -> bool:
        """Whether the three terms act."""
        return self.regularize or self.method == "ba-lora"


def resolve_arguments(args: Arguments) -> Arguments:
    """Returns `args` with every open value filled in, after checking all that can be checked without reading anything.

    Raises:
        UserError: a value out of range, or nothing to train or to train on.
    """
    args = dataclasses.replace(args)
    for name in ("model", "data"):
        if getattr(args, name) is None:
            raise UserError(f"no --{name}: give a hub name or a path, or try --config configs/demo.yaml")
    resolve_shared_arguments(args, FORMULATIONS)
    exports.read_scale(args)
    cli.require_positive(args, "logging_steps", "objective_memory", "dry_run_gpu")
    if args.dry_run_gpu is not None and not args.dry_run:
        raise UserError("--dry-run-gpu names the GPU that --dry-run estimates for: add --dry-run")
    cli.require_not_negative(args, "entropy_top_k")
    if len(args.fields) not in (1, 2):
        raise UserError(f"--fields takes instruction and response, or one name, not {len(args.fields)}")
    read_deepspeed(args.deepspeed)
    may_hold = args.overwrite or args.resume or args.dry_run
    remedy = "name another one, go on with --resume, or use --overwrite"
    inputs = (args.config, args.model, args.data, args.init_adapter, args.deepspeed, args.init_cache)
    inputs += (args.teacher_cache, args.validation_data, args.sample_prompts)
    runs.require_output_dir(args, may_hold, remedy, *inputs)
    validation.check_validation(args)
    check_reporting(args)
    if args.load_in is not None and args.method == "full":
        raise UserError("--load-in quantizes a frozen base, and --method full trains it")
    if args.load_in is not None and not torch.cuda.is_available() and not args.dry_run:
        raise UserError(f"--load-in {args.load_in} needs a CUDA GPU and bitsandbytes")
    if args.has_terms and args.method == "full":
        raise UserError("--regularize needs a method with adapters: the terms' teacher is the model without them")
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

    PiSSA's paper subtracts s·B₀A₀ from W once and for all. Here every forward pass subtracts it, and W stays the
    published weight: with the adapters off this is the pre-trained model, and the adapter is a LoRA of rank 2r on W.

    Attributes:
        base: the layer itself, nn.Linear, (out × in).
        lora_A, lora_B: the trainable factors, fp32, (r × in) and (out × r).
        initial_A, initial_B: PiSSA's A₀ and B₀, fp32; None for LoRA.
        scaling: s = alpha / r.
        enabled: False while `adapters_disabled` is in force.
        stacked: A' and B' in the type that they act in, while `stack_factors` holds them.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, initial: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.enabled = True
        self.stacked: tuple[Tensor, Tensor] | None = None
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

    @property
    def weight(self) -> Tensor:
        """W, for models that read a layer's weight itself: T5 asks its feed-forward layer for the type."""
        return self.base.weight

    def stacked_factors(self) -> tuple[Tensor, Tensor]:
        """A' (R × in) and B' (out × R) with ΔW = s·B'A'. PiSSA: [A; A₀] and [B, −B₀], R = 2r. LoRA: A and B, R = r."""
        return _stack(self.lora_A, self.lora_B, self.initial_A, self.initial_B)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.enabled:
            return y
        if type(self.base) is not nn.Linear:  # bitsandbytes returns views, which must not be changed in place
            y = y.clone()
        factors = (self.lora_A, self.lora_B, self.initial_A, self.initial_B)
        return _AddLowRank.apply(y, x.to(y.dtype), *factors, self.scaling, self.stacked)  # autocast may differ in types

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """W + ΔW (out × in), added in fp32 and rounded once to W's own type."""
        A, B = (factor.float() for factor in self.stacked_factors())
        return torch.addmm(self.base.weight.float(), B, A, alpha=self.scaling).to(self.base.weight.dtype)

    def extra_repr(self) -> str:
        return f"rank={len(self.lora_A)}, scaling={self.scaling:g}, principal={self.initial_A is not None}"


@torch.no_grad()
def stack_factors(model: nn.Module, hold: bool = True) -> None:
    """Stacks and casts every adapter's factors once for an optimizer step; under ZeRO-3 each pass stacks its own.

    Args:
        hold: False drops the stacked factors. The update needs this: stacked factors would keep the old values.
    """
    dtype = model.get_input_embeddings().weight.dtype
    for layer in adapter_layers(model).values():
        held = hold and not is_partitioned(layer.lora_A)
        layer.stacked = tuple(factor.to(dtype) for factor in layer.stacked_factors()) if held else None


def _stack(A: Tensor, B: Tensor, initial_A: Tensor | None, initial_B: Tensor | None) -> tuple[Tensor, Tensor]:
    if initial_A is None:
        return A, B
    return torch.cat([A, initial_A]), torch.cat([B, -initial_B], dim=1)


class _AddLowRank(torch.autograd.Function):
    """y + s·B'A' x in place of y; keeps x and the low-rank A'x for the backward pass. `stacked` None: stacks anew.

    y: (…, out), x: (…, in). The products run in x's type; each factor's gradient has the factor's type.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, initial_A, initial_B, scaling, stacked):
        stacked_A, stacked_B = stacked or (factor.to(x.dtype) for factor in _stack(A, B, initial_A, initial_B))
        rows = x.reshape(-1, x.shape[-1])
        low_rank = rows @ stacked_A.T  # (tokens, R)
        y.view(-1, y.shape[-1]).addmm_(low_rank, stacked_B.T, alpha=scaling)
        ctx.mark_dirty(y)
        # Only the trainable half of A'x is needed for a gradient.
        ctx.save_for_backward(x, low_rank[:, : len(A)].contiguous(), A, B, initial_A, initial_B)
        ctx.scaling, ctx.stacked = scaling, stacked
        return y

    @staticmethod
    def backward(ctx, grad_y):
        x, low_rank, A, B, *initial = ctx.saved_tensors
        stacked_A, stacked_B = ctx.stacked or (factor.to(x.dtype) for factor in _stack(A, B, *initial))
        rows, grad_rows = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, grad_y.shape[-1])
        grad_low_rank = (grad_rows @ stacked_B).mul_(ctx.scaling)  # (tokens, R)
        grad_x = (grad_low_rank @ stacked_A).view_as(x) if ctx.needs_input_grad[1] else None
        grad_A = (grad_low_rank[:, : len(A)].T @ rows).to(A.dtype)
        grad_B = (grad_rows.T @ low_rank).mul_(ctx.scaling).to(B.dtype)
        return grad_y, grad_x, grad_A, grad_B, None, None, None, None


@torch.no_grad()
def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """PiSSA's initial factors A₀ (r × in) and B₀ (out × r): s·B₀A₀ is the best rank-r approximation of `weight`.

    With W = U S Vᵀ: A₀ = (S_r/s)^{1/2} V_rᵀ, B₀ = U_r (S_r/s)^{1/2} (arXiv 2404.02948, eq. 2 and 3, where s = 1; for
    other s this is PEFT's reading, under which the residual W − s·B₀A₀ does not depend on alpha).

    The leading singular vectors are the leading eigenvectors of the smaller Gram matrix, which is several times cheaper
    than a full SVD. Squaring loses singular values below σ₁·√ε: if σ_r is below 100 times that in fp32, fp64 is used.
    """
    W = weight.detach().float()
    wide = W if W.shape[0] <= W.shape[1] else W.T  # (n, m), n ≤ m
    eigenvalues, vectors = torch.linalg.eigh(wide @ wide.T)
    if eigenvalues[-rank] < 1e4 * torch.finfo(torch.float32).eps * eigenvalues[-1]:
        _, vectors = torch.linalg.eigh(wide.double() @ wide.double().T)
    basis = vectors[:, -rank:].to(W.dtype)
    # An exact SVD within the basis keeps the rounding error of the squares out of the factors.
    rotation, S, Vh = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    root = (S / scaling).sqrt()
    left, right = (basis @ rotation) * root, root[:, None] * Vh
    A, B = (right, left) if wide is W else (left.T, right.T)
    return A.contiguous(), B.contiguous()


def _cached_principal_factors(weight: Tensor, rank: int, scaling: float, cache: Path | None) -> tuple[Tensor, Tensor]:
    """`principal_factors`, kept in the folder `cache` under a hash of the weight: an outdated file is never read."""
    if cache is None:
        return principal_factors(weight, rank, scaling)
    file = cache / f"pissa-{fingerprint([weight])[:32]}-r{rank}-s{scaling:g}.safetensors"
    return kept_in_file(file, ("A", "B"), lambda: principal_factors(weight, rank, scaling), weight.device)


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
        UserError: the model has adapters; see also `find_target_modules` and `obstacle_to_adapters`.
    """
    if adapter_layers(model):
        raise UserError("the model has adapters already: name all target modules in one call, or merge_adapters first")
    if method not in ("full", "lora", "pissa", "ba-lora"):
        raise UserError(f"unknown method {method!r}: one of full, lora, pissa, ba-lora")
    if method == "full":
        return model.requires_grad_(True)
    found = find_target_modules(model, target_modules, rank)
    layers.require_adapters(model, found)
    model.requires_grad_(False)
    factors: Iterable[tuple[Tensor, Tensor] | None] = itertools.repeat(None)
    if method != "lora" and initial is not None:
        factors = [initial[name] for name in found]
    elif method != "lora":
        decompose = functools.partial(_cached_principal_factors, rank=rank, scaling=alpha / rank, cache=cache)
        factors = factors_of_all(list(found.values()), decompose, rank)
    bar = tqdm(total=len(found), desc=f"{method} initialisation", unit="layer", disable=not progress)
    # `factors` comes first, so that zip exhausts the generator, which frees its threads at its end.
    for pair, (name, module) in zip(factors, found.items(), strict=False):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, LoRALinear(module, rank, alpha, pair))
        bar.update()
    bar.close()
    return model


def adapter_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers by their names in the model itself, which `BALoRAModel`, torch.compile or DDP may wrap."""
    while isinstance(model, BALoRAModel) or {"_orig_mod", "module"} & dict(model.named_children()).keys():
        model = next(model.children())
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is the pre-trained model, bit for bit, and without dropout."""
    layers = list(adapter_layers(model).values())
    before, training = [layer.enabled for layer in layers], model.training
    model.eval()
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        model.train(training)
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def merge_adapters(model: nn.Module) -> nn.Module:
    """Adds each adapter to its base weight and takes the LoRALinear out, in place; returns the plain model."""
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, LoRALinear):
                layer.base.weight.data = layer.merged_weight()
                setattr(parent, child, layer.base)
    return model


def attach_adapters(model: nn.Module, args: Arguments, tensors: dict[str, Tensor]) -> nn.Module:
    """Adds adapters and loads the factors in `tensors` (see `trained_tensors`), in place; returns `model`."""
    initial = checkpoints.initial_factors(tensors)
    method = "lora" if args.method != "full" and not initial else args.method
    device = next(iter(model.parameters())).device
    initial = {name: (A.to(device), B.to(device)) for name, (A, B) in initial.items()}
    add_adapters(model, method, args.rank, args.alpha, args.target_modules, initial=initial)
    if not any(is_partitioned(parameter) for parameter in model.parameters() if parameter.requires_grad):
        checkpoints.load_trained_tensors(model, tensors)
    return model


@torch.no_grad()
def round_factors(model: nn.Module, dtype: torch.dtype) -> None:
    """Rounds the adapters and PiSSA's frozen factors to `dtype`, the type in which DeepSpeed starts its parameters. If
    the frozen factors were not rounded too, B A − B₀A₀ would not be zero at the start."""
    for layer in adapter_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B, layer.initial_A, layer.initial_B):
            if factor is not None:
                factor.copy_(factor.to(dtype))


# ------------------------------------------------------------------------------------------------------------------
# Regularizers: each formula of the paper once, on (M, V) logits, differentiable, computed in fp32 or better.
# Degenerate input has a value, never NaN: no rows, one row, a zero matrix.
# ------------------------------------------------------------------------------------------------------------------


def consistency_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, left_out: Tensor | None = None
) -> Tensor:
    """L_CR = T² · mean over rows of KL( softmax(Z_P / T) ‖ softmax(Z_F / T) ); `arxiv2024`: T = 1.

    Args:
        student_logits, teacher_logits: Z_F and Z_P, (M, V).
        left_out: one token per row, (M,), that is removed from both distributions before they are renormalised: the
            target with --mask-target. None: no token, as published.
    """
    student, teacher = (_at_least_fp32(logits) / temperature for logits in (student_logits, teacher_logits))
    if left_out is not None:  # a finite number, because the divergence of two infinite logits is NaN
        student, teacher = (logits.scatter(1, left_out[:, None], -1e30) for logits in (student, teacher))
    student, teacher = (F.log_softmax(logits, dim=-1) for logits in (student, teacher))
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
        top_k: K; above V it counts as V. None: the whole vocabulary (`arxiv2024`).
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
    if not torch.isfinite(logits).all():  # the decomposition may raise an error for NaN or Inf
        return logits.sum() * math.nan
    sigma = torch.linalg.svdvals(logits)  # (min(M, V),)
    noise = 4 * len(sigma) ** 0.5 * torch.finfo(sigma.dtype).eps * sigma[0].detach()
    sigma = torch.where(sigma > noise, sigma, torch.zeros_like(sigma))
    if norm == "frobenius":
        # The norm is computed from the singular values, so that both gradients run through one decomposition.
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
    """The factor of a weight λ at `progress`, the fraction of training done, in [0, 1] (the authors' code).

    constant: 1. cosine: 1 to 0.1. two_phase: 0 for the first 20 %, a linear ramp over the next 5 %, then 1.
    linear_warmup, quadratic_warmup: rises over `warmup_fraction`. adaptive depends on the teacher: see `objective`.
    """
    match schedule:
        case "constant" | "adaptive":
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
    """1 − H(softmax(Z_P)) / ln V for each row of Z_P (M, V), from 0 (uniform) to 1 (certain). Returns (M,)."""
    log_p = F.log_softmax(_at_least_fp32(teacher_logits), dim=-1)
    return 1 + (log_p.exp() * log_p).sum(dim=-1) / math.log(teacher_logits.shape[-1])


# ------------------------------------------------------------------------------------------------------------------
# Objective: L = L_task + λ₁·L_CR + λ₂·L_DR + λ₃·L_SVDR
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """One term of the objective: L = L_task + Σ λ·term.

    Attributes:
        function: computes the term from Z_F (M, V), Z_P (M, V) or None, the targets (M,) and the run's `Arguments`.
        per_token: whether the term is a mean over rows; False: one value of the whole micro-batch.
        schedule: the option that names the schedule of its weight.
        needs_teacher: the term is left out where there is no Z_P.
    """

    function: Callable[[Tensor, Tensor | None, Tensor, Any], Tensor]
    schedule: str = "regularizer_schedule"
    per_token: bool = True
    needs_teacher: bool = False


TERMS: dict[str, Term] = {}


def term(name: str, **about: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Makes a function a term of the objective. It is logged as `name`; --lambda-`name` is its weight, 0 leaves it out.

    common/chunked.py's FUSED_TERMS lists the terms that the fused objective has. Every other term is computed from
    whole logits. docs/method.md, "Add a term", goes through an example.
    """
    if f"lambda_{name}" not in Arguments.__dataclass_fields__:
        raise TypeError(f"the term {name!r} has no weight: add the option lambda_{name} to RegularizerArguments")

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        TERMS[name] = Term(function, **about)
        return function

    return register


@term("consistency", schedule="consistency_schedule", needs_teacher=True)
def _consistency(student: Tensor, teacher: Tensor, targets: Tensor, args: Any) -> Tensor:
    return consistency_loss(student, teacher, args.temperature, targets if args.mask_target else None)


@term("diversity")
def _diversity(student: Tensor, teacher: Tensor | None, targets: Tensor, args: Any) -> Tensor:
    return topk_entropy_loss(student, args.entropy_top_k or None)


@term("spectral", per_token=False)  # the spectrum of one micro-batch's logits
def _spectral(student: Tensor, teacher: Tensor | None, targets: Tensor, args: Any) -> Tensor:
    return spectral_loss(student, args.spectral_k, args.spectral_norm)


@dataclass
class Regularizers:
    """The terms at one step of training.

    Attributes:
        weights: the λ of each term that is on. While a schedule makes λ 0, the term is reported, without gradient.
        settings: the terms' other options, which `Arguments` names and explains.
    """

    weights: dict[str, float | Tensor]
    settings: Any

    @classmethod
    def at(cls, args: Any, progress: float) -> "Regularizers":
        """The terms of `args` at `progress`, the fraction of training done."""
        weights = {}
        for name, about in TERMS.items():
            if weight := getattr(args, f"lambda_{name}", None):
                schedule = getattr(args, about.schedule)
                weights[name] = weight * schedule_factor(schedule, progress, args.warmup_fraction)
        return cls(weights, args)

    @property
    def needs_teacher(self) -> bool:
        """Whether a term that acts compares with the pre-trained model."""
        return any(TERMS[name].needs_teacher and weight for name, weight in self.weights.items())

    @property
    def is_adaptive(self) -> bool:
        return self.settings.consistency_schedule == "adaptive" and "consistency" in self.weights

    def adapted(self, confidence: Tensor) -> "Regularizers":
        """These terms with λ₁ scaled by the teacher's `confidence` (M,)."""
        scaled = self.weights["consistency"] * adaptive_factor(confidence)
        return dataclasses.replace(self, weights=self.weights | {"consistency": scaled})

    def split(self, names: Iterable[str]) -> "tuple[Regularizers, Regularizers]":
        """The terms of these names, and the others."""
        named = {name: weight for name, weight in self.weights.items() if name in names}
        others = {name: weight for name, weight in self.weights.items() if name not in names}
        return dataclasses.replace(self, weights=named), dataclasses.replace(self, weights=others)

    def shares(self, num_micro_batches: int) -> dict[str, float | Tensor]:
        """Each λ as one micro-batch's part of its mean over the step."""
        return {f"lambda_{name}": weight / num_micro_batches for name, weight in self.weights.items()}


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
    task = F.cross_entropy(_at_least_fp32(student_logits), targets, reduction="sum") / num_tokens
    terms: dict[str, float | Tensor] = {"task": task.detach()}
    if not (student_logits.requires_grad and torch.is_grad_enabled()):  # a validation
        terms["accuracy"] = (student_logits.argmax(dim=1) == targets).sum() / num_tokens
    if regularizers is None:
        return task, terms
    if regularizers.is_adaptive and teacher_logits is not None:
        regularizers = regularizers.adapted(teacher_confidence(teacher_logits))
    weighted, values = weighted_terms(
        student_logits, teacher_logits, targets, regularizers, num_tokens, num_micro_batches
    )
    return task + weighted, terms | values | regularizers.shares(num_micro_batches)


def weighted_terms(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor,
    regularizers: Regularizers,
    num_tokens: int | Tensor,
    num_micro_batches: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's part of the step's Σ λ·term, and of each term. Arguments: see `objective`."""
    loss, values = 0.0, {}
    for name, weight in regularizers.weights.items():
        about = TERMS[name]
        if about.needs_teacher and teacher_logits is None:
            continue
        acts = isinstance(weight, Tensor) or weight > 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and acts):
            value = about.function(student_logits, teacher_logits, targets, regularizers.settings)
        value = value * (len(targets) / num_tokens) if about.per_token else value / num_micro_batches
        values[name] = value.detach()
        loss = loss + weight * value
    return loss, values


# ------------------------------------------------------------------------------------------------------------------
# The same objective without logits: from hidden states, in chunks of tokens, its gradient computed in the same pass
# (common/chunked.py).
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
    memory_mib: float | None = None,
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """`objective` for logits Z = H Eᵀ with a frozen head E, without ever holding Z: the same values and gradient.

    Args:
        hidden: H_F at the valid positions, (M, d), any floating type; sums and the gradient are kept in fp32 (fp64).
        teacher_hidden: H_P at the same positions, (M, d), or None.
        head_weight: E, (V, d), without gradient.
        head_factor: from `head_factor`, (d, d); needed for L_SVDR.
        targets, regularizers, num_tokens, num_micro_batches: see `objective`.
        memory_mib: MiB for the chunks' buffers; it decides the tokens per chunk (None: see `most_rows`).
    """
    if regularizers is None:
        regularizers = Regularizers({}, None)
    elif regularizers.is_adaptive and teacher_hidden is not None:
        regularizers = regularizers.adapted(_confidence_from_hidden(teacher_hidden, head_weight, memory_mib))
    fused, lacking = regularizers.split(FUSED_TERMS)
    states, counts = (hidden, teacher_hidden, head_weight, head_factor, targets), (num_tokens, num_micro_batches)
    loss, terms = fused_terms(*states, fused.weights, regularizers.settings, *counts, memory_mib)
    if lacking.weights:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = logits_of(hidden, head_weight, dtype)
        of_teacher = None if teacher_hidden is None else logits_of(teacher_hidden, head_weight, dtype)
        weighted, values = weighted_terms(logits, of_teacher, targets, lacking, *counts)
        loss, terms = loss + weighted, terms | values
    return loss, terms | regularizers.shares(num_micro_batches)


def _confidence_from_hidden(teacher_hidden: Tensor, head_weight: Tensor, memory_mib: float | None) -> Tensor:
    """`teacher_confidence` in chunks: one more product with the head, because the whole mean is needed first."""
    dtype = torch.promote_types(teacher_hidden.dtype, torch.float32)
    confidence = torch.empty(len(teacher_hidden), dtype=dtype, device=teacher_hidden.device)
    for rows in chunks(teacher_hidden, head_weight, 3, memory_mib):
        confidence[rows] = teacher_confidence(logits_of(teacher_hidden[rows], head_weight, dtype))
    return confidence


# ------------------------------------------------------------------------------------------------------------------
# Model: student, teacher and objective as one module; packed attention
# ------------------------------------------------------------------------------------------------------------------


class BALoRAModel(nn.Module):
    """Student, teacher and objective in one forward pass: the module that `fit` trains and DDP or DeepSpeed wraps.

    The objective is computed without logits where the head is a frozen linear map, else by its definition.

    Attributes:
        model: the causal language model.
        teacher_cache: where set, the teacher's hidden states come from there.
    """

    def __init__(
        self,
        model: "transformers.PreTrainedModel",
        objective_memory: float | None = None,
        teacher_cache: TeacherCache | None = None,
    ):
        super().__init__()
        self.model = model
        self.config = model.config
        self.teacher_cache = teacher_cache
        self.objective_memory = objective_memory
        self.head_is_linear = pretrained.head_is_linear(model)
        self._head_factor: Tensor | None = None
        if self.head_is_linear:
            head = model.get_output_embeddings()
            head.forward = functools.partial(_head_forward, head)
        # The last feed-forward layer works on each position alone, and only valid positions are read. Elsewhere it is
        # skipped.
        self._last_positions: list[Tensor] = []
        last_mlp = getattr(getattr(model.get_decoder(), "layers", [None])[-1], "mlp", None)
        if last_mlp is not None:
            last_mlp.forward = functools.partial(_at_positions, last_mlp.forward, self._last_positions)

    @property
    def is_fused(self) -> bool:
        """Whether the objective is computed from hidden states."""
        return self.head_is_linear and not self.model.get_output_embeddings().weight.requires_grad

    def forward(
        self, inputs: dict[str, Any], regularizers: Regularizers | None, *counts: int | Tensor
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """See `objective`, which explains `counts`; `inputs` is a batch of PackingCollator or PaddingCollator."""
        states = self.hidden_states if self.is_fused else self.logits
        teacher = None
        if regularizers is not None and regularizers.needs_teacher:
            teacher = self.teacher_cache and self.teacher_cache.get(inputs["example_ids"])
            weight = self.model.get_input_embeddings().weight
            if self.teacher_cache is None or any_rank_lacks(teacher, weight):
                teacher = self.of_teacher(states, inputs)
                if self.teacher_cache is not None:
                    self.teacher_cache.put(inputs["example_ids"], teacher)
        rest = (inputs["targets"], regularizers, *counts)
        if not self.is_fused:
            return objective(states(inputs), teacher, *rest)

        def fused(hidden: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
            if regularizers is not None and "spectral" in regularizers.weights and self._head_factor is None:
                self._head_factor = head_factor(weight)
            return objective_from_hidden(hidden, teacher, weight, self._head_factor, *rest, self.objective_memory)

        return self.model.get_output_embeddings()(states(inputs), fused)

    def hidden_states(self, inputs: dict[str, Any]) -> Tensor:
        """The last hidden states at the valid positions, (M, d)."""
        positions = inputs["valid_positions"]
        if not self.model.is_gradient_checkpointing:  # it runs the layer again after the positions are cleared
            self._last_positions.append(positions)
        try:
            states = self.model.get_decoder()(**model_inputs(inputs), use_cache=False).last_hidden_state
        finally:
            self._last_positions.clear()
        return states.flatten(0, 1)[positions]

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """The logits at the valid positions, (M, V)."""
        if self.head_is_linear:
            return self.model.get_output_embeddings()(self.hidden_states(inputs))
        logits = self.model(**model_inputs(inputs), use_cache=False).logits
        return logits.flatten(0, 1)[inputs["valid_positions"]]

    @torch.no_grad()
    def of_teacher(self, states: Callable[[dict], Tensor], inputs: dict[str, Any]) -> Tensor:
        """`states(inputs)` of the pre-trained model: without adapters, dropout and gradients."""
        with adapters_disabled(self.model):
            return states(inputs)


def _at_positions(forward: Callable[[Tensor], Tensor], positions: list[Tensor], x: Tensor) -> Tensor:
    """`forward` at the flat positions in `positions[0]`, zeros elsewhere; at all positions if the list is empty."""
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


# ------------------------------------------------------------------------------------------------------------------
# The training loop. common/training.py has the parts that are not the method: they are called by name, in this order.
# ------------------------------------------------------------------------------------------------------------------


def fit(
    training: Training,
    model: BALoRAModel,
    examples: "datasets.Dataset",
    held_out: "datasets.Dataset | None",
    collate: Callable[[list[dict]], dict[str, Any]],
    sampler: validation.Sampler | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Trains `model` in place, from `checkpoint` where there is one.

    Args:
        collate: makes a micro-batch of examples. sampler: answers --sample-prompts at each validation.

    Raises:
        RunStopped: NaN or Inf with --on-nonfinite stop; another rank is lost.
        SystemExit: a signal came; a checkpoint is written.
    """
    args, student = training.args, model.model
    training.prepare(model, student)
    training.resume(checkpoint)
    with training.underway():
        training.is_over |= validation.is_out_of_patience(training.progress.history, args.patience)
        while not training.is_over:
            rows = training.batches.of_step(training.step)
            batches = [(collate([examples[row] for row in of_batch]), counts) for of_batch, counts in rows]
            # The step's means are over its valid tokens and its micro-batches, on all ranks.
            num_tokens, num_micro_batches = training.begin_step(
                sum(len(batch["targets"]) for batch, counts in batches if counts), sum(counts for _, counts in batches)
            )
            regularizers = Regularizers.at(args, training.fraction) if args.has_terms else None
            stack_factors(student)
            for number, (batch, counts) in enumerate(batches):
                batch = training.to_device(batch)
                with training.micro_batch(number, is_last=number == len(batches) - 1):
                    loss, terms = training.model(batch, regularizers, num_tokens, num_micro_batches)
                    training.backward(loss, counts)
                del loss  # its graph would live on through the next forward pass
                training.record(terms, num_positions(batch), counts, batch["example_ids"])
            stack_factors(student, hold=False)  # factors that stay stacked would hide the update
            norm = training.clip_gradients()
            if training.is_finite(norm):
                training.optimizer.step()
            training.end_step(norm, args.logging_steps, log_first=True)

            is_better = False
            if held_out is not None and training.is_due(args.eval_steps):
                is_better = validate(training, model, held_out, collate, sampler)
            training.save_if_due(also=is_better and args.keep_best)


def validate(
    training: Training,
    model: BALoRAModel,
    held_out: "datasets.Dataset",
    collate: Callable[[list[dict]], dict[str, Any]],
    sampler: validation.Sampler | None,
) -> bool:
    """Logs the means over the held-out examples, answers the prompts, and ends the training when --patience is spent.
    Returns whether the loss is the lowest so far."""
    args, started = training.args, time.monotonic()
    regularizers = Regularizers.at(args, 1.0) if args.has_terms else None

    def parts() -> Iterator[tuple[dict[str, float | Tensor], int, bool]]:
        size = (args.batch_size, training.rank, training.num_ranks)
        for rows, counts in validation.held_out_batches(len(held_out), *size):
            batch = training.to_device(collate([held_out[row] for row in rows]))
            yield training.model(batch, regularizers, 1, 1)[1], len(batch["targets"]), counts

    with training.validating():
        per_micro_batch = {name for name, about in TERMS.items() if not about.per_token}
        means = validation.held_out_means(training, parts(), per_micro_batch)
        if sampler is not None and training.is_main:
            sampler.write(model.model, training.step)
    training.log(means | {"eval_seconds": time.monotonic() - started})
    history = training.progress.history
    training.is_over |= validation.is_out_of_patience(history, args.patience)
    return validation.vain_validations(history) == 0


# ------------------------------------------------------------------------------------------------------------------
# The stages of a run, in order
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Base:
    """The pre-trained model, as far as it is known before its weights are read.

    Attributes:
        path: the folder or hub name behind --model.
        skeleton: the model on the meta device: shapes only.
        adapter: the adapter that --init-adapter names.
        num_adapters: how many layers get an adapter.
        trainable: how many parameters --method trains.
        coverage: which linear layers get an adapter and which do not; see `layers.coverage`.
    """

    path: str
    tokenizer: "transformers.PreTrainedTokenizerBase | None"
    config: "transformers.PretrainedConfig"
    skeleton: "transformers.PreTrainedModel"
    adapter: InitialAdapter | None
    num_adapters: int
    trainable: int
    coverage: dict[str, dict[str, int]] | None = None

    @property
    def total(self) -> int:
        """How many parameters the model has."""
        return self.skeleton.num_parameters()


def inspect_base(args: Arguments) -> Base:
    """Finds a model, rank, target or adapter that does not fit before any weight is read; fills in `args`' targets.

    Raises:
        UserError: see `load_tokenizer_and_config`, `read_adapter` and `find_target_modules`.
    """
    path = resolve_demo(args.model, "model")
    tokenizer, config = pretrained.load_tokenizer_and_config(
        path, args.model_revision, args.trust_remote_code, needs_all=not args.dry_run
    )
    pretrained.settle_config(args, config)
    attention = None if args.dry_run else args.attn_implementation  # only the run's machine needs to have it
    try:
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(
                config, trust_remote_code=args.trust_remote_code, attn_implementation=attention
            )
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot make {args.model} as a causal language model with these options: {first_line(error)}"
        ) from error
    if not getattr(config, "rope_parameters", None):  # rotary positions have no end, a table of positions has one
        pretrained.require_positions(args.model, skeleton, args.max_length)
    adapter = None
    if args.init_adapter is not None:
        adapter = read_adapter(Path(args.init_adapter), args.method)
        args.rank, args.alpha = adapter.rank, adapter.alpha
        adapter.require_fit({name: m for name, m in skeleton.named_modules() if isinstance(m, nn.Linear)})
        args.target_modules = adapter.target_modules
        print(adapter.note(path))
    if args.method == "full":
        return Base(path, tokenizer, config, skeleton, None, 0, skeleton.num_parameters())
    if args.target_modules is None:
        args.target_modules = default_target_modules(skeleton)
    found = find_target_modules(skeleton, args.target_modules, args.rank)
    if adapter is not None or any(re.search(r"[^\w.]", target) for target in args.target_modules):
        args.target_modules = layers.plain_names(skeleton, found)
    layers.require_adapters(skeleton, found)
    trainable = sum(args.rank * (layer.in_features + layer.out_features) for layer in found.values())
    coverage = layers.coverage(skeleton, found)
    return Base(path, tokenizer, config, skeleton, adapter, len(found), trainable, coverage)


def dry_run(args: Arguments, base: Base) -> str:
    """Describes a run with these arguments: configuration, parameters, memory, disk, steps and tokens."""
    screen = ""
    try:
        if base.tokenizer is None:
            raise HubError("the model has no tokenizer here")
        records = load_training_records(args)
        dataset, num_dropped = encoded(args, base.tokenizer, records)
        pretrained.require_embedded(dataset, base.skeleton, len(base.tokenizer))
        screen = first_screen(dataset) + pretrained.note_on_positions(dataset, base.skeleton) + "\n\n"
        dataset = validation.hold_out(args, dataset, None)[0]
        data = estimates.DataSizes.of(args, dataset, num_dropped)
    except HubError as error:  # the run's machine may have the data
        data = error
    return screen + "\n".join(estimates.report(args, base, data)) + "\n\n" + runs.config_text(args)


def is_mixed(args: Arguments) -> bool:
    """Whether passes run in bf16 on fp32 masters: full fine-tuning under autocast, or DeepSpeed's own masters."""
    return resolve_dtype(args.dtype) == torch.bfloat16 and (args.method == "full" or args.deepspeed is not None)


def encode_records(args: Arguments, base: Base, records: "datasets.Dataset", is_main: bool) -> "datasets.Dataset":
    """`encoded`, by the first process for all; prints an example as it is trained.

    Raises:
        UserError: no example is left, or --teacher-cache has no room for the teacher's states.
    """
    dataset, _ = first_rank_first(lambda: encoded(args, base.tokenizer, records))
    if is_main:
        print(first_screen(dataset) + pretrained.note_on_positions(dataset, base.skeleton), flush=True)
    pretrained.require_embedded(dataset, base.skeleton, len(base.tokenizer))
    if needs_teacher_cache(args):
        width = base.skeleton.get_output_embeddings().weight.shape[1]
        num_valid_positions = sum(map(num_valid, dataset["labels"]))
        require_space(Path(args.teacher_cache), num_valid_positions * width * resolve_dtype(args.dtype).itemsize)
    return dataset


def needs_teacher_cache(args: Arguments) -> bool:
    return args.teacher_cache is not None and args.has_terms and args.lambda_consistency > 0


def load_student(
    args: Arguments, base: Base, accelerator: "Accelerator", checkpoint: Path | None
) -> "transformers.PreTrainedModel":
    """The pre-trained model on its device, with its adapters, ready to train: from `checkpoint` where there is one."""
    transformers.set_seed(args.seed)
    dtype, is_main = resolve_dtype(args.dtype), accelerator.is_main_process
    # Full fine-tuning needs fp32 masters. With adapters the base is frozen, and its own type is enough.
    load_dtype = torch.float32 if args.method == "full" and args.deepspeed is None else dtype
    model = pretrained.load_model(args, base.path, load_dtype, accelerator.device)
    if checkpoint is not None:
        attach_adapters(model, args, checkpoints.load_tensors(checkpoint))
    elif base.adapter is not None:

        def factors(name: str) -> tuple[Tensor, Tensor]:
            layer = model.get_submodule(name)
            with gathered([layer.weight]):
                return principal_factors(dequantized(layer), args.rank, args.alpha / args.rank)

        attach_adapters(model, args, base.adapter.trained_tensors(factors))
    else:
        cache = Path(args.init_cache) if args.init_cache else None
        add_adapters(model, args.method, args.rank, args.alpha, args.target_modules, cache=cache, progress=is_main)
    if args.deepspeed is not None:
        round_factors(model, dtype)
    pretrained.require_causal(model)
    if is_main and base.coverage:
        lines = {what: ", ".join(f"{n} {name}" for name, n in names.items()) for what, names in base.coverage.items()}
        print(f"adapters on {lines['adapted']}; without adapter: {lines['not_adapted'] or 'none'}")
    return model


def make_ready(
    args: Arguments,
    base: Base,
    model: "transformers.PreTrainedModel",
    dataset: "datasets.Dataset",
    held_out: "datasets.Dataset | None",
    is_main: bool = True,
) -> "tuple[BALoRAModel, PackingCollator | PaddingCollator]":
    """The module that `fit` trains, and the collator of its micro-batches. Packing and lean activations are used where
    the model can; a note says why it cannot be packed."""
    everything = validation.together(dataset, held_out)
    obstacle = None
    if args.packing:
        obstacle = obstacle_to_packing(model, args.attn_implementation, map(len, everything["input_ids"]))
    if args.method != "full" and not args.gradient_checkpointing:  # checkpointing keeps almost no activations anyway
        save_activations(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    token_kernel.enabled = args.token_kernel
    wrapped = BALoRAModel(model, args.objective_memory)
    if needs_teacher_cache(args):
        if not wrapped.is_fused:
            raise UserError("--teacher-cache keeps hidden states, and this model's head is not a plain linear map")
        counts = list(map(num_valid, everything["labels"]))
        cache = wrapped.teacher_cache = TeacherCache(Path(args.teacher_cache), model, everything, counts)
        if is_main:
            known = f"{int(cache.done.sum())} of {len(everything)} examples are there"
            print(f"teacher cache: {cache.num_bytes / 2**30:.2f} GiB when full, {known}")
    if is_main and obstacle:
        print(f"note: {type(model).__name__} {obstacle}; batches are padded")
    if is_main and args.method != "full":
        estimates.note_on_whole_logits(args, wrapped, TERMS)
    if args.packing and not obstacle:
        # FlashAttention's form for packed sequences has no place for a beginning that several sequences share.
        return wrapped, PackingCollator(share_beginning=model.config._attn_implementation == PER_SEQUENCE)
    return wrapped, PaddingCollator(base.tokenizer.eos_token_id)  # an added padding token may have no embedding


def trained_model(
    args: Arguments, base: Base, training: Training, finished: Path | None
) -> "transformers.PreTrainedModel | None":
    """The model to export, on the first process; None on the others. Collective.

    It is rebuilt from the published weights where the trained model holds only parts of them, or rounded ones.

    Args:
        finished: the checkpoint to export: a finished training's, or the best state's. None: the model as it is.
    """
    model, is_main = training.trained, training.is_main
    if args.deepspeed is not None or args.load_in is not None:
        kept = checkpoints.load_tensors(finished) if finished else None
        tensors = kept or checkpoints.trained_tensors(model, keep=is_main)
        model = rebuilt_model(args, base.path, resolve_dtype(args.dtype), tensors) if is_main else None
    elif finished:
        checkpoints.load_trained_tensors(model, checkpoints.load_tensors(finished))
    return model if is_main else None


def rebuilt_model(
    args: Arguments, model_path: str, dtype: torch.dtype, tensors: dict[str, Tensor]
) -> "transformers.PreTrainedModel":
    """The trained model on the CPU, from the published weights and `trained_tensors`."""
    transformers.integrations.deepspeed.unset_hf_deepspeed_config()  # whole weights, not a rank's part
    args = dataclasses.replace(args, load_in=None, attn_implementation=None)
    return attach_adapters(
        pretrained.load_model(args, model_path, torch.float32 if args.method == "full" else dtype), args, tensors
    )


def export_model(
    model: "transformers.PreTrainedModel",
    tokenizer: "transformers.PreTrainedTokenizerBase",
    args: Arguments,
    model_path: str,
    output_dir: Path,
    remedy: str,
    about: Mapping[str, Any] | None = None,
    sample: Iterable[Any] = (),
) -> None:
    """Writes adapter/ and merged/, whole or not at all; the adapters are merged away in `model`.

    Args:
        remedy: tells the user how to write them again if this fails.
        about: the scale of ΔW (already set in `model`) and its origin; the step, if the training has not ended.
        sample: conversations of training; the exported tokenizers have to give their prompts.

    Raises:
        RunStopped: the files cannot be written, or are not the trained model when they are read back.
    """
    with runs.written_whole(output_dir, remedy) as staging:
        layers = adapter_layers(model)
        read_back = exports.ReadBack(model, layers)
        pretrained.mend_generation_config(model)
        template = Template(tokenizer, args.template or "alpaca", read_template_args(args.template_args))
        template.end_answers(model.generation_config)
        if args.method != "full":
            folder, revision = staging / "adapter", args.model_revision
            rank = export_adapter(layers, folder, model_path, args.target_modules, "CAUSAL_LM", revision=revision)
            (staging / "adapter" / "README.md").write_text(adapter_card(args, rank, about))
            template.save(staging / "adapter", model.generation_config)
        exports.save_merged(merge_adapters(model), staging / "merged", pretrained.export_dtype(model_path, args))
        template.save(staging / "merged")
        options = {"trust_remote_code": args.trust_remote_code, "attn_implementation": args.attn_implementation}
        read_back.require_same(staging, model, template, sample, options)


def export_again(args: Arguments, source: Path, output_dir: Path, alpha: float | None) -> None:
    """--export-from: adapter/ and merged/ from the newest checkpoint in `source`, with ΔW at `alpha`; None: auto."""
    run = parse_arguments(Arguments, __doc__, ["--config", str(source / "config.yaml")])
    checkpoint, unfinished = checkpoints.checkpoint_to_export(source, run.patience, run.keep_best)
    path = resolve_demo(run.model, "model")
    tokenizer, config = pretrained.load_tokenizer_and_config(path, run.model_revision, run.trust_remote_code)
    contents = {"base model": pretrained.weights_digest(path, config)}
    checkpoints.require_same_contents(checkpoint, contents, args.accept_changes)
    held_out = exports.held_out_examples(args, run, tokenizer, checkpoint) if alpha is None else None
    model = rebuilt_model(run, path, resolve_dtype(run.dtype), checkpoints.load_tensors(checkpoint))
    is_whole = run.method == "full" and alpha != 1
    base = dict(pretrained.load_model(run, path, torch.float32).named_parameters()) if is_whole else None
    scaled = exports.Scaled(model, [(vars(layer), "scaling") for layer in adapter_layers(model).values()], base)
    about = {"scale": alpha} if held_out is None else exports.choose(scaled, held_out, args.scale_tolerance)
    about |= {"unfinished": unfinished}
    scaled.set(about["scale"])
    export_model(model, tokenizer, run, path, output_dir, "give this command again", about)
    if args.scale is not None:
        runs.note_export(source, output_dir, about | {"checkpoint": checkpoint.name})
    named = "merged/" + (", adapter/" if run.method != "full" else "")
    state = f"; the training has not ended: {unfinished}" if unfinished else ""
    print(f"exported {checkpoint} to {output_dir}: {named}{state}")


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------


def run(args: Arguments, base: Base, started: float) -> None:
    """A whole run: data, model, training, export. --output-dir is this run's alone."""
    records = load_training_records(args)  # fills in the template, which a checkpoint's settings must match
    checkpoint = checkpoints.checkpoint_to_resume(args)
    eval_args = validation.arguments_of_validation_data(args)
    eval_records = eval_args and load_training_records(eval_args)
    accumulation = checkpoints.accumulation(args, checkpoint)
    width = base.skeleton.get_input_embeddings().weight.shape[1]
    accelerator = start_ranks(
        args, accumulation, is_mixed(args), width
    )  # before the model: ZeRO-3 decides how it loads
    is_main = accelerator.is_main_process
    dataset = encode_records(args, base, records, is_main)
    num_dropped, notes, sample = len(records) - len(dataset), dataset.notes, dataset.sample
    held_out = eval_args and encode_records(eval_args, base, eval_records, is_main)
    dataset, held_out = validation.hold_out(args, dataset, held_out)
    contents = {"base model": pretrained.weights_digest(base.path, base.config)}
    contents |= {"data": checkpoints.contents_of(dataset)}
    contents |= {"evaluation data": checkpoints.contents_of(held_out)} if held_out else {}
    checkpoints.require_same_start(args, checkpoint, contents)
    sampler = validation.Sampler.of(args, base.tokenizer)
    if is_main:
        runs.open_output_dir(args, checkpoint)
        print(f"training {args.model} on {len(dataset)} examples of {args.data} by {args.method}", flush=True)

    student = load_student(args, base, accelerator, checkpoint)
    if is_main:
        share = f"{base.trainable / 1e6:.2f} M trainable parameters on a model of {base.total / 1e6:.2f} M"
        print(f"{args.method}: {share} ({time.time() - started:.0f} s since start)", flush=True)
    model, collate = make_ready(args, base, student, dataset, held_out, is_main)
    order = random_order(len(dataset), args.seed)
    training = Training(args, accelerator, accumulation, len(dataset), order, contents=contents)
    if is_main:
        for note in estimates.notes_on_defaults(args, training.progress.max_steps, base.total):
            print(note, flush=True)
    training.start_trackers()
    finished = checkpoint if checkpoints.is_complete(checkpoint, args.patience, training.progress.max_steps) else None
    fit(training, model, dataset, held_out, collate, sampler, checkpoint)
    seconds, peak = training.seconds, peak_memory_gib()

    best = training.checkpoint_to_export()
    exported = trained_model(args, base, training, best or finished)
    if is_main:
        remedy = checkpoints.way_to_export(args)
        export_model(exported, base.tokenizer, args, base.path, Path(args.output_dir), remedy, sample=sample)
        summary = {
            **training.summary(),
            "examples": len(dataset),
            "held_out_examples": len(held_out or ()),
            "dropped_examples": num_dropped,
            "trainable_parameters": base.trainable,
            "total_parameters": base.total + (0 if args.method == "full" else base.trainable),
            "validation": validation.summary(training.progress.history, training.step, best),
            "resumed_from": str(checkpoint) if checkpoint else None,
            "train_seconds": seconds,
            "peak_memory_gib": peak,
            "linear_layers": base.coverage,
            "data_read": vars(notes),
        }
        runs.write_summary(args, summary)
        push_adapter(args)


def main(argv: list[str]) -> None:
    started = time.time()
    args = parse_arguments(Arguments, __doc__, argv)
    if args.export_from is not None:
        with exports.exporting(args) as place_and_scale:
            export_again(args, *place_and_scale)
        return
    args = resolve_arguments(args)
    if not args.dry_run:
        announce_device()
    base = inspect_base(args)
    if args.dry_run:
        print(dry_run(args, base))
        return
    if runs.is_trained_already(args):
        push_adapter(args)
        return
    with runs.held_alone(Path(args.output_dir)):
        run(args, base, started)


if __name__ == "__main__":
    run_rank(main)
