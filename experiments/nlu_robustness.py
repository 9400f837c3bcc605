#!/usr/bin/env python3
"""The paper's claim, measured: is BA-LoRA more robust to label noise, class imbalance and a change of domain?

    python experiments/nlu_robustness.py            tunes, runs every cell that results.jsonl lacks; then the report
    python experiments/nlu_robustness.py --report   writes the page from the existing runs

MiniLM, movie-review sentences of at most 24 tokens (data/sentiment.py). One cell is one training of 600 sentences, 3
epochs, r = 8, fp32 on the CPU, by one of full, lora, pissa and ba-lora, from one of two heads:
    initial     random, as published
    probe       a linear probe of the frozen encoder, fitted on the same (noisy, imbalanced) training labels

and in one of six conditions, with 5 seeds:
    noise 0, 10, 20, 40     as many percent of the training labels are flipped; both classes are equally frequent
    imbalance 10, 50        1 positive sentence to 10 or 50 negative ones; no label is flipped

Every condition is tested on the same balanced, clean sentences: 600 movie reviews, and 300 of each other domain.

What is compared with what. A seed fixes the training sentences, the flipped labels, the random head and the order of
the batches for all methods, so differences are taken seed by seed. The head matters to every method, not only as
BA-LoRA's teacher: BA-LoRA is compared with the others from the *same* head. BA-LoRA has the published weights λ and
T = 2, and k = 1, because the published k = 5 has no effect on two classes.

Many epochs. From both heads, with 20 % noise, BA-LoRA's start is also trained for LONG_EPOCHS epochs, without any term
and with L_DR alone. By then the model has learnt wrong labels by heart, which a term on the predictions might prevent.
Beside them stands the rival that costs no training: logits divided by a temperature that clean validation sentences
choose.

Selection. Each method and head gets the same number of learning rates and of runs to choose among them: four, on two
seeds of their own, balanced and without noise, by accuracy on validation sentences. The test sentences take no part.
These runs are kept among the results, as phase "tuning". The grid was moved up after a pilot of 4 runs, and widened
downwards after 16, because the best rates stood at its edge; no test score had been computed by then.

Results are appended one line per run, and a cell that is there is not run again: stop and start it as you like.
On two cores, two processes of one thread each are fastest.
"""

import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml

import finetune_bert_l_sst2 as nlu
from common.classifiers import apply_probe, encode, final_linear, fit_probe, load_classifier, run_model, set_head
from common.cli import UserError, option, parse_arguments, run_script
from common.intervals import by_seed, difference, holm, markdown, paired_interval, pyplot, save_picture, spread
from common.labelled import demo_data
from common.metrics import calibration_error, score, softmax
from experiments import study

HERE = Path(__file__).parent / "robustness"
METHODS = ("full", "lora", "pissa", "ba-lora")
HEADS = ("initial", "probe")
CONDITIONS = ("noise 0", "noise 10", "noise 20", "noise 40", "imbalance 10", "imbalance 50")
SEEDS, TUNING_SEEDS = (0, 1, 2, 3, 4), (100, 101)
LEARNING_RATES = {"full": (2e-5, 5e-5, 1e-4, 2e-4), "lora": (5e-4, 1e-3, 2e-3, 4e-3)}
LEARNING_RATES |= {"pissa": (2e-4, 5e-4, 1e-3, 2e-3), "ba-lora": (2e-4, 5e-4, 1e-3, 2e-3)}
MAX_TOKENS, NUM_TRAIN, NUM_TEST, NUM_DOMAIN, NUM_VALIDATION = 24, 600, 600, 300, 300
SETTINGS = {"epochs": 3, "batch_size": 16, "rank": 8, "spectral_k": 1, "warmup_ratio": 0.06, "lr_scheduler": "linear"}
LONG_EPOCHS = 30
PROBE_PENALTY = 0.01
TERMS = {"CR": "lambda_consistency", "DR": "lambda_diversity", "SVDR": "lambda_spectral"}


@dataclass
class Arguments:
    """The runs, and the places of results and page."""

    results: str = option("experiments/results/nlu_robustness.jsonl", "file that runs are appended to")
    processes: int = option(2, "how many runs at a time, one thread each")
    report: bool = option(False, "run nothing; write the page from the existing runs")
    page: str = option("docs/results/nlu-robustness.md", "the page; its pictures go beside it")


