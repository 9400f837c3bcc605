"""Tiny random models and a byte-level tokenizer: everything a test needs is made here, nothing is downloaded."""

import functools
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterable
from multiprocessing import forkserver
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else it takes all cores, and waits by turning
ROOT = Path(__file__).resolve().parent.parent

import pytest  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from common import runs  # noqa: E402
from common.cli import run_script  # noqa: E402
from common.conversations import encode_pieces  # noqa: E402
from common.templates import Template  # noqa: E402

SHARED_DATA = ROOT.parent / "shared" / "data"
NUMBERS = itertools.count()
PATIENCE = 1800  # seconds after which a process is said to hang, on the busiest machine
EOS, MERGED = "<|end|>", ":T"  # MERGED crosses the border between the prompt's last ":" and a response's first "T"

# The models' own configurations, the published table's rank, and its millions of trainable parameters; then of all.
PUBLISHED = {
    name.rpartition("/")[2].lower().removesuffix("-hf").removesuffix("-v0.1"): (
        AutoConfig.for_model(**json.loads((ROOT / "data" / "shapes" / f"{name}.json").read_text())),
        *numbers,
    )
    for name, *numbers in (
        ("meta-llama/Llama-2-7b-hf", 128, 319.8, 6738.4),
        ("mistralai/Mistral-7B-v0.1", 64, 167.8, 7241.7),
        ("google/gemma-7b", 64, 200.0, 8537.7),
    )
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and one merge across the prompt's border; the end-of-sequence token is the padding token too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, MERGED, EOS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(MERGED)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def encode_turn(
    tokenizer: PreTrainedTokenizerFast, instruction: str, response: str, max_length: int
) -> dict[str, list[int]]:
    """`input_ids` and `labels` of one instruction in Alpaca's prompt with its response."""
    messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": response}]
    return encode_pieces(Template(tokenizer, "alpaca").pieces(messages), max_length, whole_turns=False)


