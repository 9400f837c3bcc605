"""The common part of all benchmarks: arguments, prompts, and the run from data to results.

A benchmark's main reads

    args = parse_arguments(Arguments, __doc__, argv)            Arguments: a dataclass on top of the one here
    run = Run("gsm8k", args, load)                              checks the arguments, checkpoint and outputs
    records = run.records(["question", "answer"], "...")        the data
    items = run.complete([r["question"] for r in records])      one dict per completion
    for item in items: item |= grade(...)
    run.finish(items, scores, lines)                            files, and the report on the terminal

Files, in --output-dir
    NAME.completions.jsonl   completions so far, so that an interrupted run goes on when it is started again
    NAME.jsonl               one line per completion, with its verdict; --rescore takes it
    NAME.json                the scores, with settings, versions and command; written last
"""

import contextlib
import hashlib
import json
import shlex
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from common.cli import UserError, option, require_not_negative, require_positive, require_share
from common.pretrained import load_tokenizer_and_config, resolve_demo, resolve_dtype
from common.runs import changed_content, contents_of, first_difference, package_versions, write_whole
from common.tables import load_records, require_fields, with_texts
from common.templates import ALPACA_PROMPT, DAY, END_OF_THOUGHT, encode_opening
from eval.generation import (
    Backend,
    Completion,
    LoadBackend,
    Sampling,
    backend_name,
    batch_size_of,
    batches,
    with_bar,
)

# ------------------------------------------------------------------------------------------------------------------
# Arguments and prompts
# ------------------------------------------------------------------------------------------------------------------

# The published scripts read an answer after these words, the space included (llm172/BA-LoRA, utils/test_acc.py).
PUBLISHED_MARKER = "The answer is: "

# "chat" is the tokenizer's own template.
PROMPTS = {
    "alpaca": ALPACA_PROMPT,
    "alpaca-cot": ALPACA_PROMPT + " Let's think step by step.",
    "raw": "{instruction}",
}


@dataclass
class CheckpointArguments:
    """The checkpoint, the items and the results' folder."""

    ckpt: str | None = option(None, "checkpoint: a folder, a hub name, or 'demo' for the embedded SmolLM2-135M")
    adapter: str | None = option(None, "folder of a LoRA adapter in PEFT's format, trained on --ckpt")
    data: str = option("", "the benchmark's items: a file, a folder or a hub name")
    limit: int | None = option(None, "the first N items only")
    output_dir: str = option("results", "folder for the results, and for the completions of an interrupted run")
    overwrite: bool = option(False, "replace results that are there already; completions made the same way are kept")
    skip_done: bool = option(False, "end if --output-dir has these results already; refuse if it has others")
    rescore: str | None = option(None, "grade the completions of this results file (.jsonl) again, without a model")


@dataclass
class PromptArguments:
    """The prompt around each item, and its solved examples."""

    prompt: Literal["alpaca", "alpaca-cot", "chat", "raw"] = option("alpaca", "the prompt around each item")
    shots: int = option(0, "solved examples before each item")
    shots_data: str | None = option(None, "source of the solved examples, in --data's format; None: the training split")


@dataclass
class SamplingArguments:
    """The sampling of completions."""

    samples: int = option(1, "completions per item")
    temperature: float = option(0.0, "sampling temperature; 0: greedy")
    top_p: float = option(1.0, "sample from the smallest set of tokens with this probability")
    max_new_tokens: int = option(1024, "longest completion, in tokens")
    seed: int = option(0, "seed of sampling")