# ------------------------------------------------------------------------------------------------------------------
# One cell
# ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    phase: str  # tuning, study, terms, auc, long
    seed: int
    condition: str
    method: str
    head: str
    learning_rate: float
    terms: str = "CR+DR+SVDR"  # those of BA-LoRA that are on; rows of before they could be off lack it


@dataclass
class Pool:
    """Encoded sentences of one split with the frozen encoder's features; each process makes its own, once."""

    examples: list[dict]
    labels: np.ndarray
    features: np.ndarray


POOLS: dict[str, Pool] = {}
PARTS: dict[str, Any] = {}


def prepare(num_threads: int = 1) -> None:
    """Reads the demo's sentences, drops the long ones, and runs the frozen encoder on them."""
    torch.set_num_threads(num_threads)
    transformers.logging.disable_progress_bar()
    data = demo_data()
    args = nlu.Arguments(model="demo", max_length=MAX_TOKENS + 1)
    path = nlu.model_path(args)
    tokenizer, config = nlu.load_tokenizer(args, path, len(data.class_names))
    collator = nlu.Collator.of(tokenizer, config)
    PARTS.update(path=path, config=config, collator=collator, data=data, targets=args.target_modules)
    model = load_classifier(path, config, seed=0)
    sizes = {"train": None, "validation": NUM_VALIDATION} | dict.fromkeys(data.tests, NUM_DOMAIN) | {"movies": NUM_TEST}
    for name, split in {"train": data.train, "validation": data.validation, **data.tests}.items():
        examples = encode(tokenizer, config, split.texts, MAX_TOKENS + 1)
        labels = np.array(split.labels)
        short = np.array([len(example["input_ids"]) <= MAX_TOKENS for example in examples])
        # As many of each class, the first in the file: their order is that of the source, or of a hash.
        half = [np.flatnonzero(short & (labels == c))[: sizes[name] and sizes[name] // 2] for c in (0, 1)]
        rows = np.sort(np.concatenate(half))
        chosen = [examples[row] for row in rows]
        POOLS[name] = Pool(chosen, labels[rows], run_model(model, chosen, collator).features)


def training_set(condition: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training pool and their labels, with the condition's noise or imbalance."""
    kind, _, amount = condition.partition(" ")
    rng = np.random.default_rng([seed, 2408])
    positive_share = 1 / (1 + int(amount)) if kind == "imbalance" else 0.5
    num_positive = round(NUM_TRAIN * positive_share)
    pool = POOLS["train"].labels
    rows = [rng.permutation(np.flatnonzero(pool == c)) for c in (0, 1)]
    rows = np.concatenate([rows[0][: NUM_TRAIN - num_positive], rows[1][:num_positive]])
    labels = pool[rows].copy()
    if kind == "noise":
        # One permutation: every label that is flipped at 10 % is flipped at 20 % too.
        flipped = rng.permutation(NUM_TRAIN)[: NUM_TRAIN * int(amount) // 100]
        labels[flipped] = 1 - labels[flipped]
    return rows, labels


def run_cell(cell: Cell) -> dict[str, Any]:
    """Trains once; the row for the results file. A cell of method `probe` trains nothing: the probe itself."""
    started = time.monotonic()
    rows, labels = training_set(cell.condition, cell.seed)
    names = {"tuning": ["validation"], "study": list(PARTS["data"].tests)}.get(cell.phase, ["movies"])
    if cell.method == "probe":
        probe = probe_of(rows, labels)
        logits = {name: apply_probe(probe, POOLS[name].features) for name in names}
    else:
        logits = train_cell(cell, rows, labels, names)
    scores = {}
    for name in names:
        data = PARTS["data"]
        found = score(logits[name], POOLS[name].labels.tolist(), data.metrics, data.class_names)
        scores[name] = {
            "accuracy": found["accuracy"]["value"],
            "class_accuracy": [share["value"] for share in found["class_accuracy"].values()],
            "calibration_error": round(found["calibration_error"], 5),
            "auc": found["auc"]["value"],
            "margin": float(np.abs(logits[name][:, 1] - logits[name][:, 0]).mean()),  # |z₂ − z₁|, the mean
        }
    if cell.phase == "long":
        scores["movies"] |= after_many_epochs(logits, rows, labels)
    settings = settings_of(cell) | {"num_train": NUM_TRAIN, "max_tokens": MAX_TOKENS}
    return cell.__dict__ | {"scores": scores, "settings": settings, "seconds": round(time.monotonic() - started, 1)}


def settings_of(cell: Cell) -> dict[str, Any]:
    return SETTINGS | ({"epochs": LONG_EPOCHS} if cell.phase == "long" else {})


def after_many_epochs(logits: dict[str, np.ndarray], rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The share of the wrong training labels that the model gives back, and its calibration error on movie reviews when
    its logits are divided by the temperature of the lowest cross-entropy on the validation sentences."""
    truth, validation = POOLS["train"].labels[rows], POOLS["validation"].labels.tolist()

    def cross_entropy(temperature: float) -> float:
        log_p = np.log(softmax(logits["validation"] / temperature))
        return -log_p[np.arange(len(validation)), validation].mean()

    temperature = min(np.geomspace(0.25, 32, 57).tolist(), key=cross_entropy)
    error = calibration_error(logits["movies"] / temperature, POOLS["movies"].labels)
    learnt = logits["trained"].argmax(axis=1)[labels != truth] == labels[labels != truth]
    return {"learnt": float(learnt.mean()), "tempered": round(error, 5), "temperature": temperature}


def train_cell(cell: Cell, rows: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """The trained model's logits on the evaluation pools `names`."""
    with tempfile.TemporaryDirectory() as folder:
        model, examples, args = start(cell, rows, labels, folder)
        nlu.fit(model, examples, PARTS["collator"], args, quiet=True)
        scored = {name: POOLS[name].examples for name in names}
        if cell.phase == "long":
            scored |= {"validation": POOLS["validation"].examples}
            scored |= {"trained": [POOLS["train"].examples[row] for row in rows]}
        return {name: run_model(model, of_name, PARTS["collator"]).logits for name, of_name in scored.items()}


def start(cell: Cell, rows: np.ndarray, labels: np.ndarray, folder: str) -> tuple[Any, list[dict], nlu.Arguments]:
    """The model, the examples and the arguments that the cell's training starts with."""
    args = nlu.Arguments(
        method=cell.method,
        target_modules=PARTS["targets"],
        alpha=float(SETTINGS["rank"]),
        learning_rate=cell.learning_rate,
        seed=cell.seed,
        output_dir=folder,
        **nlu.FORMULATIONS["iclr2026"],
        **settings_of(cell),
    )
    for term, weight in TERMS.items():
        if term not in cell.terms.split("+"):
            setattr(args, weight, 0.0)
    model = load_classifier(PARTS["path"], PARTS["config"], cell.seed)
    if cell.head == "probe":
        set_head(model, probe_of(rows, labels))
    head = final_linear(model)
    teacher_logits = apply_probe((head.weight.detach(), head.bias.detach()), POOLS["train"].features[rows])
    examples = nlu.training_examples(
        [POOLS["train"].examples[row] for row in rows],
        labels.tolist(),
        teacher_logits if cell.method == "ba-lora" else None,
    )
    return nlu.add_trainable(model, args), examples, args


def probe_of(rows: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """A probe on the given labels, flipped ones included. Its penalty is fixed: no clean labels could choose it."""
    features = POOLS["train"].features[rows]
    return fit_probe(features, labels.tolist(), features, labels.tolist(), penalties=(PROBE_PENALTY,))


# ------------------------------------------------------------------------------------------------------------------
# All cells
# ------------------------------------------------------------------------------------------------------------------


def tuning_cells() -> list[Cell]:
    return [
        Cell("tuning", seed, CONDITIONS[0], method, head, learning_rate)
        for seed, head, method in itertools.product(TUNING_SEEDS, HEADS, METHODS)
        for learning_rate in LEARNING_RATES[method]
    ]


def study_cells(chosen: dict[tuple[str, str], float]) -> list[Cell]:
    """All conditions and methods of the first seed, then of the second. So an interrupted study has whole seeds."""
    cells = []
    for seed, condition in itertools.product(SEEDS, CONDITIONS):
        cells.append(Cell("study", seed, condition, "probe", "probe", 0.0))
        cells += [
            Cell("study", seed, condition, method, head, chosen[method, head])
            for head, method in itertools.product(HEADS, METHODS)
        ]
    return cells


def terms_cells(chosen: dict[tuple[str, str], float]) -> list[Cell]:
    """Every combination of BA-LoRA's terms at BA-LoRA's rate; and AUC where accuracy says nothing.

    From the probe head L_SVDR is constant on two classes. There its four combinations without it are run with one seed,
    which shows that they are the same.
    """
    combinations = ["+".join(names) or "none" for count in range(4) for names in itertools.combinations(TERMS, count)]

    def cells(head: str) -> list[Cell]:
        return [
            Cell("terms", seed, condition, "ba-lora", head, chosen["ba-lora", head], terms)
            for seed, condition, terms in itertools.product(SEEDS, ("noise 0", "noise 20"), combinations)
            if head == "initial" or seed == SEEDS[0] or "SVDR" in terms
        ]

    again = [
        Cell("auc", seed, "imbalance 50", method, "probe", chosen[method, "probe"])
        for seed, method in itertools.product(SEEDS, METHODS)
    ]
    return [*cells("probe"), *again, *cells("initial")]


def long_cells(chosen: dict[tuple[str, str], float]) -> list[Cell]:
    return [
        Cell("long", seed, "noise 20", "ba-lora", head, chosen["ba-lora", head], terms)
        for seed, head, terms in itertools.product(SEEDS, HEADS, ("none", "DR"))
    ]


def cell_of(row: dict[str, Any]) -> Cell:
    return Cell(**{field.name: row[field.name] for field in dataclasses.fields(Cell) if field.name in row})


def read_results(path: Path) -> dict[Cell, dict[str, Any]]:
    return {cell_of(row): row for row in study.read_rows(path)}


def select(rows: dict[Cell, dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Each method's and head's learning rate with the highest mean validation accuracy; of equals the lower one."""

    def mean(method: str, head: str, rate: float) -> float:
        cells = [Cell("tuning", seed, CONDITIONS[0], method, head, rate) for seed in TUNING_SEEDS]
        return statistics.mean(rows[cell]["scores"]["validation"]["accuracy"] for cell in cells)

    return {
        (method, head): max(LEARNING_RATES[method], key=lambda rate, m=method, h=head: (mean(m, h, rate), -rate))
        for method, head in itertools.product(METHODS, HEADS)
    }


def describe(row: dict[str, Any]) -> str:
    """A run in a few words, for the terminal."""
    accuracy = next(iter(row["scores"].values()))["accuracy"]
    name = f"{row['seed']} {row['condition']} {row['method']}/{row['head']} {row['learning_rate']:g} {row['terms']}"
    return f"{name}: {accuracy:.3f}, {row['seconds']:.0f} s"


def run_all(cells: list[Cell], path: Path, processes: int) -> None:
    study.run_missing([[cell] for cell in cells], path, processes, run_cell, prepare, cell_of, describe)


# ------------------------------------------------------------------------------------------------------------------
# Report
# ------------------------------------------------------------------------------------------------------------------


def values(rows: dict[Cell, dict], condition: str, method: str, head: str, name: str, domain: str) -> dict[int, float]:
    """A score of one condition and method by seed, in percent. name: accuracy, minority, calibration_error."""
    found = {}
    for cell, row in rows.items():
        if (cell.phase, cell.condition, cell.method, cell.head) == ("study", condition, method, head):
            scores = row["scores"][domain]
            found[cell.seed] = 100 * (scores["class_accuracy"][1] if name == "minority" else scores[name])
    return found


def tables(rows: dict[Cell, dict[str, Any]]) -> dict[str, str]:
    """Every table of the page by its name there."""
    counts = [sum(cell.phase == phase for cell in rows) for phase in ("study", "tuning", "terms", "auc", "long")]
    domains = list(next(row for cell, row in rows.items() if cell.phase == "study")["scores"])
    by_condition = {condition: (condition, domains[0]) for condition in CONDITIONS}
    imbalances = {name: column for name, column in by_condition.items() if name.startswith("imb")}
    by_domain, noisy_domains = ({domain: (at, domain) for domain in domains} for at in ("noise 0", "noise 20"))
    return {
        "counts": (
            "{} of the comparison, {} for the learning rates, {} of the terms one by one, {} for AUC, {} of many epochs"
        ).format(*counts),
        "accuracy": table_of_scores(rows, "accuracy", by_condition),
        "minority": table_of_scores(rows, "minority", imbalances),
        "domains": table_of_scores(rows, "accuracy", by_domain),
        "noisy_domains": table_of_scores(rows, "accuracy", noisy_domains),
        "calibration": table_of_scores(rows, "calibration_error", by_condition),
        "accuracy_differences": table_of_differences(rows, "accuracy", by_condition),
        "domain_differences": table_of_differences(rows, "accuracy", by_domain),
        "calibration_differences": table_of_differences(rows, "calibration_error", by_condition),
        "losses": table_of_losses(rows),
        "loss_differences": table_of_loss_differences(rows),
        "terms_seeds": ", ".join(
            f"{len(effect(rows, 'accuracy', head, OF_TERMS[1], 'CR'))} of {len(SEEDS)} from the {head} head"
            for head in ("probe", "initial")
        ),
        "terms": table_of_terms(rows),
        "effects": table_of_effects(rows),
        "joint_effects": table_of_joint_effects(rows),
        "predictions": table_of_predictions(rows),
        "auc": table_of_auc(rows),
        "long": table_of_many_epochs(rows),
        "long_predictions": table_of_long_predictions(rows),
    }


def page_text(rows: dict[Cell, dict[str, Any]]) -> str:
    """The page: experiments/robustness/page.md with its tables."""
    return study.filled_page(HERE / "page.md", tables(rows))


Columns = dict[str, tuple[str, str]]  # condition and domain of each
TITLES = {f"{method}, {head} head": (method, head) for method, head in itertools.product(METHODS, HEADS)}
TITLES |= {"linear probe alone": ("probe", "probe")}
OTHERS = {f"− {other}, {head} head": (other, head) for head, other in itertools.product(HEADS, METHODS[:-1])}


def grid(title: str, rows: dict[str, tuple], columns: dict[str, tuple], cell: Callable[..., str]) -> str:
    """A table with the cell of every row and column, which are both given to `cell` one part after the other."""
    body = [[name, *(cell(*row, *column) for column in columns.values())] for name, row in rows.items()]
    return markdown([[title, *columns], *body])


def table_of_scores(rows: dict[Cell, dict[str, Any]], name: str, columns: Columns) -> str:
    """A row per method and head."""

    def cell(method: str, head: str, condition: str, domain: str) -> str:
        return spread(values(rows, condition, method, head, name, domain).values(), 1, "not run")

    return grid("", TITLES, columns, cell)


def table_of_differences(rows: dict[Cell, dict[str, Any]], name: str, columns: Columns) -> str:
    """BA-LoRA minus each other method from the same head."""

    def cell(other: str, head: str, condition: str, domain: str) -> str:
        ours, theirs = (values(rows, condition, method, head, name, domain) for method in ("ba-lora", other))
        return study.paired_difference(ours, theirs)

    return grid("", OTHERS, columns, cell)


# A method's loss of accuracy from clean labels to others, pooled over the levels.
LEVELS = {"noise 10, 20, 40": CONDITIONS[1:4], "imbalance 10, 50": CONDITIONS[4:]}


def losses(rows: dict[Cell, dict], method: str, head: str, conditions: tuple[str, ...]) -> dict[int, float]:
    """Accuracy on clean labels minus the mean accuracy over `conditions`, by seed that has them all, in points."""
    clean, *others = (values(rows, c, method, head, "accuracy", "movies") for c in (CONDITIONS[0], *conditions))
    common = sorted(set(clean).intersection(*others))
    return {seed: clean[seed] - statistics.mean(other[seed] for other in others) for seed in common}


def table_of_losses(rows: dict[Cell, dict[str, Any]]) -> str:
    """A row per method and head; a column per level, and the levels pooled."""
    columns = {condition: (condition,) for condition in CONDITIONS[1:]} | LEVELS

    def cell(method: str, head: str, *at: str) -> str:
        return spread(losses(rows, method, head, at).values(), 1, "not run")

    return grid("", TITLES, columns, cell)


def with_holm(title: list[str], differences: list[list[dict[int, float]]], names: list[str]) -> str:
    """A row per list of differences by seed: each mean with its interval, and Holm's p over the whole table."""
    from scipy import stats

    flat = [list(of_seeds.values()) for row in differences for of_seeds in row if len(of_seeds) > 1]
    adjusted = iter(holm([float(stats.ttest_1samp(values, 0.0).pvalue) for values in flat]))
    body = [
        [
            name,
            *(
                study.paired_difference(d, dict.fromkeys(d, 0.0))
                + (f", p = {next(adjusted):.3f}" if len(d) > 1 else "")
                for d in row
            ),
        ]
        for name, row in zip(names, differences, strict=True)
    ]
    return markdown([title, *body])


def table_of_loss_differences(rows: dict[Cell, dict[str, Any]]) -> str:
    """BA-LoRA's loss of accuracy minus that of another method from the same head."""
    differences = [
        [by_seed(*(losses(rows, method, head, at) for method in ("ba-lora", other))) for at in LEVELS.values()]
        for other, head in OTHERS.values()
    ]
    return with_holm(["", *LEVELS], differences, list(OTHERS))


MEASURES = {"calibration_error": "calibration error", "accuracy": "accuracy", "auc": "AUC", "margin": "margin"}
OF_TERMS = ("noise 0", "noise 20")


def of_terms(rows: dict[Cell, dict], measure: str, head: str, condition: str) -> dict[frozenset, dict[int, float]]:
    """A measure by the terms that were on, and by seed: percent, the margin as it is."""
    found: dict[frozenset, dict[int, float]] = {}
    for cell, row in rows.items():
        if (cell.phase, cell.head, cell.condition) == ("terms", head, condition):
            value = row["scores"]["movies"][measure] * (1 if measure == "margin" else 100)
            found.setdefault(frozenset(cell.terms.split("+")) - {"none"}, {})[cell.seed] = value
    return found


def effect(
    rows: dict[Cell, dict], measure: str, head: str, condition: str, term: str, given: str | None = None
) -> dict[int, float]:
    """With `term` minus without it, by seed: the mean over the other terms' combinations, or with `given` alone. From
    the probe head, where L_SVDR is constant, it is always on. Seeds that lack a run are left out."""
    found = of_terms(rows, measure, head, condition)
    always = {"SVDR"} if head == "probe" else set()
    free = sorted(TERMS.keys() - always - {term})
    others = [{given}] if given else [set(c) for n in range(len(free) + 1) for c in itertools.combinations(free, n)]
    pairs = [(found.get(frozenset(o | always | {term}), {}), found.get(frozenset(o | always), {})) for o in others]
    seeds = set.intersection(*(set(part) for pair in pairs for part in pair))
    return {seed: statistics.mean(on[seed] - off[seed] for on, off in pairs) for seed in sorted(seeds)}


def heads_of_terms(rows: dict[Cell, dict]) -> list[str]:
    """The heads from which two whole seeds have run."""
    return [head for head in ("probe", "initial") if len(effect(rows, "accuracy", head, OF_TERMS[1], "CR")) > 1]


def table_of_terms(rows: dict[Cell, dict[str, Any]]) -> str:
    """A row per head and combination of terms."""
    body = []
    for head in heads_of_terms(rows):
        combinations = sorted(of_terms(rows, "accuracy", head, OF_TERMS[1]), key=lambda on: (len(on), sorted(on)))
        for on in combinations:
            cells = [
                spread(of_terms(rows, measure, head, condition)[on].values(), 1)
                for measure, condition in itertools.product(MEASURES, OF_TERMS)
            ]
            names = ", ".join(f"L_{name}" for name in TERMS if name in on) or "none"
            body.append([head, names, str(len(of_terms(rows, "accuracy", head, OF_TERMS[1])[on])), *cells])
    columns = [f"{name}, {condition}" for name, condition in itertools.product(MEASURES.values(), OF_TERMS)]
    return markdown([["head", "terms", "seeds", *columns], *body])


def table_of_effects(rows: dict[Cell, dict[str, Any]]) -> str:
    """A row per head and term: its effect on each measure, Holm's p within the measure."""
    tables_ = []
    for measure, title in MEASURES.items():
        names, differences = [], []
        for head in heads_of_terms(rows):
            for term in ("CR", "DR") if head == "probe" else TERMS:
                names.append(f"L_{term}, {head} head")
                differences.append([effect(rows, measure, head, condition, term) for condition in OF_TERMS])
        tables_.append(with_holm([title, *OF_TERMS], differences, names))
    return "\n\n".join(tables_)


def table_of_joint_effects(rows: dict[Cell, dict[str, Any]]) -> str:
    """The effect of L_CR on the calibration error where L_DR is on, and of L_DR where L_CR is on."""

    def cell(head: str, term: str, given: str, condition: str) -> str:
        found = effect(rows, "calibration_error", head, condition, term, given)
        return study.paired_difference(found, dict.fromkeys(found, 0.0))

    names = {
        f"L_{term} given L_{given}, {head} head": (head, term, given)
        for head, (term, given) in itertools.product(heads_of_terms(rows), (("CR", "DR"), ("DR", "CR")))
    }
    return grid("calibration error", names, {condition: (condition,) for condition in OF_TERMS}, cell)


def table_of_predictions(rows: dict[Cell, dict[str, Any]]) -> str:
    """Each prediction of experiments/robustness/predictions.yaml beside its outcome."""
    found = {}
    for told in yaml.safe_load((HERE / "predictions.yaml").read_text())["predictions"]:
        where = (told["measure"], told["head"], told["condition"], told["term"], told.get("given"))
        given = f" given L_{told['given']}" if "given" in told else ""
        name = f"{MEASURES[told['measure']]}: L_{told['term']}{given}, {told['head']} head, {told['condition']}"
        found[name] = (told["expect"], effect(rows, *where))
    return compared(found)


def compared(predictions: dict[str, tuple[str, dict[int, float]]]) -> str:
    """A row per effect: the place where its interval was predicted to lie, and its differences by seed."""
    body = []
    for name, (expected, of_seed) in predictions.items():
        came, differences = ["not run", ""], list(of_seed.values())
        if len(differences) > 1:
            mean, half = paired_interval(differences)
            place = "below 0" if mean + half < 0 else "above 0" if mean - half > 0 else "around 0"
            came = [difference(differences, 2), "yes" if place == expected else "no"]
        body.append([name, expected, *came])
    return markdown([["effect", "predicted", "came", "as predicted"], *body])


def table_of_auc(rows: dict[Cell, dict[str, Any]]) -> str:
    """Accuracy and AUC, 1 positive sentence to 50, of the seeds that all methods have run."""
    by_method: dict[str, dict[int, dict]] = {method: {} for method in METHODS}
    for cell, row in rows.items():
        if cell.phase == "auc":
            by_method[cell.method][cell.seed] = row["scores"]["movies"]
    seeds, body = set.intersection(*map(set, by_method.values())), []
    for method, of_seed in by_method.items():
        found = [of_seed[seed] for seed in sorted(seeds)]
        cells = [spread([100 * one[name] for one in found], 1, "not run") for name in ("accuracy", "auc")]
        body.append([f"{method}, probe head", str(len(found)), *cells])
    return markdown([["", "seeds", "accuracy", "AUC"], *body])


OF_LONG = MEASURES | {"learnt": "wrong labels learnt", "tempered": "calibration error, tempered"}


def of_long(rows: dict[Cell, dict], head: str, terms: str, measure: str) -> dict[int, float]:
    """A measure after many epochs, by seed: percent, the margin as it is."""
    cells = {cell.seed: cell for cell in rows if (cell.phase, cell.head, cell.terms) == ("long", head, terms)}
    unit = 1 if measure == "margin" else 100
    return {seed: rows[cell]["scores"]["movies"][measure] * unit for seed, cell in sorted(cells.items())}


def table_of_many_epochs(rows: dict[Cell, dict[str, Any]]) -> str:
    """A row per head: without terms, with L_DR, and the difference by seed."""
    body = []
    for head in HEADS:
        found = {measure: [of_long(rows, head, terms, measure) for terms in ("none", "DR")] for measure in OF_LONG}
        for number, name in enumerate(("no term", "L_DR")):
            cells = [spread(of_seed[number].values(), 1, "not run") for of_seed in found.values()]
            body.append([f"{name}, {head} head", *cells])
        differences = [study.paired_difference(with_it, without) for without, with_it in found.values()]
        body.append([f"L_DR − no term, {head} head", *differences])
    return markdown([["", *OF_LONG.values()], *body])


def table_of_long_predictions(rows: dict[Cell, dict[str, Any]]) -> str:
    told = yaml.safe_load((HERE / "predictions.yaml").read_text())["many_epochs"]
    return compared(
        {
            f"{OF_LONG[one['measure']]}: L_DR, {one['head']} head": (
                one["expect"],
                by_seed(*(of_long(rows, one["head"], terms, one["measure"]) for terms in ("DR", "none"))),
            )
            for one in told
        }
    )


# Okabe and Ito's colours, which the colour-blind can tell apart; each method has a marker of its own as well.
STYLE = {"full": ("#999999", "s"), "lora": ("#E69F00", "^"), "pissa": ("#0072B2", "D"), "ba-lora": ("#D55E00", "o")}
STYLE |= {"probe": ("#009E73", "x")}


def draw_panel(axis: Any, rows: dict[Cell, dict[str, Any]], head: str, places: dict[str, float], domain: str) -> None:
    """A curve per method over the conditions at their `places`; those that were not run are left out."""
    for number, method in enumerate([*METHODS, "probe"]):
        colour, marker = STYLE[method]
        source = "probe" if method == "probe" else head
        groups = {
            place: list(values(rows, c, method, source, "accuracy", domain).values()) for c, place in places.items()
        }
        groups = {place + (number - 2) * 0.04: group for place, group in groups.items() if group}
        axis.errorbar(
            list(groups),
            [statistics.mean(group) for group in groups.values()],
            [statistics.stdev(group) if len(group) > 1 else 0.0 for group in groups.values()],
            color=colour,
            marker=marker,
            linestyle="--" if method == "probe" else "-",
            capsize=2,
            label="linear probe alone" if method == "probe" else method,
        )


def draw(rows: dict[Cell, dict[str, Any]], folder: Path, domain: str) -> list[str]:
    """Accuracy under noise and imbalance, one panel per head: mean and standard deviation over seeds."""
    plt = pyplot()
    files = []
    noisy = "With wrong labels, BA-LoRA is nowhere shown to be more accurate than another method"
    rare = "At 50 : 1 every method is at chance; at 10 : 1 from the probe head, BA-LoRA loses most"
    for kind, title, conditions, places, label in (  # to scale, the second by its logarithm
        ("noise", noisy, CONDITIONS[:4], (0, 1, 2, 4), "flipped training labels, %"),
        ("imbalance", rare, (CONDITIONS[0], *CONDITIONS[4:]), (0, 1, 1.7), "negative sentences to one positive"),
    ):
        ticks = [c.split()[1] for c in conditions] if kind == "noise" else ["1", "10", "50"]
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
        for axis, head in zip(axes, HEADS, strict=True):
            draw_panel(axis, rows, head, dict(zip(conditions, places, strict=True)), domain)
            axis.set_xticks(places, ticks)
            axis.set_xlabel(label)
            axis.set_title(f"{head} head")
            axis.grid(axis="y", alpha=0.3)
        axes[0].set_ylabel("accuracy on movie reviews, %")
        axes[0].legend(frameon=False, fontsize=8)
        files.append(str(save_picture(figure, folder / f"nlu_{kind}.png", title)))
    return files


def main(argv: list[str]) -> None:
    args = parse_arguments(Arguments, __doc__, argv)
    if args.processes < 1:
        raise UserError(f"--processes is {args.processes}: it must be above 0")
    path = Path(args.results)
    if not args.report:
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes to come
        path.parent.mkdir(parents=True, exist_ok=True)
        run_all(tuning_cells(), path, args.processes)
        chosen = select(read_results(path))
        run_all(study_cells(chosen), path, args.processes)
        run_all(terms_cells(chosen), path, args.processes)
        run_all(long_cells(chosen), path, args.processes)
    rows = read_results(path)
    if not any(cell.phase == "study" for cell in rows):
        raise UserError(f"{path} has no run of the study yet: leave out --report")
    page = Path(args.page)
    files = draw(rows, page.parent, "movies")
    page.write_text(page_text(rows))
    print(f"page: {page}; pictures: {', '.join(files)}")


if __name__ == "__main__":
    run_script(main)
