#!/usr/bin/env python3
"""How much a run of train.py learned and forgot, checkpoint by checkpoint, and the answers of its last state.

Less training always forgets less, so two methods are compared where they have learned the same: by the curve of one
against the other. Each point is a checkpoint, and step 0 the base:

    response_loss                  −ln p per response token of held-out examples, in the prompt of training
    forgetting, kl_base_tuned, kl_tuned_base      on texts that are not of the task, as eval/forgetting.py defines them

Of the last state as well: `entropy_change` on those texts; `energy.K`, the share Σ_{i≤K} σ_i² / ‖Z‖_F² of the logits of
the held-out responses; `distinct_answers`, the share of distinct ones among the samples of a question
(`distinct_texts`: of whole completions). Each text has its own numbers: forgetting.NAME, NAME the file's.

    python experiments/curve.py --ckpt output/mine/merged --data held-out.jsonl --texts code.jsonl prose.jsonl

With --scales the points are the run's end with ΔW at each α (common/exports.py), and their names end in @α.
--validation names examples by which α may be chosen: `validation_loss`.

The run keeps as many checkpoints as there shall be points (--save-steps, --keep-checkpoints). Adapter and base compute
in --dtype; logits are fp32, and everything computed from them float64.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.cli import (
    UserError,
    option,
    parse_arguments,
    require_not_negative,
    require_positive,
    require_scales,
    run_script,
)
from common.intervals import mean, ratio, score_line
from eval.benchmark import Results, load_backend
from eval.forgetting import Sums, sums_of
from eval.generation import Sampling, batches

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    import train

ENERGIES = (1, 2, 5, 10, 20, 50, 100, 200)  # the K of `energy.K`
FORGETTING = ("forgetting", "kl_base_tuned", "kl_tuned_base")


@dataclass
class RunArguments:
    """The run, and where the results go."""

    ckpt: str | None = option(None, "merged/ of a run of train.py; its checkpoints lie beside it")
    output_dir: str = option("results", "folder for the results")
    overwrite: bool = option(False, "replace results that are there already")
    skip_done: bool = option(False, "end where --output-dir has these results already; refuse where it has others")


@dataclass
class DataArguments:
    """The data that the run is measured on."""

    data: str | None = option(None, "held-out examples, a file with the run's --fields")
    validation: str | None = option(None, "further held-out examples, apart from those that are reported")
    scales: list[float] = option([], "scales α of the last state's ΔW, in the place of the checkpoints")
    texts: list[str] = option([], "files with a column text, of no task that was trained")
    limit: int | None = option(None, "the first N examples only")
    text_limit: int | None = option(None, "the first N of each file's texts only")
    text_length: int = option(128, "tokens of a text; longer texts are cut")


@dataclass
class SampleArguments:
    """The samples for the count of distinct answers."""

    questions: int = option(0, "the first N examples get samples; 0: none")
    samples: int = option(8, "completions of each")
    temperature: float = option(0.8, "sampling temperature")
    max_new_tokens: int = option(96, "longest completion, in tokens")


@dataclass
class MachineArguments:
    """How the machine is used."""

    batch_size: int = option(16, "sequences that the model reads together")
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "auto: bfloat16 where the GPU has it, else float32")


@dataclass
class Arguments(MachineArguments, SampleArguments, DataArguments, RunArguments):
    """The options."""


@dataclass
class Sequence:
    """Token ids, and from which on they are predicted and counted; `source` is a text's file, "" for an example of
    --validation, None for another example."""

    tokens: list[int]
    first: int
    source: str | None


# ------------------------------------------------------------------------------------------------------------------
# Sequences
# ------------------------------------------------------------------------------------------------------------------


def read_sequences(args: Arguments, run: "train.Arguments", tokenizer: Any) -> list[Sequence]:
    """The held-out examples, encoded as in training, then the texts.

    Raises:
        UserError: no such file, no such column, or nothing in it.
    """
    from common.conversations import build_dataset
    from common.tables import load_records, read_table, require_fields
    from common.templates import IGNORE_INDEX, encode_opening

    found = []
    for data, source in ((args.data, None), (args.validation, "")):
        records = load_records(data, "test") if data else []
        if data:
            records = records.select(range(min(args.limit or len(records), len(records))))
            records, _ = build_dataset(records, tokenizer, run.fields, run.max_length, run.template, run.train_on, data)
        for example in records:
            first = next(i for i, label in enumerate(example["labels"]) if label != IGNORE_INDEX)
            found.append(Sequence(example["input_ids"], max(first, 1), source))
    num_examples = len(found)
    for path in args.texts:
        table = read_table(path, ["text"], "text")
        require_fields(table, ["text"], path, "name the text's column so")
        encoded = [encode_opening(tokenizer, text)[: args.text_length] for text in table["text"][: args.text_limit]]
        found += [Sequence(tokens, 1, Path(path).stem) for tokens in encoded if len(tokens) > 1]
    if not num_examples or len(found) == num_examples:
        raise UserError(f"{args.data} and --texts: no example, or no text of two tokens")
    return found


# ------------------------------------------------------------------------------------------------------------------
# Measures
# ------------------------------------------------------------------------------------------------------------------


def hidden_states(model: "PreTrainedModel", sequences: list[Sequence], batch_size: int) -> list["Tensor"]:
    """The last hidden states of every sequence, (T, d) fp32 each; padded on the right, where no token looks."""
    import torch

    from common.tensors import padded

    found: list[Any] = [None] * len(sequences)
    lengths = [len(sequence.tokens) for sequence in sequences]
    for group in batches(lengths, batch_size):
        rows, mask = padded([sequences[i].tokens for i in group], 0)
        with torch.inference_mode():
            states = model.get_decoder()(input_ids=rows, attention_mask=mask, use_cache=False).last_hidden_state
        for i, state in zip(group, states, strict=True):
            found[i] = state[: lengths[i]].float()
    return found


def sums_by_sequence(
    sequences: list[Sequence], states: list["Tensor"], base_states: list["Tensor"], heads: list["Tensor"]
) -> list[Sums]:
    """The sums of `eval/forgetting.py` over the counted tokens of every sequence; an example has the tuned model's.

    Args:
        heads: fp32 (V, d), the base's and the tuned model's.
    """
    import torch

    found = []
    for sequence, tuned, base in zip(sequences, states, base_states, strict=True):
        start = sequence.first - 1  # the state there predicts the first token that counts
        tokens = torch.tensor(sequence.tokens[start:])
        with torch.inference_mode():
            logits = tuned[start:] @ heads[1].T
            before = base[start:] @ heads[0].T if sequence.source else logits
            found.append(sums_of(before, logits, tokens))
    return found


def energies(states: list["Tensor"], sequences: list[Sequence], head: "Tensor") -> dict[str, float]:
    """Σ_{i≤K} σ_i² / ‖Z‖_F² of Z = H Eᵀ, H the states that predict response tokens: σ_i² are the eigenvalues of
    R (HᵀH) Rᵀ, where EᵀE = RᵀR, in float64."""
    import torch

    pairs = zip(states, sequences, strict=True)
    rows = torch.cat([state[sequence.first - 1 : -1] for state, sequence in pairs if sequence.source is None]).double()
    head = head.double()
    values, vectors = torch.linalg.eigh(head.T @ head)
    root = vectors * values.clamp(min=0).sqrt()  # EᵀE = root rootᵀ
    squares = torch.linalg.eigvalsh(root.T @ (rows.T @ rows) @ root).flip(0).clamp(min=0)
    shares = squares.cumsum(0) / squares.sum()
    return {f"energy.{k}": shares[k - 1].item() for k in ENERGIES if k <= len(shares)}


def summarise(sequences: list[Sequence], sums: list[Sums]) -> dict[str, Any]:
    """The scores of one state, with intervals over sequences."""

    def over(chosen: list[int], value: Any) -> dict[str, Any]:
        counts = [len(sequences[i].tokens) - sequences[i].first for i in chosen]
        return ratio([value(sums[i]) for i in chosen], counts)

    examples, validation = ([i for i, item in enumerate(sequences) if item.source == kind] for kind in (None, ""))
    texts = [i for i, sequence in enumerate(sequences) if sequence.source]
    scores = {"response_loss": over(examples, lambda item: item.loss_after)}
    if validation:
        scores["validation_loss"] = over(validation, lambda item: item.loss_after)
    scores |= {"response_entropy": over(examples, lambda item: item.entropy_after)}
    sources = dict.fromkeys(sequences[i].source for i in texts)
    groups = {"": texts} | {f".{name}": [i for i in texts if sequences[i].source == name] for name in sources}
    for ending, chosen in groups.items():
        scores[f"forgetting{ending}"] = over(chosen, lambda item: item.loss_after - item.loss_before)
        for name in (*FORGETTING[1:], "agreement"):
            scores[f"{name}{ending}"] = over(chosen, lambda item, name=name: getattr(item, name))
        scores[f"entropy_change{ending}"] = over(chosen, lambda item: item.entropy_after - item.entropy_before)
    return scores


def distinct(args: Arguments, tokenizer: Any, questions: list[str]) -> dict[str, Any]:
    """Of the samples of every question, the shares of distinct answers and of distinct completions; answers are read as
    GSM8K's are, and samples without one have one in common."""
    from eval.benchmark import digest, encode_prompt
    from eval.gsm8k import extract_answer

    prompts = [encode_prompt(tokenizer, "alpaca", question) for question in questions]
    options = {"dtype": args.dtype, "max_length": max(map(len, prompts)) + args.max_new_tokens}
    model = load_backend("transformers", args.ckpt, tokenizer, **options)
    sampling = Sampling(args.max_new_tokens, args.temperature)
    answers, texts = [], []
    for number, prompt in enumerate(prompts):
        seeds = [int(digest([number, sample])[:15], 16) for sample in range(args.samples)]
        made = model.generate([prompt] * args.samples, sampling, seeds)
        texts.append(len({completion.text for completion in made}) / args.samples)
        answers.append(len({str(extract_answer(completion.text)) for completion in made}) / args.samples)
    return {"distinct_answers": mean(answers), "distinct_texts": mean(texts)}


