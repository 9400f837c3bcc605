#!/usr/bin/env python3
"""MT-Bench: 80 two-turn questions (Zheng et al., arXiv 2306.05685), answers rated from 1 to 10 by a judge model.

One question, the answers to its turns, what the judge writes, and the scores:

    {"question_id": 101, "category": "reasoning", "turns": ["You have overtaken the second person. What is your current
     position?", "And if you have overtaken the last person?"]}
    "Second place."   "The last person is now behind me."
    "... Rating: [[10]]"   "... Rating: [[3]]"      first turn 10, second turn 3; "I like it" is no rating: missing

The protocol is FastChat's: its temperature for each category, 1,024 new tokens, its judge prompts for single answers,
and reference answers shown to the judge for mathematics, reasoning and coding. The published table has the mean of the
first turn.

The questions come from the hub. They are a file of FastChat (github.com/lm-sys/FastChat, Apache-2.0), as are judge
prompts and reference answers, in fastchat/llm_judge/data: mt_bench/question.jsonl, judge_prompts.jsonl,
mt_bench/reference_answer/gpt-4.jsonl. The last two are needed for judging alone, and are not on the hub. The questions'
own column `reference` is no substitute: it holds FastChat's short notes, not what its judge is shown.

How to run
    python eval/mt_bench.py --ckpt FOLDER                                       answers; prints what judges them
    OPENAI_API_KEY=... python eval/mt_bench.py --ckpt FOLDER --data question.jsonl \\
        --judge-model gpt-4 --judge-prompts judge_prompts.jsonl --references gpt-4.jsonl
    python eval/mt_bench.py ... --skip-done --judge-model gpt-4 ...             judges the answers that are there
    python eval/mt_bench.py ... --judge-url http://127.0.0.1:8000/v1            any other OpenAI-compatible endpoint

What comes out, in --output-dir
    mt_bench.jsonl     every turn's conversation, judgment and score
    mt_bench.json      mean scores of both turns with 95 % bootstrap intervals, by category; what is missing
    mt_bench.judgments.jsonl     the judge's answers so far: a run that is started again asks only for the others
"""

import http.client
import json
import os
import re
import shlex
import threading
import urllib.error
import urllib.request
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from tqdm import tqdm

from common.cli import UserError, option, parse_arguments, require_not_negative, require_positive, run_script
from common.intervals import mean, proportion, score_line
from eval import benchmark
from eval.benchmark import Store, digest, encode_prompt, stop_strings
from eval.generation import LoadBackend, Sampling

# FastChat, fastchat/llm_judge/common.py: temperature_config and NEED_REF_CATS.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]|\[(\d+\.?\d*)\]")  # the second form is FastChat's fallback
LOCAL = ("127.0.0.1", "localhost", "::1")
# FastChat's file with its own columns and numbers. Not every copy on the hub has them: HuggingFaceH4's calls the turns
# `prompt` and numbers them by a hash, so that no reference answer fits.
HUB_DATA = "lighteval/mt-bench"
FORMAT = "MT-Bench's format has question_id, category and turns (FastChat's question.jsonl)"


@dataclass
class JudgeArguments:
    """Who rates the answers."""

    judge_model: str | None = option(None, "name of the judge; None: answers only, and the command that judges them")
    judge_url: str = option("https://api.openai.com/v1", "the judge's OpenAI-compatible endpoint")
    judge_key_env: str = option("OPENAI_API_KEY", "environment variable that holds the judge's key")
    judge_prompts: str | None = option(None, "FastChat's judge_prompts.jsonl")
    references: str | None = option(None, "FastChat's reference answers for mathematics, reasoning and coding")
    judge_requests: int = option(4, "requests to the judge at a time")
    judge_retries: int = option(4, "how often a judgment that fails or has no rating is asked for again")


@dataclass
class Arguments(JudgeArguments, benchmark.Arguments):
    data: str = option(HUB_DATA, "FastChat's question.jsonl, a file in its format, or hub name")
    prompt: Literal["alpaca", "alpaca-cot", "chat", "raw"] = option("alpaca", "the prompt around each turn")


