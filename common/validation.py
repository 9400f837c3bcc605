"""Validation while training: the held-out examples, the means over them, the best state, early stopping, samples."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

from common import tables
from common.cli import UserError, option, require_positive
from common.conversations import read_template_args
from common.pretrained import resolve_demo
from common.ranks import read_deepspeed
from common.runs import SAMPLES, JsonLines
from common.tables import note_on_overlap
from common.templates import IGNORE_INDEX, Template, decode_response

if TYPE_CHECKING:
    import datasets

SAMPLE_TOKENS = 256  # most tokens of an answer, which also ends at --max-length


@dataclass
class ValidationArguments:
    """Validation while it trains; without --validation-data and --eval-share there is none, and it costs nothing."""

    validation_data: str | None = option(
        None, "held-out examples to validate on: a file like --data's, or a folder of them", formerly="eval_data"
    )
    eval_share: float | None = option(None, "hold out this share of --data instead, such as 0.02, drawn by --seed")
    eval_steps: int = option(100, "optimizer steps between two validations; the last step is also followed by one")
    keep_best: bool = option(False, "export the state with the lowest validation loss, not the last state")
    patience: int | None = option(None, "stop after this many validations in a row without a lower loss")
    sample_prompts: str | None = option(
        None, "file of prompts, one per line or jsonl, that are answered greedily at every validation"
    )


def check_validation(args: Any) -> None:
    """Raises a UserError where the options of ValidationArguments do not fit together, or name a missing file."""
    require_positive(args, "eval_steps", "patience")
    if args.validation_data is not None and args.eval_share is not None:
        raise UserError("--validation-data and --eval-share both choose the held-out examples: give one of the two")
    if args.eval_share is not None and not 0 < args.eval_share < 1:
        raise UserError(f"--eval-share is {args.eval_share}: it must be above 0 and below 1")
    if args.validation_data is None and args.eval_share is None:
        for name, value in (("keep-best", args.keep_best), ("patience", args.patience)):
            if value:
                raise UserError(f"--{name} needs a validation: add --validation-data or --eval-share")
        if args.sample_prompts is not None:
            raise UserError("--sample-prompts are answered at validations: add --validation-data or --eval-share")
    if args.sample_prompts is not None:
        read_prompts(args.sample_prompts, args.fields[0])
        if read_deepspeed(args.deepspeed).get("zero_optimization", {}).get("stage") == 3:
            raise UserError("--sample-prompts needs whole weights, and ZeRO-3 splits them: leave it out, or use ZeRO-2")


# ------------------------------------------------------------------------------------------------------------------
# Held-out examples
# ------------------------------------------------------------------------------------------------------------------


def arguments_of_validation_data(args: Any) -> Any | None:
    """`args` with --validation-data in place of --data, and without a limit; None without --validation-data."""
    if args.validation_data is None:
        return None
    data = resolve_demo(args.validation_data, "test")
    source = {"data": data, "split": tables.split_of(data, "validation"), "data_subset": None, "data_config": None}
    return dataclasses.replace(args, **source, limit=None, teacher_cache=None)


def hold_out(
    args: Any, examples: "datasets.Dataset", held_out: "datasets.Dataset | None"
) -> "tuple[datasets.Dataset, datasets.Dataset | None]":
    """The examples to train on and those to validate on, each in its order; their `index` is their place in `together`.

    Args:
        examples: those of --data. held_out: those of --validation-data.

    Raises:
        UserError: --eval-share leaves nothing to train on, or --validation-data has the same examples as --data.
    """
    if held_out is not None:
        indices = list(range(len(examples), len(examples) + len(held_out)))
        held_out = held_out.remove_columns("index").add_column("index", indices)
    elif args.eval_share is not None:
        examples, held_out = _split(args, examples)
    if held_out is not None:
        trained, watched = row_digests(examples), row_digests(held_out)
        if args.validation_data is not None and set(trained) == set(watched):
            raise UserError(
                f"--validation-data {args.validation_data} has exactly the examples of the training: name others"
            )
        pairs = (zip(_prompt_digests(of), rows, strict=True) for of, rows in ((examples, trained), (held_out, watched)))
        note = note_on_overlap(*pairs, "what is held out")
        if note and os.environ.get("RANK", "0") == "0":
            print(note, flush=True)
    return examples, held_out


def _split(args: Any, examples: "datasets.Dataset") -> "tuple[datasets.Dataset, datasets.Dataset]":
    """The examples without the part that --eval-share draws, and that part."""
    count = max(1, round(args.eval_share * len(examples)))
    if count >= len(examples):
        raise UserError(f"--eval-share {args.eval_share} of {len(examples)} examples leaves none to train on")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(args.seed)).tolist()
    return examples.select(sorted(order[count:])), examples.select(sorted(order[:count]))


def row_digests(examples: "datasets.Dataset") -> list[bytes]:
    """A digest of each tokenised example's `input_ids` and `labels`."""
    return [hashlib.sha256(ids.tobytes() + labels.tobytes()).digest() for ids, labels in _rows(examples)]