@dataclass
class MachineArguments:
    """How the machine is used."""

    backend: Literal["auto", "vllm", "transformers"] = option("auto", "auto: vLLM where it is installed")
    batch_size: int | None = option(
        None, "prompts generated, and saved, together; None: 32 with transformers, 256 with vLLM"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it, else float32")
    tensor_parallel_size: int = option(1, "GPUs that vLLM spreads the model over")
    gpu_memory_utilization: float = option(0.9, "share of GPU memory that vLLM takes")


@dataclass
class Arguments(  # a dataclass takes its bases' fields from the last to the first
    MachineArguments, SamplingArguments, PromptArguments, CheckpointArguments
):
    """The arguments of every benchmark."""


# The settings of completions that the summary names.
MADE_WITH = ("ckpt", "adapter", "prompt", "shots", "shots_data", "samples", "temperature", "top_p", "max_new_tokens")
MADE_WITH += ("seed", "backend", "dtype")
# Options that decide no result: paths, and the use of the machine.
NOT_DECIDING = {"output_dir", "overwrite", "skip_done", "rescore", "batch_size", "tensor_parallel_size", "workers"}
NOT_DECIDING |= {"gpu_memory_utilization", "unsafe", "judge_key_env", "judge_requests", "judge_retries"}


def check_arguments(args: Arguments) -> None:
    """Raises a UserError where a value is out of range or does not go with another; reads nothing."""
    if (args.ckpt is None) == (args.rescore is None):
        if args.rescore is not None:
            raise UserError("--rescore reads completions and needs no --ckpt: give one of the two")
        raise UserError("no --ckpt: give a checkpoint's folder or hub name, or 'demo'")
    require_positive(args, "samples", "max_new_tokens", "batch_size", "tensor_parallel_size", "limit")
    require_not_negative(args, "shots", "temperature")
    require_share(args, "top_p", "gpu_memory_utilization")
    if args.samples > 1 and args.temperature == 0:
        raise UserError(f"--samples {args.samples} with --temperature 0 are all alike: give a temperature")


Turns = Sequence[tuple[str, str]]  # earlier questions with their answers: solved examples, or a conversation's turns


def encode_prompt(tokenizer: Any, template: str, instruction: str, turns: Turns = ()) -> list[int]:
    """The prompt's token ids, with the tokenizer's own start token where it has one. A chat template that writes
    today's date writes the date of training, so that the prompt is the same every day.

    Raises:
        UserError: `chat`, and the tokenizer has no chat template.
    """
    if template == "chat":
        messages = [
            message
            for question, answer in turns
            for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        ]
        messages.append({"role": "user", "content": instruction})
        if not tokenizer.chat_template:
            raise UserError("--prompt chat: the checkpoint's tokenizer has no chat template")
        fixed = {"strftime_now": lambda form: time.strftime(form, DAY)}
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **fixed)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has them
    prompt = PROMPTS[template]
    openings = [prompt.format(instruction=question) for question in (*(question for question, _ in turns), instruction)]
    text = "".join(
        opening + ("" if opening[-1:].isspace() else " ") + answer + "\n\n"
        for opening, (_, answer) in zip(openings, turns, strict=False)
    )
    return encode_opening(tokenizer, text + openings[-1])


BEGINNINGS = ("### Instruction:", "Below is an instruction")  # the beginnings of the template's next example


def stop_strings(template: str) -> tuple[str, ...]:
    """Strings that end a completion: a model that goes on with an example of its own begins it with one of these."""
    return BEGINNINGS if template.startswith("alpaca") else ()


def after_thoughts(text: str) -> str:
    """The text of a reasoning model after its thoughts; the whole text if they have no end, or nothing follows it."""
    return next((part for part in reversed(END_OF_THOUGHT.split(text)) if part.strip()), "")


# ------------------------------------------------------------------------------------------------------------------
# Files on disk
# ------------------------------------------------------------------------------------------------------------------


class Store:
    """Values by key in a file that is only appended to, so that the finished values of a killed run are kept."""

    def __init__(self, path: Path):
        self.path = path
        self.values: dict[str, Any] = {}
        self._lock = threading.Lock()
        whole = 0
        with open(path, "ab+") as file:
            file.seek(0)
            for line in file:
                try:
                    entry = json.loads(line)
                    self.values[entry["key"]] = entry["value"]
                except (ValueError, KeyError, TypeError):
                    pass  # a damaged line; its value is made again
                whole += len(line) if line.endswith(b"\n") else 0
            file.truncate(whole)  # a line that a kill cut short

    def add(self, key: str, value: Any) -> None:
        self.values[key] = value
        with self._lock, open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")


