"""The price of an experiment, from configurations alone: no weights, no data, no network.

Counted operations are multiplications and additions of matrix products, two for each pair. Of N parameters in a model's
linear layers and a head of d × V, one token of training takes

    adapters        forward 2N, backward 2N; head 4dV (frozen: no gradient of its weights); the adapters' own 6N_A
    full            forward 2N, backward 4N; head 6dV
    teacher (L_CR)  forward 2N, head 2dV
    attention       2as forward per layer, 4as backward; a the heads' width, s the length (half of the square is masked)

The arithmetic of L_DR and L_SVDR, norms, the decompositions of PiSSA's start and reading data are not counted. Every
length is taken at its limit, --max-length or --max-new-tokens: operations, tokens and hours are upper bounds of what is
counted.

Hours are counted operations divided by a device's speed: its peak (NVIDIA's data sheets, dense) times a utilisation.
Shapes of the published models are in data/shapes/, sizes of the published data in data/shapes/examples.json.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from common.classifiers import count_parameters, default_targets, linear_for_conv1d
from common.cli import UserError
from common.estimates import adapter_bytes, estimated_memory
from common.layers import default_target_modules, find_target_modules
from common.training import num_steps
from eval.results import NLG, NLU
from experiments.entries import ROOT
from experiments.plans import Plan, PlannedRun, parse_training

SHAPES = ROOT / "data" / "shapes"
# FLOP/s, dense: bfloat16 on tensor cores, and float32, in which classification trains.
PEAKS = {"A100": (312e12, 19.5e12), "H100": (989e12, 67e12)}
TRAINING, FLOAT32, GENERATION = 0.40, 0.50, 0.05  # of the peak that is reached
CPU = 100e9  # FLOP/s of the machine that runs a twin
PROMPT = 256  # tokens of a benchmark's prompt
GLUE_TESTS = {name: column.items for name, column in NLU.items()} | {"mnli": 19647}  # both of MNLI's
# Two turns of each of MT-Bench's; then what reads and does not write, of a curve about so many.
ITEMS = {name: column.items for name, column in NLG.items()} | {"mt_bench": 160, "crows_pairs": 3016, "curve": 2000}
NEW_TOKENS = {"gsm8k": 1024, "hendrycks_math": 2048, "humaneval": 512, "mbpp": 512, "mt_bench": 1024}
NEW_TOKENS |= {"crows_pairs": 0, "curve": 0}
FULL_STATE = 12  # bytes per trained parameter of a checkpoint: fp32 and both of Adam's moments


@dataclass(frozen=True)
class Price:
    """Of one run. tokens, operations: of training; generated: operations of the benchmarks; memory: bytes per device;
    kept, beside: bytes on disk when it is done, and more while it runs."""

    model: str
    method: str
    trainable: int
    steps: int
    tokens: int
    operations: float
    generated: float
    memory: float
    kept: float
    beside: float
    is_float32: bool
    processes: int

    def hours(self, device: str) -> float:
        """Device hours, training and benchmarks together; an experiment's run of n devices counts n times."""
        peak, peak_float32 = PEAKS[device]
        rate = peak_float32 * FLOAT32 if self.is_float32 else peak * TRAINING
        return (self.operations / rate + self.generated / (peak * GENERATION)) / 3600


# ------------------------------------------------------------------------------------------------------------------
# Models and data
# ------------------------------------------------------------------------------------------------------------------


def shape(model: str) -> dict[str, Any]:
    """The configuration of a published model, of one in a folder, or of one that the experiment makes.

    Raises:
        UserError: it is none of these.
    """
    for path in (SHAPES / f"{model}.json", Path(model) / "config.json", SHAPES / f"{Path(model).name}.json"):
        if path.is_file():
            return json.loads(path.read_text())
    raise UserError(f"no shape of {model!r}: put its config.json into data/shapes/{model}.json to see the price")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)


@functools.cache
def skeleton(model: str, *, num_classes: int | None = None) -> Any:
    """The model without weights; a classifier where `num_classes` is given."""
    settings = shape(model)
    with quietly(), torch.device("meta"):
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        if num_classes is None:
            return AutoModelForCausalLM.from_config(config)
        config.num_labels = num_classes
        config.pad_token_id = 0
        return AutoModelForSequenceClassification.from_config(config)


def num_examples(data: str, part: str | None, limit: int | None) -> int:
    """Training examples of a published data set, or `limit` of them.

    Raises:
        UserError: neither is known.
    """
    known = json.loads((SHAPES / "examples.json").read_text()).get(data)
    if isinstance(known, dict):
        known = known.get(part)
    if known is None and limit is None:
        raise UserError(f"the size of {data!r} is not known: give limit, or add it to data/shapes/examples.json")
    return min(count for count in (known, limit) if count is not None)


