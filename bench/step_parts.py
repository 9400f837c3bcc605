#!/usr/bin/env python3
"""Where one training step of ours goes, by part, beside the floor that its matrix products set.

    python bench/step_parts.py --data FILE.jsonl --fields question answer

The floor of a part is its counted multiply-adds, two operations each, at the rate that one large product of this
machine reaches in the same run. The last row counts what PEFT's PiSSA with the stock loss multiplies on the same
sequences, padded: r instead of 2r in the adapters, no teacher, and the head at every position.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import contenders
import torch
from side_by_side import machine, step_parser
from transformers import AutoModelForCausalLM

import train
from common.cli import run_script
from common.packing import shared_beginning
from common.pretrained import load_tokenizer_and_config, resolve_demo


def seconds_of(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def rate(size: int = 1536, repeats: int = 7) -> float:
    """Operations per second of a square fp32 product: the median."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / statistics.median(seconds_of(lambda: a @ b) for _ in range(repeats))


def timed_steps(wrapper: train.BALoRAModel, batches: list[dict]) -> tuple[list[dict[str, float]], list[float]]:
    """Seconds of each step by part, and the rate of one large product beside each; the first step warms up."""
    given: dict[str, Any] = {}
    parts = contenders.step_parts(wrapper, given)
    rows, rates = [], []
    for batch in batches:
        given["batch"] = batch
        train.stack_factors(wrapper.model)
        row = {name: seconds_of(part) for name, part in parts.items() if name != "AdamW"}
        train.stack_factors(wrapper.model, hold=False)
        rows.append(row | {"AdamW": seconds_of(parts["AdamW"])})
        rates.append(rate())
    return rows[1:], rates[1:]


def main(argv: list[str]) -> None:
    args = step_parser(__doc__, 6).parse_args(argv)
    path = resolve_demo(args.model, "model")
    tokenizer, _ = load_tokenizer_and_config(path)
    batches = contenders.batches_of(args, tokenizer)
    wrapper = contenders.adapted(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), args.rank)
    model, packed = wrapper.model, list(map(train.PackingCollator(), batches))
    rows, rates = timed_steps(wrapper, packed)
    per_second = statistics.median(rates)

    layers = train.adapter_layers(model).values()
    body = sum(layer.base.weight.numel() for layer in layers)
    sides = sum(sum(layer.base.weight.shape) for layer in layers)
    head = model.get_output_embeddings().weight.numel()
    counts = contenders.token_counts(batches[1:])
    padded, valid = counts["padded"], counts["valid"]
    tokens = statistics.mean(batch["input_ids"].numel() for batch in packed[1:])
    shared = statistics.mean(shared_beginning(batch) for batch in batches[1:])
    r = args.rank
    # The last feed-forward leaves tokens out: its part of the body shrinks by as many.
    skipped = sum(m.weight.numel() for m in model.get_decoder().layers[-1].mlp.modules() if type(m) is torch.nn.Linear)
    computed = tokens - (tokens - valid) * skipped / body
    # Backward: the gradient of x through W; that of the low-rank input and x through 2r; those of A and B through r.
    operations = {
        "teacher, forward": 2 * computed * body,
        "student, forward": 2 * computed * (body + 2 * r * sides),
        "objective": 3 * 2 * valid * head,
        "student, backward": 2 * computed * (body + (2 * r + r) * sides),
        "AdamW": 0,
    }
    peft = 2 * padded * (2 * body + (r + 2 * r) * sides) + 2 * 2 * padded * head
    print("| part | seconds | share | operations, 10⁹ | floor, seconds |")
    print("|---|---|---|---|---|")
    total = statistics.median(sum(row.values()) for row in rows)
    for part, count in operations.items():
        median = statistics.median(row[part] for row in rows)
        print(f"| {part} | {median:.2f} | {median / total:.0%} | {count / 1e9:.0f} | {count / per_second:.2f} |")
    ours = sum(operations.values())
    print(f"| whole step | {total:.2f} | | {ours / 1e9:.0f} | {ours / per_second:.2f} |")
    print(f"| PEFT's PiSSA, stock loss | | | {peft / 1e9:.0f} | {peft / per_second:.2f} |")
    print(
        f"\nMedians of {len(rows)} steps; {tokens:.0f} tokens computed ({padded:.0f} padded, {valid:.0f} valid), "
        f"{shared:.0f} at the beginning of every sequence of a batch once; one product of 1,536³ runs at "
        f"{per_second / 1e9:.0f}·10⁹ operations a second. Attention, norms and activations are not counted. {machine()}"
    )


if __name__ == "__main__":
    run_script(main)
