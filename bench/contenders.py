"""The two sides of the benchmarks: a step of ours, and one of PEFT's PiSSA with the stock loss or the public objective.

The public objective is written out from the paper and the known behaviour of the authors' code: a second whole copy
of the model as the teacher, whole logits of both in fp32, the unshifted label mask, `svd_lowrank` under autograd.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from common import chunked
from common.cli import UserError
from common.layers import TARGET_MODULES, save_activations
from common.packing import enable_packing
from common.templates import IGNORE_INDEX
from common.tensors import padded

WEIGHTS = {"consistency": 0.025, "diversity": 0.005, "spectral": 0.005}  # λ₁, λ₂, λ₃
REGULARIZERS = train.Regularizers(WEIGHTS, train.Arguments(**train.FORMULATIONS["iclr2026"]))

Step = Callable[[dict[str, Any]], float]  # of a batch; the loss


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
    return WEIGHTS["consistency"] * consistency + WEIGHTS["diversity"] * diversity + WEIGHTS["spectral"] * spectral


def peft_model(model: nn.Module, rank: int, init: str | bool = "pissa") -> nn.Module:
    """PEFT's PiSSA (`pissa`, or `pissa_niter_4`) on all seven projections, alpha = r."""
    import peft

    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=TARGET_MODULES, init_lora_weights=init, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def adapted(model: nn.Module, rank: int, initial: dict | None = None) -> train.BALoRAModel:
    """The model with PiSSA's adapters and packed attention, ready to train. Activations are computed again as train.py
    does it, but for gradient checkpointing, which computes all of them again."""
    train.add_adapters(model, "ba-lora", rank, rank, TARGET_MODULES, initial=initial)
    assert enable_packing(model)
    if not getattr(model, "is_gradient_checkpointing", False):
        save_activations(model)
    return train.BALoRAModel(model).train()


def optimizer_of(model: nn.Module, rate: float = 2e-5) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, fused=trained[0].is_cuda or None)


def our_step(wrapper: train.BALoRAModel, settings: train.Regularizers | None, rate: float = 2e-5) -> Step:
    """Forward, backward and AdamW on a packed batch; `settings` None: the task's loss alone."""
    optimizer = optimizer_of(wrapper, rate)

    def step(batch: dict[str, Any]) -> float:
        train.stack_factors(wrapper.model)
        loss, _ = wrapper(batch, settings, len(batch["targets"]), 1)
        loss.backward()
        train.stack_factors(wrapper.model, hold=False)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def peft_step(model: nn.Module, teacher: nn.Module | None = None, rate: float = 2e-5) -> Step:
    """The same on a padded batch with the stock loss, and with the public objective where there is a teacher. On a GPU
    in bf16 by autocast."""
    optimizer = optimizer_of(model.train(), rate)

    def step(batch: dict[str, Tensor]) -> float:
        on_gpu = batch["input_ids"].is_cuda
        with torch.autocast("cuda" if on_gpu else "cpu", dtype=torch.bfloat16, enabled=on_gpu):
            output = model(**batch)
            loss = output.loss
            if teacher is not None:
                with torch.no_grad():
                    reference = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                mask = batch["labels"] != IGNORE_INDEX
                loss = loss + public_regularizers(output.logits, reference, mask)
                del reference
            del output
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def step_parts(wrapper: train.BALoRAModel, given: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """A step of ours on `given["batch"]` in five parts, to be called in their order."""
    optimizer = optimizer_of(wrapper)
    head = wrapper.model.get_output_embeddings().weight
    factor = chunked.head_factor(head)

    def teacher() -> None:
        given["teacher"] = wrapper.of_teacher(wrapper.hidden_states, given["batch"])

    def student() -> None:
        given["student"] = wrapper.hidden_states(given["batch"])

    def objective() -> None:
        targets = given["batch"]["targets"]
        rest = (head, factor, targets, REGULARIZERS, len(targets), 1)
        given["loss"] = train.objective_from_hidden(given["student"], given["teacher"], *rest)[0]

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    parts = {"teacher, forward": teacher, "student, forward": student, "objective": objective}
    return parts | {"student, backward": lambda: given.pop("loss").backward(), "AdamW": update}


def objective_inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, device: str = "cpu", scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random hidden states of student and teacher (M, d), a head (V, d) and targets (M,); `shape` is (M, V, d)."""
    num_tokens, vocabulary, width = shape
    made = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    hidden, teacher = (torch.randn(num_tokens, width, **made).to(dtype) for _ in range(2))
    head = (torch.randn(vocabulary, width, **made) * scale / width**0.5).to(dtype)
    return hidden, teacher, head, torch.randint(vocabulary, (num_tokens,), **made)


def padded_batch(examples: list[dict]) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` as every public trainer pads them."""
    input_ids, attention_mask = padded([example["input_ids"] for example in examples], 0)
    labels, _ = padded([example["labels"] for example in examples], IGNORE_INDEX)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def batches_of(args: Any, tokenizer: Any) -> list[list[dict]]:
    """The batches of `--steps` timed steps, after one to warm up, from `--data` and `--fields`.

    Raises:
        UserError: no such data, or too little.
    """
    from common.conversations import build_dataset
    from common.pretrained import resolve_demo
    from common.tables import load_records, require_fields

    records = load_records(resolve_demo(args.data, "train"))
    require_fields(records, args.fields, args.data, "name two of them with --fields")
    count = (args.steps + 1) * args.batch_size
    dataset, _ = build_dataset(
        records.select(range(min(2 * count, len(records)))), tokenizer, args.fields, args.max_length
    )
    if len(dataset) < count:
        raise UserError(f"{args.data} has {len(dataset)} examples, of {count} needed: fewer --steps")
    return [[dataset[i] for i in range(start, start + args.batch_size)] for start in range(0, count, args.batch_size)]


def token_counts(batches: list[list[dict]]) -> dict[str, float]:
    """Means over the batches: tokens, tokens when padded, and valid ones."""
    lengths = [[len(example["input_ids"]) for example in batch] for batch in batches]
    valid = [label != IGNORE_INDEX for batch in batches for example in batch for label in example["labels"]]
    return {
        "tokens": sum(map(sum, lengths)) / len(batches),
        "padded": sum(max(row) * len(row) for row in lengths) / len(batches),
        "valid": sum(valid) / len(batches),
    }