def linear_parameters(model: Any) -> int:
    """Parameters of the matrices that every token is multiplied by; the output head is not among them."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kinds = (torch.nn.Linear, Conv1D)
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, kinds) and module is not head)


# ------------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------------


def language_model_price(plan: Plan, run: PlannedRun, args: Any) -> Price:
    """Of a run of train.py."""
    on_gpu = bool(plan.entries.get("needs-gpu"))
    model = skeleton(args.model)
    config = model.config
    trainable = total = model.num_parameters()
    num_adapters = 0
    if args.method != "full":
        layers = find_target_modules(model, args.target_modules or default_target_modules(model), args.rank)
        num_adapters = len(layers)
        trainable = sum(args.rank * (layer.in_features + layer.out_features) for layer in layers.values())
    per_step = args.batch_size * args.gradient_accumulation * run.processes
    count = 0 if args.max_steps > 0 else num_examples(args.data, args.data_subset, args.limit)
    steps = num_steps(args, count, run.processes)
    tokens = steps * per_step * args.max_length

    num_linear, head = linear_parameters(model), config.hidden_size * config.vocab_size
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 2 * width * args.max_length * config.num_hidden_layers
    forward = 2 * num_linear + attention
    full = args.method == "full"
    per_token = 3 * forward + 6 * head if full else 2 * forward + attention + 4 * head + 6 * trainable
    if args.has_terms and args.lambda_consistency > 0:
        per_token += forward + 2 * head
    if args.gradient_checkpointing:
        per_token += forward

    dtype = torch.bfloat16 if on_gpu and args.dtype != "float32" else torch.float32
    batch = args.batch_size * args.max_length
    sizes = {"num_adapters": num_adapters, "tokens": batch, "valid": batch, "num_processes": run.processes}
    parts = estimated_memory(args, config, dtype, total=total, trainable=trainable, **sizes)
    if on_gpu:
        parts.pop("program", None)
    adapter = 0 if full else adapter_bytes(args, trainable)
    state = trainable * FULL_STATE + (adapter / 2 if args.method in ("pissa", "ba-lora") else 0)
    checkpoints = state if args.save_steps else 0
    merged = total * dtype.itemsize
    keeps_merged = plan.entries.get("keep-merged", True)
    return Price(
        model=args.model,
        method=args.method + (" + terms" if args.has_terms and args.method != "ba-lora" else ""),
        trainable=trainable,
        steps=steps,
        tokens=tokens,
        operations=float(per_token) * tokens,
        generated=sum(generation(name, given, 2 * (num_linear + head)) for name, given in scored(run)),
        memory=sum(parts.values()),
        kept=args.keep_checkpoints * checkpoints + adapter + (merged if keeps_merged else 0),
        beside=checkpoints + (0 if keeps_merged else merged),
        is_float32=False,
        processes=run.processes,
    )


def scored(run: PlannedRun) -> list[tuple[str, dict[str, Any]]]:
    """The run's benchmarks with their options."""
    return [(name, run.evaluation) for name in run.benchmarks] + list(run.alone.items())


def generation(name: str, options: dict[str, Any], per_token: float) -> float:
    """Operations of one benchmark, at most."""
    items = options.get("limit") or ITEMS[name]
    new = options.get("max-new-tokens", NEW_TOKENS[name])
    return float(per_token) * items * options.get("samples", 1) * (PROMPT + new)


