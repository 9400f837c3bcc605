#!/usr/bin/env python3
"""The data files that experiments need beside the published ones. Same command, same file.

problems --count N --skip S FILE       N problems of the demo's kind that are in neither of its files, after the first S
held-out --data NAME --subset PART --skip S --count N FILE        N rows after the first S, in GSM8K's format
gsm8k --data NAME --split SPLIT --skip S --count N FILE           N problems of GSM8K after the first S, with the
                                       response that is trained: its steps and MetaMathQA's ending
texts --data NAME --split SPLIT --fields A B --skip S --count N FILE        N texts, the fields of a row one under the
                                       other
answers --data NAME --model MODEL --count N FILE        N texts: MT-Bench's first turns, each with MODEL's greedy answer
imbalance --data NAME --subset PART --split SPLIT [--label L --ratio R --count N --seed S] FILE
                                       rows of a data set for classification; of class L one to R of every other class
sentences --split SPLIT --count N [--noise P] [--ratio R] [--seed S] FILE
                                       rated sentences of the demo, as many of each class; P percent of the labels
                                       flipped, or one positive to R negative ones
tiny-data FOLDER, tiny-benchmarks FOLDER                          a few items of arithmetic in every format
"""

import inspect
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.cli import Parser, UserError, run_script
from common.runs import write_whole
from common.tables import load_records, require_fields

ANSWER_TOKENS = 96  # of `answers`, at most


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Lines of JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------------------
# Word problems
# ------------------------------------------------------------------------------------------------------------------


def problems(count: int, skip: int) -> list[dict[str, str]]:
    """New problems of the demo's generator: those that it makes after its own."""
    from data import demo

    def made(number: int) -> list[dict[str, str]]:
        return demo.generate_problems(demo.NUM_TRAIN + demo.NUM_TEST + number, demo.PROBLEMS_SEED)

    # Asked for more, it makes the same ones and some after them, in another order.
    known = {row["question"] for row in made(skip)}
    return [row for row in made(skip + count) if row["question"] not in known]


def held_out(data: str, subset: str | None, skip: int, count: int) -> list[dict[str, str]]:
    """The rows after the first `skip` in which the answer ends with a number, in GSM8K's format."""
    records = load_records(data, "train", subset)
    names = next(
        (pair for pair in (["instruction", "output"], ["query", "response"]) if pair[0] in records.features), []
    )
    require_fields(records, names or ["instruction", "output"], data, "MetaMathQA's format has query and response")
    rows = []
    for row in records.select(range(min(skip, len(records)), len(records))):
        if "The answer is:" in row[names[1]] and row[names[1]].rpartition(":")[2].strip().lstrip("-").isdigit():
            rows.append({"question": row[names[0]], "answer": row[names[1]]})
        if len(rows) == count:
            return rows
    raise UserError(f"{data} has {len(rows)} such rows after the first {skip}, not {count}")


def gsm8k_with_responses(data: str, subset: str | None, split: str, skip: int, count: int) -> list[dict[str, str]]:
    """Rows after the first `skip`; `response` is without the calculator's marks and ends as MetaMathQA's answers do."""
    from eval.gsm8k import solved

    records = load_records(data, split, name=subset)
    require_fields(records, ["question", "answer"], data, "GSM8K's format has question and answer")
    records = chosen(records, data, skip, count)
    return [{"question": row["question"], "answer": row["answer"], "response": solved(row)[1]} for row in records]


# ------------------------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------------------------


def chosen(records: Any, data: str, skip: int, count: int) -> Any:
    """`count` rows after the first `skip`.

    Raises:
        UserError: there are fewer.
    """
    if len(records) < skip + count:
        raise UserError(f"{data} has {len(records)} rows, and {skip} + {count} are asked for")
    return records.select(range(skip, skip + count))


def texts(data: str, subset: str | None, split: str, fields: list[str], skip: int, count: int) -> list[dict[str, str]]:
    """The fields of each row, one under the other."""
    records = load_records(data, split, name=subset)
    require_fields(records, fields, data, "name the texts' columns by --fields")
    return [{"text": "\n".join(row[name] for name in fields)} for row in chosen(records, data, skip, count)]


def answers(data: str, model: str, split: str, skip: int, count: int) -> list[dict[str, str]]:
    """MT-Bench's first turns, each with the greedy answer of `model`, in its chat template."""
    from common.pretrained import load_tokenizer_and_config, resolve_demo
    from eval.benchmark import load_backend
    from eval.generation import Sampling, batches

    records = load_records(data, split)
    require_fields(records, ["turns"], data, "MT-Bench's format has turns")
    path = resolve_demo(model, "model")
    tokenizer, _ = load_tokenizer_and_config(path)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["turns"][0]}], tokenize=False, add_generation_prompt=True
        )
        for row in chosen(records, data, skip, count)
    ]
    encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    backend = load_backend("transformers", path, tokenizer, dtype="float32", max_length=2048)
    found = [""] * len(prompts)
    for group in batches([len(ids) for ids in encoded], 16):
        made = backend.generate([encoded[i] for i in group], Sampling(max_new_tokens=ANSWER_TOKENS))
        for i, completion in zip(group, made, strict=True):
            found[i] = prompts[i] + completion.text
    return [{"text": text} for text in found]


