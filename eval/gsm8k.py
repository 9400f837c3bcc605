#!/usr/bin/env python3
"""GSM8K: grade-school word problems; greedy, one completion each; exact match of the final number.

One item, as data in GSM8K's format has it, a completion, and its verdict:

    {"question": "Natalia sold 48 clips in April and half as many in May. How many altogether?",
     "answer": "In May she sold 48/2 = <<48/2=24>>24 clips. Altogether 48+24 = <<48+24=72>>72.\\n#### 72"}
    "In May: 48 / 2 = 24. Altogether 48 + 24 = 72.\\nThe answer is: 72"      extracted 72, correct

Published rule (BA-LoRA, PiSSA, MetaMath): the number after the last "The answer is:" (GSM8K's own "####" counts too)
equals the gold number after "####". The lenient reading, reported beside it, takes the last number of the completion.

How to run
    python eval/gsm8k.py --ckpt output/ba-lora/merged                       the 1,319 test problems from the hub
    python eval/gsm8k.py --ckpt FOLDER_OR_HUB_NAME --data FILE.jsonl
    python eval/gsm8k.py --ckpt demo --data demo --loss-field response      no hub needed

What comes out, in --output-dir
    gsm8k.jsonl     every prompt, completion, extracted answer and verdict
    gsm8k.json      accuracy with its 95 % Wilson interval, the settings and the versions
"""

import re
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from generation import load_backend  # first: it makes train.py importable
from results import claim_outputs, proportion, write_results

from train import (
    UserError,
    encode_prompt,
    encode_response,
    load_records,
    load_tokenizer_and_config,
    option,
    package_versions,
    parse_arguments,
    require_fields,
    resolve_demo,
    run_script,
)

HUB_DATA = "openai/gsm8k"


@dataclass
class Arguments:
    ckpt: str | None = option(None, "checkpoint: a folder, a hub name, or 'demo' for the embedded SmolLM2-135M")
    data: str = option(HUB_DATA, "file in GSM8K's format (question, answer), hub name, or 'demo'")
    limit: int | None = option(None, "score the first N problems")
    output_dir: str = option("results", "folder for gsm8k.jsonl and gsm8k.json")
    overwrite: bool = option(False, "replace results that are there already")
    backend: Literal["auto", "vllm", "transformers"] = option("auto", "auto: vLLM where it is installed")
    max_new_tokens: int = option(1024, "longest completion, in tokens")
    batch_size: int = option(32, "prompts per batch of the transformers back end")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it, else float32")
    tensor_parallel_size: int = option(1, "GPUs that vLLM spreads the model over")
    gpu_memory_utilization: float = option(0.9, "share of GPU memory that vLLM takes")
    loss_field: str | None = option(None, "also measure the loss on this field's responses, per token")


NUMBER = re.compile(r"(-?)\s?\$?\s?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s?/\s?(\d+))?")
ANSWER_MARKER = re.compile(r"The answer is:|####")


def extract_answer(text: str) -> Fraction | None:
    """The first number after the last answer marker; None where there is no marker or no number after it."""
    markers = list(ANSWER_MARKER.finditer(text))
    if not markers:
        return None
    return _number(NUMBER.search(text, markers[-1].end()))


def extract_last_number(text: str) -> Fraction | None:
    """The last number in the text: the lenient reading."""
    numbers = list(NUMBER.finditer(text))
    return _number(numbers[-1]) if numbers else None


def _number(match: re.Match | None) -> Fraction | None:
    if match is None:
        return None
    sign, digits, denominator = match.groups()
    value = Fraction(digits.replace(",", ""))
    if denominator is not None and int(denominator) != 0:
        value /= int(denominator)
    return -value if sign else value


def grade(completion: str, gold: Fraction) -> dict[str, Any]:
    """What was extracted from a completion, by the published rule and by the lenient one, and the verdicts."""
    extracted, last = extract_answer(completion), extract_last_number(completion)
    return {
        "extracted": None if extracted is None else str(extracted),
        "correct": extracted == gold,
        "last_number": None if last is None else str(last),
        "correct_lenient": last == gold,
    }