class Run(benchmark.Run):
    """A run that leaves its answers to be judged later, and asks again for missing judgments."""

    def lacking(self, made: dict[str, Any]) -> Collection[str]:
        judging = {item.name for item in fields(JudgeArguments)}
        if self.args.judge_model is None:
            return ()
        if made.get("judge") is None:
            return judging
        return judging & benchmark.NOT_DECIDING if made.get("missing") else ()


# ------------------------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------------------------


def answer(run: Run, questions: list[dict]) -> list[dict[str, Any]]:
    """One dict per question and turn, with prompt and completion; or those of `--rescore`'s file."""
    args = run.args
    if run.rescored is not None:
        return rescored(run.rescored, questions, args)
    tokenizer = run.tokenizer
    # The second prompt holds the first answer, of any length; 16 more for the border between answer and template.
    run.max_length = 2 * args.max_new_tokens + 16
    run.max_length += max(
        len(encode_prompt(tokenizer, args.prompt, question["turns"][1], [(question["turns"][0], "")]))
        for question in questions
    )
    answers: list[list[str]] = [[] for _ in questions]
    items = []
    for turn in (0, 1):
        for temperature in sorted({TEMPERATURES[question["category"]] for question in questions}):
            chosen = [i for i, question in enumerate(questions) if TEMPERATURES[question["category"]] == temperature]
            prompts = [
                encode_prompt(
                    tokenizer,
                    args.prompt,
                    questions[i]["turns"][turn],
                    list(zip(questions[i]["turns"][:turn], answers[i], strict=True)),
                )
                for i in chosen
            ]
            sampling = Sampling(args.max_new_tokens, temperature, args.top_p, stop_strings(args.prompt))
            for i, prompt, (completion,) in zip(chosen, prompts, run.generate(prompts, sampling), strict=True):
                answers[i].append(completion.text.strip())
                items.append(
                    {
                        "index": i,
                        "sample": 0,
                        "turn": turn,
                        "instruction": questions[i]["turns"][turn],
                        "prompt": tokenizer.decode(prompt),
                        "completion": answers[i][turn],
                        "num_tokens": completion.num_tokens,
                        "finished": completion.finished,
                    }
                )
    return sorted(items, key=lambda item: (item["index"], item["turn"]))


def rescored(items: list[dict], questions: list[dict], args: Arguments) -> list[dict]:
    """The items of an earlier run that belong to `questions`.

    Raises:
        UserError: other questions, or not both turns.
    """
    items = [item for item in items if item["index"] < len(questions)]
    expected = [(i, turn, text) for i, question in enumerate(questions) for turn, text in enumerate(question["turns"])]
    if [(item["index"], item.get("turn"), item["instruction"]) for item in items] != expected:
        raise UserError(f"--rescore {args.rescore} does not hold both turns of the questions of {args.data}")
    return items


# ------------------------------------------------------------------------------------------------------------------
# Judge
# ------------------------------------------------------------------------------------------------------------------