class Curve(Results):
    MODELS = ("ckpt",)


def check_arguments(args: Arguments) -> Path:
    """The run's folder. Raises a UserError where something is missing or out of range; reads no weights."""
    if args.ckpt is None or args.data is None or not args.texts:
        raise UserError("give --ckpt, --data and --texts")
    require_positive(args, "limit", "text_limit", "samples", "temperature", "max_new_tokens", "batch_size")
    require_not_negative(args, "questions")
    if args.scales:
        require_scales(args.scales)
    run = Path(args.ckpt).parent
    if not (run / "config.yaml").is_file():
        raise UserError(f"--ckpt {args.ckpt}: no config.yaml beside it, so it is not merged/ of a run of train.py")
    return run


def run_of(folder: Path) -> tuple["train.Arguments", dict[int, Path]]:
    """The arguments of a run of train.py, and its complete checkpoints by step.

    Raises:
        UserError: it has none.
    """
    import train
    from common import checkpoints

    run = parse_arguments(train.Arguments, "", ["--config", str(folder / "config.yaml")])
    complete = checkpoints.complete_checkpoints(folder, read_all=True, verbose=True)
    found = {int(path.name.partition("-")[2]): path for path in complete[::-1]}
    if not found:
        raise UserError(f"{folder} has no complete checkpoint: train with --save-steps and --keep-checkpoints")
    return run, found


