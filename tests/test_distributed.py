"""Two ranks on the CPU, by the real DeepSpeed and the real torchrun: the same result as one process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    PATIENCE,
    ROOT,
    free_port,
    make_model,
    make_tokenizer,
    on_ranks,
    read_jsonl,
    save_tiny,
    start_ranks,
    sums,
    write_jsonl,
)
from safetensors.torch import load_file
from torch.utils.data import BatchSampler

from common.checkpoints import complete_checkpoints, newest_checkpoint
from common.training import MicroBatches

METHODS = ["full", "lora", "pissa", "ba-lora"]
LAUNCHERS = {  # nothing: processes are forked, the ranks with the variables that torchrun gives
    "one process": [],
    "torchrun": ["torchrun", "--nproc_per_node", "2"],
    "zero2": ["deepspeed", "--no_local_rank", "--num_accelerators", "2"],
    "zero3": [],
}


def environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(name: str, runs: list[dict], folder: Path) -> list[str]:
    """Makes the runs one after the other (see distributed_runs.py); returns what each of them printed."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(runs))
    if LAUNCHERS[name]:
        port = ["--master_port", free_port()]  # other runs may have the usual one
        command = [*LAUNCHERS[name], *port, str(ROOT / "tests" / "distributed_runs.py"), str(file)]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": PATIENCE}
        done = subprocess.run(command, env=environment(), cwd=ROOT, **options)
        assert done.returncode == 0, done.stdout[-3000:]
        printed = done.stdout
    else:
        printed = on_ranks(2 if name == "zero3" else None, [file], folder, "distributed_runs")
    return re.split(r"^=== run \d+$", printed, flags=re.MULTILINE)[1:]


def arguments(folder: Path, output: Path, *options) -> list:
    fixed = ["--model", folder / "base", "--data", folder / "data.jsonl", "--rank", 4, "--learning-rate", 1e-3]
    fixed += ["--max-steps", 5, "--batch-size", 2, "--logging-steps", 1, "--regularizer-schedule", "constant"]
    return [*fixed, "--output-dir", output, *options]


def launched(name: str, folder: Path, output: Path, *options) -> list:
    """The arguments of a run whose optimizer step takes eight sequences under this launcher."""
    accumulation = ["--gradient-accumulation", 4 if name == "one process" else 2]
    zero = ["--deepspeed", ROOT / "configs" / f"ds_{name}.json"] if name.startswith("zero") else []
    return arguments(folder, output, *accumulation, *zero, *options)


