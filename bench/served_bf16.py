#!/usr/bin/env python3
"""Measures how far a trained model that is served in bf16 is from the trained function.

    python bench/served_bf16.py output/pissa output/lora --limit 60

Each folder is a run of train.py. The trained function is the base's weights as the run read them, with ΔW added in
fp32, computed in fp32. Compared with it on held-out examples: the mean loss of a response token, and how far a
response's log-likelihood is off, per token.
    training            base and stacked factors in bf16, as train.py computes
    PEFT                base in bf16, factors in fp32 (its default) or in bf16
    vLLM                base in bf16 with the adapter; vLLM rounds the factors to bf16
    merged              merged/ in bf16, by transformers and by vLLM
"""

import multiprocessing
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

import train
from common import checkpoints, pretrained
from common.cli import Parser, parse_arguments, run_script
from common.conversations import encoded, load_training_records
from common.intervals import markdown
from common.pretrained import resolve_demo
from common.tables import split_of
from common.templates import IGNORE_INDEX
from eval.benchmark import load_backend

FORMS = ("fp32", "training", "PEFT, fp32", "PEFT, bf16", "vLLM", "merged", "merged, vLLM")


def examples_of(
    run: train.Arguments, tokenizer: PreTrainedTokenizerBase, data: str, limit: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of held-out examples, in tokens."""
    run.data, run.data_subset, run.data_config, run.limit = resolve_demo(data, "test"), None, None, limit
    run.split = split_of(run.data, "test")
    prompts, responses = [], []
    for example in encoded(run, tokenizer, load_training_records(run))[0]:
        start = next(i for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX)
        prompts.append(example["input_ids"][:start])
        responses.append(example["input_ids"][start:])
    return prompts, responses


def log_likelihoods(folder: Path, form: str, data: str, limit: int) -> tuple[list[float], list[int]]:
    """The log-likelihood of each response by the run's model in this form, and the response's tokens."""
    run = parse_arguments(train.Arguments, "", ["--config", str(folder / "config.yaml")])
    base = resolve_demo(run.model, "model")
    tokenizer, _ = pretrained.load_tokenizer_and_config(base)
    prompts, responses = examples_of(run, tokenizer, data, limit)
    ckpt = str(folder / "merged") if form.startswith("merged") else base
    adapter = str(folder / "adapter") if form.startswith(("PEFT", "vLLM")) else None
    options = {"dtype": "bfloat16", "max_length": 512, "batch_size": 16, "adapter": adapter}
    backend = load_backend("vllm" if "vLLM" in form else "transformers", ckpt, tokenizer, **options)
    if form in ("fp32", "training"):
        trained = checkpoints.load_tensors(checkpoints.newest_checkpoint(folder))
        model = train.attach_adapters(backend.model, run, trained)
        backend.model = (train.merge_adapters(model.float()) if form == "fp32" else model).eval()
    elif form == "PEFT, bf16":
        backend.model.to(torch.bfloat16)
    return backend.log_likelihoods(prompts, responses), [len(response) for response in responses]


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--data", default="demo", help="held-out examples in the run's format; demo: its test problems")
    parser.add_argument("--limit", type=int, default=60)
    args = parser.parse_args(argv)
    rows = [["run", "form", "loss", "log-likelihood off, per token"]]
    for folder in args.runs:
        reference = None
        for form in FORMS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # vLLM takes its process over
                found, sizes = pool.apply(log_likelihoods, (folder, form, args.data, args.limit))
            reference = reference or found
            total = sum(sizes)
            apart = sum(abs(mine - theirs) for mine, theirs in zip(found, reference, strict=True)) / total
            rows.append([folder.name, form, f"{-sum(found) / total:.4f}", f"{apart:.4f}"])
            print(rows[-1], flush=True)
    print(markdown(rows))


if __name__ == "__main__":
    run_script(main)