def classifier_price(plan: Plan, run: PlannedRun, args: Any) -> Price:
    """Of a run of finetune_bert_l_sst2.py, which trains in float32 on one device."""
    name = "demo-encoder" if args.model == "demo" else args.model
    model = skeleton(name, num_classes={"mnli": 3, "stsb": 1}.get(args.task, 2))
    linear_for_conv1d(model)
    num_linear, (trainable, head_size) = linear_parameters(model), count_parameters(model)
    total, full = trainable + head_size, args.method == "full"
    if not full:
        targets = args.target_modules or default_targets(model)
        layers = find_target_modules(model, targets, args.rank)
        trainable = sum(args.rank * sum(layer.weight.shape) for layer in layers.values())

    source = "demo sentences" if args.data == "demo" else args.data or "nyu-mll/glue"
    count = num_examples(source, args.task, args.limit)
    validation = 0 if args.data == "demo" else min(max(count // 10, 1), 2000)
    count -= validation
    steps = num_steps(args, count, 1)
    tokens = steps * args.batch_size * args.max_length
    config = model.config
    width, layers = config.hidden_size, config.num_hidden_layers
    forward = 2 * num_linear + 4 * width * args.max_length * layers  # every token sees every other
    # The model before training runs over all splits once; validations come with the epochs.
    passes = count + validation * (2 + args.epochs * args.evals_per_epoch) + 2 * GLUE_TESTS.get(args.task, 2000)
    batch = args.batch_size * args.max_length
    scores = 4 * config.num_attention_heads * args.max_length  # fp32, softmax and its input
    feed_forward = getattr(config, "intermediate_size", 0) or getattr(config, "d_ff", 0) or 4 * width
    activations = batch * 4 * layers * (10 * width + 3 * feed_forward + scores / 2)
    return Price(
        model=args.model,
        method=args.method,
        trainable=trainable,
        steps=steps,
        tokens=tokens,
        operations=float(forward) * ((3 if full else 2) * tokens + passes * args.max_length) + 6.0 * trainable * tokens,
        generated=0.0,
        memory=4 * total + 16 * (trainable + head_size) + activations,
        kept=4 * total + (0 if full else 4 * (trainable + head_size)),
        beside=0.0,
        is_float32=True,
        processes=1,
    )


# ------------------------------------------------------------------------------------------------------------------
# An experiment
# ------------------------------------------------------------------------------------------------------------------


def prices(plan: Plan) -> list[Price]:
    """Of every run; runs that differ in nothing but the seed are counted once.

    Raises:
        UserError: a model or data are not known, or an option does not fit the model.
    """
    known: dict[str, Price] = {}
    found = []
    for run in plan.runs:
        alike = {name: value for name, value in run.settings.items() if name != "seed"}
        alike = json.dumps([run.script, alike, scored(run), run.processes], sort_keys=True, default=str)
        for seed in {run.labels.get("seed")} - {None}:
            alike = alike.replace(f"-{seed}", "-SEED")  # in the name of a file
        if alike not in known:
            price_of = language_model_price if run.script == "train.py" else classifier_price
            known[alike] = price_of(plan, run, parse_training(plan, run))
        found.append(known[alike])
    return found


HEAD = ("model", "method", "runs", "trained", "steps", "tokens", "PFLOP", "A100 h", "H100 h", "GiB/device", "disk GiB")


def text(plan: Plan) -> str:
    """The price as a table, a row per model and method, and the assumptions below it."""
    try:
        found = prices(plan)
    except UserError as error:
        return f"price of {plan.experiment}: {len(plan.runs)} runs; not known ({error})"
    groups: dict[tuple, list[Price]] = {}
    for price in found:
        key = (price.model, price.method, price.trainable, price.steps)
        groups.setdefault(key, []).append(price)
    rows = [list(HEAD), *(row(*key[:2], group) for key, group in groups.items())]
    if len(groups) > 1:
        rows.append(row("together", "", found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"price of {plan.experiment}: {len(found)} runs, at most"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows]
    return "\n".join([*lines, *notes(plan, found)])


def row(model: str, method: str, group: list[Price]) -> list[str]:
    same = len({(price.trainable, price.steps) for price in group}) == 1
    operations = sum(price.operations + price.generated for price in group)
    disk = sum(price.kept for price in group) + max(price.beside for price in group)
    return [
        model.rpartition("/files/")[2],
        method,
        str(len(group)),
        f"{group[0].trainable / 1e6:.{1 if group[0].trainable >= 1e7 else 3}f} M" if same else "",
        str(group[0].steps) if same else str(sum(price.steps for price in group)),
        f"{sum(price.tokens for price in group) / 1e6:.1f} M",
        f"{operations / 1e15:,.{0 if operations >= 1e18 else 3 if operations < 1e15 else 1}f}",
        *(f"{sum(price.hours(device) for price in group):,.2f}" for device in PEAKS),
        f"{max(price.memory for price in group) / 2**30:.1f}",
        f"{disk / 2**30:,.1f}",
    ]


def notes(plan: Plan, found: list[Price]) -> list[str]:
    """The assumptions behind the numbers."""
    devices = max(price.processes for price in found)
    used = [f"{'GPUs' if plan.entries.get('needs-gpu') else 'processes'} per run: {devices}"]
    if any(not price.is_float32 for price in found):
        peaks = ", ".join(f"{name} {peak[0] / 1e12:.0f}" for name, peak in PEAKS.items())
        used.append(f"bfloat16 peak {peaks} TFLOP/s, {TRAINING:.0%} of it in training, {GENERATION:.0%} in generation")
    if any(price.is_float32 for price in found):
        peaks = ", ".join(f"{name} {peak[1] / 1e12:g}" for name, peak in PEAKS.items())
        used.append(f"classification in float32, peak {peaks} TFLOP/s, {FLOAT32:.0%} of it")
    lines = ["; ".join(used) + "; every sequence as long as it may be"]
    if not plan.entries.get("needs-gpu"):
        operations = sum(price.operations + price.generated for price in found)
        lines.append(f"without a GPU: {operations / CPU / 3600:.1f} h at {CPU / 1e9:.0f} GFLOP/s")
    if not plan.entries.get("keep-merged", True):
        lines.append("merged models go when they are scored (--export-from makes them again)")
    return lines
