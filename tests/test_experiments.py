"""Experiments: each resolves without network, with its price; mistakes get one line; kills leave the same folder."""

import itertools
import json
import math
import os
import random
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed.run
import yaml
from conftest import ROOT, make_model, record
from safetensors.torch import load_file
from scipy import stats
from torch.utils.flop_counter import FlopCounterMode

from common.cli import UserError
from common.runs import load_record, records_in
from common.training import Interruption
from experiments import choose, entries, grid, plans, price, report, run_record

SNAKEMAKE = Path(os.environ.get("SNAKEMAKE") or ROOT / ".venv-experiments/bin/snakemake")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a dry run reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ------------------------------------------------------------------------------------------------------------------
# Every experiment
# ------------------------------------------------------------------------------------------------------------------

NAMED = {"ablation", "formulation", "glue", "glue-imbalance", "glue-noise", "lambda", "learning-rate", "nlg", "rank"}
NAMED |= {"peft-metamath", "schedules", "spectral-k", "start", "temperature", "top-k"}


def test_what_was_asked_for_is_there_with_a_twin_each():
    assert NAMED | {f"{name}-demo" for name in NAMED} | {"nlg-batch32", "nlg-tiny", "nlu-robustness"} <= set(
        entries.names()
    )


@pytest.mark.parametrize("name", entries.names())
def test_an_experiment_resolves_without_network_and_has_its_price(name, no_network, monkeypatch):
    """Its runs are all combinations, each in a folder of its own; every file that a run needs has a command."""
    monkeypatch.chdir(ROOT)
    plan = plans.expand(name)
    study = [run for run in plan.runs if run.phase == "study"]
    sizes = [len(values) for values in plan.entries["axes"].values()]
    assert len(study) == np.prod(sizes)
    assert len({run.folder for run in plan.runs}) == len(plan.runs)
    content = grid.as_json(plan, "plan.json", {}, [])
    commands = grid.all_commands(content)
    for run in plan.runs:
        assert content["runs"][run.name]["train"] in commands
        assert set(run.needs) <= set(content["files"])
        assert set(content["runs"][run.name]["measure"].values()) <= set(commands)
    found = price.prices(plan)
    assert len(found) == len(plan.runs)
    for one in found:
        assert min(one.trainable, one.steps, one.tokens, one.operations, one.memory, one.kept) > 0
        assert one.hours("A100") > one.hours("H100") > 0
    text = price.text(plan)
    assert text.startswith(f"price of {name}: {len(plan.runs)} runs")
    assert "not known" not in text


def test_the_published_counts_of_trainable_parameters(monkeypatch):
    """The published table's, in the price as it is printed."""
    monkeypatch.chdir(ROOT)
    text = price.text(plans.expand("nlg", only={"seed": ["42"], "data": ["metamath"]}))
    for model, adapters, full in (
        ("Llama-2-7b-hf", 319.8, 6738.4),
        ("Mistral-7B-v0.1", 167.8, 7241.7),
        ("gemma-7b", 200.0, 8537.7),
    ):
        rows = [line.split() for line in text.splitlines() if line.strip().partition(" ")[0].endswith(model)]
        trained = {row[1]: float(row[3]) for row in rows}
        assert trained == {"full": full, "lora": adapters, "pissa": adapters, "ba-lora": adapters}
    glue = price.prices(plans.expand("glue", only={"seed": ["42"], "task": ["rte"], "model": ["deberta-v3-base"]}))
    assert [round(one.trainable / 1e6, 2) for one in glue[1:]] == [1.33] * 3
    peft = price.prices(plans.expand("peft-metamath", only={"seed": ["0"]}))
    assert {one.trainable for one in peft} == {9175040}  # as PEFT counts them for its LoRA of rank 32


