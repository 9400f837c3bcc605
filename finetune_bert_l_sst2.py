#!/usr/bin/env python3
"""BA-LoRA for classification and regression (arXiv 2408.04556): BERT-large on SST-2, GLUE, or one's own data.

The adapters and the regularizers are train.py's; here they act on the classifier's logits Z (N examples × D classes):

    L = L_task + λ₁·L_CR + λ₂·L_DR + λ₃·L_SVDR
    L_CR    stay near the pre-trained model's logits     T² · KL( softmax(Z_P/T) ‖ softmax(Z_F/T) )
    L_DR    decorrelate the classes' logits              (1/D) Σ_{i≠j} Cov(Z_F)_ij²
    L_SVDR  concentrate the batch's logits               − Σ_{i≤k} σ_i(Z_F) / Σ_j σ_j(Z_F)

One item of SST-2, and of a task with two texts (RTE):

    {"sentence": "one long string of cliches", "label": 0}
    {"sentence1": "No weapons were found in Iraq.", "sentence2": "Weapons were found in Iraq.", "label": 1}

The published form has two traps. L_SVDR is the constant -1 if k ≥ D (k is 5, and D is 2 or 3): set --spectral-k 1.
And the "pre-trained" classifier behind Z_P is random. --teacher-head initial leaves it so; --teacher-head probe first
fits a linear probe on the frozen encoder's features, and teacher and student both start from it. With a probe, L_SVDR
has no effect on two classes, with any k: a probe's two logits are each other's negative, so Z_F keeps rank 1.

How to run
    python finetune_bert_l_sst2.py                BERT-large on SST-2 with a GPU and the hub, else MiniLM on the demo
    python finetune_bert_l_sst2.py --task rte --model microsoft/deberta-v3-base
    python finetune_bert_l_sst2.py --model FOLDER --data train.tsv --test-data dev.tsv --fields 0 --label 1   no header
    python finetune_bert_l_sst2.py --config configs/glue_deberta_v3_base.yaml --task mrpc --learning-rate 5e-4
    torchrun --nproc_per_node 8 finetune_bert_l_sst2.py --task mnli --batch-size 4

What comes out, in --output-dir
    adapter/            adapters and classifier in PEFT's format, for the published base model (not with --method full)
    merged/             a plain checkpoint with its tokenizer
    results.json        scores of the linear probe and of the trained model on every evaluation set, settings, versions
    predictions.jsonl   label, prediction and confidence of every evaluated example
    metrics.jsonl       loss and each term over training, the validation score
    config.yaml         every argument as it was used; `--config` takes it

The state that scores best on a held-out part of the training data (the demo has a file of its own) is kept.
Nothing is selected on the evaluation sets.

Read from top to bottom: arguments, data, adapters and objective, the training loop, the stages of a run, main.
Everything that is not the method stands in common/.
"""

import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor

import train
from common import cli
from common.checkpoints import BestState, accumulation, checkpoint_to_resume, require_same_start
from common.classifiers import (
    Collator,
    Scores,
    conv1d_for_linear,
    count_parameters,
    encode_data,
    final_linear,
    head_modules,
    linear_for_conv1d,
    load_classifier,
    load_tokenizer,
    probe_encoder,
    rescale_outputs,
    run_model,
    start_head,
    training_examples,
)
from common.cli import UserError, option, parse_arguments
from common.exports import classifier_card, export_adapter, link_base, save_merged
from common.labelled import TASKS, Data, contents_of, load_data
from common.layers import find_target_modules
from common.metrics import metric, prediction_rows, predictions, score, score_report
from common.pretrained import weights_digest
from common.ranks import announce_device, choose_device, run_rank, start_ranks
from common.runs import (
    commit,
    config_text,
    held_alone,
    is_unfinished,
    leave_if_done,
    open_output_dir,
    package_versions,
    require_output_dir,
    write_whole,
    written_whole,
)
from common.templates import save_tokenizer
from common.tensors import num_ranks
from common.training import Training, generator_of, num_steps, resolve_shared_arguments
from train import (
    adapter_layers,
    adaptive_factor,
    add_adapters,
    consistency_loss,
    covariance_loss,
    merge_adapters,
    normalized_mse_consistency_loss,
    schedule_factor,
    spectral_loss,
    teacher_confidence,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

ROOT = Path(__file__).resolve().parent
LOGGING_STEPS = 10
HUB_MODEL = "google-bert/bert-large-uncased"
HUB_EXPERIMENT, DEMO_EXPERIMENT = ROOT / "configs/bert_large_sst2.yaml", ROOT / "configs/nlu_demo.yaml"

# Published weights of the NLU regularizers (arXiv 2408.04556 v6 and ICLR 2026; v1 to v5). An argument left at None
# takes its value from here.
FORMULATIONS: dict[str, dict[str, float]] = {
    "iclr2026": {
        "lambda_consistency": 0.15,
        "lambda_diversity": 0.03,
        "lambda_spectral": 0.03,
        "temperature": 2.0,
    },
    "arxiv2024": {
        "lambda_consistency": 1e-4,
        "lambda_diversity": 4e-4,
        "lambda_spectral": 1e-4,
        "temperature": 1.0,
    },
}

# Rates that the study of robustness chose among four by validation, for 600 sentences and MiniLM with a random head.
LEARNING_RATES = {"full": 5e-5, "lora": 2e-3, "pissa": 5e-4, "ba-lora": 5e-4}


# ------------------------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------------------------


@dataclass
class DataArguments:
    """The model, its data, and the output folder."""

    config: str | None = option(
        None, "YAML file with any of these options by name; the command line overrides it", first=True
    )
    model: str | None = option(
        None, "hub name or folder of the pre-trained model; 'demo': the embedded MiniLM", first=True
    )
    model_revision: str | None = option(None, "hub revision of the model")
    task: Literal["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte"] | None = option(
        None, "GLUE task: its fields and metrics, and without --data its data from the hub (nyu-mll/glue)", first=True
    )
    data: str | None = option(
        None, "csv, tsv, jsonl or parquet file to train on; 'demo': the embedded movie reviews", first=True
    )
    test_data: list[str] = option(
        [], "files to score at the end, one score each; none: a tenth of --data is set aside", formerly="eval_data"
    )
    validation_data: str | None = option(
        None, "file to select the best state by; none: a tenth of --data is set aside, of each class in its share"
    )
    fields: list[str] | None = option(
        None,
        "the data's one or two columns of text; numbers count the columns of a file without header, from 0",
        first=True,
    )
    label: str = option("label", "the data's column of labels, by name or number")
    metric: Literal["accuracy", "f1", "macro_f1", "matthews", "pearson", "spearman"] | None = option(
        None, "metric that selects the best state; none: the task's first metric"
    )
    limit: int | None = option(None, "train on the first N examples only", formerly="max_examples")
    max_length: int = option(128, "tokens per example; longer ones are cut")
    output_dir: str = option("output/nlu", "folder for everything this run writes", first=True)
    overwrite: bool = option(False, "replace an output folder that already holds something")
    dry_run: bool = option(False, "print the configuration, the data's classes, parameters and steps, then stop")
    skip_done: bool = option(
        False, "keep a finished run of these settings, replace an unfinished one, refuse if another run is there"
    )


@dataclass
class AdapterArguments(train.AdapterArguments):
    """The part of the model that is trained; every method trains the classifier too."""

    method: Literal["full", "lora", "pissa", "ba-lora"] = option(
        "ba-lora",
        "full fine-tuning, LoRA, PiSSA, or ba-lora: PiSSA with the three terms; the classifier is always trained",
        first=True,
    )
    rank: int = option(8, "adapter rank r", first=True)
    teacher_head: Literal["initial", "probe"] = option(
        "initial",
        "head of the teacher and of the start; initial: the checkpoint's, else random; probe: fitted first",
    )


@dataclass
class RegularizerArguments(train.RegularizerArguments):
    """The three terms, for --method ba-lora only; None: the published value of the formulation."""

    lambda_diversity: float | None = option(None, "weight λ₂ of L_DR, decorrelation of the logits")
    spectral_k: int = option(5, "k of L_SVDR, the leading singular values; acts where k < min(batch, classes)")
    consistency_schedule: Literal["constant", "cosine", "adaptive"] = option(
        "constant", "λ₁ over training; adaptive: by the teacher's confidence on each batch"
    )
    regularizer_schedule: Literal["constant", "two_phase", "linear_warmup", "quadratic_warmup"] = option(
        "constant", "λ₂ and λ₃ over training"
    )


@dataclass
class OptimizationArguments(train.OptimizationArguments):
    """Length and optimizer of the training."""

    epochs: float = option(3.0, "passes over the data", first=True)
    batch_size: int = option(32, "examples per device and micro-batch; L_DR and L_SVDR see one micro-batch", first=True)
    gradient_accumulation: int = option(1, "micro-batches per optimizer step")
    learning_rate: float | None = option(
        None,
        "peak learning rate of AdamW; none: the method's, full 5e-5, lora 2e-3, pissa and ba-lora 5e-4",
        first=True,
    )
    class_weights: Literal["balanced"] | None = option(
        None, "balanced: each class's share of L_task is the same, whatever its number of examples"
    )
    warmup_ratio: float = option(0.06, "part of training over which the learning rate rises")
    lr_scheduler: str = option("linear", "learning-rate schedule after warm-up, a name that transformers knows")
    evals_per_epoch: int = option(1, "validations per epoch; the best state so far is kept")
    patience: int = option(5, "stop after this many validations without a better score")
    seed: int = option(42, "seed of the head, the adapters, dropout and data order")


@dataclass
class InterruptionArguments(train.InterruptionArguments):
    """Checkpoints, and how an interrupted run goes on; a run that ends deletes its checkpoints."""

    save_steps: int = option(500, "optimizer steps between two checkpoints; 0: none, except after a signal")


@dataclass
class Arguments(  # a dataclass takes its bases' fields from the last to the first
    InterruptionArguments, OptimizationArguments, RegularizerArguments, AdapterArguments, DataArguments
):
    """Everything that a run is told."""

    loss_weights = None  # no option: the weight of each class, which `load_data` computes for --class-weights


def resolve_arguments(argv: list[str]) -> Arguments:
    """Reads the command line, chooses the experiment where it names none, and checks what needs no file.

    Raises:
        UserError: a value out of range, or an output folder that holds something.
    """
    args = parse_arguments(Arguments, __doc__, argv)
    if args.task is None and args.data is None:
        if args.config is not None:
            raise UserError(f"{args.config} names neither a task nor data: add --task or --data")
        experiment, reason = default_experiment()
        print(f"{reason}: {experiment.relative_to(ROOT)}", flush=True)
        args = parse_arguments(Arguments, __doc__, ["--config", str(experiment), *argv])
    if args.model is None:
        raise UserError("no --model: a hub name or a folder, or 'demo' for the embedded MiniLM")
    if args.fields is None and args.data != "demo":
        args.fields = list(TASKS[args.task].fields) if args.task else ["sentence"]
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.method]
    resolve_shared_arguments(args, FORMULATIONS)
    cli.require_positive(args, "evals_per_epoch", "patience")
    cli.require_not_negative(args, "weight_decay")
    if args.data == "demo" and (args.task or args.test_data or args.validation_data):
        raise UserError("--data demo has its own sets: leave out --task and --test-data, and --validation-data too")
    if args.data != "demo" and len(args.fields) not in (1, 2):
        raise UserError(f"--fields takes one or two columns of text, not {len(args.fields)}")
    if (args.test_data or args.validation_data) and args.data is None:
        option_name = "--test-data" if args.test_data else "--validation-data"
        raise UserError(f"{option_name} needs --data: without it, --task reads its own splits")
    if (args.skip_done or args.resume) and not args.overwrite:
        leave_if_done(args)
        args.overwrite = not args.resume and is_unfinished(Path(args.output_dir))
    inputs = (args.config, args.model, args.data, args.validation_data, *args.test_data)
    remedy = "name another one, go on with --resume, or use --overwrite"
    require_output_dir(args, args.overwrite or args.resume or args.dry_run, remedy, *inputs)
    return args