def run_of(argv: list, **more: str | list[str]) -> dict:
    return {"argv": [str(word) for word in argv], **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny(folder / "base")
    rows = sums(64)
    write_jsonl(folder / "data.jsonl", rows)
    write_jsonl(folder / "held_out.jsonl", rows[:9])  # five micro-batches
    return folder


@pytest.fixture(scope="module")
def poisoned(folder: Path) -> Path:
    """A base with NaN in the embedding of one token, which one example has."""
    poisoned = folder / "poisoned"
    model = make_model(tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[make_tokenizer()("?")["input_ids"][0]] = float("nan")
    model.save_pretrained(poisoned / "base")
    make_tokenizer().save_pretrained(poisoned / "base")
    rows = [{"instruction": f"Add {i} and 1", "output": f"The sum is {i + 1}" + "?" * (i == 11)} for i in range(40)]
    write_jsonl(poisoned / "data.jsonl", rows)
    return poisoned


def kept(folder: Path) -> tuple:
    """Options of checkpoints at steps 3 and 5, and of validations at 2, 4 and 5."""
    return ("--save-steps", 3, "--validation-data", folder / "held_out.jsonl", "--eval-steps", 2)


@pytest.fixture(scope="module")
def launches(folder: Path, poisoned: Path) -> tuple[dict[tuple[str, str], Path], dict[tuple[str, str], str]]:
    """Every launcher once, with all of its runs: by launcher and what they are, their folders and what they printed.

    By name of a method: five steps, checkpoints of steps 3 and 5. METHOD-resumed: goes on from step 3. best, nan,
    cache-N, full-disk-N: see their tests.
    """
    outputs, texts = {}, {}
    for name in LAUNCHERS:
        runs = []

        def add(what: str, *options, where: Path = folder, name: str = name, runs: list = runs, **more) -> None:
            outputs[name, what] = where / f"{name}-{what}"
            runs.append(run_of(launched(name, where, outputs[name, what], *options), **more))

        for method in METHODS:
            add(method, *kept(folder), "--method", method)
        if name != "one process":
            add("best", *kept(folder), "--keep-best")
            for method in ("full", "ba-lora"):
                places = (outputs[name, method], folder / f"{name}-{method}-resumed")
                copied = [str(place / "checkpoints" / "checkpoint-3") for place in places]
                add(f"{method}-resumed", *kept(folder), "--resume", "--method", method, copy=copied)
            add("nan", "--on-nonfinite", "skip", "--epochs", 1, where=poisoned)
        if name == "torchrun":
            add("full-disk", "--save-steps", 3, full_disk_on="0")
        if name == "zero3":
            cache = ("--teacher-cache", folder / "states")
            add("cache-1", *cache, "--seed", 1, "--max-steps", 2)
            add("cache-2", *cache, "--seed", 2)
            add("no-cache", "--seed", 2)
        names = [place for place in outputs if place[0] == name]
        texts |= dict(zip(names, launch(name, runs, folder), strict=True))
    return outputs, texts


@pytest.fixture(scope="module")
def runs(launches) -> dict[tuple[str, str], Path]:
    return launches[0]


@pytest.fixture(scope="module")
def printed(launches) -> dict[tuple[str, str], str]:
    return launches[1]


def movement(output: Path, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The merged weights in one vector, and how far they went from the base, both in float64."""
    base, merged = load_file(folder / "base/model.safetensors"), load_file(output / "merged/model.safetensors")
    assert set(base) == set(merged)
    weights = torch.cat([merged[name].double().flatten() for name in sorted(base)])
    return weights, weights - torch.cat([base[name].double().flatten() for name in sorted(base)])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in LAUNCHERS if name != "one process"])
def test_two_ranks_end_where_one_process_ends(name, method, runs, folder):
    """Within 1e-4, of the weights and of what was learnt; the adapters too."""
    expected, expected_movement = movement(runs["one process", method], folder)
    actual, actual_movement = movement(runs[name, method], folder)
    assert expected_movement.norm() > 1e-4 * expected.norm()  # it did learn
    assert (actual - expected).norm() < 1e-4 * expected.norm()
    assert (actual_movement - expected_movement).norm() < 1e-4 * expected_movement.norm()
    if method != "full":
        file = "adapter/adapter_model.safetensors"
        theirs, ours = load_file(runs["one process", method] / file), load_file(runs[name, method] / file)
        assert set(theirs) == set(ours)
        for tensor in theirs:
            assert (ours[tensor] - theirs[tensor]).norm() <= 1e-4 * theirs[tensor].norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in LAUNCHERS if name != "one process"])
def test_metrics_and_validations_are_one_processs(name, method, runs):
    """Every rank counts; a validation has an odd number of micro-batches: one rank has none left at the end."""
    ours, theirs = (read_jsonl(runs[launcher, method] / "metrics.jsonl") for launcher in (name, "one process"))
    assert [row["step"] for row in ours if "eval_loss" in row] == [2, 4, 5]
    machine = {"tokens_per_second", "peak_memory_gib", "eval_seconds"}
    for row, expected in zip(ours, theirs, strict=True):
        assert row.keys() == expected.keys()
        assert ("eval_spectral" in row) == (method == "ba-lora" and "eval_loss" in row)
        for term in row.keys() - machine:
            assert row[term] == pytest.approx(expected[term], rel=1e-4, abs=1e-6), term


def test_the_best_state_of_two_ranks_is_exported(runs, folder):
    """ZeRO's, from the checkpoint of the best step: as good as a run that ends there, where the loss still falls."""
    for name in ("torchrun", "zero2", "zero3"):
        output = runs[name, "best"]
        record = json.loads((output / "run.json").read_text())["validation"]
        assert record["exported_step"] == record["best"]["step"]
        assert (output / "checkpoints" / f"checkpoint-{record['exported_step']}").is_dir()
        assert torch.equal(movement(output, folder)[0], movement(runs[name, "ba-lora"], folder)[0])


def test_resume_on_two_ranks_is_an_uninterrupted_run(runs, printed, folder):
    for name in ("torchrun", "zero2", "zero3"):
        for method in ("full", "ba-lora"):
            assert printed[name, f"{method}-resumed"].count("going on from") == 1
            expected, _ = movement(runs[name, method], folder)
            actual, _ = movement(runs[name, f"{method}-resumed"], folder)
            assert torch.equal(actual, expected)


# ---------------------------------------------------------------------------------------------- another number of ranks


@pytest.mark.parametrize("on_one_rank", [False, True])
def test_a_bad_example_ends_every_rank_with_the_same_line(on_one_rank, folder, tmp_path):
    """Also where one rank alone finds it: each of two nodes has files of its own."""
    good, bad = {"instruction": "Add", "output": "4"}, {"instruction": "Add", "output": "5", "weight": 0.5}
    for rank in (0, 1):
        rows = [good] if on_one_rank and rank == 0 else [good, bad]
        (tmp_path / f"rank-{rank}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", folder / "base", "--data", tmp_path / "rank-{RANK}.jsonl", "--output-dir", tmp_path / "run"]
    ranks, logs = start_ranks(2, [*argv, "--rank", 4], tmp_path, "train")
    for process in ranks:
        process.join(200)
    assert [process.exitcode for process in ranks] == [2, 2]
    data = tmp_path / f"rank-{int(on_one_rank)}.jsonl"
    expected = f"train.py: error: {data}, example 2: its weight is 0.5: it must be 0 or 1"
    assert [[line for line in log.read_text().splitlines() if "error:" in line] for log in logs] == [[expected]] * 2


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_micro_batches_are_the_same_for_every_number_of_ranks(num_ranks):
    """torch's own sampler gives them to one process; none comes twice, none is lost."""
    order = torch.randperm(53, generator=torch.Generator().manual_seed(7)).tolist()
    expected = list(BatchSampler(order, 4, drop_last=False))
    ranks = [MicroBatches(lambda epoch: order, 53, 4, 3, rank, num_ranks) for rank in range(num_ranks)]
    steps = [[batch for step in range(rank.steps_per_epoch) for batch in rank.of_step(step)] for rank in ranks]
    batches = [batch for one_round in zip(*steps, strict=True) for batch in one_round]
    assert [rows for rows, counts in batches if counts] == expected
    assert all(counts for _, counts in batches[: len(expected)])
    assert all(rows for rows, _ in batches), "a rank that has none left must stand in"


def unfinished_by_two_ranks(folder: Path, output: Path, argv: list) -> None:
    """Starts two ranks, of which the first is killed in the step after the first checkpoint, and the second then."""
    words = [*argv, "--output-dir", output]
    ranks, logs = start_ranks(2, words, folder, "train", ends=(signal.SIGKILL, "metrics.jsonl", 6))
    ranks[0].join(PATIENCE)
    ranks[1].kill()
    ranks[1].join()
    assert ranks[0].exitcode == -signal.SIGKILL, logs[0].read_text()[-3000:]
    assert newest_checkpoint(output).name == "checkpoint-5"


@pytest.mark.parametrize("name", ["torchrun", "zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_ranks_killed_go_on_as_one_and_as_four(name, folder):
    """In the midst of an epoch whose last step has 5 examples instead of 8."""
    write_jsonl(folder / "uneven.jsonl", sums(61))
    argv = ["--model", folder / "base", "--data", folder / "uneven.jsonl", "--rank", 4, "--learning-rate", 1e-3]
    argv += ["--epochs", 2, "--batch-size", 2, "--logging-steps", 1, "--save-steps", 5]
    whole = folder / "uninterrupted-uneven"
    if not whole.exists():
        launch("one process", [run_of([*argv, "--gradient-accumulation", 4, "--output-dir", whole])], folder)
    expected, learnt = movement(whole, folder)

    argv += ["--gradient-accumulation", 2]
    argv += ["--deepspeed", ROOT / "configs" / f"ds_{name}.json"] if name.startswith("zero") else []
    killed = folder / f"{name}-killed"
    unfinished_by_two_ranks(folder, killed, argv)
    for count in (1, 4):
        output = folder / f"{name}-on-{count}"
        shutil.copytree(killed, output)
        printed = on_ranks(count, [*argv, "--output-dir", output, "--resume"], folder)
        assert f"{newest_checkpoint(killed).name}, with --gradient-accumulation" in printed
        actual, movement_of_it = movement(output, folder)
        assert (actual - expected).norm() < 1e-4 * expected.norm()
        assert (movement_of_it - learnt).norm() < 1e-4 * learnt.norm()
        result = json.loads((output / "run.json").read_text())
        assert (result["processes"], result["micro_batches"], result["steps"]) == (count, 4, 16)
        lines = read_jsonl(output / "metrics.jsonl")
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 17))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run_of_two_ranks(runs, printed, folder):
    """The first rank alone writes files."""
    place = ("torchrun", "full-disk")
    output = runs[place]
    assert "the checkpoint of step 3 could not be written" in printed[place]
    assert "No space left" in printed[place]
    assert [path.name for path in complete_checkpoints(output)] == ["checkpoint-5"]
    assert torch.equal(movement(output, folder)[0], movement(runs["torchrun", "ba-lora"], folder)[0])


def test_a_half_filled_teacher_cache_under_zero3(runs, folder):
    """Ranks that have their examples wait for one that has not: the weights are gathered by all or none."""
    expected, learnt = movement(runs["zero3", "no-cache"], folder)
    assert (movement(runs["zero3", "cache-2"], folder)[0] - expected).norm() < 1e-4 * learnt.norm()


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_checkpoint_under_deepspeed_is_small_too(name, runs):
    checkpoint = newest_checkpoint(runs[name, "ba-lora"])
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    adapter = runs[name, "ba-lora"] / "adapter" / "adapter_model.safetensors"
    assert size <= 5 * adapter.stat().st_size + 10**6
    held = {key for file in checkpoint.glob("*.safetensors") for key in load_file(file)}
    assert held
    assert not any(key.endswith("base.weight") or "embed" in key for key in held)


@pytest.mark.parametrize("name", ["torchrun", "zero2", "zero3"])
def test_nan_skips_on_every_rank(name, runs):
    """ZeRO-2 in fp32 would step on NaN; NaN comes from one rank's example alone."""
    output = runs[name, "nan"]
    assert json.loads((output / "run.json").read_text())["skipped_steps"] == 1
    tensors = load_file(output / "adapter" / "adapter_model.safetensors").values()
    assert all(tensor.isfinite().all() for tensor in tensors)


# ---------------------------------------------------------------------------------------------- ZeRO-3 initialisation

MEASURE = """
import json, sys, threading, time
import deepspeed, peft, torch, transformers  # all that `add_adapters` imports: it does not count
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see ranks.py
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
import train
from common import tensors
from common.ranks import leave

deepspeed.init_distributed(dist_backend="gloo")
keep = HfDeepSpeedConfig({{"zero_optimization": {{"stage": 3}}, "train_micro_batch_size_per_gpu": 1}})
model = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)
largest = max(p.ds_numel for p in model.parameters() if len(p.ds_shape) == 2)
held, most = {{}}, 0
gathered_by, principal_factors = tensors.gathered_by, train.principal_factors

def watch(owner, weight):
    global most
    whole = gathered_by(owner, weight)
    if whole is not None:
        held[id(whole)] = __import__("weakref").ref(whole)
    most = max(most, sum(ref() is not None for ref in held.values()))
    return whole

count = 0
def counted(*args):
    global count
    count += 1
    return principal_factors(*args)

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

principal_factors(torch.randn(1024, 1024), 4, 1.0)  # loads the libraries
tensors.gathered_by, train.principal_factors = watch, counted
open("/proc/self/clear_refs", "w").write("5")
before = resident()
train.add_adapters(model, "ba-lora", 4, 4, None)
grown = resident() - before
all_in_parts = all(p.numel() == 0 for n, p in model.named_parameters() if "lora" not in n)
result = [most, count, grown / (4 * largest), all_in_parts]
open(f"{out}/{{dist.get_rank()}}.json", "w").write(json.dumps(result))
leave(0)
"""


def test_zero3_initialisation_holds_one_whole_layer_per_rank(tmp_path):
    """Twelve layers of 4 MiB: whole weights alive at once are counted, and the resident peak bounds what is not."""
    make_model(hidden_size=1024, intermediate_size=1024, num_hidden_layers=4).save_pretrained(tmp_path / "base")
    script = tmp_path / "measure.py"
    script.write_text(MEASURE.format(base=str(tmp_path / "base"), out=str(tmp_path)))
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", free_port(), str(script)]
    # What is freed goes back at once: the peak is of what is alive.
    where = environment() | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
    done = subprocess.run(command, env=where, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        most, count, growth, partitioned = json.loads((tmp_path / f"{rank}.json").read_text())
        assert most == 1
        assert count == 14  # of 28: shared out
        assert partitioned
        # A layer, its Gram matrix, eigenvectors and workspace: 5.5. With its 14 layers held whole it would be 19.
        assert growth < 8, growth


# ---------------------------------------------------------------------------------------------- two nodes

ADDRESSES = ["10.213.77.1", "10.213.77.2"]


WAIT = """
import types, torch
from common.ranks import start_ranks
start_ranks(types.SimpleNamespace(deepspeed=None))
print(torch.distributed.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout)
"""


def test_ranks_wait_for_what_the_first_one_does_alone():
    """Ten minutes are NCCL's own timeout: two hours, as torch's group itself has it."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-c", WAIT]
    done = subprocess.run(command, env=environment() | rank, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "2:00:00"


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory) -> Path:
    """A folder with the data, and in out/ a run of two ranks that saved its last step alone."""
    place = tmp_path_factory.mktemp("stopped")
    shutil.copy(folder / "data.jsonl", place)
    started, logs = start_apart([place, place], [(), ()], folder, place)
    assert [process.exitcode for process in started] == [0, 0], logs[0].read_text()[-3000:]
    (place / "out" / "run.json").unlink()
    return place


def start_apart(places: list[Path], options: list[tuple], folder: Path, tmp_path: Path) -> tuple[list, list[Path]]:
    """Two ranks, each with a folder and options of its own, to their end: two nodes that share no disk."""
    for rank, (place, more) in enumerate(zip(places, options, strict=True)):
        fixed = ["--model", folder / "base", "--data", "data.jsonl", "--output-dir", "out", "--rank", 2]
        run = run_of([*fixed, "--max-steps", 2, "--batch-size", 2, *more], **{"in": str(place)})
        (tmp_path / f"apart-{rank}.json").write_text(json.dumps([run]))
    started, logs = start_ranks(2, [tmp_path / "apart-{RANK}.json"], tmp_path, "distributed_runs")
    for process in started:
        process.join(PATIENCE)
    return started, logs


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, None),
        ("checkpoint", r"rank 1 has checkpoint = None, not out/checkpoints/checkpoint-2 \(\w{64}\) as rank 0"),
        ("data", r"rank 1 has content of the data = \w{64}, not \w{64} as rank 0"),
        ("option", "rank 1 has save_steps = 7, not 100 as rank 0"),
    ],
)
def test_ranks_that_would_start_differently_are_refused(change, expected, stopped, folder, tmp_path):
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        shutil.copytree(stopped, place)
    if change == "checkpoint":
        shutil.rmtree(places[1] / "out" / "checkpoints")
    elif change == "data":
        write_jsonl(places[1] / "data.jsonl", [*sums(63), {"instruction": "Add 63 and 1", "output": "No"}])
    options = ("--resume", "--accept-changes")  # which are meant for another content, the same on all ranks
    more = {"option": ("--save-steps", 7), None: ("--init-cache", places[1] / "cache")}.get(change, ())
    started, logs = start_apart(places, [options, (*options, *more)], folder, tmp_path)
    for process, log in zip(started, logs, strict=True):
        assert process.exitcode == (0 if change is None else 2), log.read_text()[-3000:]
        assert change is None or re.search(expected, log.read_text().strip().splitlines()[-1])


@pytest.fixture
def nodes():
    """Two network namespaces with an address each, joined by a cable; skipped where they cannot be made."""
    names = [f"balora{os.getpid() % 10000}n{i}" for i in range(2)]

    def ip(*words: str, check: bool = True) -> bool:
        return subprocess.run(["ip", *words], capture_output=True, check=check).returncode == 0

    try:
        made = all(ip("netns", "add", name, check=False) for name in names)
    except OSError:
        made = False
    if not made:
        pytest.skip("network namespaces cannot be made here")
    try:
        ends = [f"{name}v" for name in names]
        ip(*f"link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}".split())
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"{name}v")
            ip("-n", name, "link", "set", f"{name}v", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def start_nodes(nodes: list[str], script: str, argv: list, logs: list[Path]) -> list[subprocess.Popen]:
    """torchrun on each node, as docs/many-gpus.md has it."""
    processes = []
    for rank, (name, log) in enumerate(zip(nodes, logs, strict=True)):
        command = ["ip", "netns", "exec", name, "torchrun", "--nnodes", "2", "--node_rank", str(rank)]
        command += ["--nproc_per_node", "1", "--master_addr", ADDRESSES[0], "--master_port", "29511"]
        command += [str(ROOT / script), *map(str, argv)]
        with open(log, "w") as file:
            where = environment() | {"GLOO_SOCKET_IFNAME": f"{name}v"}
            processes.append(subprocess.Popen(command, env=where, cwd=ROOT, stdout=file, stderr=file))
    return processes


def test_two_nodes_end_where_one_process_ends_and_a_lost_rank_ends_both(nodes, runs, folder, tmp_path):
    """One start makes a run to its end, and another that loses its second rank."""
    whole, output = tmp_path / "two-nodes", tmp_path / "lost"
    options = ("--method", "ba-lora", "--max-steps", 200, "--epochs", 100, "--save-steps", 20)
    argv = launched("torchrun", folder, output, *options)
    file = tmp_path / "runs.json"
    file.write_text(json.dumps([run_of(launched("torchrun", folder, whole, "--method", "ba-lora")), run_of(argv)]))
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    processes = start_nodes(nodes, "tests/distributed_runs.py", [file], logs)
    while newest_checkpoint(output) is None:
        assert all(process.poll() is None for process in processes), logs[0].read_text()[-2000:]
        time.sleep(0.1)
    listed = subprocess.run(["pgrep", "-P", str(processes[1].pid), "-f", "runs.json"], capture_output=True, text=True)
    worker = int(listed.stdout.split()[0])  # of the second node
    os.kill(worker, signal.SIGKILL)
    assert all(process.wait(PATIENCE) != 0 for process in processes)
    expected, _ = movement(runs["one process", "ba-lora"], folder)
    actual, _ = movement(whole, folder)
    assert (actual - expected).norm() < 1e-4 * expected.norm()
    message = next(line for line in logs[0].read_text().splitlines() if "stopped:" in line)
    assert "lost another rank" in message
    assert "--resume goes on from" in message

    logs = [tmp_path / "c.log", tmp_path / "d.log"]
    for process in start_nodes(nodes, "train.py", [*argv, "--resume"], logs):
        assert process.wait(PATIENCE) == 0, logs[0].read_text()[-2000:]
    assert "going on from" in logs[0].read_text()
    assert json.loads((output / "run.json").read_text())["steps"] == 200