def _prompt_digests(examples: "datasets.Dataset") -> list[bytes]:
    """A digest of each tokenised example's tokens that are not trained."""
    return [hashlib.sha256(ids[labels == IGNORE_INDEX].tobytes()).digest() for ids, labels in _rows(examples)]


def _rows(examples: "datasets.Dataset") -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each tokenised example's `input_ids` and `labels`, (T,) each."""
    for table in examples.with_format("arrow").iter(batch_size=1000):
        columns = [table.column(name).combine_chunks() for name in ("input_ids", "labels")]
        ends = np.cumsum(columns[0].value_lengths().to_numpy(zero_copy_only=False))[:-1]
        yield from zip(
            *(np.split(column.flatten().to_numpy(zero_copy_only=False), ends) for column in columns), strict=True
        )


def together(examples: "datasets.Dataset", held_out: "datasets.Dataset | None") -> "datasets.Dataset":
    """Both in the order of their `index`."""
    if held_out is None:
        return examples
    import datasets

    both = datasets.concatenate_datasets([examples, held_out])
    indices = both["index"][:]
    return both.select(sorted(range(len(both)), key=indices.__getitem__))


# ------------------------------------------------------------------------------------------------------------------
# Means over them
# ------------------------------------------------------------------------------------------------------------------


def held_out_batches(num_examples: int, batch_size: int, rank: int, num_ranks: int) -> Iterator[tuple[range, bool]]:
    """The rows of each micro-batch that this rank validates on, and whether it counts.

    The micro-batches have training's size and the data's order, and the ranks share them, so that L_SVDR, the spectrum
    of one micro-batch, does not depend on the number of ranks. Under ZeRO-3 all ranks must run equally often: a rank
    without a further micro-batch repeats the last one and does not count it.
    """
    count = math.ceil(num_examples / batch_size)
    for first in range(0, count, num_ranks):
        number = min(first + rank, count - 1)
        yield range(number * batch_size, min((number + 1) * batch_size, num_examples)), first + rank < count


def held_out_means(
    training: Any, parts: Iterable[tuple[dict[str, float | Tensor], int, bool]], per_micro_batch: Collection[str] = ()
) -> dict[str, float]:
    """Loss, accuracy and terms over the held-out examples: means over their valid tokens, of all ranks.

    Args:
        training: common/training.py's `Training`.
        parts: each micro-batch's values, its number of valid tokens, and whether it counts.
        per_micro_batch: the values that are means over micro-batches. The others are sums over tokens.
    """
    sums: dict[str, Tensor] = {}
    for terms, tokens, counts in parts:
        for name, value in (terms | {"tokens": tokens, "micro_batches": 1}).items():
            if name.startswith("lambda_"):
                continue
            value = torch.as_tensor(value, dtype=torch.float64, device=training.device)
            sums[name] = sums.get(name, 0.0) + value * counts
    totals = torch.stack([sums[name] for name in sorted(sums)])
    if training.num_ranks > 1:
        totals = training.accelerator.reduce(totals, reduction="sum")
    means = dict(zip(sorted(sums), totals.tolist(), strict=True))
    tokens, micro_batches = means.pop("tokens"), means.pop("micro_batches")
    means = {name: value / (micro_batches if name in per_micro_batch else tokens) for name, value in means.items()}
    return {"eval_loss": means.pop("task")} | {f"eval_{name}": value for name, value in means.items()}


# ------------------------------------------------------------------------------------------------------------------
# Decisions by the validation loss. They depend on the log alone, which every checkpoint holds.
# ------------------------------------------------------------------------------------------------------------------


def losses_by_step(history: Sequence[Mapping[str, float]]) -> dict[int, float]:
    """The validation loss of every validated step in a run's log, in order."""
    return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}


def vain_validations(history: Sequence[Mapping[str, float]]) -> int:
    """How many validations at the end of the log have no lower loss than the best before them."""
    best, vain = math.inf, 0
    for loss in losses_by_step(history).values():
        best, vain = (loss, 0) if loss < best else (best, vain + 1)
    return vain


