"""The command lines that cannot run here: a dry run prints them whole, and their options exist."""

import fcntl
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch.distributed.run
import yaml
from conftest import ROOT, start_script

import finetune_bert_l_sst2
import train
from common.cli import parse_arguments
from eval import mt_bench, suite


def dry_run(script: str, *options: str, **environment: str) -> str:
    result = subprocess.run(
        ["sh", str(ROOT / "scripts" / script), *options],
        env=os.environ | {"DRY_RUN": "1", "OUTPUT": "out"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


def train_options(printed: str) -> train.Arguments:
    (line,) = (line for line in printed.splitlines() if "train.py" in line)
    words = shlex.split(line)
    return train.resolve_arguments(parse_arguments(train.Arguments, "", words[words.index("train.py") + 1 :]))


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
    assert (args.max_length, args.limit, args.data_subset) == (512, 100_000, "metamath")
    for ckpt in ("meta-llama/Llama-2-7b-hf", "out/merged"):
        assert f"eval/suite.py --benchmarks gsm8k hendrycks_math --ckpt {ckpt} " in printed
    assert "eval/report.py" in printed


@pytest.mark.parametrize("questions", ["/q.jsonl", ""])
def test_the_published_table_is_three_trainings_each_scored_on_its_own_benchmarks(questions, monkeypatch):
    """Every method, data set and seed once; GSM8K and MATH of metamath alone, and so on; one report of all. Without a
    file of questions MT-Bench's are the hub's."""
    monkeypatch.chdir(ROOT)
    printed = dry_run("nlg.sh", "--formulation", "arxiv2024", NUM_GPUS="8", MT_BENCH=questions, SEEDS="1 2")
    trainings, scored = {}, {}
    for words in map(shlex.split, printed.splitlines()):
        if "train.py" in words:
            args = parse_arguments(train.Arguments, "", words[words.index("train.py") + 1 :])
            assert (args.formulation, args.resume) == ("arxiv2024", True)
            trainings[args.output_dir] = (args.method, args.data_subset, args.seed)
        elif words[:2] == ["python", "eval/suite.py"]:
            args = parse_arguments(suite.Arguments, "", words[2:])
            assert args.ckpt == args.output_dir.partition("/results")[0] + "/merged"
            assert args.output_dir not in scored
            assert args.mt_bench == (questions or None)
            scored[args.output_dir] = args.benchmarks
    methods, seeds = ("full", "lora", "pissa", "ba-lora"), (1, 2)
    benchmarks = {
        "metamath": ["gsm8k", "hendrycks_math"],
        "python": ["humaneval", "mbpp"],
        "conversation": ["mt_bench"],
    }
    assert len(trainings) == 24
    assert set(trainings.values()) == set(itertools.product(methods, benchmarks, seeds))
    expected = {f"{out}/results/{method}": benchmarks[subset] for out, (method, subset, _) in trainings.items()}
    assert scored == expected
    report = shlex.split(printed.splitlines()[-1])
    assert set(report[2:-3]) == set(scored)


def test_a_driver_without_a_gpu_is_no_gpu(tmp_path):
    """nvidia-smi that finds nothing: the demo, not a silent end."""
    variables = stub_nvidia_smi(tmp_path, "No devices were found")
    with (tmp_path / "nvidia-smi").open("a") as file:
        file.write("exit 6\n")
    assert "no CUDA GPU" in dry_run("ba-lora.sh", **variables)


def stub_nvidia_smi(folder, *listed: str) -> dict[str, str]:
    """A variable under which nvidia-smi lists these lines."""
    lines = "".join(f"echo '{line}'\n" for line in listed)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
    (folder / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


FOUR = [f"GPU {i}: NVIDIA H100 (UUID: GPU-{i}a0b)" for i in range(4)]
MIG = [FOUR[0], "  MIG 3g.40gb Device 0: (UUID: MIG-1c)", "  MIG 3g.40gb Device 1: (UUID: MIG-2d)"]
BY_NAME = "env CUDA_VISIBLE_DEVICES={} torchrun --standalone --nproc_per_node {} --shutdown-timeout 600"


def assert_torchrun_is_patient(printed: str) -> None:
    """By torchrun's own reading: ten minutes for a rank to end, Slurm's warning handed on, and not nohup's signal."""
    (line,) = (line for line in printed.splitlines() if "torchrun" in line)
    found = torch.distributed.run.parse_args(shlex.split(line)[shlex.split(line).index("torchrun") + 1 :])
    assert found.shutdown_timeout == 600
    assert set(found.signals_to_handle.split(",")) == {"SIGTERM", "SIGINT", "SIGUSR1"}
    assert found.training_script == "train.py"


@pytest.mark.parametrize(
    ("listed", "variables", "launcher", "devices"),
    [
        (FOUR, {}, "deepspeed --no_local_rank --num_gpus 4 train.py", "0,1,2,3"),
        (FOUR, {"NUM_GPUS": "2"}, "deepspeed --no_local_rank --num_gpus 2 train.py", "0,1,2,3"),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "2,3", "NUM_GPUS": "1"}, "--include localhost:2 train.py", "2,3"),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "2, 3"}, "--include localhost:2,3 train.py", "2,3"),
        (FOUR, {"CUDA_VISIBLE_DEVICES": ""}, "no CUDA GPU", ""),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "-1"}, "no CUDA GPU", ""),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "3,1"}, "--include localhost:3,1 train.py", "3,1"),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "3,-1,2"}, "--include localhost:3 train.py", "3"),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "1,7,2"}, "--include localhost:1 train.py", "1"),
        (FOUR, {"CUDA_VISIBLE_DEVICES": "GPU-2a0b, GPU-3a"}, BY_NAME.format("GPU-2a0b,GPU-3a", 2), "GPU-2a0b,GPU-3a"),
        (
            FOUR,
            {"CUDA_VISIBLE_DEVICES": "GPU-2a,GPU-3a", "NUM_GPUS": "1"},
            BY_NAME.format("GPU-2a", 1),
            "GPU-2a,GPU-3a",
        ),
        (MIG, {"CUDA_VISIBLE_DEVICES": "MIG-2d"}, BY_NAME.format("MIG-2d", 1), "MIG-2d"),
        # CUDA gives a process one of them; two runs of an experiment can take one each.
        (MIG, {"CUDA_VISIBLE_DEVICES": "MIG-1c,MIG-2d"}, BY_NAME.format("MIG-1c", 1), "MIG-1c,MIG-2d"),
    ],
)
def test_a_run_takes_the_cards_that_are_named_and_no_others(
    listed, variables, launcher, devices, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    variables = stub_nvidia_smi(tmp_path, *listed) | variables
    printed = dry_run("ba-lora.sh", **variables)
    assert launcher in printed
    if "torchrun" in printed:
        assert_torchrun_is_patient(printed)
    if devices:
        args, count = train_options(printed), int(re.search(r"(\d+) CUDA GPUs", printed)[1])
        assert args.batch_size * args.gradient_accumulation * count == 128
    words = "cd scripts && . ./setup.sh && cards | paste -s -d , -"
    shown = subprocess.run(["sh", "-c", words], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert shown.stdout == f"{devices}\n"


@pytest.mark.parametrize("visible", ["2,3", "GPU-2a,GPU-3a", "MIG-1c,MIG-2d"])
def test_more_gpus_than_are_named_is_a_mistake(visible, tmp_path):
    variables = stub_nvidia_smi(tmp_path, *FOUR) | {"CUDA_VISIBLE_DEVICES": visible, "NUM_GPUS": "3", "DRY_RUN": "1"}
    words = ["sh", "scripts/ba-lora.sh"]
    finished = subprocess.run(words, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.endswith(
        f"a run can take {1 + ('MIG' not in visible)} here: CUDA_VISIBLE_DEVICES={visible}\n"
    )


def test_an_old_driver_stops_the_script_before_it_installs_anything_for_gpus(tmp_path):
    """The repository's scripts beside an environment in which everything is installed but what GPUs add."""
    for name in ("scripts", "common", "requirements.txt", "requirements-gpu.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name, command in (("pip", f'echo "$@" >>{tmp_path}/pip.log'), ("python", f'exec {sys.executable} "$@"')):
        (binaries / name).write_text(f"#!/bin/sh\n{command}\n")
        (binaries / name).chmod(0o755)
    variables = stub_nvidia_smi(binaries, *FOUR)
    words = ["sh", str(tmp_path / "scripts" / "ba-lora.sh")]

    def started(**more):
        return subprocess.run(words, env=os.environ | variables | more, capture_output=True, text=True)

    finished = started()
    assert finished.returncode == 2
    (line,) = finished.stderr.splitlines()
    assert "GPUs that nvidia-smi lists: 4; that torch" in line
    assert "-r requirements.txt" in (tmp_path / "pip.log").read_text()
    assert "requirements-gpu" not in (tmp_path / "pip.log").read_text()


def test_cards_that_torch_does_not_see_stop_a_run_once(checkpoint, data_file, tmp_path):
    """One line of the first rank; hidden cards are no obstacle, and the first line names the device."""
    (tmp_path / "bin").mkdir()
    variables = stub_nvidia_smi(tmp_path / "bin", *FOUR)
    words = [
        "--model",
        checkpoint,
        "--data",
        data_file,
        "--output-dir",
        tmp_path / "out",
        "--rank",
        2,
        "--max-steps",
        1,
    ]

    def started(name, **more):
        return start_script("train", words, tmp_path / name, **variables, **more)

    rank = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    processes = [started(f"rank {i}", RANK=str(i), LOCAL_RANK=str(i), **rank) for i in range(2)]
    processes.append(started("hidden", CUDA_VISIBLE_DEVICES=""))
    for process in processes:  # the second rank ends by itself too where no launcher ends it
        process.join()
    assert [process.exitcode for process in processes] == [2, 2, 0]
    (line,) = (tmp_path / "rank 0").read_text().splitlines()
    assert "GPUs that nvidia-smi lists: 4; that torch" in line
    assert (tmp_path / "rank 1").read_text() == ""
    assert re.fullmatch(r"device: CPU, \d+ threads", (tmp_path / "hidden").read_text().splitlines()[0])


def test_a_second_start_asks_the_scripts_what_is_done(tmp_path, monkeypatch):
    """They compare the settings (their own tests); what is trained anew is scored anew."""
    monkeypatch.chdir(ROOT)
    for script in (["ba-lora.sh", "--resume"], ["ba-lora.sh", "--overwrite"]):
        printed = dry_run(*script, NUM_GPUS="0", OUTPUT=str(tmp_path))
        training, *scoring, _ = [line for line in printed.splitlines() if line.startswith("python")]
        assert script[1] in training.split()
        flag = "--skip-done" if script[1] == "--resume" else "--overwrite"
        assert [line.split()[1] for line in scoring] == ["eval/gsm8k.py"] * 2
        assert all(flag in line.split() for line in scoring)
        assert f"--ckpt {tmp_path}/merged" in scoring[1]
    eight = dry_run("ba-lora.sh", "--overwrite", NUM_GPUS="8")
    scoring = [line for line in eight.splitlines() if "eval/suite.py" in line]
    assert len(scoring) == 2
    assert all("--overwrite" in line for line in scoring)


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
    """One command; what it runs each script with is what the script takes; local files and options reach it."""
    monkeypatch.chdir(ROOT)
    files = {name: f"/data/{name}.jsonl" for name in ("GSM8K", "MATH", "HUMANEVAL", "MBPP", "MT_BENCH")}
    judge = {"JUDGE": "gpt-4", "JUDGE_URL": "http://127.0.0.1:1/v1", "JUDGE_PROMPTS": "/p", "REFERENCES": "/r"}
    command = ["sh", "scripts/eval.sh", "out/run/merged", "", "--limit", "7"]

    def commands(**environment):
        variables = os.environ | {"DRY_RUN": "1"} | environment
        printed = subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout
        return [shlex.split(line) for line in printed.splitlines() if line.startswith("python")]

    def parsed_by_scripts(words):
        assert words[:2] == ["python", "eval/suite.py"]
        found = suite.commands(parse_arguments(suite.Arguments, "", words[2:]))
        scripts = {name: importlib.import_module(f"eval.{name}") for name in found}
        return {name: parse_arguments(script.Arguments, "", found[name]) for name, script in scripts.items()}

    scoring, last = commands(**files, **judge)
    assert last[1:3] == ["eval/report.py", "out/run/results"]
    parsed = parsed_by_scripts(scoring)
    assert list(parsed) == ["gsm8k", "hendrycks_math", "humaneval", "mbpp", "mt_bench"]
    for args, data in zip(parsed.values(), files.values(), strict=True):
        assert (args.ckpt, args.data, args.limit) == ("out/run/merged", data, 7)
        assert args.output_dir == "out/run/results"
        assert (args.temperature, args.skip_done) == (0, True)
    asked = parsed["mt_bench"]
    assert (asked.judge_model, asked.judge_url) == ("gpt-4", judge["JUDGE_URL"])
    assert (asked.judge_prompts, asked.references) == ("/p", "/r")
    plain = parsed_by_scripts(commands()[0])
    assert list(plain) == list(parsed)  # MT-Bench's questions are the hub's
    assert (plain["mt_bench"].data, plain["mt_bench"].judge_model) == (mt_bench.HUB_DATA, None)
    assert list(parsed_by_scripts(commands(BENCHMARKS="mbpp gsm8k")[0])) == ["mbpp", "gsm8k"]


def test_a_second_start_leaves_the_plan_and_options_of_the_engine_arrive_as_typed(tmp_path):
    """With stand-ins for the installation, for two GPUs and for Snakemake, which prints its words."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/experiment.sh", tmp_path / "scripts")
    stand_ins = (
        f"cd '{ROOT}'; say() {{ echo \"$*\"; }}; setup() {{ :; }}; setup_experiments() {{ :; }}; cards() {{ seq 0 1; }}"
    )
    (tmp_path / "scripts/setup.sh").write_text(stand_ins)
    engine = tmp_path / "snakemake"
    engine.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    engine.chmod(0o755)
    output = tmp_path / "out"
    environment = os.environ | {"SNAKEMAKE": str(engine), "OUTPUT": str(output), "PRICE": "no"}

    def start(*options: str) -> subprocess.CompletedProcess:
        command = ["sh", str(tmp_path / "scripts/experiment.sh"), "nlg-demo", *options]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    extra = "slurm_extra='--qos=high --constraint=a100'"
    ended = start("--resources", "mem_mb=9", "--jobs", "2", "--res=a=1", "--default-resources", extra, "--quiet", "all")
    assert ended.returncode == 0, ended.stderr
    words = ended.stdout.splitlines()
    expected = ["--jobs", "2", "--default-resources", extra, "--quiet", "all"]
    expected += ["--resources", "mem_mb=9", "a=1", "gpu_0=1", "gpu_1=1"]
    assert words[words.index("--jobs") : words.index("--config")] == expected
    plan = (output / "plan.json").read_bytes()
    with open(output / ".start") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ended = start("--", "--save-steps", "50")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "another start is running" in ended.stderr
    assert (output / "plan.json").read_bytes() == plan


@pytest.mark.parametrize(
    ("script", "variable"),
    [
        ("nlg.sh", "SUBSET"),
        ("nlg.sh", "AXES"),
        ("glue.sh", "METHOD"),
        ("glue.sh", "MODEL"),
        ("experiment.sh nlg", "SEEDS"),
        ("experiment.sh nlg", "NUM_GPUS"),
    ],
)
def test_a_variable_of_another_script_is_refused_in_one_line(script, variable):
    name, *options = script.split()
    environment = os.environ | {"DRY_RUN": "1", "PRICE": "no", variable: "7"}
    ended = subprocess.run(
        ["sh", f"scripts/{name}", *options], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert re.search(rf"{variable}( is not read here|=7): .*(METHODS|AXES)", ended.stderr)


def test_the_list_of_experiments_without_an_installation_says_what_installs_it(tmp_path):
    """A checkout without .venv, and a Python that has none of the packages, or no Python at all."""
    (tmp_path / "scripts").mkdir()
    for script in ("experiment.sh", "setup.sh"):
        shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("sh", "dirname", "date", "sed", "basename"):
        (tools / tool).symlink_to(shutil.which(tool))
    for python in ("none", "bare"):
        if python == "bare":
            (tools / "python").write_text(f"#!/bin/sh\nexec '{sys.executable}' -I -S \"$@\"\n")
            (tools / "python").chmod(0o755)
        for words in ([], ["nlg", "-n"]):
            command = [shutil.which("sh"), str(tmp_path / "scripts/experiment.sh"), *words]
            ended = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)
            assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
            assert "pip install -r requirements.txt" in ended.stderr


def test_glue_takes_no_number_of_gpus_and_says_so():
    environment = os.environ | {"DRY_RUN": "1", "GPUS_PER_RUN": "4"}
    ended = subprocess.run(["sh", "scripts/glue.sh"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "GPUS_PER_RUN=4: a run is one process here" in ended.stderr


def test_glue_is_every_task_by_every_method_and_seed(tmp_path):
    printed = subprocess.run(
        ["sh", "scripts/glue.sh", "configs/glue_roberta_large.yaml", "--epochs", "2"],
        env=os.environ | {"DRY_RUN": "1", "SEEDS": "0 1", "OUTPUT": str(tmp_path / "glue")},
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
    rates = {args.method: args.learning_rate for args in parsed}
    assert rates == {"full": 2e-5, "lora": 4e-4, "pissa": 1e-4, "ba-lora": 1e-4}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_configuration_is_valid(path, tmp_path):
    keys = set(yaml.safe_load(path.read_text()))
    if path.name.startswith(("bert", "glue", "nlu")):
        assert keys <= set(finetune_bert_l_sst2.Arguments.__dataclass_fields__)
        task = [] if keys & {"task", "data"} else ["--task", "rte"]
        finetune_bert_l_sst2.resolve_arguments(["--config", str(path), "--output-dir", str(tmp_path / "out"), *task])
    else:
        assert keys <= set(train.Arguments.__dataclass_fields__)
        train.resolve_arguments(parse_arguments(train.Arguments, "", ["--config", str(path)]))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.json")), ids=lambda path: path.name)
def test_every_deepspeed_configuration_is_json(path):
    assert "zero_optimization" in json.loads(path.read_text())
