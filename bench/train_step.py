#!/usr/bin/env python3
"""One training step, side by side: PEFT's PiSSA with the stock loss, the public BA-LoRA objective, and ours.

    python bench/train_step.py --data FILE.jsonl --fields question answer

Each contender lives in a process of its own, so that its peak memory is its own; they take turns on the same batches,
one step each, so that a slow moment of the machine hits all of them. A step is forward, backward and AdamW. Printed:
the median seconds, the ratio to PEFT's PiSSA step by step with its spread, and the peak resident memory.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from common.cli import run_script
from common.conversations import num_valid
from common.pretrained import load_tokenizer_and_config, resolve_demo
from common.ranks import peak_memory_gib
from common.templates import IGNORE_INDEX

CONTENDERS = {
    "peft": "PEFT's PiSSA, stock loss",
    "peft_tuned": "the same with ours' allocator settings",
    "public": "PEFT's PiSSA, public BA-LoRA objective",
    "ours": "BA-LoRA, ours",
    "cached": "BA-LoRA, ours, teacher cache",
}


PEFT = ("peft", "peft_tuned", "public")
TUNED = ("peft_tuned", "ours", "cached")


def allocator_settings() -> str:
    """The GLIBC_TUNABLES that scripts/setup.sh gives to training on a CPU."""
    text = (Path(__file__).resolve().parent.parent / "scripts" / "setup.sh").read_text()
    return next(line.partition("=")[2] for line in text.splitlines() if line.startswith("cpu_allocator="))


def worker(name: str, connection, model_path: str, rank: int, batches: list[list[dict]], cache: str) -> None:
    """Builds one contender, then makes the step that it is told to make."""
    import contenders
    import datasets
    import torch
    from transformers import AutoModelForCausalLM

    import train
    from common.activations import save_activations
    from common.packing import enable_packing
    from common.targets import TARGET_MODULES
    from common.teacher_cache import TeacherCache

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if name in PEFT:
        model = contenders.peft_model(model, rank)
        if name == "public":
            teacher = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).requires_grad_(False)
    else:
        train.add_adapters(model, "ba-lora", rank, rank, TARGET_MODULES)
        assert enable_packing(model)
        save_activations(model)
        wrapper = train.BALoRAModel(model)
        if name == "cached":
            examples = [example for batch in batches for example in batch]
            counts = [num_valid(example["labels"]) for example in examples]
            wrapper.teacher_cache = TeacherCache(Path(cache), model, datasets.Dataset.from_list(examples), counts)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)

    def step(examples: list[dict]) -> float:
        if name in PEFT:
            batch = contenders.padded_batch(examples)
            output = model(**batch)
            loss = output.loss
            if name == "public":
                with torch.no_grad():
                    reference = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
                mask = batch["labels"] != IGNORE_INDEX
                loss = loss + contenders.public_regularizers(output.logits, reference, mask)
                del reference
            del output
        else:
            batch = train.PackingCollator()(examples)
            loss, _ = wrapper(batch, contenders.REGULARIZERS, len(batch["targets"]), 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    if name == "cached":  # as a second epoch finds it
        for batch in batches:
            packed = train.PackingCollator()(batch)
            wrapper.teacher_cache.put(packed["example_ids"], wrapper.of_teacher(wrapper.hidden_states, packed))
    connection.send("ready")
    while (index := connection.recv()) is not None:
        started = time.perf_counter()
        loss = step(batches[index])
        seconds = time.perf_counter() - started
        connection.send((seconds, loss, peak_memory_gib()))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="causal language model (default: the embedded SmolLM2-135M)")
    parser.add_argument("--data", default="demo", help="real text of uneven lengths")
    parser.add_argument("--fields", nargs=2, default=["question", "response"])
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each contender, after one to warm up")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    args = parser.parse_args(argv)

    import contenders

    model_path = resolve_demo(args.model, "model")
    tokenizer, _ = load_tokenizer_and_config(model_path)
    batches = contenders.batches_of(args, tokenizer)
    examples = [example for batch in batches for example in batch]
    tokens = sum(len(example["input_ids"]) for example in examples) / len(batches)
    padded = sum(max(len(e["input_ids"]) for e in batch) * len(batch) for batch in batches) / len(batches)
    valid = sum(label != -100 for example in examples for label in example["labels"]) / len(batches)

    context = multiprocessing.get_context("spawn")
    seconds = {name: [] for name in args.only}
    memory, connections = {}, {}
    with tempfile.TemporaryDirectory() as cache:
        for name in args.only:
            connections[name], theirs = context.Pipe()
            rest = (model_path, args.rank, batches, cache)
            os.environ.pop("GLIBC_TUNABLES", None)  # read by the C library when the process starts
            if name in TUNED:
                os.environ["GLIBC_TUNABLES"] = allocator_settings()
            context.Process(target=worker, args=(name, theirs, *rest), daemon=True).start()
            connections[name].recv()  # one after the other: loading is not timed, but memory is shared
        for index in range(len(batches)):
            for name in args.only:
                connections[name].send(index)
                elapsed, loss, memory[name] = connections[name].recv()
                if index > 0:
                    seconds[name].append(elapsed)
                print(f"step {index} {name}: {elapsed:.2f} s, loss {loss:.4f}", file=sys.stderr, flush=True)
        for connection in connections.values():
            connection.send(None)

    reference = args.only[0]
    print(f"| one training step | seconds | ratio to {reference} [min, max] | peak GiB | ratio |")
    print("|---|---|---|---|---|")
    for name in args.only:
        ratios = [mine / base for mine, base in zip(seconds[name], seconds[reference], strict=True)]
        spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        share = memory[name] / memory[reference]
        label = CONTENDERS[name]
        print(f"| {label} | {statistics.median(seconds[name]):.2f} | {spread} | {memory[name]:.2f} | {share:.2f} |")
    print(
        f"\n{args.steps} steps of {args.batch_size} sequences, {tokens:.0f} tokens ({padded:.0f} padded, {valid:.0f} "
        f"valid); r = {args.rank}, fp32. {contenders.machine()}"
    )
    print(json.dumps({"seconds": seconds, "peak_gib": memory}), file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
