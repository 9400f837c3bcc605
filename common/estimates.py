"""A run's expected memory, by part, and disk space, for --dry-run; notes on defaults that do not fit the run."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.chunked import FUSED_TERMS, bytes_per_row, card_bytes, most_rows
from common.cli import UserError
from common.conversations import num_valid
from common.packing import shared_beginning
from common.pretrained import resolve_dtype
from common.ranks import read_deepspeed
from common.training import num_steps

if TYPE_CHECKING:
    import datasets

# Memory beside the tensors: Python, torch and transformers, and the holes that the allocator cannot fill. Measured from
# peaks of whole runs on Linux (tests/test_architectures.py measures again). On a GPU it does not count.
PROGRAM_BYTES = 0.85 * 2**30


def card_of(args: Any) -> int | None:
    """Bytes of the GPU that the run is to have: --dry-run-gpu's, or this machine's; None: a CPU."""
    return card_bytes() if args.dry_run_gpu is None else int(args.dry_run_gpu * 2**30)


def adapter_bytes(args: Any, trainable: int) -> int:
    """Bytes of the fp32 factors, PiSSA's frozen ones included."""
    return trainable * 4 * (1 if args.method == "lora" else 2)


def _widest(config: Any, name: str) -> int | None:
    """A width of the configuration, the largest if each layer has its own; None where there is none."""
    value = getattr(config, name, None)
    return max(value) if isinstance(value, list | tuple) else value


def estimated_memory(
    args: Any,
    config: Any,
    dtype: torch.dtype,
    *,
    total: int,
    trainable: int,
    num_adapters: int,
    tokens: int,
    valid: int,
    num_processes: int,
) -> dict[str, float]:
    """Bytes per process at the peak of a training step, by part.

    Activations are the tensors that the student keeps for its backward pass, counted per token and layer for gated
    decoders without a stored matrix of attention scores: d is the residual stream's width, f the feed-forward's, a and
    g the widths of queries and of keys, r the adapter's rank.

    Args:
        args: train.py's Arguments. config: the model's configuration.
        total, trainable: parameters of the model, and those that are trained.
        num_adapters: how many layers get an adapter.
        tokens, valid: the largest micro-batch's tokens, and its tokens at which the objective is computed.
    """
    zero = read_deepspeed(args.deepspeed).get("zero_optimization", {})
    stage, card = zero.get("stage", 0), card_of(args)
    split = {name: num_processes if stage >= needed else 1 for name, needed in (("o", 1), ("g", 2), ("w", 3))}
    full = args.method == "full"
    item = dtype.itemsize
    base_item = {None: 4 if full and not args.deepspeed else item, "8bit": 1, "4bit": 0.56}[args.load_in]
    parts = {"weights": total * base_item / split["w"]}
    if not full:
        stacked = 0 if (args.method == "lora" and item == 4) or split["w"] > 1 else item / 4
        parts["adapters"] = adapter_bytes(args, trainable) * (1 + stacked)
    parts["gradients"] = trainable * (item if args.deepspeed else 4) / split["g"]
    masters = 4 if args.deepspeed and item < 4 else 0
    offloaded = zero.get("offload_optimizer", {}).get("device") == "cpu" and card is not None
    parts["optimizer"] = 0 if offloaded else trainable * (8 + masters) / split["o"]

    d, layers = config.hidden_size, config.num_hidden_layers
    f = _widest(config, "intermediate_size") or 4 * d
    heads = _widest(config, "num_attention_heads") or 1  # Mamba has none: its mixer counts as one head of width d
    head = _widest(config, "head_dim") or d // heads
    a, g = heads * head, (_widest(config, "num_key_value_heads") or heads) * head
    ranks = args.rank * num_adapters / layers
    attention = 3 * a + 2 * g  # queries, keys, values, the output, and its copy for the output projection
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
        # The memory of the plain form; the fused kernels need less.
        row = bytes_per_row(vocabulary, 2, 4, item, card is not None)
        rows = min(most_rows(row, args.objective_memory, card), valid)
        parts["objective"] = rows * row + 3 * valid * d * 4 + 12 * d * d
    # A layer's backward pass also holds a feed-forward's gradients.
    parts["transient"] = 4 * tokens * f * item
    # DeepSpeed's step makes a rank's gradients fp32 first. By then the memory of the passes is free again.
    passes = parts["activations"] + parts["objective"] + parts["transient"]
    if masters and not offloaded and (more := trainable * 4 / split["o"] - passes) > 0:
        parts["update"] = more
    if card is None:
        parts["program"] = PROGRAM_BYTES
    return parts


@dataclass
class DataSizes:
    """The tokenised data: tokens and response tokens of each example; those of the largest micro-batch."""

    lengths: torch.Tensor
    valid: torch.Tensor
    num_dropped: int
    largest_tokens: int
    largest_valid: int

    @classmethod
    def of(cls, args: Any, dataset: "datasets.Dataset", num_dropped: int) -> "DataSizes":
        """The sizes of `dataset`; the largest micro-batch is that of one random order."""
        lengths = torch.tensor([len(ids) for ids in dataset["input_ids"]])
        valid = torch.tensor([num_valid(labels) for labels in dataset["labels"]])
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(args.seed)).split(args.batch_size)
        sizes = [int(lengths[batch].sum() if args.packing else lengths[batch].max() * len(batch)) for batch in order]
        tokens, largest = max(zip(sizes, order, strict=True), key=lambda pair: pair[0])
        if args.packing:
            tokens -= (len(largest) - 1) * shared_beginning([dataset[int(row)] for row in largest])
        return cls(lengths, valid, num_dropped, tokens, int(valid[largest].sum()))


