"""The interface of the two back ends that generate, vLLM and transformers, which eval/backends.py has.

Both take a batch of prompts as token ids and return the same completions but for rounding. The caller forms the batches
(`batches`). Rounding depends on them, so a resumed run must form the same batches.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from tqdm import tqdm

from common.cli import UserError


@dataclass(frozen=True)
class Sampling:
    """The choice of tokens: everything that a completion depends on beside model and prompt."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # a completion ends before the first of these


@dataclass
class Completion:
    text: str
    num_tokens: int
    finished: bool  # False: cut at max_new_tokens


class Backend(Protocol):
    """A checkpoint that generates, and that measures how likely given responses are."""

    name: str
    batch_size: int

    def generate(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int] | None = None
    ) -> list[Completion]:
        """One completion per prompt of one batch, in order; `seeds`, one per prompt, where temperature is above 0."""

    def log_likelihoods(self, prompts: list[list[int]], responses: list[list[int]]) -> list[float]:
        """Σ ln p(token | prompt, response so far) of every response, in nats."""


def response_loss(backend: Backend, prompts: list[list[int]], responses: list[list[int]]) -> float:
    """The mean over all response tokens of −ln p(token | prompt, response so far), in nats."""
    return -sum(backend.log_likelihoods(prompts, responses)) / sum(map(len, responses))


# The type of `load_backend` and of its substitutes.
LoadBackend = Callable[..., Backend]


def batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Indices of prompts of similar length, at most `batch_size` together; the longest come first, so that memory runs
    out early or never."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def backend_name(backend: str) -> str:
    """`vllm` or `transformers`; `auto` takes vLLM where it is installed.

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    if backend == "vllm" and not has_vllm:
        raise UserError("--backend vllm: no vLLM (pip install -r requirements-gpu.txt); or take --backend transformers")
    return "vllm" if backend == "vllm" or (backend == "auto" and has_vllm) else "transformers"


def batch_size_of(batch_size: int | None, backend: str) -> int:
    """`batch_size`, or the back end's own if it is None."""
    return batch_size or {"vllm": 256, "transformers": 32}[backend]


def with_bar(groups: list[list[int]], description: str, done: int = 0) -> Iterator[list[int]]:
    """The groups in turn, under a progress bar that counts their members and starts at `done`."""
    total = sum(map(len, groups)) + done
    with tqdm(total=total, initial=done, desc=description, unit="item", disable=not groups) as bar:
        for group in groups:
            yield group
            bar.update(len(group))
