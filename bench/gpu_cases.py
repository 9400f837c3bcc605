"""The cases of bench/gpu.py: published shapes with random weights, batches of GSM8K's lengths, a clock.

Nothing here needs more than torch, transformers and safetensors. `installed` knows which further packages there are.
"""

import functools
import gc
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import contenders
import torch
import transformers
from torch import Tensor, nn

import train
from common.layers import TARGET_MODULES, find_target_modules
from common.templates import IGNORE_INDEX

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("accelerate", "peft", "trl", "liger_kernel", "bitsandbytes", "flash_attn", "triton", "deepspeed", "vllm")

# Of 40 problems of GSM8K's training file, drawn at random: tokens of the prompt in its template, and of the answer.
GSM8K_LENGTHS = (
    (73, 90), (76, 165), (98, 140), (70, 87), (103, 142), (76, 120), (66, 51), (69, 93), (54, 120), (95, 208),
    (91, 148), (85, 185), (97, 209), (74, 77), (91, 213), (76, 93), (183, 252), (83, 105), (131, 73), (66, 72),
    (79, 106), (110, 67), (102, 82), (106, 131), (72, 64), (117, 139), (78, 114), (59, 76), (70, 91), (108, 138),
    (76, 124), (80, 129), (110, 101), (77, 152), (110, 120), (96, 160), (89, 155), (99, 218), (75, 118), (90, 155),
)  # fmt: skip
SHARED_BEGINNING = 24  # tokens of the template's head


@dataclass
class Options:
    """The settings of a part: the device, and whether the shapes are tiny ones that any machine can do."""

    device: str
    small: bool

    @property
    def is_cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The number type of weights and activations in measurements of speed."""
        return torch.bfloat16 if self.is_cuda else torch.float32


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # half imported, or kept out
        return False


# ------------------------------------------------------------------------------------------------------------------
# Models
# ------------------------------------------------------------------------------------------------------------------

LLAMA = {"max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1}


def llama(d: int, f: int, layers: int, heads: int, groups: int, vocabulary: int, tied: bool, **extra: Any) -> Any:
    sizes = {"hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": groups, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    return transformers.LlamaConfig(**LLAMA, **sizes, **extra)


# The published configurations' sizes.
CONFIGS: dict[str, Callable[[], Any]] = {
    "SmolLM2-135M": lambda: llama(576, 1536, 30, 9, 3, 49_152, True),
    "Llama-3.2-1B": lambda: llama(2048, 8192, 16, 32, 8, 128_256, True, head_dim=64),
    "Llama-3.2-3B": lambda: llama(3072, 8192, 28, 24, 8, 128_256, True, head_dim=128),
    "LLaMA-2-7B": lambda: llama(4096, 11_008, 32, 32, 32, 32_000, False),
    "Gemma-7B": lambda: transformers.GemmaConfig(
        hidden_size=3072, intermediate_size=24_576, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=16, head_dim=256, vocab_size=256_000,
    ),
}  # fmt: skip


def tiny_config(options: Options, **extra: Any) -> Any:
    """A model for the checks: two layers, and weights so large that attention and logits differ between positions."""
    if options.small:
        return llama(32, 48, 2, 4, 2, 256, True, **({"initializer_range": 0.3} | extra))
    return llama(512, 1024, 2, 8, 4, 8192, True, **({"initializer_range": 0.06} | extra))


def make_model(config: Any, options: Options, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A frozen model with random weights, made on the device."""
    torch.manual_seed(seed)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def random_factors(model: nn.Module, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random A₀ and B₀ of every target layer. The real ones take minutes, and a step takes as long with random ones."""
    factors = {}
    for name, layer in find_target_modules(model, TARGET_MODULES, rank).items():
        d, generator = layer.in_features, torch.Generator(layer.weight.device).manual_seed(len(factors))
        A = torch.randn(rank, d, generator=generator, device=layer.weight.device) / d**0.5
        B = torch.randn(layer.out_features, rank, generator=generator, device=layer.weight.device) / (10 * rank**0.5)
        factors[name] = (A, B)
    return factors


# ------------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------------


def examples(count: int, vocabulary: int, longest: int, seed: int = 0, exactly: bool = False) -> list[dict]:
    """Random tokens in GSM8K's lengths, prompts that begin alike, cut at `longest`; `exactly`: half of each answers."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randint(2, vocabulary, (SHARED_BEGINNING,), generator=generator)
    rows = []
    for index in range(count):
        prompt, answer = GSM8K_LENGTHS[(seed * count + index) % len(GSM8K_LENGTHS)]
        prompt, answer = (longest // 2, longest - longest // 2) if exactly else (prompt, answer)
        ids = torch.cat([head, torch.randint(2, vocabulary, (prompt + answer,), generator=generator)])
        ids = ids[: min(longest, prompt + answer)].tolist()
        prompt = min(prompt, len(ids) - 2)
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * prompt + ids[prompt:], "index": index})
    return rows


def on_device(batch: dict[str, Any], options: Options) -> dict[str, Any]:
    return {name: value.to(options.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def packed(rows: list[dict], options: Options) -> dict[str, Any]:
    return on_device(train.PackingCollator()(rows), options)


def padded(rows: list[dict], options: Options) -> dict[str, Tensor]:
    return on_device(contenders.padded_batch(rows), options)


# ------------------------------------------------------------------------------------------------------------------
# Comparing and timing
# ------------------------------------------------------------------------------------------------------------------


@functools.cache
def oracle() -> ModuleType:
    """tests/oracle.py: the terms and their gradients in float64 by hand, in numpy, with nothing of train.py."""
    spec = importlib.util.spec_from_file_location("oracle", ROOT / "tests" / "oracle.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ in float64; infinite where anything is not finite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error = ((actual - expected).norm() / expected.norm().clamp(min=1e-300)).item()
    return error if error == error else float("inf")


def check(what: str, error: float, limit: float) -> dict[str, Any]:
    """The row of a check: its error and the largest error allowed."""
    return {"check": what, "error": float(f"{error:.3g}"), "limit": limit, "ok": error <= limit}


def note(what: str, why: str) -> dict[str, Any]:
    """The row of a check that is left out, and why."""
    return {"check": what, "error": why, "limit": None, "ok": True}


def synchronize(options: Options) -> None:
    if options.is_cuda:
        torch.cuda.synchronize()


def free_memory(options: Options) -> None:
    """Frees the memory of earlier parts, and resets the count of the peak."""
    gc.collect()
    if options.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(options: Options) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if options.is_cuda else None


def seconds_of(function: Callable[[], Any], options: Options, repeats: int, warm_up: int = 1) -> list[float]:
    """Wall-clock seconds of each call, the device's work included, after `warm_up` calls."""
    seconds = []
    for _ in range(warm_up + repeats):
        synchronize(options)
        started = time.perf_counter()
        function()
        synchronize(options)
        seconds.append(time.perf_counter() - started)
    return seconds[warm_up:]