def points_of(
    args: Arguments, run: "train.Arguments", path: str, sequences: list[Sequence], folders: dict[int, Path]
) -> dict[float, dict[str, Any]]:
    """The scores at step 0 and of every checkpoint, by step, the energies among them; with --scales by scale."""
    import torch
    from safetensors.torch import load_file

    import train
    from common import checkpoints, exports, pretrained

    dtype = pretrained.resolve_dtype(args.dtype)
    model = pretrained.load_model(run, path, dtype).eval()
    base = (
        {name: weight.detach().clone() for name, weight in model.named_parameters()} if run.method == "full" else None
    )
    base_states = hidden_states(model, sequences, args.batch_size)
    base_head = model.get_output_embeddings().weight.detach().float().clone()

    def point(states: list["Tensor"], head: "Tensor") -> dict[str, Any]:
        sums = sums_by_sequence(sequences, states, base_states, [base_head, head])
        return summarise(sequences, sums) | ({} if args.scales else energies(states, sequences, head))

    points: dict[float, dict[str, Any]] = {0: point(base_states, base_head)}
    for step, folder in folders.items():
        tensors = load_file(folder / checkpoints.TRAINED_TENSORS)
        if len(points) == 1:
            train.attach_adapters(model, run, tensors).eval()
        with torch.no_grad():
            checkpoints.load_trained_tensors(model, tensors)
        factors = [(vars(layer), "scaling") for layer in train.adapter_layers(model).values()]
        scaled = exports.Scaled(model, factors, base)
        for scale in args.scales or [1.0]:
            scaled.set(scale)
            states = hidden_states(model, sequences, args.batch_size)
            head = model.get_output_embeddings().weight.detach().float()
            points[scale if args.scales else step] = point(states, head)
    return points


def main(argv: list[str]) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    folder = check_arguments(args)
    results = Curve("curve", args)
    from common.pretrained import load_tokenizer_and_config, resolve_demo

    run, folders = run_of(folder)
    if args.scales:
        folders = {max(folders): folders[max(folders)]}
    path = resolve_demo(run.model, "model")
    tokenizer, _ = load_tokenizer_and_config(path)
    sequences = read_sequences(args, run, tokenizer)
    points = points_of(args, run, path, sequences, folders)
    scores = dict(points[max(points)])
    for step, point in points.items():
        scores |= {
            f"{name}@{step:g}": value["value"] if isinstance(value, dict) else value
            for name, value in point.items()
            if name.partition(".")[0] in ("response_loss", "validation_loss", *FORGETTING, "energy")
        }
    if args.questions:
        from common.tables import load_records

        questions = load_records(args.data, "test")[run.fields[0]][: args.questions]
        scores |= distinct(args, tokenizer, questions)
    about = {"checkpoint": results.state(), "ckpt": args.ckpt, "adapter": None, "backend": "transformers"}
    nats, signed = "{:.3f}".format, "{:+.3f}".format
    lines = [score_line("response loss", scores["response_loss"], nats)]
    lines += [score_line(name, scores[name], signed) for name in FORGETTING]
    if args.questions:
        lines.append(score_line("distinct answers", scores["distinct_answers"]))
    items = [{"scale" if args.scales else "step": step, **point} for step, point in points.items()]
    about |= {"data": args.data, **scores, "arguments": asdict(args)}
    what = f"{len(args.scales)} scales" if args.scales else f"{len(folders)} checkpoints"
    results.write(items, about, f"{what} of {folder} (transformers", lines)


if __name__ == "__main__":
    run_script(main)
