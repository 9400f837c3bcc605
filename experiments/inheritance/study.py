"""Arms, plans, selection and running. One run is one row; rows are appended one JSON line each, failures too.

A row has the run's own fields (kind, seed, beta, eta, questions, data, arm, rate), its measures, and in `points` the
same measures of its models on the way. A run whose row is there is not run again, so that a study
that was killed goes on where it was and ends with the same rows; only `seconds` and `finished` depend on the clock.
"""

import dataclasses
import datetime
import functools
import json
import math
import os
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import LlamaForCausalLM

from experiments.inheritance import measures as M
from experiments.inheritance import training as T
from experiments.inheritance import world as W
from experiments.inheritance.training import Arm, Base
from experiments.study import read_rows, run_missing

HERE = Path(__file__).parent
SETTLED = yaml.safe_load((HERE / "predictions.yaml").read_text())  # rates and best cases from the selection's seeds

PUBLISHED = (0.025, 0.005, 0.005)
MAIN = {
    "full": Arm("full"),
    "LoRA": Arm("lora"),
    "PiSSA": Arm("pissa"),
    "PiSSA + L_CR": Arm("pissa", (0.025, 0, 0)),
    "PiSSA + L_DR": Arm("pissa", (0, 0.005, 0)),
    "PiSSA + L_SVDR": Arm("pissa", (0, 0, 0.005)),
    "BA-LoRA": Arm("pissa", PUBLISHED),
    "LoRA + three terms": Arm("lora", PUBLISHED),
}
SWEEP = {f"λ₁ = {weight:g}": Arm("pissa", (weight, 0, 0), "constant") for weight in (0.025, 0.15, 1, 4)}
CONTROLS = {
    "BA-LoRA, clean twin": Arm("pissa", PUBLISHED, teacher="clean twin", rate_of="BA-LoRA"),
    "λ₁ = 0.15, clean twin": Arm("pissa", (0.15, 0, 0), "constant", "clean twin", rate_of="λ₁ = 0.15"),
    "λ₁ = 1, clean twin": Arm("pissa", (1, 0, 0), "constant", "clean twin", rate_of="λ₁ = 1"),
    **{f"PiSSA, rate / {d}": Arm("pissa", rate_of="PiSSA", rate_factor=1 / d) for d in (2, 4, 8)},
}
REMEDIES = {
    "λ₁ = 1, unless contradicted": Arm("pissa", (1, 0, 0), "constant", unless_contradicted=True),
    "λ₁ = 0.15, averaged teacher": Arm("pissa", (0.15, 0, 0), "constant", "averaged", rate_of="λ₁ = 0.15"),
    "BA-LoRA + invariance": Arm("pissa", PUBLISHED, invariance=1.0, rate_of="BA-LoRA"),
}
TUNED = {**MAIN, **SWEEP, **CONTROLS, **REMEDIES}
CORE = (
    *MAIN,
    "PiSSA, rate / 2",
    "PiSSA, rate / 4",
    "λ₁ = 0.15",
    "λ₁ = 1",
    "λ₁ = 0.15, clean twin",
    "BA-LoRA + invariance",
)
BEST_SETTINGS = SETTLED.get("best_case") or {}
BEST = {
    f"best {which}": Arm("pissa", rate_of="BA-LoRA" if which == "λs" else "PiSSA", **settings)
    for which, settings in BEST_SETTINGS.items()
}
ARMS = {**TUNED, **BEST}
NOISE_ARMS = ("full", "LoRA", "PiSSA", "BA-LoRA", "λ₁ = 0.15")

RATE_GRIDS = {
    "full": [2.5e-4 * 2**i for i in range(5)],
    "lora": [2e-3 * 2**i for i in range(5)],
    "pissa": [5e-4 * 2**i for i in range(5)],
}
ENOUGH = 0.05  # nats of clear validation loss
SELECTION_SEEDS = (100, 101)
SEEDS = tuple(range(10, 20))  # no pilot looked at these; ten, since a gate may take one or two out
FEW_SEEDS = SEEDS[:4]  # for the noise study and the world without questions
SHORT_SEEDS = SEEDS[:5]