def test_the_paper_s_protocol(monkeypatch):
    """One epoch of 100,000 examples, 128 per step whatever the number of GPUs, at most 512 tokens each."""
    monkeypatch.chdir(ROOT)
    for count in (1, 2, 8):
        plan = plans.expand("nlg", only={"seed": ["42"], "data": ["python"]}, processes=count)
        for run, one in zip(plan.runs, price.prices(plan), strict=True):
            args = plans.parse_training(plan, run)
            assert args.batch_size * args.gradient_accumulation * count == 128
            assert (args.learning_rate, args.warmup_ratio, args.weight_decay, args.epochs) == (2e-5, 0.03, 0.0, 1.0)
            assert (one.steps, one.tokens) == (782, 782 * 128 * 512)
            if count > 1:  # a step may take longer than the thirty seconds that torchrun gives by itself
                found = torch.distributed.run.parse_args(grid.training_command(plan, run)[1:])
                assert (found.nproc_per_node, found.shutdown_timeout) == (str(count), 600)
                assert {"SIGTERM", "SIGUSR1"} <= set(found.signals_to_handle.split(",")) < {*dir(signal)} - {"SIGHUP"}
    (run, *_) = plans.expand("nlg-batch32").runs
    assert run.settings["gradient-accumulation"] * 4 * run.processes == 32