def gold_answer(answer: str, index: int, source: str) -> Fraction:
    """The number after "####".

    Raises:
        UserError: there is none.
    """
    gold = extract_answer(answer)
    if gold is None:
        raise UserError(f"item {index} of {source} has no '#### number' at the end of its answer")
    return gold


def main(argv: list[str]) -> None:
    started = time.time()
    args = parse_arguments(Arguments, __doc__, argv)
    if args.ckpt is None:
        raise UserError("no --ckpt: give a checkpoint's folder or hub name, or 'demo'")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be above 0")
    items_path, summary_path = claim_outputs(args.output_dir, "gsm8k", args.overwrite)
    records = load_records(resolve_demo(args.data, "test"), "test", name="main" if args.data == HUB_DATA else None)
    fields = ["question", "answer"] + ([args.loss_field] if args.loss_field else [])
    require_fields(records, fields, args.data, "GSM8K's format has question and answer")
    if args.limit is not None:
        records = records.select(range(max(0, min(args.limit, len(records)))))
    if len(records) == 0:
        raise UserError(f"{args.data} holds no problem")
    golds = [gold_answer(record["answer"], index, args.data) for index, record in enumerate(records)]
    ckpt = resolve_demo(args.ckpt, "model")
    tokenizer, config = load_tokenizer_and_config(ckpt)

    prompts = [encode_prompt(tokenizer, record["question"]) for record in records]
    responses = [encode_response(tokenizer, record[args.loss_field]) for record in records] if args.loss_field else []
    longest = max(map(len, prompts)) + max(args.max_new_tokens, *map(len, responses), 0)
    backend = load_backend(
        args.backend,
        ckpt,
        tokenizer,
        config,
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_length=longest,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
    completions = backend.generate(prompts, args.max_new_tokens)
    loss = backend.response_loss(prompts, responses) if args.loss_field else None

    items = [
        {
            "index": index,
            "question": record["question"],
            "prompt": tokenizer.decode(prompt),
            "completion": completion.text,
            "num_tokens": completion.num_tokens,
            "finished": completion.finished,
            "gold": str(gold),
            **grade(completion.text, gold),
        }
        for index, (record, prompt, completion, gold) in enumerate(
            zip(records, prompts, completions, golds, strict=True)
        )
    ]
    count = len(items)
    summary = {
        "benchmark": "gsm8k",
        "ckpt": args.ckpt,
        "data": args.data,
        "accuracy": proportion(sum(item["correct"] for item in items), count),
        "accuracy_lenient": proportion(sum(item["correct_lenient"] for item in items), count),
        "answer_extracted": proportion(sum(item["extracted"] is not None for item in items), count),
        "finished": proportion(sum(item["finished"] for item in items), count),
        "response_loss": loss,
        "backend": backend.name,
        "arguments": asdict(args),
        "versions": package_versions(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "seconds": round(time.time() - started, 1),
    }
    write_results(items_path, items, summary_path, summary)
    print(report(summary, items_path, summary_path))


def report(summary: dict[str, Any], items_path: Path, summary_path: Path) -> str:
    """The summary for the terminal."""
    lines = [f"\n{summary['ckpt']} on {summary['data']} ({summary['backend']}, {summary['seconds']:.0f} s)"]
    for name, label in (
        ("accuracy", "accuracy"),
        ("accuracy_lenient", "accuracy, last number"),
        ("answer_extracted", "answer extracted"),
        ("finished", "finished in time"),
    ):
        share = summary[name]
        low, high = share["interval_95"]
        text = f"{share['value']:6.1%}  [{low:.1%}, {high:.1%}]  {share['count']} of {share['of']}"
        lines.append(f"  {label:24}{text}")
    if summary["response_loss"] is not None:
        lines.append(f"  {'response loss':24}{summary['response_loss']:6.3f}  nats per token")
    return "\n".join([*lines, f"  items and summary       {items_path}, {summary_path}"])


if __name__ == "__main__":
    run_script(main)