@dataclass(frozen=True)
class StudyRun:
    """A pre-training (no arm) or a fine-tuning. A row is known by it.

    Attributes:
        settings: of an arm that has no name in ARMS: a trial of the search.
        task_alone: measures how well the task is learnt and nothing else: for choosing rates.
    """

    base: Base
    data: str | None = None
    arm: str | None = None
    rate: float | None = None
    settings: Arm | None = field(default=None, compare=False)
    task_alone: bool = field(default=False, compare=False)

    def fields(self) -> dict:
        kind = "pre-training" if self.arm is None else "fine-tuning"
        return {"kind": kind, **dataclasses.asdict(self.base), "data": self.data, "arm": self.arm, "rate": self.rate}

    @classmethod
    def of(cls, row: dict) -> "StudyRun":
        """The run that a row is of."""
        base = Base(*(row[part.name] for part in dataclasses.fields(Base)))
        return cls(base, row["data"], row["arm"], row["rate"])


def rate_of(settings: Arm, arm: str) -> float:
    """The learning rate that the selection has settled, from predictions.yaml."""
    return SETTLED["learning_rates"][settings.rate_of or arm] * settings.rate_factor


# ------------------------------------------------------------------------------------------------------------------
# One run
# ------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def base_model(base: Base, cache: Path) -> LlamaForCausalLM:
    """The pre-trained model, from `cache` or trained now; a kill leaves no half-written file."""
    kind = "questions" if base.questions else "statements"
    path = cache / f"{T.CORPUS_SIZE}-seed{base.seed}-beta{base.beta:g}-eta{base.eta:g}-{kind}.pt"
    if path.exists():
        model = T.make_model(base.seed)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model = T.pretrain(base)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(model.state_dict(), temporary)
    temporary.rename(path)
    return model


@functools.lru_cache(maxsize=8)
def _data(seed: int, condition: str) -> W.Prompts:
    return W.finetuning_data(W.World.of_seed(seed), seed, condition, T.EXAMPLES)


def execute(run: StudyRun, cache: Path) -> dict:
    """The run's row. A failure is a row with its error."""
    started = time.perf_counter()
    try:
        row = json.dumps(run.fields() | measured(run, cache), allow_nan=False)
        row = json.loads(row, parse_float=lambda text: float(f"{float(text):.6g}"))  # six digits
    except Exception as error:  # a failed run is a result too, and the others go on
        row = run.fields() | {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(limit=-2)}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return row | {"seconds": round(time.perf_counter() - started, 1), "finished": now}


def measured(run: StudyRun, cache: Path) -> dict:
    """The result of `run`: measures, and in `points` those of the models on the way."""
    base = base_model(run.base, cache)
    if run.arm is None:
        return {"measures": M.measure(base, run.base, base)}
    settings = run.settings or ARMS[run.arm]
    twin = None
    if settings.teacher == "clean twin":
        twin = base_model(dataclasses.replace(run.base, beta=0.5), cache)
    is_pissa = run.arm == "PiSSA" and run.data == "F0"
    seed = run.base.seed
    result = T.finetune(settings, run.rate, base, twin, _data(seed, run.data), seed, T.STOPS if is_pissa else ())
    if run.task_alone:
        return {"measures": M.task(result.model, seed), "points": {}}
    row = {"measures": M.measure(result.model, run.base, base), "points": {}}
    if is_pissa:
        models = {f"scale {scale:g}": T.scaled(result.model, scale) for scale in T.SCALES}
        models |= {f"stopped at {stop:g}": model for stop, model in result.stopped.items()}
        row["points"] = {name: M.measure(model, run.base, base) for name, model in models.items()}
    if run.arm in MAIN and run.data == "F0":
        row["points"]["revived"] = M.bias(T.revive(result.model, run.rate, run.base), seed, "old")
    return row


