#!/usr/bin/env python3
"""Where one training step of ours goes, by part, beside the floor that its matrix products set.

    python bench/step_parts.py --data FILE.jsonl --fields question answer

The floor of a part is its counted multiply-adds, two operations each, at the rate that one large product of this
machine reaches in the same run. The last row counts what PEFT's PiSSA with the stock loss multiplies on the same
sequences, padded: r instead of 2r in the adapters, no teacher, and the head at every position.
"""

import argparse
import statistics
import time

import contenders
import torch
from transformers import AutoModelForCausalLM

import train
from common.activations import save_activations
from common.cli import run_script
from common.packing import enable_packing, shared_beginning
from common.pretrained import load_tokenizer_and_config, resolve_demo
from common.targets import TARGET_MODULES
from common.templates import IGNORE_INDEX


def rate(size: int = 1536, repeats: int = 7) -> float:
    """Operations per second of a square fp32 product: the median."""
    a, b = torch.randn(2, size, size)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds)


class Clock:
    """Seconds by part; `wrap` times a function's calls."""

    def __init__(self):
        self.seconds = {}

    def wrap(self, part, function):
        def timed(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

        return timed


def timed_steps(model: torch.nn.Module, batches: list[list[dict]]) -> tuple[list[dict[str, float]], list[float]]:
    """Seconds of each step by part, and the rate of one large product beside each; the first step warms up."""
    wrapper = train.BALoRAModel(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)

    clock = Clock()
    of_teacher, from_hidden = wrapper.of_teacher, train.objective_from_hidden
    wrapper.of_teacher = clock.wrap("teacher, forward", of_teacher)
    train.objective_from_hidden = clock.wrap("objective", from_hidden)
    forward = clock.wrap("whole forward", wrapper)
    rows, rates = [], []
    for batch in batches:
        clock.seconds = {}
        packed = train.PackingCollator()(batch)
        loss, _ = forward(packed, contenders.REGULARIZERS, len(packed["targets"]), 1)
        clock.wrap("student, backward", loss.backward)()
        clock.wrap("AdamW", optimizer.step)()
        optimizer.zero_grad()
        seconds = clock.seconds
        whole = seconds.pop("whole forward")
        seconds["student, forward"] = whole - seconds["teacher, forward"] - seconds["objective"]
        rows.append(seconds)
        rates.append(rate())
    return rows[1:], rates[1:]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="causal language model (default: the embedded SmolLM2-135M)")
    parser.add_argument("--data", default="demo", help="real text of uneven lengths")
    parser.add_argument("--fields", nargs=2, default=["question", "response"])
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="timed steps, after one to warm up")
    args = parser.parse_args(argv)

    path = resolve_demo(args.model, "model")
    tokenizer, _ = load_tokenizer_and_config(path)
    batches = contenders.batches_of(args, tokenizer)

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    train.add_adapters(model, "ba-lora", args.rank, args.rank, TARGET_MODULES)
    assert enable_packing(model)
    save_activations(model)
    rows, rates = timed_steps(model, batches)
    per_second = statistics.median(rates)

    layers = train.adapter_layers(model).values()
    body = sum(layer.base.weight.numel() for layer in layers)
    sides = sum(sum(layer.base.weight.shape) for layer in layers)
    head = model.get_output_embeddings().weight.numel()
    timed = batches[1:]
    tokens = statistics.mean(train.PackingCollator()(batch)["input_ids"].numel() for batch in timed)
    padded = statistics.mean(max(len(e["input_ids"]) for e in batch) * len(batch) for batch in timed)
    valid = statistics.mean(sum(label != IGNORE_INDEX for e in batch for label in e["labels"]) for batch in timed)
    shared = statistics.mean(shared_beginning(batch) for batch in timed)
    r = args.rank
    # What the last feed-forward leaves out: as many tokens' worth of its part of the body.
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
        f"{per_second / 1e9:.0f}·10⁹ operations a second. Attention, norms and activations are not counted. "
        f"{contenders.machine()}"
    )


if __name__ == "__main__":
    run_script(main)