def report(args: Any, base: Any, data: DataSizes | UserError) -> list[str]:
    """Parameters, data, steps, memory and disk of a run of train.py, a line each.

    Args:
        base: the model: train.py's Base. data: its sizes, or the error if it cannot be read.
    """
    dtype, is_cpu = resolve_dtype(args.dtype), card_of(args) is None
    if args.dry_run_gpu is not None and args.dtype == "auto":
        dtype = torch.bfloat16
    num_processes = int(os.environ.get("WORLD_SIZE", max(1, torch.cuda.device_count())))
    lines = [f"parameters: {base.trainable / 1e6:.1f} M trainable, {base.total / 1e6:.1f} M in the model"]
    per_step = args.batch_size * args.gradient_accumulation * num_processes
    if isinstance(data, DataSizes):
        count, mean = len(data.lengths), data.lengths.float().mean().item()
        steps = num_steps(args, count, num_processes)
        tokens, valid = data.largest_tokens, data.largest_valid
        lines += [
            f"data: {count} examples ({data.num_dropped} dropped), {mean:.0f} tokens on average, at most "
            f"{data.lengths.max()}; {int(data.valid.sum())} response tokens",
            f"steps: {steps} of {per_step} sequences ({args.batch_size} x {args.gradient_accumulation} x "
            f"{num_processes} processes), about {steps * per_step * mean / 1e6:.2f} M tokens",
        ]
    else:
        known = f"{args.max_steps} steps" if args.max_steps > 0 else "steps not known"
        tokens = valid = args.batch_size * args.max_length
        lines.append(f"data: not read ({data}); {known}, {per_step} sequences each of at most {args.max_length} tokens")
    parameters = {"total": base.total, "trainable": base.trainable}
    sizes = {"num_adapters": base.num_adapters, "tokens": tokens, "valid": valid, "num_processes": num_processes}
    parts = estimated_memory(args, base.config, dtype, **parameters, **sizes)
    device = "process" if is_cpu else "GPU"
    lines.append(f"memory per {device}, estimated for a micro-batch of {tokens} tokens in {str(dtype)[6:]}:")
    lines += [f"  {name:<12} {size / 2**30:8.2f} GiB" for name, size in parts.items()]
    lines.append(f"  {'together':<12} {sum(parts.values()) / 2**30:8.2f} GiB")
    lines.append(disk_line(args, dtype, **parameters))
    return lines + (notes_on_defaults(args, steps, base.total) if isinstance(data, DataSizes) else [])


def notes_on_defaults(args: Any, steps: int, total: int) -> list[str]:
    """Notes where the paper's defaults, made for a model of 7 B on 100,000 examples, do not fit a much smaller run.

    Args:
        steps: optimizer steps of the run. total: parameters of the model.
    """
    notes = []
    if steps < 20:
        notes.append(
            f"note: {steps} optimizer steps are few: more --epochs, or fewer sequences a step than --batch-size x "
            f"--gradient-accumulation = {args.batch_size} x {args.gradient_accumulation}, give more"
        )
    warmup = math.ceil(steps * args.warmup_ratio)
    if steps > 1 and warmup * 4 >= steps:
        notes.append(f"note: the warm-up takes {warmup} of {steps} steps: --warmup-ratio 0 leaves it out")
    if args.method != "full" and args.learning_rate <= 2e-5 and (args.method == "lora" or total < 2e9):
        what = "LoRA's start" if args.method == "lora" else f"a model of {total / 1e6:.0f} M"
        notes.append(
            f"note: --learning-rate {args.learning_rate:g} is low for {what}: docs/own-model.md has measured rates, "
            "1e-4 to 1e-3 for small models"
        )
    return notes


def note_on_whole_logits(args: Any, wrapped: Any, terms: Iterable[str]) -> None:
    """Prints why the objective of `wrapped`, a BALoRAModel, holds whole logits, and how much they take, where it does.

    Args:
        terms: the names of all terms.
    """
    lacking = [name for name in terms if getattr(args, f"lambda_{name}") and name not in FUSED_TERMS]
    if not wrapped.is_fused:
        reason = f"the head of {type(wrapped.model).__name__} is not a plain linear map"
    elif args.has_terms and lacking:
        reason = f"common/chunked.py lacks the term {' and the term '.join(lacking)}"
    else:
        return
    vocabulary = wrapped.model.get_input_embeddings().weight.shape[0]
    mib = args.batch_size * args.max_length * vocabulary * 4 / 2**20
    print(f"note: {reason}; the objective holds whole logits, up to {mib:.0f} MiB a copy for a full micro-batch")


def disk_line(args: Any, dtype: torch.dtype, *, total: int, trainable: int) -> str:
    """The disk space of checkpoints, adapter and merged model, for the terminal."""
    adapter = 0 if args.method == "full" else adapter_bytes(args, trainable)
    checkpoint = trainable * 12 + (adapter if args.method in ("pissa", "ba-lora") else 0) / 2
    merged = total * dtype.itemsize
    count = args.keep_checkpoints + 1
    return (
        f"disk: {(count * checkpoint + adapter + merged) / 2**30:.2f} GiB at most ({count} checkpoints of "
        f"{checkpoint / 2**30:.2f} GiB, adapter {adapter / 2**30:.2f} GiB, merged model {merged / 2**30:.2f} GiB)"
    )