# ------------------------------------------------------------------------------------------------------------------
# Plans: jobs in order, each the runs of one seed and stage, so that a study cut short is balanced
# ------------------------------------------------------------------------------------------------------------------


def _stage(
    seed: int, betas: Iterable[float], arms: Iterable[str], data: Iterable[str] = ("F0",), **base_settings
) -> list[StudyRun]:
    bases = [Base(seed, beta, **base_settings) for beta in betas]
    tuned = [(arm, rate_of(ARMS[arm], arm)) for arm in arms]
    finetunings = [StudyRun(base, which, arm, rate) for which in data for arm, rate in tuned for base in bases]
    return [StudyRun(base) for base in bases] + finetunings


def short_plan() -> list[list[StudyRun]]:
    """β = 0.5 and 0.9, five seeds, F0, the main arms, the controls and the sweep."""
    arms = [*MAIN, *SWEEP, *CONTROLS]
    return [_stage(seed, (0.5, 0.9), arms) + _stage(seed, (0.5, 0.9), ["PiSSA"], ("F2",)) for seed in SHORT_SEEDS]


def confirmatory_plan() -> list[list[StudyRun]]:
    """The primary outcome and what explains it first; then other data, another β, noise, another world."""
    jobs = [_stage(seed, (0.5, 0.9), CORE) + _stage(seed, (0.5, 0.9), ["PiSSA"], ("F2",)) for seed in SEEDS]
    jobs += [_stage(seed, (0.5, 0.9), TUNED) for seed in SEEDS]
    jobs += [_stage(seed, (0.5, 0.9), MAIN, ("F1", "F2")) for seed in SEEDS]
    jobs += [_stage(seed, (0.5, 0.9), BEST) for seed in SEEDS]
    jobs += [_stage(seed, (0.7,), MAIN) for seed in SEEDS]
    jobs += [_stage(seed, (0.5, 0.9), NOISE_ARMS, eta=eta) for seed in FEW_SEEDS for eta in (0.0, 0.2)]
    jobs += [_stage(seed, (0.5, 0.9), MAIN, questions=False) for seed in FEW_SEEDS]
    jobs += [_stage(seed, (0.5, 0.9), MAIN, ("F3", "F4")) for seed in SEEDS]
    return jobs


def run_jobs(jobs: list[list[StudyRun]], rows: Path, cache: Path, workers: int = 1) -> None:
    """Does the runs that have no row yet, `workers` jobs at a time, one thread each."""
    run_missing(jobs, rows, workers, functools.partial(execute, cache=cache), _one_thread, StudyRun.of, describe)


def _one_thread() -> None:
    torch.set_num_threads(1)


def describe(row: dict) -> str:
    """A row in a few words, for the terminal."""
    measures = row.get("measures", {})
    shown = {name: measures[name] for name in ("gap_new", "gap_old", "loss") if name in measures}
    what = row.get("error") or ", ".join(f"{name} {value}" for name, value in shown.items())
    name = f"{row['arm']}, {row['data']}" if row["arm"] else "pre-training"
    return f"seed {row['seed']}, β = {row['beta']:g}: {name}: {what} ({row['seconds']} s)"


# ------------------------------------------------------------------------------------------------------------------
# Selection, on seeds of its own
# ------------------------------------------------------------------------------------------------------------------


def validation_loss(rows: list[dict], arm: str, rate: float) -> float:
    """Mean clear validation loss over the selection's seeds at β = 0.9; infinite where a run failed."""
    of_arm = [row for row in rows if row["arm"] == arm and row["rate"] == rate and row["beta"] == 0.9]
    losses = [row["measures"]["validation_loss"] if "measures" in row else math.inf for row in of_arm]
    return float(np.mean(losses)) if losses else math.inf