def make_model(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A Llama of two layers with grouped-query attention, V = 258."""
    settings = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # weights of a size at which attention and logits are not all alike
        "bos_token_id": None,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


def save_tiny(folder: Path, **overrides) -> Path:
    """`make_model` with its tokenizer, on disk."""
    make_model(**overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_noisy(folder: Path, noise: float) -> Path:
    """`save_tiny`, and noise of so many standard deviations on every weight."""
    model, generator = make_model(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def sums(count: int, lengths: int = 5) -> list[dict[str, str]]:
    """Short examples of as many lengths in the fields instruction and output."""
    return [
        {"instruction": f"Add {i} and 1", "output": f"The sum is {i + 1}" + "!" * (i % lengths)} for i in range(count)
    ]


def write_jsonl(path: Path, rows: Iterable) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def bits(file: Path) -> dict[str, bytes]:
    """The tensors of a file, bit for bit: its header has no fixed order."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def record(run: str, **changes) -> dict:
    """A record as run_record.py writes it, of a run that is done."""
    made = {"version": runs.VERSION, "run": run, "arm": run, "phase": "study", "status": "done", "error": None}
    made |= {"labels": {}, "settings": {}, "seed": 1, "scores": {}, "validation": None, "memory": {"peak_gib": 1.0}}
    return made | {"time": {"train_seconds": 60.0, "seconds": None}} | changes


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny model with its tokenizer, on disk."""
    return save_tiny(tmp_path / "base")


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "data.jsonl", sums(16))


@pytest.fixture
def shared_data() -> Path:
    """The folder with real benchmark files; tests that need it are skipped where it is not there."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no real benchmark data beside the checkout")
    return SHARED_DATA


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what is marked slow without SLOW=1, and what is marked gpu without a GPU."""
    left_out = {"slow": "SLOW" not in os.environ, "gpu": not torch.cuda.is_available()}
    reasons = {"slow": "takes minutes: SLOW=1", "gpu": "no CUDA GPU"}
    for item in items:
        for name in left_out:
            if left_out[name] and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reasons[name]))


def pytest_collection_finish(session: pytest.Session) -> None:
    """transformers collects garbage in every run: what the imports made is none."""
    gc.collect()
    gc.freeze()


@functools.cache
def forking() -> multiprocessing.context.ForkServerContext:
    """Python 3.11's server has another sys.path, and skips without a word what it cannot import: so PYTHONPATH."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed.runtime.zero.muon.muon_optimizer", "warm"])  # the first is ZeRO's
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def _signal_itself(number: int, place: str, count: int) -> None:
    """The process gets the signal when it opens, makes, moves or deletes what has `place` in its path for the count-th
    time: no other process has to meet a moment."""
    events = {"open", "os.mkdir", "os.rename", "os.remove", "shutil.rmtree"}
    left = count

    def watch(event: str, about: tuple) -> None:
        nonlocal left
        if event in events and any(place in str(word) for word in about[:2]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

    sys.addaudithook(watch)


def _run_script(
    script: str, argv: list[str], log: str, ends: tuple | None, file_size: int | None, environment: dict[str, str]
) -> None:
    assert "warm" in sys.modules
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored
    os.environ |= environment
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if file_size is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    torch.set_num_threads(1)  # so that two runs add up in the same order
    sys.argv = [f"{script}.py", *argv]
    main = importlib.import_module(script).main
    if ends is not None:
        _signal_itself(*ends)
    run_script(main)


def start_script(
    script: str,
    argv: list,
    log: Path,
    ends: tuple[int, str, int] | None = None,
    file_size: int | None = None,
    **environment: str,
) -> multiprocessing.context.ForkServerProcess:
    """Runs a script's main in a process of its own, forked from one that has the imports behind it (warm.py).

    Args:
        log: gets stdout and stderr.
        ends: a signal, and the moment at which the process gets it: a part of a path, and how often it is touched
            until then (see _signal_itself).
        file_size: bytes that a file of the process may have at most: what a full disk does, without one.
        environment: further variables.
    """
    context = forking()
    words = [str(word) for word in argv]
    log.touch()
    process = context.Process(target=_run_script, args=(script, words, str(log), ends, file_size, environment))
    process.start()
    return process


def run_apart(script: str, argv: list, folder: Path, **options) -> tuple[int, str]:
    """Runs a script's main by `start_script` to its end; returns its exit code and what it printed."""
    log = folder / f"{script}-{next(NUMBERS)}.log"
    process = start_script(script, argv, log, **options)
    process.join(PATIENCE)
    assert process.exitcode is not None, f"it does not end: {log.read_text()[-3000:]}"
    return process.exitcode, log.read_text()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_ranks(
    count: int | None, argv: list, folder: Path, script: str, ends: tuple | None = None
) -> tuple[list, list[Path]]:
    """Starts `count` ranks, or a process that is none; returns them and what they write to. `ends`: the first one's.
    "{RANK}" in a word of `argv` is each rank's number."""
    port = free_port()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    variables = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)] if count else [{}]
    logs = [folder / f"rank-{port}-{rank}.log" for rank in range(len(variables))]
    started = []
    for rank, (log, those) in enumerate(zip(logs, variables, strict=True)):
        words = [str(word).replace("{RANK}", str(rank)) for word in argv]
        started.append(start_script(script, words, log, ends=None if rank else ends, **those))
    return started, logs


def on_ranks(count: int | None, argv: list, folder: Path, script: str = "train") -> str:
    """Runs a script's main on `count` ranks (see start_ranks) to its end; returns what the first one printed."""
    ranks, logs = start_ranks(count, argv, folder, script)
    for process, log in zip(ranks, logs, strict=True):
        process.join(PATIENCE)
        assert process.exitcode == 0, log.read_text()[-3000:]
    return logs[0].read_text()


def pytest_unconfigure() -> None:
    """What `pytest_collection_finish` froze would count as leaked in Triton's binding: thirty lines after every run.
    And Python would wait for what a failed test has left running."""
    gc.unfreeze()
    for process in multiprocessing.active_children():
        process.kill()