def read_jsonl(path: str, what: str) -> list[dict]:
    """The JSON objects of `path`, one per line; a UserError where a line is not one."""
    try:
        return benchmark.read_jsonl(Path(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the {what} {path}: {error}") from error


@dataclass
class Judge:
    """An OpenAI-compatible endpoint that rates answers, and its judgments so far."""

    args: Arguments
    prompts: dict[str, dict]
    references: dict[int, list[str]]
    key: str | None
    stopped: threading.Event = field(default_factory=threading.Event)

    @staticmethod
    def of(args: Arguments, questions: list[dict]) -> "Judge | None":
        """The judge that the arguments name, if any.

        Raises:
            UserError: no prompts, references or key, or files that hold something else.
        """
        if args.judge_model is None:
            return None
        for name, file in (("judge-prompts", "judge_prompts.jsonl"), ("references", "gpt-4.jsonl")):
            if getattr(args, name.replace("-", "_")) is None:
                raise UserError(f"--judge-model needs --{name}: FastChat's {file}, see --help")
        parts = urlsplit(args.judge_url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(f"--judge-url {args.judge_url} is no http address, such as http://127.0.0.1:8000/v1")
        prompts = {prompt.get("name"): prompt for prompt in read_jsonl(args.judge_prompts, "judge prompts")}
        for with_reference in (False, True):
            for turn in (0, 1):
                name = prompt_name(with_reference, turn)
                if not {"system_prompt", "prompt_template"} <= set(prompts.get(name, {})):
                    raise UserError(f"{args.judge_prompts} has no prompt {name!r}: FastChat's judge_prompts.jsonl has")
        references = {}
        for row in read_jsonl(args.references, "reference answers"):
            try:
                references[row["question_id"]] = row["choices"][0]["turns"]
            except (KeyError, IndexError, TypeError) as error:
                raise UserError(f"{args.references} is not in FastChat's format: no {error}") from error
        for question in questions:
            if question["category"] in WITH_REFERENCE and len(references.get(question["question_id"], [])) < 2:
                raise UserError(f"{args.references} lacks question {question['question_id']}, which needs a reference")
        key = os.environ.get(args.judge_key_env)
        if key is None and parts.hostname not in LOCAL:
            raise UserError(f"no key for the judge: set {args.judge_key_env}, or name another --judge-key-env")
        if key is not None and parts.scheme == "http" and parts.hostname not in LOCAL:
            print(f"note: {args.judge_url} is not encrypted, and the key in {args.judge_key_env} goes there")
        return Judge(args, prompts, references, key)

    def messages(self, question: dict, answers: list[str], turn: int) -> list[dict[str, str]]:
        """The judge's prompt about one turn, in FastChat's words."""
        with_reference = question["category"] in WITH_REFERENCE
        prompt = self.prompts[prompt_name(with_reference, turn)]
        names = {"question": question["turns"][0], "answer": answers[0]}
        for number in (1, 2):
            names[f"question_{number}"] = question["turns"][number - 1]
            names[f"answer_{number}"] = answers[number - 1]
            if with_reference:
                names[f"ref_answer_{number}"] = self.references[question["question_id"]][number - 1]
        return [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": prompt["prompt_template"].format(**names)},
        ]

    def judge(self, requests: list[list[dict[str, str]]], store: Store) -> list[dict[str, Any]]:
        """For each request the judge's text, its score, and the error if there is no score.

        Raises:
            UserError: the judge cannot be reached, or refuses the key, or does not know the model, or there is no
                rating at all. The judgments so far are kept.
        """
        keys = [digest([self.args.judge_model, self.args.judge_url, messages]) for messages in requests]
        missing = [i for i, key in enumerate(keys) if key not in store.values]
        failures: dict[str, str] = {}

        def ask(i: int) -> None:
            text, problem = self._ask_until_rated(requests[i])
            if problem is None:
                store.add(keys[i], text)
            else:
                failures[keys[i]] = problem

        with ThreadPoolExecutor(self.args.judge_requests) as pool:
            futures = [pool.submit(ask, i) for i in missing]
            try:
                for future in tqdm(futures, desc="judging", unit="answer", disable=not futures):
                    future.result()
            finally:
                self.stopped.set()  # ends the requests that wait for another attempt after one has raised an error
                pool.shutdown(cancel_futures=True)
        if failures and not any(key in store.values for key in keys):
            first = next(iter(failures.values()))
            raise UserError(
                f"{self.args.judge_model} at {self.args.judge_url} rates no answer: {first}; answers are kept"
            )
        return [
            {"judgment": text, "score": rating(text), "problem": failures.get(key)}
            for key, text in ((key, store.values.get(key)) for key in keys)
        ]

    def _ask_until_rated(self, messages: list[dict[str, str]]) -> tuple[str | None, str | None]:
        """The judge's text and None, or None and the error of the last attempt."""
        body = {"model": self.args.judge_model, "messages": messages, "temperature": 0.0, "max_tokens": 2048}
        problem = None
        for attempt in range(self.args.judge_retries + 1):
            if attempt and self.stopped.wait(min(60.0, FIRST_PAUSE * 2 ** (attempt - 1))):
                break
            try:
                text = self._request("/chat/completions", body)["choices"][0]["message"]["content"] or ""
            except Unreachable as error:
                if attempt == self.args.judge_retries:
                    raise UserError(f"{error}; answers and judgments are kept: start again") from error
                problem = str(error)
            except UserError:
                raise
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.msg}".rstrip()
                if 400 <= error.code < 500 and error.code not in PASSING:
                    return None, problem
            except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
                problem = f"not a chat completion ({type(error).__name__})"
            else:
                if rating(text) is not None:
                    return text, None
                problem = "no rating"
        return None, f"{problem}, {self.args.judge_retries + 1} attempts"

    def require_reachable(self) -> None:
        """Raises a UserError if nothing answers at the judge's address, or the judge refuses the key."""
        try:
            self._request("/models")
        except Unreachable as error:
            raise UserError(str(error)) from error
        except UserError:
            raise
        except (OSError, ValueError, http.client.HTTPException):
            pass  # something answers; not every endpoint lists its models

    def _request(self, path: str, body: dict | None = None) -> Any:
        """The endpoint's JSON.

        Raises:
            UserError: the judge refuses the key, or does not know the model.
            Unreachable: nothing answers.
            OSError, ValueError, HTTPException: the answer is something else; an HTTPError's `msg` is what it says.
        """
        args = self.args
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(args.judge_url.rstrip("/") + path, data, headers)
        try:
            with OPENER.open(request, timeout=SECONDS) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            detail = " ".join(error.read(300).decode(errors="replace").split())
            if error.code in (401, 403):
                raise UserError(
                    f"the judge at {args.judge_url} refuses the key in {args.judge_key_env} (HTTP {error.code}): set "
                    f"another one and start again; answers and judgments are kept"
                ) from error
            # An error that says "model" need not be about its name: a long answer exceeds "this model's context".
            unknown = (error.code == 404 and "model" in detail) or "model_not_found" in detail or "not exist" in detail
            if unknown and body is not None:
                raise UserError(f"the judge at {args.judge_url} does not take {args.judge_model}: {detail}") from error
            error.msg = detail
            raise
        except urllib.error.URLError as error:
            raise Unreachable(f"the judge at {args.judge_url} cannot be reached: {error.reason}") from error


SECONDS = 300.0  # for one answer of the judge
PASSING = (408, 409, 425, 429)  # of the codes 400 to 499 those that the same request may not get again
FIRST_PAUSE = 2.0  # seconds before the first repeated request; every further pause is twice as long, up to 60


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: the key is sent only to the address that the user gave."""

    def redirect_request(self, *request: Any) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirect)


class Unreachable(Exception):
    """Nothing answers at the judge's address."""


def prompt_name(with_reference: bool, turn: int) -> str:
    """FastChat's name of the judge prompt."""
    return ("single-math-v1" if with_reference else "single-v1") + ("-multi-turn" if turn else "")


def rating(text: str | None) -> float | None:
    """The first [[rating]], or else [rating], from 0 to 10, as FastChat has it; None where none is in that range."""
    matches = list(RATING.finditer(text or ""))
    double = [match for match in matches if match[1] is not None]
    chosen = (double or matches)[:1]
    value = float(chosen[0][1] or chosen[0][2]) if chosen else None
    return value if value is not None and value <= 10 else None


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------


def check_questions(records: list[dict], source: str) -> list[dict]:
    """The questions; a question_id that is a number is one, as in the references.

    Raises:
        UserError: a category without a temperature, or not two turns.
    """
    questions = [dict(record) for record in records]
    for question in questions:
        if str(question["question_id"]).isdigit():
            question["question_id"] = int(question["question_id"])
        if question["category"] not in TEMPERATURES:
            known = ", ".join(TEMPERATURES)
            raise UserError(
                f"{source}: question {question['question_id']} has category {question['category']!r}: {known}"
            )
        if len(question["turns"]) != 2:
            raise UserError(f"{source}: question {question['question_id']} has {len(question['turns'])} turns, not 2")
    return questions


def check_protocol(args: Arguments) -> None:
    """Raises a UserError for an option that MT-Bench's protocol fixes."""
    for name in ("samples", "temperature", "shots", "shots_data"):
        if getattr(args, name) != getattr(benchmark.Arguments, name):
            raise UserError(f"--{name.replace('_', '-')} cannot be set: MT-Bench's protocol fixes it, as in FastChat")
    require_positive(args, "judge_requests")
    require_not_negative(args, "judge_retries")


def judge_command(run: Run) -> str:
    """The command that judges the stored answers, without a model."""
    args = run.args
    words = ["python", "eval/mt_bench.py", "--rescore", str(run.items_path), "--output-dir", args.output_dir]
    words += ["--limit", str(args.limit)] if args.limit is not None else []
    words += ["--overwrite", "--data", args.data, "--judge-model", args.judge_model or "gpt-4"]
    words += ["--judge-prompts", args.judge_prompts or "judge_prompts.jsonl"]
    words += ["--references", args.references or "gpt-4.jsonl", "--judge-url", args.judge_url]
    return f"{args.judge_key_env}=... " + shlex.join(words)


def main(argv: list[str], load: LoadBackend | None = None) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    check_protocol(args)
    run = Run("mt_bench", args, load)
    fields, lists = ["question_id", "category"], ["turns"]
    records = run.records(fields, FORMAT, split="train", lists=lists)  # the only split on the hub
    questions = check_questions(records, args.data)
    judge = Judge.of(args, questions)
    if judge is not None:
        judge.require_reachable()
    items = answer(run, questions)
    for item in items:
        question = questions[item["index"]]
        item |= {"question_id": question["question_id"], "category": question["category"]}
        item |= {"judge": args.judge_model, "judgment": None, "score": None, "problem": "not judged"}
    if judge is not None:
        answers = [[item["completion"] for item in items if item["index"] == i] for i in range(len(questions))]
        requests = [judge.messages(questions[item["index"]], answers[item["index"]], item["turn"]) for item in items]
        for item, verdict in zip(items, judge.judge(requests, run.store("judgments")), strict=True):
            item |= verdict
    scores = summarise(items) | {"judge": args.judge_model, "judge_url": args.judge_url if judge else None}
    run.finish(items, scores, report_lines(scores))
    if judge is None:
        print(f"\nnot judged yet; this does it, with the judge's key in place of the dots:\n  {judge_command(run)}")
    elif scores["missing"]:
        print(f"\n{scores['missing']} judgments are missing; this asks for them again:\n  {judge_command(run)}")


def summarise(items: list[dict]) -> dict[str, Any]:
    """Mean scores of the rated answers: of both turns, of each, of each category; and how many have no rating."""

    def means(chosen: list[dict]) -> dict[str, Any]:
        of_questions: dict[int, list[float]] = {}
        for item in chosen:
            if item["score"] is not None:
                of_questions.setdefault(item["index"], []).append(item["score"])
        return mean([sum(scores) / len(scores) for scores in of_questions.values()])

    def by_turn(chosen: list[dict]) -> dict[str, Any]:
        turns = {name: [item for item in chosen if item["turn"] == turn] for turn, name in enumerate(TURNS)}
        return {name: means(of_turn) for name, of_turn in turns.items()} | {"both_turns": means(chosen)}

    categories = [name for name in TEMPERATURES if any(item["category"] == name for item in items)]
    return by_turn(items) | {
        "missing": sum(item["score"] is None for item in items),
        "finished": proportion(sum(item["finished"] for item in items), len(items)),
        "by_category": {name: by_turn([item for item in items if item["category"] == name]) for name in categories},
    }


TURNS = ("first_turn", "second_turn")


def report_lines(scores: dict[str, Any]) -> list[str]:
    """The scores for the terminal."""
    form = "{:.2f}".format
    lines = [
        score_line("first turn", scores["first_turn"], form),
        score_line("second turn", scores["second_turn"], form),
        score_line("both turns", scores["both_turns"], form),
        f"  {'judgments missing':24}{scores['missing']:6}",
        score_line("finished in time", scores["finished"]),
        "",
        f"  {'category':24}{'first':>8}{'second':>8}{'both':>8}",
    ]
    for name, of_category in scores["by_category"].items():
        values = [of_category[turn]["value"] for turn in (*TURNS, "both_turns")]
        lines.append(f"  {name:24}" + "".join(f"{'-' if value is None else form(value):>8}" for value in values))
    return [*lines, ""]


if __name__ == "__main__":
    run_script(main)