def select_rates(rows: Path, cache: Path) -> dict[str, float]:
    """For each arm the smallest rate whose clear validation loss is within ENOUGH of the best, widened at an edge.

    The grid is five values a factor of 2 apart for full, LoRA and PiSSA; where terms are added, three around the rate
    of the same method without them.

    The task has no noise: its loss falls with the rate long after every answer is right, while everything else is
    forgotten. Nobody wants the rate of the very lowest loss.
    """
    chosen = {}
    for arm, settings in TUNED.items():
        if settings.rate_of:
            continue
        plain = {"full": "full", "lora": "LoRA", "pissa": "PiSSA"}[settings.method]
        grid = (
            [chosen[plain] * factor for factor in (0.5, 1, 2)] if plain in chosen else list(RATE_GRIDS[settings.method])
        )
        for _ in range(7):
            runs = [StudyRun(Base(seed, 0.9), "F0", arm, r, task_alone=True) for r in grid for seed in SELECTION_SEEDS]
            run_jobs([runs], rows, cache)
            done = read_rows(rows)
            losses = {rate: validation_loss(done, arm, rate) for rate in grid}
            best = min(rate for rate in grid if losses[rate] <= min(losses.values()) + ENOUGH)
            if best == grid[0]:
                grid.insert(0, best / 2)
            elif best == grid[-1]:
                grid.append(best * 2)
            else:
                break
        chosen[arm] = best
    return chosen


def search_trials() -> dict[str, list[Arm]]:
    """Twelve random settings each: BA-LoRA's λs, and the rivals that only train less."""
    random = np.random.default_rng(12)

    def uniform_in_log(low: float, high: float) -> float:
        return float(f"{math.exp(random.uniform(math.log(low), math.log(high))):.3g}")

    trials = {"λs": [], "rate": [], "scale": []}
    for _ in range(12):
        lambdas = (uniform_in_log(0.01, 4), uniform_in_log(0.001, 0.3), uniform_in_log(0.001, 0.3))
        trials["λs"].append(Arm("pissa", lambdas, rate_of="BA-LoRA"))
        trials["rate"].append(Arm("pissa", rate_of="PiSSA", rate_factor=uniform_in_log(0.03, 1)))
        trials["scale"].append(Arm("pissa", rate_of="PiSSA", scale=uniform_in_log(0.1, 1)))
    return trials


def search(rows: Path, cache: Path) -> dict[str, dict]:
    """Of each kind the setting of the smallest |I| (new prompts), accuracy no more than a point below PiSSA's."""
    bases = [Base(seed, beta) for seed in SELECTION_SEEDS for beta in (0.5, 0.9)]
    runs, names = [StudyRun(base) for base in bases], {}
    for which, arms in {"PiSSA": [MAIN["PiSSA"]], **search_trials()}.items():
        for index, arm in enumerate(arms):
            name = f"trial {which} {index + 1}" if which != "PiSSA" else "trial PiSSA"
            names[name] = (which, arm)
            rate = rate_of(arm, "PiSSA")
            runs += [StudyRun(base, "F0", name, rate, arm) for base in bases]
    run_jobs([runs], rows, cache)
    by_trial: dict[tuple, dict] = {
        (row["arm"], row["seed"], row["beta"]): row["measures"] for row in read_rows(rows) if "measures" in row
    }
    results = {}
    for name in names:
        inheritance, accuracy = [], []
        for seed in SELECTION_SEEDS:
            planted = by_trial[None, seed, 0.9]["gap_old"] - by_trial[None, seed, 0.5]["gap_old"]
            biased, clean = by_trial[name, seed, 0.9], by_trial[name, seed, 0.5]
            inheritance.append((biased["gap_new"] - clean["gap_new"]) / planted)
            accuracy.append(biased["accuracy"])
        results[name] = (abs(float(np.mean(inheritance))), float(np.mean(accuracy)))
    floor = results["trial PiSSA"][1] - 0.01
    best = {}
    for kind in search_trials():
        allowed = [name for name in names if names[name][0] == kind and results[name][1] >= floor]
        if allowed:
            arm = names[min(allowed, key=lambda name: results[name][0])][1]
            best[kind] = {"lambdas": list(arm.lambdas), "rate_factor": arm.rate_factor, "scale": arm.scale}
    return best
