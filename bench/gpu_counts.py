"""What the forms for a GPU save, counted without one: operators, bytes and host waits, before and after.

Meta tensors have shapes and no numbers, so any machine counts what a large one would run.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import contenders
import torch
from gpu_cases import Options
from gpu_fast import Counted
from torch import Tensor

import train
from common import chunked, chunks, token_kernel

CARD = 80 * 2**30  # bytes of the GPU that is counted for


class Kernel:
    """Stands in for a Triton kernel: one launch, and the bytes of the chunks that it reads and writes."""

    def __init__(self, counted: Counted, writes: bool):
        self.counted, self.writes = counted, writes

    def __getitem__(self, grid: tuple) -> Callable[..., None]:
        def launch(z: Tensor, teacher: Tensor, *rest: Any, HAS_TEACHER: bool, **_: Any) -> None:
            self.counted.kernels += 1
            self.counted.num_bytes += z.numel() * z.element_size() * (1 + HAS_TEACHER + self.writes)

        return launch


def token_terms(shape: tuple[int, int, int], fused: bool, memory_mib: float | None) -> dict[str, Any]:
    """The token terms of M tokens in bf16 on an 80 GiB card: task, L_CR, top-K entropy, gradient, products."""
    num_tokens, vocabulary, width = shape
    made = {"device": "meta", "dtype": torch.bfloat16}
    hidden, teacher = (torch.empty(num_tokens, width, **made) for _ in range(2))
    head = torch.empty(vocabulary, width, **made)
    targets = torch.empty(num_tokens, device="meta", dtype=torch.long)
    most = chunks.most_rows(chunks.bytes_per_row(vocabulary, 2, 2 if fused else 4, 2, not fused), memory_mib, CARD)
    count = -(-num_tokens // most)
    slices = [slice(num_tokens * i // count, num_tokens * (i + 1) // count) for i in range(count)]
    counted = Counted()
    with contextlib.ExitStack() as stack:
        replaced = [(chunked, "chunks", lambda *_, **__: slices), (chunked, "blocks", lambda z: [slice(None)])]
        replaced += [(token_kernel, "is_usable", lambda *_: fused)]
        replaced += [(token_kernel, f"_{name}", Kernel(counted, name == "write")) for name in ("read", "write")]
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value, create=True))  # without triton no kernel exists
        stack.enter_context(counted)
        chunked.token_sums(
            hidden,
            teacher,
            head,
            targets,
            contenders.REGULARIZERS.weights,
            contenders.REGULARIZERS.settings,
            True,
            memory_mib,
        )
    return {"chunks": count, **figures(counted)}


def figures(counted: Counted) -> dict[str, Any]:
    return {"operators": counted.kernels, "GB": round(counted.num_bytes / 1e9, 3), "host waits": counted.waits}


def stacking(layers: int, width: int, out: int, rank: int, held: bool) -> dict[str, Any]:
    """What all forward and backward passes of one optimizer step, of four micro-batches, spend on stacking."""
    A, A0 = (torch.empty(rank, width, device="meta") for _ in range(2))
    B, B0 = (torch.empty(out, rank, device="meta") for _ in range(2))
    with Counted() as counted:
        [factor.to(torch.bfloat16) for factor in train._stack(A, B, A0, B0)]
    times = layers * (1 if held else 4 * 2)
    one = figures(counted)
    return {"operators": one["operators"] * times, "GB": round(counted.num_bytes * times / 1e9, 3), "host waits": 0}


def iteration(shape: tuple[int, int], on_gpu: bool) -> dict[str, Any]:
    """L_SVDR's subspace iteration, run on this machine; singular values that fall as i^-0.7, about as a model's do."""
    Y = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, shape[1] + 1) ** -0.7
    with Counted() as counted:
        chunked.leading_by_iteration(Y, 10, on_gpu)
    # The decomposition of a small matrix reads its verdict, and so does the look at the residual.
    return figures(counted)


def counts(options: Options, deadline: float) -> Iterator[dict]:
    """Each of the forms for a GPU, before and after."""
    shapes = {
        "LLaMA-2-7B": (1024, 32_000, 4096),
        "Llama-3.2-1B": (1024, 128_256, 2048),
        "Gemma-7B": (1024, 256_000, 3072),
    }
    for name, shape in shapes.items():
        ways = {
            "128 MiB, plain": (False, 128.0),
            "rows enough, plain": (False, None),
            "rows enough, fused": (True, None),
        }
        for way, (fused, memory) in ways.items():
            yield {"what": f"token terms, {name}, M = 1,024", "form": way} | token_terms(shape, fused, memory)
    for way, held in (("in every pass", False), ("once per step", True)):
        row = {"what": "stacking, 224 layers of 4096 × 4096, r = 128, 4 micro-batches", "form": way}
        yield row | stacking(224, 4096, 4096, 128, held)
    shape = (560, 530) if options.small else (1024, 2048)
    for way, on_gpu in (("a look each round", False), ("wider, first looks left out", True)):
        yield {"what": f"iteration, {shape[0]} × {shape[1]}", "form": way} | iteration(shape, on_gpu)