# ------------------------------------------------------------------------------------------------------------------
# Classification
# ------------------------------------------------------------------------------------------------------------------


def imbalanced(rows: list[dict], label: str | None, ratio: int | None, count: int | None, seed: int) -> list[dict]:
    """`count` of the rows, shuffled: of class `label` one to `ratio` of every other class, of these equally many.

    Raises:
        UserError: a class has too few rows, or there is none of that name.
    """
    rows = list(rows)
    random.Random(seed).shuffle(rows)
    if ratio is None:
        return rows[:count]
    classes = sorted({str(row["label"]) for row in rows})
    if label not in classes:
        raise UserError(f"--label {label}: the classes are {', '.join(classes)}")
    total = count or len(rows)
    rare = max(round(total / (1 + ratio * (len(classes) - 1))), 1)
    wanted = {name: rare if name == label else (total - rare) // (len(classes) - 1) for name in classes}
    chosen, left = [], dict(wanted)
    for row in rows:
        if left[str(row["label"])]:
            left[str(row["label"])] -= 1
            chosen.append(row)
    if any(left.values()):
        raise UserError(f"too few rows of class {max(left, key=left.__getitem__)}: give a smaller --count")
    return chosen


def imbalance(
    data: str, subset: str | None, split: str, label: str | None, ratio: int | None, count: int | None, seed: int
) -> list[dict]:
    """Rows of a data set, as `imbalanced` has them."""
    return imbalanced(list(load_records(data, split, name=subset)), label, ratio, count, seed)


def sentences(split: str, count: int, noise: int, ratio: int | None, seed: int) -> list[dict[str, Any]]:
    """Rated sentences of the demo. The seed decides which, and which labels are flipped: those of 10 % are
    among those of 20 %."""
    from data import sentiment

    with open(sentiment.sentences(split), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [{"sentence": row["sentence"], "label": row["label"]} for row in rows]
    rows = imbalanced(rows, "positive", ratio or 1, count, seed)
    if noise:
        other = {"positive": "negative", "negative": "positive"}
        flipped = random.Random(seed + 2408).sample(range(len(rows)), len(rows))[: len(rows) * noise // 100]
        for place in flipped:
            rows[place]["label"] = other[rows[place]["label"]]
    return rows


# ------------------------------------------------------------------------------------------------------------------
# Tiny
# ------------------------------------------------------------------------------------------------------------------


def tiny_data(folder: Path) -> None:
    """The three trainings' folders, 24 short examples each."""
    for part, form in (
        ("metamath", "What is {} + {}?"),
        ("python", "Write {} + {} in Python."),
        ("conversation", "Add {} to {}, please."),
    ):
        rows = [
            {"instruction": form.format(i, 2 * i), "output": f"The answer is: {3 * i}", "type": part} for i in range(24)
        ]
        write(folder / part / "train.jsonl", rows)


def tiny_benchmarks(folder: Path) -> None:
    """Items of GSM8K, MATH, MBPP and MT-Bench in their formats, eight of each."""
    formats = {
        "gsm8k": lambda i: {"question": f"What is {i} + {i}?", "answer": f"{i} + {i}\n#### {2 * i}"},
        "math": lambda i: {
            "problem": f"Find ${i}^2$.",
            "solution": f"$\\boxed{{{i * i}}}$",
            "level": "Level 1",
            "type": "Algebra",
        },
        "mbpp": lambda i: {
            "task_id": i,
            "text": f"Write a function add that adds {i} to its argument.",
            "code": f"def add(x):\n    return x + {i}",
            "test_list": [f"assert add(1) == {1 + i}"],
        },
        "mt_bench": lambda i: {
            "question_id": i,
            "category": "math",
            "turns": [f"What is {i} times {i}?", f"And {i} times {i + 1}?"],
        },
    }
    for name, item in formats.items():
        write(folder / f"{name}.jsonl", map(item, range(2, 10)))


# Each with options of the names of its arguments.
KINDS = {
    "problems": problems,
    "held-out": held_out,
    "gsm8k": gsm8k_with_responses,
    "texts": texts,
    "answers": answers,
    "imbalance": imbalance,
    "sentences": sentences,
}
TINY = {"tiny-data": tiny_data, "tiny-benchmarks": tiny_benchmarks}


def main(argv: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("kind", choices=[*KINDS, *TINY])
    parser.add_argument("target", type=Path)
    for name in ("data", "subset", "label", "model"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--fields", nargs="+", default=["text"])
    parser.add_argument("--split", default="train")
    for name, default in (("count", None), ("skip", 0), ("ratio", None), ("noise", 0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    if args.kind in TINY:
        TINY[args.kind](args.target)
        return
    if args.count is None and args.kind != "imbalance":
        raise UserError(f"{args.kind} needs --count")
    make = KINDS[args.kind]
    write(args.target, make(**{name: getattr(args, name) for name in inspect.signature(make).parameters}))


if __name__ == "__main__":
    run_script(main)