def test_operations_are_those_that_a_counter_sees(tmp_path, monkeypatch):
    """torch's own counter of matrix products in a full fine-tuning step, so short that attention weighs little."""
    monkeypatch.chdir(ROOT)
    model = make_model(
        hidden_size=64, intermediate_size=192, attn_implementation="eager", tie_word_embeddings=False
    ).train()
    ids = torch.arange(8).repeat(2, 1)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    settings = {
        "model": str(tmp_path),
        "data": "demo",
        "max-length": 8,
        "max-steps": 1,
        "batch-size": 2,
        "method": "full",
    }
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump({"settings": settings | {"gradient-accumulation": 1}}))
    (one,) = price.prices(plans.expand(str(path)))
    assert one.operations == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_price_counts_the_teacher_and_only_where_it_acts(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = {run.arm: one for run, one in both("start", {"seed": ["42"]}) if run.phase == "study"}
    assert found["lora-plain"].operations == found["pissa-plain"].operations < found["lora-terms"].operations
    found = {run.arm: one for run, one in both("ablation", {"seed": ["42"]})}
    assert found["dr"].operations == found["pissa"].operations < found["cr"].operations == found["all"].operations


def both(name: str, only: dict) -> zip:
    plan = plans.expand(name, only=only)
    return zip(plan.runs, price.prices(plan), strict=True)


def test_a_local_copy_is_read_by_every_step(tmp_path, capsys):
    """The names of model and data stand in the configuration for LLaMA, and in the experiment for Gemma."""
    places = {"meta-llama/Llama-2-7b-hf": "/m/llama", "google/gemma-7b": "/m/gemma", "fxmeng/pissa-dataset": "/d/pissa"}
    (tmp_path / "paths.yaml").write_text(yaml.safe_dump(places | {"no/such-model": "/m/none"}))
    only = ["--axis", "seed=42", "--axis", "method=pissa", "--axis", "data=metamath"]
    grid.main(
        ["nlg", "--no-price", "--paths", str(tmp_path / "paths.yaml"), "--axis", "model=llama2-7b,gemma-7b", *only]
    )
    printed, said = capsys.readouterr()
    assert said == "note: --paths: no command here reads no/such-model\n"
    lines = [shlex.split(line) for line in printed.splitlines()]
    bases = {"/m/llama", "/m/gemma"}
    assert {words[words.index("--model") + 1] for words in lines if "train.py" in words} == bases
    assert {words[words.index("--data") + 1] for words in lines if "train.py" in words} == {"/d/pissa"}
    assert {words[words.index("--base") + 1] for words in lines if "eval/forgetting.py" in words} == bases
    assert not [name for name in places if name in printed]


def test_a_tuning_has_seeds_of_its_own_and_its_arm_takes_its_choice():
    plan = plans.expand("start-demo")
    tuning = [run for run in plan.runs if run.phase == "tuning"]
    study = [run for run in plan.runs if run.phase == "study"]
    assert len(plan.choices) == 4
    assert not {run.settings["seed"] for run in tuning} & {run.settings["seed"] for run in study}
    for run in study:
        command = grid.training_command(plan, run)
        assert command[command.index("--config") + 1] == run.chosen
        made = [other for other in tuning if other.name in plan.choices[run.chosen]["runs"]]
        assert len(made) == {"lora": 4, "pissa": 6}[run.labels["start"]]  # rates of one seed
        kept = {"method", "regularize", "max-steps"}
        assert all(
            {key: other.settings.get(key) for key in kept} == {key: run.settings.get(key) for key in kept}
            for other in made
        )
        assert not {other.alone["gsm8k"]["data"] for other in made} & {run.alone["gsm8k"]["data"]}


# ------------------------------------------------------------------------------------------------------------------
# Mistakes
# ------------------------------------------------------------------------------------------------------------------


def mistake(tmp_path: Path, entries: dict) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(entries))
    with pytest.raises(UserError) as error:
        plans.expand(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


DEMO = {"model": "demo", "data": "demo", "fields": ["question", "response"]}


def tuned(tune: dict, **settings) -> dict:
    """An experiment whose 'tune' is right but for the changes."""
    tune = {"learning-rate": [1e-4, 1e-3], "score": "gsm8k.accuracy", "seed": [100]} | tune
    axes = {"method": ["lora", "pissa"], "seed": [1]}
    return {"settings": DEMO | settings, "axes": axes, "benchmarks": {"gsm8k": {"data": "demo"}}, "tune": tune}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"settings": DEMO | {"lerning-rate": 1e-4}}, "no option 'lerning-rate'; did you mean 'learning-rate'?"),
        ({"settings": DEMO | {"method": "pisa"}}, "lora, pissa, ba-lora; did you mean 'pissa'?"),
        ({"settings": DEMO | {"rank": "high"}}, "--rank 'high' is no whole number"),
        ({"settings": DEMO | {"packing": "yes"}}, "--packing 'yes' is no true or false"),
        ({"setings": DEMO}, "unknown entry 'setings'; did you mean 'settings'?"),
        ({"settings": DEMO, "benchmarks": ["gsm8"]}, "unknown benchmark 'gsm8'; did you mean 'gsm8k'?"),
        ({"settings": DEMO, "axes": {"seed": [1, 2, 1]}}, "so two runs would have one name"),
        (
            {"settings": DEMO, "axes": {"a": {"x-y": {}, "x": {}}, "b": {"z": {}, "y-z": {}}}},
            "two runs have the name 'x-y-z'",
        ),
        ({"settings": DEMO, "axes": {"seed": []}}, "has no runs"),
        ({"settings": DEMO | {"batch-size": 3}, "sequences-per-step": 8}, "8 sequences per step are no multiple of 3"),
        ({"settings": DEMO | {"data": "{files}/x.jsonl"}}, "nothing in 'files' makes 'x.jsonl'"),
        ({"settings": DEMO | {"data": "{place}.jsonl"}}, "names 'place', which is no axis"),
        ({"like": "ablatoin"}, "no experiment 'ablatoin'; did you mean 'ablation'?"),
        ({"settings": DEMO, "tune": {"rank": [1, 2]}}, "'tune' takes one option with its values"),
        ({"settings": DEMO, "benchmarks": {"gsm8k": {"limt": 3}}}, "did you mean 'limit'?"),
        (tuned({}) | {"report": {"baseline": {"methd": "lora"}}}, "'methd', which is no axis; did you mean 'method'?"),
        (tuned({}) | {"report": {"baseline": {"method": "lra"}}}, "axis 'method' has no 'lra'; did you mean 'lora'?"),
        (tuned({}) | {"report": {"effects": ["method"]}}, "'effects' takes two axes, not ['method']"),
        (tuned({}) | {"report": {"curve": "learning-rat"}}, "is no option; did you mean 'learning-rate'?"),
        (tuned({}, **{"learning-rate": 1e-4}), "'tune' chooses learning-rate, and 'settings' or a label sets it"),
        (tuned({"mode": "minimum"}), "takes 'mode: max' or 'mode: min', not 'minimum'"),
        (tuned({"score": "gsm8k.response_loss"}), "'tune' by gsm8k.response_loss takes 'mode: max' or 'mode: min'"),
        (tuned({"within": "1 %"}), "'within' of 'tune' is '1 %'"),
        (tuned({"per": ["metod"]}), "'tune' names 'metod', which is no axis; did you mean 'method'?"),
        (tuned({"at": {"method": "lra"}}), "'tune' is at method: lra, which has no such label; did you mean 'lora'?"),
        (tuned({"score": "gsm8.accuracy"}), "measures 'gsm8.accuracy'; did you mean 'gsm8k'?"),
    ],
)
def test_a_mistake_in_an_experiment_is_one_line_that_names_it(tmp_path, entries, message):
    assert message in mistake(tmp_path, entries)


