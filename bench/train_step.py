#!/usr/bin/env python3
"""One training step, side by side: PEFT's PiSSA with the stock loss, the public BA-LoRA objective, and ours.

    python bench/train_step.py --data FILE.jsonl --fields question answer

Each contender lives in a process of its own, so that its peak memory is its own; they take turns on the same batches,
one step each, so that a slow moment of the machine hits all of them. A step is forward, backward and AdamW. Printed:
the median seconds, the ratio to PEFT's PiSSA step by step with its spread, and the peak resident memory.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import allocator_settings, machine, print_table, step_parser

from common.cli import run_script
from common.ranks import peak_memory_gib

CONTENDERS = {
    "peft": "PEFT's PiSSA, stock loss",
    "peft_tuned": "the same with ours' allocator settings",
    "public": "PEFT's PiSSA, public BA-LoRA objective",
    "ours": "BA-LoRA, ours",
    "cached": "BA-LoRA, ours, teacher cache",
}
PEFT = ("peft", "peft_tuned", "public")
TUNED = ("peft_tuned", "ours", "cached")


def worker(name: str, connection, model_path: str, rank: int, batches: list[list[dict]], cache: str) -> None:
    """Builds one contender, then makes the step that it is told to make."""
    import contenders
    import datasets
    import torch
    from transformers import AutoModelForCausalLM

    import train
    from common.conversations import num_valid
    from common.teacher_cache import TeacherCache

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)

    if name in PEFT:
        teacher = load().requires_grad_(False) if name == "public" else None
        step, collate = contenders.peft_step(contenders.peft_model(load(), rank), teacher), contenders.padded_batch
    else:
        wrapper, collate = contenders.adapted(load(), rank), train.PackingCollator()
        if name == "cached":  # as a second epoch finds it
            examples = datasets.Dataset.from_list([example for batch in batches for example in batch])
            counts = list(map(num_valid, examples["labels"]))
            wrapper.teacher_cache = TeacherCache(Path(cache), wrapper.model, examples, counts)
            for packed in map(collate, batches):
                wrapper.teacher_cache.put(packed["example_ids"], wrapper.of_teacher(wrapper.hidden_states, packed))
        step = contenders.our_step(wrapper, contenders.REGULARIZERS)
    connection.send("ready")
    while (index := connection.recv()) is not None:
        started = time.perf_counter()
        loss = step(collate(batches[index]))
        seconds = time.perf_counter() - started
        connection.send((seconds, loss, peak_memory_gib()))


def main(argv: list[str]) -> None:
    args = step_parser(__doc__, 6, CONTENDERS).parse_args(argv)

    import contenders

    from common.pretrained import load_tokenizer_and_config, resolve_demo

    model_path = resolve_demo(args.model, "model")
    tokenizer, _ = load_tokenizer_and_config(model_path)
    batches = contenders.batches_of(args, tokenizer)

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

    print_table("one training step | seconds", CONTENDERS, seconds, memory)
    counts = contenders.token_counts(batches)
    print(
        f"\n{args.steps} steps of {args.batch_size} sequences, {counts['tokens']:.0f} tokens ({counts['padded']:.0f} "
        f"padded, {counts['valid']:.0f} valid); r = {args.rank}, fp32. {machine()}"
    )
    print(json.dumps({"seconds": seconds, "peak_gib": memory}), file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