def digest(value: Any) -> str:
    """A short name for a JSON value, different for different values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def weights_identity(name: str, config: Any = None) -> Any:
    """An identity of a checkpoint that needs no reading of weights: a folder's files with their sizes and times; on the
    hub, the commit."""
    folder = Path(name)
    if not folder.is_dir():
        return [name, getattr(config, "_commit_hash", None)]
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json", ".model", ".jinja")]
    return [str(folder.resolve()), [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]]


PLACES, PLACE = 16, 2**16  # how many places of a weight file identify it, and the bytes of each


def state_of(*names: str | None) -> str | None:
    """A digest of the weights of these checkpoints and adapters, wherever they lie; None if none is a folder.

    Files are read in a few places only, because any training changes the numbers there.
    """
    folders = [Path(name) for name in names if name and Path(name).is_dir()]
    known = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        size = path.stat().st_size
        known.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for place in range(PLACES):
                file.seek(place * max(size - PLACE, 0) // (PLACES - 1))
                known.update(file.read(PLACE))
    return known.hexdigest()[:32] if folders else None


# Arguments that name files.
FILES = ("data", "validation", "texts", "shots_data", "against", "completions", "judge_prompts", "references")


def full_name(name: str | None) -> str | None:
    """One name for a folder, however it was typed; a hub name as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def check_context(config: Any, name: str | None, tokens: int, remedy: str) -> None:
    """Raises a UserError that ends with `remedy` if the model `name` has too few positions for so many tokens."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens > context:
        raise UserError(f"{name} holds {context} tokens and {tokens} are needed: {remedy}")


def read_jsonl(path: Path) -> list[Any]:
    """One value per line; a line ends at "\\n" alone, since JSON may hold other characters that end a line for Python.

    Raises:
        OSError, ValueError: no such file, or a line that is not JSON.
    """
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


FAILURES = "failures.json"  # the benchmarks that failed in eval/suite.py, and why


def read_failures(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The failed benchmarks of the results in `folder`, by name: error, checkpoint and command."""
    try:
        return dict(json.loads((Path(folder) / FAILURES).read_text()))
    except (OSError, ValueError, TypeError):
        return {}


# ------------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------------