def test_a_mistake_ends_the_program_with_2_and_one_line(tmp_path):
    for words, message in (
        (["nlgg"], "no experiment 'nlgg'; did you mean 'nlg'?"),
        (["nlg", "--axis", "method=balora"], "axis 'method' has no 'balora'; did you mean 'ba-lora'?"),
    ):
        result = subprocess.run(
            [sys.executable, "experiments/grid.py", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert message in result.stderr


@pytest.mark.parametrize(
    ("name", "option", "owner"),
    [
        ("nlg-demo", "--seed=7", "the axis 'seed'"),  # the runs would be named after 42, 43, 44
        ("rank-demo", "--rank", "the axis 'rank'"),
        ("start-demo", "--no-regularize", "the axis 'terms'"),  # what a label sets
        ("start-demo", "--learning_rate", "'tune'"),
        ("nlg", "--batch-size", "'sequences-per-step'"),
        ("temperature-demo", "--method", "the plan"),
        ("nlg-demo", "--output-dir", "the plan"),
    ],
)
def test_an_option_for_every_training_does_not_contradict_the_names_of_the_runs(name, option, owner):
    with pytest.raises(UserError, match=rf"-- {option.partition('=')[0].replace('_', '-')} would .*{owner} sets it"):
        plans.expand(name, extra=[option, "1"])
    plan = plans.expand("nlg-demo", only={"method": ["lora"], "seed": ["42"]}, extra=["--save-steps", "50"])
    assert grid.training_command(plan, plan.runs[0])[-2:] == ["--save-steps", "50"]


def test_an_experiment_that_needs_gpus_says_so_before_it_starts():
    with pytest.raises(UserError, match=r"nlg takes 8 GPUs per run, and there are 2 here.*nlg-demo"):
        grid.require_devices(plans.expand("nlg", only={"seed": ["42"]}), 2)


# ------------------------------------------------------------------------------------------------------------------
# Records, choices, reports
# ------------------------------------------------------------------------------------------------------------------


def test_a_record_of_another_version_is_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(record("a") | {"version": 99}))
    with pytest.raises(UserError, match=r"a\.json has version 99 of the format and this script reads 1") as error:
        records_in(tmp_path)
    assert "\n" not in str(error.value)
    path.write_text("[]")
    with pytest.raises(UserError, match="is no record of a run"):
        records_in(tmp_path)


def made_plan(folder: Path, monkeypatch) -> dict:
    """A plan of one run with one benchmark, in whose folder nothing is yet."""
    monkeypatch.chdir(ROOT)
    only = {"model": ["tiny-llama"], "data": ["metamath"], "method": ["ba-lora"], "seed": ["42"]}
    plan = grid.as_json(plans.expand("nlg-tiny", str(folder), only), "plan.json", {}, [])
    (run,) = plan["runs"].values()
    Path(run["results"]).mkdir(parents=True)
    (folder / "logs").mkdir()
    return plan


def test_a_record_says_how_a_run_failed_and_keeps_what_is_there(tmp_path, monkeypatch):
    plan = made_plan(tmp_path, monkeypatch)
    ((name, run),) = plan["runs"].items()
    assert run_record.record_of(plan, name)["status"] == "unfinished"
    Path(run["folder"], "run.json").write_text(
        json.dumps({"seed": 42, "steps": 4, "trainable_parameters": 7, "processes": 1, "commit": "abc+"})
    )
    Path(run["folder"], ".train.done").touch()
    summary = {
        "accuracy": {"value": 0.25, "of": 4, "interval_95": [0.0, 0.7]},
        "arguments": {"limit": 4},
        "seconds": 3.0,
    }
    Path(run["results"], "gsm8k.json").write_text(json.dumps(summary))
    log = tmp_path / "logs" / f"{name}.score.log"
    log.write_text("loading\nhendrycks_math.py: error: no such file\nexit code 2\n")
    found = run_record.write_record(plan, name)
    assert found["status"] == "failed"
    assert found["error"] == {"step": "score", "code": 2, "message": "hendrycks_math.py: error: no such file"}
    assert found["scores"] == {"gsm8k": {"accuracy": {"value": 0.25, "of": 4, "interval_95": [0.0, 0.7]}}}
    assert (found["steps"], found["parameters"]["trainable"], found["time"]["gsm8k"]) == (4, 7, 3.0)
    assert found["commit"] == "abc+"  # of the training, not of this moment
    assert load_record(tmp_path / "records" / f"{name}.json") == found
    for number in (*Interruption.SIGNALS, signal.SIGKILL):  # it was interrupted or killed, and goes on
        log.write_text(f"exit code {128 + number}\n")
        assert run_record.record_of(plan, name)["status"] == "unfinished"


def test_the_best_rate_is_chosen_and_of_equals_the_smaller(tmp_path, monkeypatch):
    rates = {"0.1": [0.5, 0.7], "0.01": [0.7, 0.5], "0.001": [0.2, 0.3]}
    assert choose.best(rates, "max") == "0.01"
    assert choose.best(rates, "min") == "0.001"
    assert [choose.best(rates, "max", within) for within in (0.34, 0.36)] == ["0.01", "0.001"]
    assert choose.best(rates, "min", 0.36) == "0.001"
    assert choose.best(rates | {"0.01": [math.nan, 0.5]}, "max") == "0.1"  # it diverged
    assert [choose.is_at_edge(rate, rates) for rate in rates] == [True, False, True]
    assert not choose.is_at_edge("2", {"2": [0.1], "10": [0.2]})  # of two values, each is at an edge
    with pytest.raises(UserError, match=r"a has no score 'gsm8k\.accuracy' to choose by"):
        choose.score_of(record("a"), "gsm8k.accuracy")


def test_answers_without_a_judge_are_named_in_the_table():
    judged = {"mt_bench": {"first_turn": {"value": 4.5}}}
    waiting = {
        "mt_bench": {"first_turn": {"value": None}},
        "forgetting": {"forgetting": {"value": 0.0123}, "tokens": 9},
    }
    records = [record("a", scores=waiting), record("b", scores=judged), record("c")]
    columns = report.columns_of(records, None)
    assert columns == [("mt_bench", "first_turn"), ("forgetting", "forgetting")]
    rows = [[cell.strip() for cell in line.split("|")] for line in report.table(records, columns).splitlines()[2:]]
    assert [row[3:5] for row in rows] == [["not judged", "0.012"], ["4.500", "-"], ["-", "-"]]


def test_the_table_has_the_mean_minutes_and_the_most_memory_of_the_seeds():
    seeds = [
        record(f"a-{n}", arm="a", time={"train_seconds": 60.0 * n, "seconds": None}, memory={"peak_gib": float(n)})
        for n in (3, 1)
    ]
    assert report.table(seeds, []).splitlines()[-1].replace(" ", "").endswith("|2.0|3.00|")


def test_records_that_were_kept_give_the_experiment_s_report(tmp_path, capsys):
    """Of start-demo without its plan: means, differences and their parts with paired t-intervals, each arm's rates."""
    losses = {"0.001": 0.5, "0.01": 0.3, "0.003": 0.4}
    chooses = {"option": "learning-rate", "score": "gsm8k.response_loss", "mode": "min"}
    rng, values = np.random.default_rng(0), {}

    def write(name: str, **changes) -> None:
        (tmp_path / f"{name}.json").write_text(json.dumps(record(name, experiment="start-demo", **changes)))

    for start, terms in (("lora", "plain"), ("lora", "terms"), ("pissa", "plain"), ("pissa", "terms")):
        arm, place = f"{start}-{terms}", {"start": start, "terms": terms}
        for rate, loss in losses.items():
            about = {"phase": "tuning", "chooses": chooses, "labels": place | {"learning-rate": rate}}
            write(f"tune-{arm}-{rate}", arm=arm, scores={"gsm8k": {"response_loss": loss}}, **about)
        values[arm] = 100 * rng.random(4)
        for seed, value in enumerate(values[arm]):
            scores = {"gsm8k": {"accuracy": {"value": value / 100}}}
            write(f"{arm}-{seed}", arm=arm, seed=seed, labels=place | {"seed": str(seed)}, scores=scores)
    report.main([str(tmp_path)])
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")] for line in printed.splitlines() if line.startswith("|")]
    cells = {row[1]: row[2] for row in rows}
    a, b, c, d = values.values()

    def interval(differences: np.ndarray) -> str:
        low, high = stats.ttest_1samp(differences, 0).confidence_interval()
        return f"{differences.mean():+.2f} [{low:+.2f}, {high:+.2f}]"

    parts = {"whole": d - a, "of start": ((c - a) + (d - b)) / 2, "of terms": ((b - a) + (d - c)) / 2}
    for name, differences in (parts | {"interaction": (d - c) - (b - a)}).items():
        assert cells[name] == interval(differences), name
    assert f"| lora-terms  | 4     | {interval(b - a)}" in printed
    assert f"| pissa-terms | 4     | {interval(d - c)}" in printed
    for arm, of_seeds in values.items():
        assert f"| {arm:11} | 4     | {statistics.mean(of_seeds):.2f} ± {statistics.stdev(of_seeds):.2f} " in printed
    assert "lora-terms, by gsm8k.response_loss: 0.001 0.5000; 0.003 0.4000; **0.01** 0.3000; the best is at" in printed


def test_parts_of_a_difference_are_told_apart_by_the_other_axes():
    """By hand: at rank 8 the starts differ by 10 points, at rank 64 by 30; the terms add 10 to every run."""

    def one(rank: str, start: str, terms: str, seed: int, **scores) -> dict:
        value = 0.3 + {"lora": 0.0, "pissa": 0.1 if rank == "8" else 0.3}[start] + 0.1 * (terms == "terms") + seed / 100
        labels = {"rank": f"rank{rank}", "start": start, "terms": terms, "seed": str(seed)}
        scores = {"gsm8k": {"accuracy": {"value": value}} | scores}
        return record("-".join(labels.values()), arm=f"{rank}-{start}-{terms}", labels=labels, seed=seed, scores=scores)

    places = itertools.product(("8", "64"), ("lora", "pissa"), ("plain", "terms"), (1, 2))
    records = [one(*place) for place in places]
    table = report.effects(records, [("gsm8k", "accuracy")], ["start", "terms"])
    cells = {
        row[1]: row[2].split()[0]
        for row in ([part.strip() for part in line.split("|")] for line in table.splitlines()[2:])
    }
    assert {name: float(value) for name, value in cells.items() if "interaction" not in name} == {
        "rank8: whole": 20.0,
        "rank8: of start": 10.0,
        "rank8: of terms": 10.0,
        "rank64: whole": 40.0,
        "rank64: of start": 30.0,
        "rank64: of terms": 10.0,
    }
    some = [made for made in records if made["labels"]["start"] == "lora"]
    text = report.summary("about", {made["run"]: made for made in some}, {"effects": ["start", "terms"]})
    assert "no parts: they need two labels of start, and the runs have 1" in text
    diverged = [
        one("8", "lora", "plain", seed, response_loss=loss) for seed, loss in ((1, 0.5), (2, math.inf), (3, 0.4))
    ]
    assert "| not finite in 1 of 3" in report.table(diverged, [("gsm8k", "response_loss")])


# ------------------------------------------------------------------------------------------------------------------
# The workflow
# ------------------------------------------------------------------------------------------------------------------


def workflow(folder: Path, *options: str) -> list[str]:
    """The command that runs an experiment's plan in `folder`."""
    command = [
        SNAKEMAKE,
        "--snakefile",
        "experiments/Snakefile",
        "--directory",
        ".",
        "--rerun-incomplete",
        "--keep-going",
    ]
    return [*map(str, command), "--cores", "1", "--quiet", "all", *options, "--config", f"plan={folder}/plan.json"]


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# What the clock, the machine's memory and the number of starts decide.
OF_THE_CLOCK = {"train_seconds", "seconds", "time", "resumed_from", "peak_memory_gib", "peak_gib", "command"}
OF_THE_CLOCK |= {"commit"}  # of the moment at which a run was recorded
OF_THE_CLOCK |= {"tokens_per_second", "eval_seconds"}


def without_the_clock(value):
    if isinstance(value, dict):
        return {key: without_the_clock(found) for key, found in value.items() if key not in OF_THE_CLOCK}
    return [without_the_clock(found) for found in value] if isinstance(value, list) else value


def what_is_left(folder: Path) -> dict:
    """By name every file of an experiment's folder, or of a run's, as it can be compared; of pictures, logs and torch's
    own files that they are there. The workflow's marks (.train.done) are its own."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name.startswith(".") or "tensorboard" in path.parts:
            continue
        text = (
            path.read_text().replace(str(folder), "FOLDER")
            if path.suffix in (".json", ".jsonl", ".yaml", ".md")
            else ""
        )
        if path.suffix == ".safetensors":
            text = {key: tensor.numpy().tobytes() for key, tensor in load_file(path).items()}
        elif path.name == "metrics.jsonl":
            text = [without_the_clock(line) for line in map(json.loads, text.splitlines()) if "loss" in line]
        elif path.suffix == ".jsonl":
            text = [without_the_clock(json.loads(line)) for line in text.splitlines()]
            if path.name.endswith((".completions.jsonl", ".measured.jsonl")):  # keys: digests of the checkpoint's place
                text = [line["value"] for line in text]
        elif path.suffix == ".json":
            text = without_the_clock(json.loads(text))
            if path.name == "manifest.json":  # the length of the log, which has times in it
                text["files"].pop("progress.json")
        elif path.name == "summary.md":  # the last columns are minutes and GiB
            text = [line.split("|")[:-3] if line.startswith("|") else line for line in text.splitlines()]
        found[name] = None if path.parent.name == "logs" else text
    return found


needs_snakemake = pytest.mark.skipif(
    not SNAKEMAKE.is_file(), reason="no Snakemake: requirements-experiments.txt in .venv-experiments"
)


@needs_snakemake
def test_a_job_names_the_gpus_that_it_takes(tmp_path, monkeypatch):
    """Four GPUs, two per training: what a job sees is what Snakemake counts for it, and all four are used."""
    monkeypatch.chdir(ROOT)
    only = {"seed": ["1", "2"], "data": ["metamath"], "model": ["llama2-7b"], "method": ["lora"]}
    plan = grid.as_json(plans.expand("nlg", str(tmp_path), only, 2), "", {}, ["4", "5", "6", "7"])
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    command = [word for word in workflow(tmp_path, "--dry-run") if word not in ("--quiet", "all")]
    printed = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = [line for line in printed.splitlines() if "visible=" in line]
    seen = {}
    for line in lines:
        counted = {name: int(value) for name, value in re.findall(r"gpu_(\d)=(\d)", line)}
        visible = re.search(r"visible=([\d,]+)", line)[1].split(",")
        assert {str(4 + int(name)) for name, value in counted.items() if value} == set(visible)
        seen.setdefault(len(visible), set()).add(tuple(visible))
    assert seen[2] == {("4", "5"), ("6", "7")}  # the two trainings
    assert seen[1] == {("4",), ("6",)}  # what is measured on their models


@needs_snakemake
def test_what_is_made_again_starts_again_what_names_it_if_its_content_is_another(tmp_path, monkeypatch):
    """Programs that only say that they ran, in the place of the scripts: each change of the plan has its own jobs."""
    monkeypatch.chdir(ROOT)
    path, folder = tmp_path / "mine.yaml", tmp_path / "out"
    settings = {"model": "demo", "data": "{files}/train.jsonl", "fields": ["question", "response"]}
    entries = {"settings": settings, "axes": {"seed": [1, 2]}, "benchmarks": {"gsm8k": {"data": "{files}/test.jsonl"}}}
    entries["tune"] = {"learning-rate": [1e-4], "score": "gsm8k.accuracy", "per": [], "seed": [100]}

    def jobs(train: str, test: str, rate: str = "1e-4") -> set[str]:
        texts = {"train.jsonl": train, "test.jsonl": test}
        entries["files"] = {name: f"sh -c 'echo {text} > {{file}}'" for name, text in texts.items()}
        path.write_text(yaml.safe_dump(entries))
        grid.main([str(path), "--output-dir", str(folder), "--plan", f"{folder}/plan.json", "--no-price"])
        plan = json.loads((folder / "plan.json").read_text()) | {"report": ["true"]}
        for name, run in plan["runs"].items():  # the words stay, because the files that they name decide
            run["train"] = f"sh -c 'echo {name}.train >> {folder}/ran' {run['train']}"
            run["measure"] = {
                key: f"sh -c 'echo {name}.{key} >> {folder}/ran' {run['measure'][key]}" for key in run["measure"]
            }
            Path(run["folder"], "merged").mkdir(parents=True, exist_ok=True)
            Path(run["results"]).mkdir(parents=True, exist_ok=True)
            Path(run["results"], "gsm8k.json").write_text(json.dumps({"accuracy": {"value": float(rate), "of": 1}}))
            Path(run["folder"], "run.json").write_text("{}")
        (folder / "plan.json").write_text(json.dumps(plan))
        (folder / "ran").write_text("")
        subprocess.run(workflow(folder), env=environment(), cwd=ROOT, capture_output=True, check=True)
        return set((folder / "ran").read_text().split())

    study = {f"{seed}.{step}" for seed in (1, 2) for step in ("train", "gsm8k")}
    tuning = {f"tune-learning-rate0.0001-100.{step}" for step in ("train", "gsm8k")}
    assert jobs("a", "b") == study | tuning
    assert jobs("a", "b") == set()
    assert jobs("a", "c") >= {"1.gsm8k", "2.gsm8k"}
    assert jobs("d", "c") >= {"1.train", "2.train"}
    os.utime(folder / ".files" / "train.jsonl.done")  # the same content
    assert jobs("d", "c") == set()
    (folder / ".files" / "train.jsonl.done").write_text("another, and killed before the runs started")
    assert {"1.train", "2.train"} <= jobs("d", "c")
    (folder / "chosen" / "all.yaml").write_text("learning_rate: 0.1")
    assert jobs("d", "c") == {"1.train", "2.train"}


def run_both(start, undisturbed: Path, killed: Path) -> None:
    """Runs an experiment in one folder, and in another with three kills of all its processes at random moments.

    Args:
        start: starts the workflow in a folder.
    """
    started = time.monotonic()
    assert start(undisturbed).wait() == 0
    whole = time.monotonic() - started
    moments = random.Random(12)
    for _ in range(3):
        process = start(killed)
        time.sleep(whole * moments.uniform(0.2, 0.9))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            subprocess.run(workflow(killed, "--unlock"), env=environment(), cwd=ROOT, check=True)
    assert start(killed).wait() == 0


@needs_snakemake
def test_three_kills_at_random_moments_leave_the_same_folder(tmp_path, checkpoint, data_file, monkeypatch):
    """A real training by BA-LoRA that is killed with all its processes; --unlock, and the same command again."""
    monkeypatch.chdir(ROOT)
    settings = {
        "model": str(checkpoint),
        "data": str(data_file),
        "rank": 2,
        "batch-size": 2,
        "gradient-accumulation": 1,
    }
    settings |= {"max-steps": 60, "save-steps": 5, "logging-steps": 5, "spectral-k": 2, "learning-rate": 1e-3}
    path = tmp_path / "kills.yaml"
    path.write_text(yaml.safe_dump({"settings": settings, "axes": {"run": {"only": {}}, "seed": [1]}}))

    def start(folder: Path) -> subprocess.Popen:
        grid.main([str(path), "--output-dir", str(folder), "--plan", f"{folder}/plan.json", "--no-price"])
        return subprocess.Popen(workflow(folder), env=environment(), cwd=ROOT, start_new_session=True)

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_both(start, undisturbed, killed)
    assert what_is_left(killed) == what_is_left(undisturbed)
    (found,) = records_in(killed / "records").values()
    assert found["status"] == "done"
    # With other settings under the same name nothing is lost: the script refuses, and the workflow says so.
    (run,) = killed.glob("only-*")
    before = what_is_left(run)
    path.write_text(yaml.safe_dump({"settings": settings | {"rank": 4}, "axes": {"run": {"only": {}}, "seed": [1]}}))
    assert start(killed).wait() != 0
    assert what_is_left(run) == before
    (found,) = records_in(killed / "records").values()
    assert (found["status"], found["error"]["code"]) == ("failed", 2)
    assert "rank = 2, not 4" in found["error"]["message"]


@needs_snakemake
@pytest.mark.slow
def test_three_kills_of_a_whole_experiment_leave_the_same_folder(tmp_path, monkeypatch):
    """Two trainings to their table: files, merges, all five benchmarks, forgetting, records, both reports."""
    monkeypatch.chdir(ROOT)
    axes = ["--axis", "model=tiny-gemma", "--axis", "method=lora,ba-lora", "--axis", "seed=42"]

    def start(folder: Path) -> subprocess.Popen:
        grid.main(["nlg-tiny", "--output-dir", str(folder), "--plan", f"{folder}/plan.json", "--no-price", *axes])
        return subprocess.Popen(workflow(folder), env=environment(), cwd=ROOT, start_new_session=True)

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run_both(start, undisturbed, killed)
    left = what_is_left(undisturbed)
    assert {"summary.md", "report/report.md", "tiny-gemma-metamath-lora-42/results/lora/mt_bench.json"} <= set(left)
    assert what_is_left(killed) == left
