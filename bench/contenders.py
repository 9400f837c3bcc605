"""What the benchmarks compare with: PEFT's PiSSA with the stock loss, and the public BA-LoRA objective.

The public objective is written out from the paper and from what the authors' code is known to do: a second whole copy
of the model as the teacher, whole logits of both in fp32, the unshifted label mask, `svd_lowrank` under autograd.
"""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import train
from common.cli import UserError
from common.conversations import build_dataset
from common.pretrained import resolve_demo
from common.runs import package_versions
from common.tables import load_records, require_fields
from common.targets import TARGET_MODULES
from common.templates import IGNORE_INDEX

WEIGHTS = (0.025, 0.005, 0.005)  # λ₁, λ₂, λ₃
NAMES = ("consistency", "diversity", "spectral")
REGULARIZERS = train.Regularizers(
    dict(zip(NAMES, WEIGHTS, strict=True)), train.Arguments(**train.FORMULATIONS["iclr2026"])
)


def public_regularizers(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """λ₁·L_CR + λ₂·L_DR + λ₃·L_SVDR from whole logits (B, L, V) and a mask (B, L), differentiated by autograd."""
    T, k, top_k = 2.0, 10, 20
    rows = mask.bool()
    log_p = F.log_softmax(student.float() / T, dim=-1)
    q = F.softmax(teacher.float() / T, dim=-1)
    divergence = F.kl_div(log_p, q, reduction="none").sum(dim=-1)
    consistency = T**2 * (divergence * rows).sum() / rows.sum()
    top = student.float().topk(top_k, dim=-1).values
    p = F.softmax(top, dim=-1)
    entropy = -(p * torch.log(p + 1e-10)).sum(dim=-1)
    diversity = -(entropy * rows).sum() / rows.sum()
    valid = student[rows].float()
    _, sigma, _ = torch.svd_lowrank(valid, q=k + 5, niter=2)
    spectral = -sigma[:k].sum() / valid.norm()
    return WEIGHTS[0] * consistency + WEIGHTS[1] * diversity + WEIGHTS[2] * spectral


def peft_model(model: torch.nn.Module, rank: int, init: str | bool = "pissa") -> torch.nn.Module:
    """PEFT's PiSSA (`pissa`, or `pissa_niter_4`) on all seven projections, alpha = r."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=TARGET_MODULES, init_lora_weights=init, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def padded_batch(examples: list[dict]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` as every public trainer pads them."""
    width = max(len(example["input_ids"]) for example in examples)

    def pad(ids: list[int], value: int) -> list[int]:
        return ids + [value] * (width - len(ids))

    return {
        "input_ids": torch.tensor([pad(e["input_ids"], 0) for e in examples]),
        "attention_mask": torch.tensor([pad([1] * len(e["input_ids"]), 0) for e in examples]),
        "labels": torch.tensor([pad(e["labels"], IGNORE_INDEX) for e in examples]),
    }


def batches_of(args: Any, tokenizer: Any) -> list[list[dict]]:
    """The batches of `--steps` timed steps, after one to warm up, from `--data` and `--fields`.

    Raises:
        UserError: no such data, or too little.
    """
    records = load_records(resolve_demo(args.data, "train"))
    require_fields(records, args.fields, args.data, "name two of them with --fields")
    count = (args.steps + 1) * args.batch_size
    dataset, _ = build_dataset(
        records.select(range(min(2 * count, len(records)))), tokenizer, args.fields, args.max_length
    )
    if len(dataset) < count:
        raise UserError(f"{args.data} has {len(dataset)} examples, of {count} needed: fewer --steps")
    return [[dataset[i] for i in range(start, start + args.batch_size)] for start in range(0, count, args.batch_size)]


def machine() -> str:
    """Processor, threads and versions, for the line under a table."""
    versions = package_versions()
    versions["peft"] = version("peft")
    cpu = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    names = ("python", "torch", "transformers", "peft")
    return f"{cpu}, {torch.get_num_threads()} threads; " + ", ".join(f"{name} {versions[name]}" for name in names)