def default_experiment() -> tuple[Path, str]:
    """The experiment for a command line that names none, and the reason for the choice."""
    if choose_device().type == "cpu":
        return DEMO_EXPERIMENT, "no CUDA GPU, so the demo instead of BERT-large on SST-2"
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(HUB_MODEL, timeout=10)
    except Exception:  # offline mode, no network and a proxy's page raise different kinds
        return DEMO_EXPERIMENT, "the model hub cannot be reached, so the demo instead of BERT-large on SST-2"
    return HUB_EXPERIMENT, "a CUDA GPU and the model hub"


# ------------------------------------------------------------------------------------------------------------------
# Adapters and objective
# ------------------------------------------------------------------------------------------------------------------


def add_trainable(model: "transformers.PreTrainedModel", args: Arguments) -> "transformers.PreTrainedModel":
    """Makes `model` ready to train by --method, in place: adapters in the encoder, a head that is trained whole."""
    add_adapters(model, args.method, args.rank, args.alpha, args.target_modules)
    for name in head_modules(model):
        model.get_submodule(name).requires_grad_(True)
    return model


def nlu_objective(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, args: Arguments, progress: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = L_task + λ₁·L_CR + λ₂·L_DR + λ₃·L_SVDR over one batch, and its terms. λs of 0 cost nothing.

    Regression: L_task and L_CR are mean squared errors of the predictions; the others are not defined for one column.

    Args:
        logits, teacher_logits: Z_F and Z_P, (N, D); the teacher's are None for methods without regularizers.
        labels: (N,), class numbers, or numbers to predict.
        progress: the fraction of training done, for the schedules.
    """
    regression = logits.shape[1] == 1
    if regression:
        task = F.mse_loss(logits[:, 0], labels.to(logits.dtype))
    else:
        weights = None if args.loss_weights is None else logits.new_tensor(args.loss_weights)
        task = F.cross_entropy(logits, labels, weights, reduction="sum") / len(labels)
    terms = {"task": task}
    if teacher_logits is None:
        return task, terms
    schedule = args.consistency_schedule
    factor = 1.0 if schedule == "adaptive" else schedule_factor(schedule, progress, args.warmup_fraction)
    if schedule == "adaptive" and not regression:
        factor = adaptive_factor(teacher_confidence(teacher_logits))
    loss = task
    if args.lambda_consistency > 0:
        if regression:
            terms["consistency"] = F.mse_loss(logits, teacher_logits)
        elif args.formulation == "arxiv2024":
            terms["consistency"] = normalized_mse_consistency_loss(logits, teacher_logits)
        else:
            terms["consistency"] = consistency_loss(logits, teacher_logits, args.temperature)
        loss = loss + args.lambda_consistency * factor * terms["consistency"]
    factor = schedule_factor(args.regularizer_schedule, progress, args.warmup_fraction)
    if args.lambda_diversity > 0 and not regression:
        terms["diversity"] = covariance_loss(logits)
        loss = loss + args.lambda_diversity * factor * terms["diversity"]
    if args.lambda_spectral > 0 and not regression and args.spectral_k < logits.shape[1]:
        acts = args.spectral_k < len(logits)  # in a last batch of at most k examples the term is the constant -1
        terms["spectral"] = spectral_loss(logits, args.spectral_k, "nuclear") if acts else -logits.new_ones(())
        if acts:
            loss = loss + args.lambda_spectral * factor * terms["spectral"]
    return loss, terms


def note_on_regularizers(args: Arguments, num_classes: int) -> str | None:
    """One line where a regularizer cannot act on this data, with the remedy; None where all do."""
    if args.method != "ba-lora":
        return None
    if num_classes == 1:
        return "note: regression: consistency is a mean squared error of predictions; L_DR and L_SVDR are off"
    if args.lambda_spectral > 0 and args.teacher_head == "probe" and num_classes == 2:
        # The probe's two logits add up to 0, and so do every term's gradients with respect to them.
        return (
            "note: L_SVDR is the constant -1 with every k: a probe's logits on two classes are each other's negative, "
            "and training keeps them so; with --teacher-head initial --spectral-k 1 it acts"
        )
    # A probe's logits on D classes are centred and have rank D − 1, so k = D − 1 covers all singular values.
    rank = min(num_classes - (args.teacher_head == "probe"), args.batch_size)
    if args.lambda_spectral == 0 or args.spectral_k < rank:
        return None
    is_constant = "is the constant -1 and has no gradient"
    if args.spectral_k < min(num_classes, args.batch_size):
        is_constant = "starts as the constant -1, since a probe's logits add up to 0"
    return (
        f"note: L_SVDR with k = {args.spectral_k} on {num_classes} classes {is_constant}; "
        f"--spectral-k {rank - 1} or less acts"
    )


# ------------------------------------------------------------------------------------------------------------------
# The training loop: train.py's, with this objective, and with the best state kept in memory.
# ------------------------------------------------------------------------------------------------------------------


def fit(
    model: "transformers.PreTrainedModel",
    examples: list[dict[str, Any]],
    collate: Collator,
    args: Arguments,
    validate: Callable[[], float] | None = None,
    quiet: bool = False,
    checkpoint: Path | None = None,
    accelerator: "Accelerator | None" = None,
    contents: dict[str, str] | None = None,
) -> tuple[Training, BestState]:
    """Trains `model` (see `add_trainable`) in place.

    Args:
        examples: encoded, with `labels`, and for BA-LoRA `teacher_logits`.
        validate: returns the model's present score. The model ends in its best state, which may be the state before
            training; None: in its last state.
        quiet: no bar, no log and no checkpoints.
        checkpoint: the checkpoint to go on from.
    """
    accelerator, steps = accelerator or start_ranks(args), accumulation(args, checkpoint)
    order = partial(by_length, examples, args.batch_size * steps * accelerator.num_processes, args.seed)
    training = Training(args, accelerator, steps, len(examples), order, quiet, contents)
    best = BestState(args.patience)

    def select() -> None:
        score = validate()
        training.log({"validation": score if math.isfinite(score) else None})
        best.update(score, training.step, model)
        training.is_over |= best.is_vain

    training.extra = best.for_checkpoint
    training.prepare(model, model)
    training.resume(checkpoint)
    if checkpoint is not None:
        best.load(checkpoint)
    with training.underway():
        training.is_over |= best.is_vain
        if validate is not None and checkpoint is None:
            select()
        while not training.is_over:
            rows = training.batches.of_step(training.step)
            batches = [(collate([examples[row] for row in of_batch]), counts) for of_batch, counts in rows]
            # The step's mean is over its examples, on all ranks.
            (num_examples,) = training.begin_step(sum(len(batch["labels"]) for batch, counts in batches if counts))
            for number, (batch, counts) in enumerate(batches):
                batch = training.to_device(batch)
                labels, teacher_logits = batch.pop("labels"), batch.pop("teacher_logits", None)
                share = len(labels) / num_examples
                with training.micro_batch(number, is_last=number == len(batches) - 1):
                    logits = training.model(**batch).logits
                    loss, terms = nlu_objective(logits, teacher_logits, labels, args, training.fraction)
                    training.backward(share * loss, counts)
                terms = {name: share * value.detach() for name, value in terms.items()}
                training.record(terms, batch["attention_mask"].sum(), counts)
                del logits, loss  # their graph would live on through the next forward pass
            norm = training.clip_gradients()
            if training.is_finite(norm):
                training.optimizer.step()
            training.end_step(norm, LOGGING_STEPS)

            if validate is not None and is_validation_due(training, args.evals_per_epoch):
                select()
            training.save_if_due()
    if validate is not None:
        best.put_back(model)
    return training, best


def by_length(examples: list[dict[str, Any]], size: int, seed: int, epoch: int) -> list[int]:
    """An epoch's order: steps of `size` examples of similar length, in each step the longest example first."""
    lengths = [len(example["input_ids"]) for example in examples]
    from transformers.trainer_pt_utils import LengthGroupedSampler

    return list(LengthGroupedSampler(size, lengths=lengths, generator=generator_of(seed, epoch)))


def is_validation_due(training: Training, per_epoch: int) -> bool:
    """Whether one of the epoch's validations falls on the step that was taken; the last step has one too."""
    share = per_epoch / training.batches.steps_per_epoch
    is_due = int(training.step * share + 1e-9) > int((training.step - 1) * share + 1e-9)
    return is_due or training.step >= training.progress.max_steps


# ------------------------------------------------------------------------------------------------------------------
# The stages of a run
# ------------------------------------------------------------------------------------------------------------------


def model_path(args: Arguments) -> str:
    """The hub name or folder of --model; 'demo' is the embedded encoder."""
    if args.model != "demo":
        return args.model
    from data import sentiment

    try:
        return str(sentiment.encoder())
    except (RuntimeError, OSError) as error:
        raise UserError(f"cannot make the demo's encoder: {error}") from error


@dataclass
class Base:
    """The pre-trained model before its weights are read."""

    path: str
    tokenizer: "transformers.PreTrainedTokenizerBase"
    config: "transformers.PretrainedConfig"
    shift: float = 0.0  # shift and unit of the numbers to predict; see Data
    unit: float = 1.0


def inspect_base(args: Arguments, data: Data) -> Base:
    """The model of --model with a classifier for `data`; see `load_tokenizer`. Standardizes numbers to predict, in
    place."""
    path = model_path(args)
    tokenizer, config = load_tokenizer(args, path, data.num_outputs)
    if data.is_regression:
        with torch.device("meta"):
            layer = final_linear(transformers.AutoModelForSequenceClassification.from_config(config))
        data.standardize(centre=layer.bias is not None)  # a layer without bias cannot restore the mean
    else:
        config.id2label = dict(enumerate(data.class_names))
        config.label2id = {name: number for number, name in enumerate(data.class_names)}
    return Base(path, tokenizer, config, data.shift, data.unit)


def load_pretrained(args: Arguments, base: Base, device: torch.device) -> "transformers.PreTrainedModel":
    """The model before training, on its device: the teacher, and the encoder of the linear probes."""
    model = load_classifier(base.path, base.config, args.seed, args.model_revision)
    model.to(device)
    if model.has_trained_head:  # the trained head predicts in the units of the file
        rescale_outputs(model, -base.shift / base.unit, 1 / base.unit)
    if num_ranks() == 1 or dist.get_rank() == 0:
        if model.new_modules:
            print(f"note: {args.model} has no {', '.join(model.new_modules)}: random, and trained with the classifier")
        if model.head_note:
            print(model.head_note)
    return model


def validation_score(model: "transformers.PreTrainedModel", data: Data, collator: Collator) -> float:
    """The first metric; −∞ if a logit is NaN or Inf, or if the model predicts one number for all examples."""
    logits = run_model(model, data.validation.examples, collator).logits
    if not np.isfinite(logits).all():
        return -math.inf
    if data.is_regression and np.ptp(logits) < 1e-6:  # in standardized units; the metric would correlate with noise
        return -math.inf
    return metric(data.metrics[0], predictions(logits), np.asarray(data.validation.labels))


def evaluate(
    model: "transformers.PreTrainedModel", data: Data, collator: Collator, args: Arguments, scores: Scores
) -> None:
    """Adds the trained model's scores to those of the probes, and writes predictions.jsonl."""
    rows = []
    for name, split in data.tests.items():
        logits = data.in_units(run_model(model, split.examples, collator, title=name).logits)
        scores[name][args.method] = score(logits, split.labels, data.metrics, data.class_names)
        rows += prediction_rows(name, logits, split.labels, data.class_names)
    if num_ranks() == 1 or dist.get_rank() == 0:
        write_whole(Path(args.output_dir) / "predictions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def export(model: "transformers.PreTrainedModel", args: Arguments, base: Base, conv1d: list[str]) -> None:
    """Writes adapter/ and merged/, whole or not at all. They predict in the units of the file; the adapters are merged
    away in `model`.

    Args:
        conv1d: the layers that `linear_for_conv1d` has replaced.

    Raises:
        RunStopped: the files cannot be written.
    """
    rescale_outputs(model, base.shift, base.unit)
    output_dir, source = Path(args.output_dir), base.path
    with written_whole(output_dir, "give the same command with --resume") as folder:
        if args.method != "full":
            layers, head = adapter_layers(model), {name: model.get_submodule(name) for name in head_modules(model)}
            if Path(base.path).is_dir():
                source = str((output_dir / "adapter" / "base").resolve())
                link_base(folder / "adapter" / "base", Path(base.path), model.config)
            target = (folder / "adapter", source, args.target_modules, "SEQ_CLS", head)
            rank = export_adapter(layers, *target, revision=args.model_revision)
            card = classifier_card(args, rank, model.config, model.replaces_head)
            (folder / "adapter" / "README.md").write_text(card)
            save_tokenizer(base.tokenizer, folder / "adapter")
        merge_adapters(model)
        conv1d_for_linear(model, conv1d)
        save_merged(model, folder / "merged", torch.float32)
        save_tokenizer(base.tokenizer, folder / "merged")


# ------------------------------------------------------------------------------------------------------------------
# Main
# ------------------------------------------------------------------------------------------------------------------


def run(args: Arguments, data: Data, started: float) -> None:
    """A whole run: probes, training, evaluation, export. --output-dir is this run's alone."""
    base = inspect_base(args, data)
    encode_data(data, base.tokenizer, base.config, args.max_length)
    checkpoint = checkpoint_to_resume(args)
    contents = {"base model": weights_digest(base.path, base.config), "data": contents_of(data)}
    accelerator = start_ranks(args)
    require_same_start(args, checkpoint, contents)
    is_main = accelerator.is_main_process
    say = print if is_main else lambda *_, **__: None
    if note := note_on_regularizers(args, data.num_outputs):
        say(note, flush=True)
    model = load_pretrained(args, base, accelerator.device)
    if is_main:
        open_output_dir(args, checkpoint)
    say(data.sizes(args.model), flush=True)
    collator = Collator.of(base.tokenizer, base.config)

    outputs, probe, scores = probe_encoder(model, data, collator)
    teacher_logits = start_head(model, args, probe, outputs)
    examples = training_examples(
        data.train.examples, data.train.labels, teacher_logits if args.method == "ba-lora" else None
    )
    conv1d = [] if args.method == "full" else linear_for_conv1d(model)
    add_trainable(model, args)
    adapter_parameters, head_parameters = count_parameters(model)
    say(f"{args.method}: {adapter_parameters:,} trained parameters and {head_parameters:,} of the head", flush=True)
    validate = partial(validation_score, model, data, collator)
    training, best = fit(model, examples, collator, args, validate, False, checkpoint, accelerator, contents)

    evaluate(model, data, collator, args, scores)
    if not is_main:
        return
    summary = {
        "results": scores,
        "validation": {data.metrics[0]: best.best, "step": best.best_step},
        **training.summary(),
        "adapter_parameters": adapter_parameters,
        "head_parameters": head_parameters,
        "class_names": data.class_names,
        "f1_class": data.f1_class,
        "notes": data.notes,
        "examples": {"train": len(data.train), "validation": len(data.validation)},
        "arguments": asdict(args),
        "versions": package_versions(),
        "commit": commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "seconds": round(time.time() - started, 1),
    }
    export(model, args, base, conv1d)
    # results.json is written last: a run that has it is finished and is not resumed.
    write_whole(Path(args.output_dir) / "results.json", json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(Path(args.output_dir) / "checkpoints", ignore_errors=True)
    print(score_report(summary, data, args))


def dry_run(args: Arguments, data: Data) -> str:
    """Describes a run with these arguments: configuration, examples and classes, parameters, steps."""
    base = inspect_base(args, data)
    notes = [note] if (note := note_on_regularizers(args, data.num_outputs)) else []
    encode_data(data, base.tokenizer, base.config, args.max_length)
    lengths = [len(example["input_ids"]) for example in data.train.examples]
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(base.config)
    if args.method != "full":
        linear_for_conv1d(model)
    trained, head = count_parameters(model)
    if args.method != "full":
        layers = find_target_modules(model, args.target_modules, args.rank).values()
        trained = sum(args.rank * sum(layer.weight.shape) for layer in layers)
    per_step = args.batch_size * args.gradient_accumulation * num_ranks()
    steps = num_steps(args, len(data.train), num_ranks())
    return "\n".join(
        [
            data.sizes(args.model),
            *notes,
            f"tokens: {sum(lengths) / len(lengths):.0f} on average",
            f"parameters: {trained:,} trained and {head:,} of the head",
            f"steps: {steps} of {per_step} examples",
            "",
            config_text(args),
        ]
    )


def main(argv: list[str]) -> None:
    started = time.time()
    args = resolve_arguments(argv)
    if not args.dry_run:
        announce_device()
    data = load_data(args)
    if args.dry_run:
        print(dry_run(args, data))
        return
    with held_alone(Path(args.output_dir)):
        run(args, data, started)


if __name__ == "__main__":
    run_rank(main)