class Results:
    """A script's results in --output-dir: NAME.jsonl, a line per item, and NAME.json, the summary.

    Args:
        args: with output_dir, overwrite and skip_done, and a name or None for each of `MODELS`.

    Raises:
        UserError: there are results already, without --overwrite and --skip-done; or with --skip-done, and they were
            made with other settings.
        SystemExit: there are these results already (--skip-done).
    """

    MODELS = ("ckpt", "adapter")  # the arguments that name weights

    def __init__(self, benchmark: str, args: Any):
        self.started = time.time()
        self.benchmark, self.args = benchmark, args
        self.contents = contents_of(args, FILES)
        folder = Path(args.output_dir)
        self.items_path, self.summary_path = folder / f"{benchmark}.jsonl", folder / f"{benchmark}.json"
        if self.summary_path.exists() and not args.overwrite:
            remedy = "name another --output-dir, or replace it with --overwrite"
            if not args.skip_done:
                raise UserError(f"{self.summary_path} is there already: {remedy}")
            made = self._made()
            lacking = self.lacking(made)
            difference = self._difference(made, NOT_DECIDING | set(lacking))
            if difference:
                raise UserError(f"{self.summary_path} was made with {difference}: {remedy}")
            if not lacking:
                print(f"{benchmark} is done: {self.summary_path}")
                sys.exit(0)

    def lacking(self, made: dict[str, Any]) -> Collection[str]:
        """The arguments that the stored results lack and that complete them now; none: the results are complete."""
        return ()

    def state(self) -> str | None:
        """A digest of the weights that the arguments name."""
        return state_of(*(getattr(self.args, name) for name in self.MODELS))

    def _made(self) -> dict[str, Any]:
        """The stored summary."""
        try:
            made = json.loads(self.summary_path.read_text())
            return made | {"arguments": dict(made["arguments"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.summary_path} is damaged: replace it with --overwrite") from error

    def _difference(self, made: dict[str, Any], but: Collection[str]) -> str | None:
        """The first difference between stored settings and the arguments, `but` for some names, in a few words."""
        theirs = made["arguments"] | {name: full_name(made["arguments"].get(name)) for name in self.MODELS}
        ours = asdict(self.args) | {name: full_name(getattr(self.args, name)) for name in self.MODELS}
        difference = first_difference(theirs, ours, but)
        difference = difference or changed_content({"contents": self.contents}, made, but)
        now = self.state()
        if difference is None and now is not None and made.get("checkpoint") not in (None, now):
            return "other weights in the same folder"
        return difference

    def store(self, name: str) -> Store:
        """The append-only file NAME.`name`.jsonl of this benchmark."""
        folder = self.items_path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return Store(folder / f"{self.benchmark}.{name}.jsonl")
        except OSError as error:
            raise UserError(f"cannot write to --output-dir {folder}: {error.strerror}") from error

    def by_groups(
        self,
        name: str,
        requests: list[Any],
        groups: list[list[int]],
        how: Any,
        make: Callable[[list[int]], list[Any]],
        description: str,
    ) -> list[Any]:
        """The result of every request, as JSON: from disk if it was made in the same way, else made group by group.

        Rounding depends on which requests are computed together. So groups, not requests, are kept and made again.

        Args:
            name: the name of the `store`.
            groups: indices of requests, each index once.
            how: everything beside the requests that the results depend on.
            make: makes the results of a group, in its order.
        """
        store = self.store(name)
        keys = {group[0]: digest([how, [requests[i] for i in group]]) for group in groups}
        missing = [group for group in groups if keys[group[0]] not in store.values]
        for group in with_bar(missing, description, done=len(requests) - sum(map(len, missing))):
            store.add(keys[group[0]], make(group))
        found = {i: made for group in groups for i, made in zip(group, store.values[keys[group[0]]], strict=True)}
        return [found[i] for i in range(len(requests))]

    def write(self, items: list[dict], about: dict[str, Any], what: str, lines: Iterable[str]) -> None:
        """Writes items and summary, the summary last, and prints the report.

        Args:
            about: the summary without the entries that every summary has.
            what: the terminal's line on the checkpoint, the items and the settings.
            lines: made by `score_line`.
        """
        seconds = round(time.time() - self.started, 1)
        summary = {
            "benchmark": self.benchmark,
            **about,
            "contents": self.contents,
            "versions": package_versions(),
            "command": shlex.join([Path(sys.executable).name, *sys.argv]),
            "seconds": seconds,
        }
        self.items_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.items_path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
        write_whole(self.summary_path, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        print(f"\n{what}, {seconds:.0f} s)")
        print("\n".join([*lines, f"  {'items and summary':24}{self.items_path}, {self.summary_path}"]))


def load_backend(backend: str, ckpt: str, tokenizer: Any, **options: Any) -> Backend:
    """Loads the checkpoint, with a LoRA adapter where one is given (`check_adapter` first).

    Args:
        options: those of its class in eval/backends.py, which takes seconds to import.

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    name = backend_name(backend)
    from eval.backends import BACKENDS

    return BACKENDS[name](ckpt, tokenizer, **options)


class Run(Results):
    """One benchmark on one checkpoint, from checked arguments to results.

    Args:
        load: loads the back end; None: `load_backend`. eval/suite.py shares one among benchmarks.

    Raises:
        UserError: an argument out of range, results that exist already, or not a usable checkpoint or adapter.
    """

    def __init__(self, benchmark: str, args: Arguments, load: LoadBackend | None = None):
        check_arguments(args)
        super().__init__(benchmark, args)
        self._load = load or load_backend
        self.max_length = (
            0  # Tokens that the back end must hold. complete() raises it to the length of its prompts and answers.
        )
        self._backend: Backend | None = None
        self._store: Store | None = None
        self.rescored: list[dict] | None = None  # the items of --rescore's file
        self._origin: dict[str, Any] = {"ckpt": args.ckpt, "adapter": args.adapter, "backend": None}
        if args.rescore is not None:
            self.rescored = _read_items(Path(args.rescore))
            summary = Path(args.rescore).with_suffix(".json")
            with contextlib.suppress(OSError, ValueError):
                made = json.loads(summary.read_text())
                self._origin = {name: made[name] for name in self._origin} | {"checkpoint": made.get("checkpoint")}
                theirs = made.get("contents") or {}
                self.contents = {name: theirs[name] for name in theirs if name in MADE_WITH} | self.contents
                self._origin["made_with"] = made.get("made_with") or {
                    "arguments": {name: made["arguments"].get(name) for name in MADE_WITH},
                    "versions": made["versions"],
                    "command": made["command"],
                }
            self._origin["rescored"] = args.rescore
            return
        self._origin["backend"] = backend_name(args.backend)
        self.ckpt = resolve_demo(args.ckpt, "model")
        self.tokenizer, self.config = load_tokenizer_and_config(self.ckpt)
        if args.adapter is not None:
            from eval.backends import check_adapter, tokenizer_of

            check_adapter(args.adapter, self.ckpt, self.config, self._origin["backend"])
            self.tokenizer = tokenizer_of(args.adapter, args.ckpt, self.tokenizer, self.config)
        trained = self.tokenizer.init_kwargs.get("trained_template")  # train.py leaves it in merged/ and adapter/
        if trained in ("chat", "raw") and args.prompt.startswith("alpaca"):
            name = args.adapter or args.ckpt
            print(f"note: {name} was trained with another prompt: --prompt {trained}", file=sys.stderr)

    def records(
        self,
        fields: list[str],
        remedy: str,
        split: str = "test",
        names: Mapping[str, str] = MappingProxyType({}),
        lists: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """The benchmark's items, `--limit` of them.

        Args:
            fields, lists: the fields that every item must have, as texts and as lists of texts; `remedy` ends the error
                if one is missing.
            split, names: for hub data sets: the split, and the configuration's name by the data set's.

        Raises:
            UserError: no such data, or not in this format; names the item.
        """
        args = self.args
        records = load_records(resolve_demo(args.data, "test"), split, name=names.get(args.data))
        require_fields(records, [*fields, *lists], args.data, remedy)
        if args.limit is not None:
            records = records.select(range(min(args.limit, len(records))))
        if len(records) == 0:
            raise UserError(f"{args.data} holds no item")
        return [with_texts(record, f"item {i} of {args.data}", fields, lists) for i, record in enumerate(records)]

    def examples(
        self,
        fields: list[str],
        remedy: str,
        split: str = "train",
        names: Mapping[str, str] = MappingProxyType({}),
        lists: Sequence[str] = (),
        prefer: Callable[[dict], bool] = lambda record: True,
    ) -> list[dict[str, Any]]:
        """The `--shots` solved examples: the first ones of the training data, preferred examples before others. The
        further arguments are those of `records`."""
        args = self.args
        if args.shots == 0:
            return []
        source = args.shots_data
        if source is None:
            if Path(args.data).exists():
                raise UserError(f"--shots {args.shots} needs --shots-data: {args.data} has no training split")
            source = args.data
        records = load_records(resolve_demo(source, "train"), split, name=names.get(source))
        require_fields(records, [*fields, *lists], source, remedy)
        if len(records) < args.shots:
            raise UserError(f"--shots {args.shots}: {source} holds {len(records)}")
        shown = sorted(enumerate(records), key=lambda numbered: not prefer(numbered[1]))[: args.shots]
        return [with_texts(record, f"item {i} of {source}", fields, lists) for i, record in shown]

    def encode(self, instruction: str, shots: Turns = ()) -> list[int]:
        """The token ids of `--prompt` around an instruction."""
        return encode_prompt(self.tokenizer, self.args.prompt, instruction, shots)

    def complete(
        self, instructions: list[str], shots: Turns = (), *, stop: tuple[str, ...] | None = None
    ) -> list[dict[str, Any]]:
        """`--samples` completions of every instruction, or the completions of `--rescore`'s file.

        Args:
            shots: solved examples, instruction and response.
            stop: strings that end a completion; None: the template's own beginnings.

        Returns:
            One dict per completion, ordered by index (of the instruction) and sample, with instruction, prompt,
            completion, num_tokens, finished.
        """
        args = self.args
        if self.rescored is not None:
            for item in self.rescored:
                index = item["index"]
                if index < len(instructions) and item["instruction"] != instructions[index]:
                    raise UserError(f"item {index} of {args.rescore} is another one than in {args.data}")
            return [item for item in self.rescored if item["index"] < len(instructions)]
        prompts = [self.encode(text, shots) for text in instructions]
        if stop is None:
            stop = stop_strings(args.prompt)
        sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, stop)
        of_prompts = self.generate(prompts, sampling, args.samples)
        return [
            {
                "index": index,
                "sample": sample,
                "instruction": instructions[index],
                "prompt": self.tokenizer.decode(prompts[index]),
                "completion": completion.text,
                "num_tokens": completion.num_tokens,
                "finished": completion.finished,
            }
            for index, completions in enumerate(of_prompts)
            for sample, completion in enumerate(completions)
        ]

    def generate(self, prompts: list[list[int]], sampling: Sampling, samples: int = 1) -> list[list[Completion]]:
        """`samples` completions of each prompt: from disk if they were made in the same way, else by the back end.

        Raises:
            UserError: the model's context is too short, or the folder cannot be written to.
        """
        args = self.args
        self.max_length = max(self.max_length, max(map(len, prompts)) + sampling.max_new_tokens)
        remedy = "lower --max-new-tokens" + (" or --shots" if args.shots else "")
        check_context(self.config, args.ckpt, self.max_length, remedy)
        requests = [(prompt, sample) for prompt in prompts for sample in range(samples)]
        groups = batches(
            [len(prompt) for prompt, _ in requests], batch_size_of(args.batch_size, self._origin["backend"])
        )
        how = digest([self.identity(), asdict(sampling), args.seed if sampling.temperature > 0 else None])

        def make(group: list[int]) -> list[dict[str, Any]]:
            seeds = None
            if sampling.temperature > 0:
                seeds = [int(digest([args.seed, *requests[i]])[:15], 16) for i in group]
            made = self.backend().generate([requests[i][0] for i in group], sampling, seeds)
            return [asdict(completion) for completion in made]

        found = self.by_groups("completions", requests, groups, how, make, "generating")
        completions = [Completion(**made) for made in found]
        return [completions[start : start + samples] for start in range(0, len(requests), samples)]

    def identity(self) -> Any:
        """Everything that completions depend on beside prompt and sampling."""
        args = self.args
        versions = package_versions()
        return {
            "ckpt": weights_identity(self.ckpt, self.config),
            "adapter": None if args.adapter is None else weights_identity(args.adapter),
            "backend": self._origin["backend"],
            "dtype": str(resolve_dtype(args.dtype)),
            "tensor_parallel_size": args.tensor_parallel_size,
            "versions": {name: versions.get(name) for name in ("torch", "transformers", self._origin["backend"])},
        }

    def backend(self) -> Backend:
        """The back end, loaded at the first call."""
        if self._backend is None:
            args = self.args
            self._backend = self._load(
                self._origin["backend"],
                self.ckpt,
                self.tokenizer,
                dtype=args.dtype,
                max_length=self.max_length,
                batch_size=args.batch_size,
                adapter=args.adapter,
                seed=args.seed,
                tensor_parallel_size=args.tensor_parallel_size,
                gpu_memory_utilization=args.gpu_memory_utilization,
            )
        return self._backend

    def finish(self, items: list[dict], scores: dict[str, Any], lines: Iterable[str]) -> None:
        """Writes items and summary, and prints the report."""
        args = self.args
        arguments = asdict(args)
        if args.rescore is not None:  # the arguments of --rescore do not tell how the completions were made
            arguments |= self._origin.get("made_with", {}).get("arguments") or dict.fromkeys(MADE_WITH)
        state = None if args.rescore is not None else self.state()
        about = {"checkpoint": state, **self._origin, "data": args.data, **scores, "arguments": arguments}
        how = f"rescored from {args.rescore}" if args.rescore else self._origin["backend"]
        on = f" with {self._origin['adapter']}" if self._origin["adapter"] else ""
        self.write(items, about, f"{self._origin['ckpt']}{on} on {args.data} ({how}", lines)


def _read_items(path: Path) -> list[dict]:
    """The items of an earlier run.

    Raises:
        UserError: not such a file.
    """
    made = ("index", "sample", "instruction", "prompt", "completion", "num_tokens", "finished")
    try:
        items = read_jsonl(path)
    except OSError as error:
        raise UserError(f"--rescore {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--rescore {path} is no results file: {error}") from error
    whole = all(isinstance(item, dict) and all(name in item for name in made) for item in items)
    if not items or not whole or not all(isinstance(item["index"], int) and item["index"] >= 0 for item in items):
        raise UserError(f"--rescore {path} is no results file: every line needs {', '.join(made)}")
    return items
