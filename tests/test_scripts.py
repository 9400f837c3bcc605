"""The command lines that cannot run here: a dry run prints them whole, and their options exist."""

import importlib
import itertools
import json
import os
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT

import finetune_bert_l_sst2
import train


def dry_run(script: str, **environment: str) -> str:
    result = subprocess.run(
        ["sh", str(ROOT / "scripts" / script)],
        env=os.environ | {"DRY_RUN": "1", "OUTPUT": "out"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def train_options(printed: str) -> train.Arguments:
    (line,) = (line for line in printed.splitlines() if "train.py" in line)
    words = shlex.split(line)
    return train.resolve_arguments(train.parse_arguments(train.Arguments, "", words[words.index("train.py") + 1 :]))


@pytest.mark.parametrize(
    ("script", "method"),
    [("ba-lora.sh", "ba-lora"), ("pissa.sh", "pissa"), ("lora.sh", "lora"), ("full-ft.sh", "full")],
)
@pytest.mark.parametrize("num_gpus", [1, 2, 8])
def test_the_papers_experiment_on_gpus(script, method, num_gpus, monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = dry_run(script, NUM_GPUS=str(num_gpus), SEED="7")
    assert f"{num_gpus} CUDA GPUs; EXPERIMENT=demo for the small one" in printed
    assert f"deepspeed --no_local_rank --num_gpus {num_gpus} train.py" in printed
    args = train_options(printed)
    assert (args.method, args.seed, args.model, args.rank) == (method, 7, "meta-llama/Llama-2-7b-hf", 128)
    assert args.batch_size * args.gradient_accumulation * num_gpus == 128
    assert (args.learning_rate, args.warmup_ratio, args.weight_decay, args.epochs) == (2e-5, 0.03, 0.0, 1.0)
    assert (args.max_length, args.max_examples, args.data_subset) == (512, 100_000, "metamath")
    assert "eval/gsm8k.py --ckpt meta-llama/Llama-2-7b-hf" in printed
    assert "eval/gsm8k.py --ckpt out/merged" in printed
    assert "eval/report.py" in printed


def test_the_demo_without_gpus(monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = dry_run("ba-lora.sh", NUM_GPUS="0")
    assert "no CUDA GPU; EXPERIMENT=paper for LLaMA-2-7B" in printed
    assert train_options(printed).model == "demo"


def test_local_copies_take_the_hubs_place(monkeypatch):
    monkeypatch.chdir(ROOT)
    args = train_options(dry_run("ba-lora.sh", NUM_GPUS="4", MODEL="/models/llama", DATA="/data/metamath.jsonl"))
    assert (args.model, args.data) == ("/models/llama", "/data/metamath.jsonl")


def test_all_five_benchmarks_of_a_checkpoint(monkeypatch):
    """Each command is one that its script takes; local files and options reach it; without questions no MT-Bench."""
    monkeypatch.chdir(ROOT)
    files = {name: f"/data/{name}.jsonl" for name in ("GSM8K", "MATH", "HUMANEVAL", "MBPP", "MT_BENCH")}
    judge = {"JUDGE": "gpt-4", "JUDGE_URL": "http://127.0.0.1:1/v1", "JUDGE_PROMPTS": "/p", "REFERENCES": "/r"}
    command = ["sh", "scripts/eval.sh", "out/run/merged", "", "--limit", "7"]

    def commands(**environment):
        variables = os.environ | {"DRY_RUN": "1"} | environment
        printed = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
        return [shlex.split(line) for line in printed.splitlines() if line.startswith("python")]

    *scores, last = commands(**files, **judge)
    assert last[1:3] == ["eval/report.py", "out/run/results"]
    parsed = {}
    for words in scores:
        script = importlib.import_module(words[1].removeprefix("eval/").removesuffix(".py"))
        parsed[script.__name__] = train.parse_arguments(script.Arguments, "", words[2:])
    assert list(parsed) == ["gsm8k", "hendrycks_math", "humaneval", "mbpp", "mt_bench"]
    for args, data in zip(parsed.values(), files.values(), strict=True):
        assert (args.ckpt, args.data, args.limit) == ("out/run/merged", data, 7)
        assert args.output_dir == "out/run/results"
        assert args.temperature == 0
    assert (parsed["mt_bench"].judge_model, parsed["mt_bench"].references) == ("gpt-4", "/r")
    assert [words[1] for words in commands()] == [f"eval/{name}.py" for name in [*list(parsed)[:4], "report"]]


def test_glue_is_every_task_by_every_method_and_seed(tmp_path):
    printed = subprocess.run(
        ["sh", "scripts/glue.sh", "configs/glue_roberta_large.yaml", "--epochs", "2"],
        env=os.environ | {"DRY_RUN": "1", "SEEDS": "0 1", "OUTPUT": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    *runs, report = [shlex.split(line) for line in printed.splitlines() if line.startswith("python")]
    parsed = [finetune_bert_l_sst2.resolve_arguments(words[2:]) for words in runs]
    expected = set(itertools.product(finetune_bert_l_sst2.TASKS, ("full", "lora", "pissa", "ba-lora"), (0, 1)))
    assert {(args.task, args.method, args.seed) for args in parsed} == expected
    assert len(parsed) == len({args.output_dir for args in parsed}) == len(expected)
    assert {(args.model, args.epochs) for args in parsed} == {("FacebookAI/roberta-large", 2.0)}
    assert report[2:-3] == [args.output_dir for args in parsed]


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_valid(path, tmp_path):
    keys = set(yaml.safe_load(path.read_text()))
    if path.name.startswith(("bert", "glue", "nlu")):
        assert keys <= set(finetune_bert_l_sst2.Arguments.__dataclass_fields__)
        task = [] if keys & {"task", "data"} else ["--task", "rte"]
        finetune_bert_l_sst2.resolve_arguments(["--config", str(path), "--output-dir", str(tmp_path / "out"), *task])
    else:
        assert keys <= set(train.Arguments.__dataclass_fields__)
        train.resolve_arguments(train.parse_arguments(train.Arguments, "", ["--config", str(path)]))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.json")), ids=lambda path: path.name)
def test_every_deepspeed_configuration_is_json(path):
    assert "zero_optimization" in json.loads(path.read_text())
