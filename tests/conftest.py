"""Tiny random models and a byte-level tokenizer: everything a test needs is made here, nothing is downloaded."""

import functools
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else it takes all cores, and waits by turning
ROOT = Path(__file__).resolve().parent.parent

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from common.cli import run_script  # noqa: E402
from common.conversations import encode_pieces  # noqa: E402
from common.templates import Template  # noqa: E402

SHARED_DATA = ROOT.parent / "shared" / "data"
EOS, MERGED = "<|end|>", ":T"  # MERGED crosses the border between the prompt's last ":" and a response's first "T"

# The models' own configurations, the published table's rank, and its millions of trainable parameters; then of all.
PUBLISHED = {
    "llama-2-7b": (
        LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
        ),
        128,
        319.8,
        6738.4,
    ),
    "mistral-7b": (
        MistralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
        ),
        64,
        167.8,
        7241.7,
    ),
    "gemma-7b": (
        GemmaConfig(
            hidden_size=3072,
            intermediate_size=24576,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=256,
            vocab_size=256000,
        ),
        64,
        200.0,
        8537.7,
    ),
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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny model with its tokenizer, on disk."""
    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Sixteen short examples in the fields instruction and output."""
    import json

    path = tmp_path / "data.jsonl"
    rows = [{"instruction": f"Add {i} and 1", "output": f"The sum is {i + 1}" + "!" * (i % 5)} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


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


def _run_script(script: str, argv: list[str], log: str, file_size: int | None, environment: dict[str, str]) -> None:
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
    run_script(importlib.import_module(script).main)


def start_script(
    script: str, argv: list, log: Path, file_size: int | None = None, **environment: str
) -> multiprocessing.context.ForkServerProcess:
    """Runs a script's main in a process of its own, forked from one that has the imports behind it (warm.py).

    Args:
        log: gets stdout and stderr.
        file_size: bytes that a file of the process may have at most: what a full disk does, without one.
        environment: further variables.
    """
    context = forking()
    words = [str(word) for word in argv]
    process = context.Process(target=_run_script, args=(script, words, str(log), file_size, environment))
    process.start()
    return process


def start_ranks(count: int | None, argv: list, folder: Path, script: str) -> tuple[list, list[Path]]:
    """Starts `count` ranks, or a process that is none; returns them and what they write to. "{RANK}" in a word of
    `argv` is each rank's number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    variables = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)] if count else [{}]
    logs = [folder / f"rank-{port}-{rank}.log" for rank in range(len(variables))]
    words = [[str(word).replace("{RANK}", those.get("RANK", "")) for word in argv] for those in variables]
    return [start_script(script, *each, **those) for *each, those in zip(words, logs, variables, strict=True)], logs


def on_ranks(count: int | None, argv: list, folder: Path, script: str = "train") -> str:
    """Runs a script's main on `count` ranks (see start_ranks) to its end; returns what the first one printed."""
    ranks, logs = start_ranks(count, argv, folder, script)
    for process, log in zip(ranks, logs, strict=True):
        process.join(400)
        assert process.exitcode == 0, log.read_text()[-3000:]
    return logs[0].read_text()


def pytest_unconfigure() -> None:
    """What `pytest_collection_finish` froze would count as leaked in Triton's binding: thirty lines after every run."""
    gc.unfreeze()