def is_out_of_patience(history: Sequence[Mapping[str, float]], patience: int | None) -> bool:
    return patience is not None and vain_validations(history) >= patience


def summary(history: Sequence[Mapping[str, float]], last_step: int, exported: Path | None) -> dict[str, Any] | None:
    """For run.json: the last validation, the best, and the step of the exported state; None without any.

    Args:
        exported: the checkpoint that is exported instead of the last state.
    """
    entries = [entry for entry in history if "eval_loss" in entry]
    if not entries:
        return None
    best = min(entries, key=lambda entry: entry["eval_loss"] if math.isfinite(entry["eval_loss"]) else math.inf)
    step = last_step if exported is None else int(exported.name.partition("-")[2])
    return {"last": entries[-1], "best": best, "exported_step": step}


# ------------------------------------------------------------------------------------------------------------------
# Samples
# ------------------------------------------------------------------------------------------------------------------


def read_prompts(path: str, field: str) -> list[str]:
    """The prompts of a text file, one per line; of a jsonl file of strings, or of objects with `field` or "prompt"; or
    of such a column of another table.

    Raises:
        UserError: no such file, no prompt in it, or a line without a prompt.
    """
    if not Path(path).is_file():
        raise UserError(f"cannot read --sample-prompts {path}: no such file")
    kind, prompts = tables.kind_of(Path(path)), []
    is_text, is_table = kind not in tables.KINDS, kind in (".csv", ".tsv", ".parquet")
    for number, row in enumerate(tables.load_records(path), 1) if is_table else tables.numbered_lines(Path(path)):
        if isinstance(row, str) and not row.strip():
            continue
        if isinstance(row, str) and not is_text:
            try:
                row = json.loads(row)
            except ValueError as error:
                raise UserError(f"--sample-prompts {path}, line {number} is no JSON: {error}") from error
        prompt = row.get(field, row.get("prompt")) if isinstance(row, dict) else row
        if not isinstance(prompt, str):
            raise UserError(f"--sample-prompts {path}, line {number}: no text in the field {field!r} or 'prompt'")
        prompts.append(prompt.strip("\r\n") if is_text else prompt)
    if not prompts:
        raise UserError(f"--sample-prompts {path} holds no prompt: write one per line")
    return prompts


@dataclass
class Sampler:
    """Answers the same prompts again and again, greedily; samples.jsonl has a line for each answer.

    Attributes:
        prompts: the prompts as they are written. encoded: their tokens, as in training.
        max_length: most tokens of prompt and answer together.
    """

    file: JsonLines
    template: Template
    prompts: list[str]
    encoded: list[list[int]]
    max_length: int

    @classmethod
    def of(cls, args: Any, tokenizer: "transformers.PreTrainedTokenizerBase") -> "Sampler | None":
        """The sampler of --sample-prompts; None without this option.

        Raises:
            UserError: a prompt is longer than an example may be.
        """
        if args.sample_prompts is None:
            return None
        prompts = read_prompts(args.sample_prompts, args.fields[0])
        template = Template(tokenizer, args.template, read_template_args(args.template_args))
        encoded = [template.prompt(prompt) for prompt in prompts]
        for number, ids in enumerate(encoded, 1):
            if len(ids) >= args.max_length:
                raise UserError(f"--sample-prompts {args.sample_prompts}: prompt {number} fills --max-length")
        return cls(JsonLines(Path(args.output_dir) / SAMPLES), template, prompts, encoded, args.max_length)

    @torch.no_grad()
    def write(self, model: "transformers.PreTrainedModel", step: int) -> None:
        """Adds the answers of `model`, in evaluation mode, to the file; one prompt at a time, so nothing is padded."""
        own = model.generation_config
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        ends = sorted({*ends, self.template.tokenizer.eos_token_id, self.template.end_token_id} - {None})
        settings = {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[0], "use_cache": True}
        device = model.get_input_embeddings().weight.device
        try:
            model.generation_config = transformers.GenerationConfig()  # the model's own may sample, or penalise
            rows = []
            for prompt, ids in zip(self.prompts, self.encoded, strict=True):
                input_ids = torch.tensor([ids], device=device)
                mask = torch.ones_like(input_ids)
                most = min(SAMPLE_TOKENS, self.max_length - len(ids))
                config = transformers.GenerationConfig(max_new_tokens=most, **settings)
                output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
                answer = decode_response(self.template.tokenizer, ids, output[0, len(ids) :].tolist())
                rows.append({"step": step, "prompt": prompt, "answer": answer})
        finally:
            model.generation_config = own
        self.file.append(rows)
