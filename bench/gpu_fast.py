"""The measurements of bench/gpu.py: a training step, the objective alone, the start, where a step goes, and counts."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import contenders
import gpu_cases as cases
import torch
import transformers
from gpu_cases import Options
from gpu_right import write_out
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import train
from common import chunked, token_kernel
from common.layers import TARGET_MODULES, find_target_modules

Step = Callable[[], Any]

# ------------------------------------------------------------------------------------------------------------------
# A training step, side by side
# ------------------------------------------------------------------------------------------------------------------


def peft_step(model: nn.Module, options: Options, rank: int, rows: list[dict], public: bool = False) -> Step:
    """PEFT's PiSSA with the stock loss, or with the public objective and its second whole model; bf16 by autocast.

    The residual and the factors are random: decomposing takes minutes, and a step as long with these.
    """
    teacher = cases.make_model(model.config, options, options.dtype) if public else None
    if cases.installed("peft"):
        model = contenders.peft_model(model, rank, init=True)
    else:
        model = write_out(model, rank, cases.random_factors(model, rank))
    return functools.partial(contenders.peft_step(model, teacher), cases.padded(rows, options))


def our_step(
    model: nn.Module, options: Options, rank: int, rows: list[dict], terms: bool, cached: bool = False
) -> Step:
    """Ours, packed: BA-LoRA, with the teacher's states computed or given, or plain PiSSA."""
    wrapper = contenders.adapted(model, rank, cases.random_factors(model, rank))
    batch = cases.packed(rows, options)
    if cached:
        states = wrapper.of_teacher(wrapper.hidden_states, batch)
        wrapper.of_teacher = lambda *_: states
    return functools.partial(contenders.our_step(wrapper, contenders.REGULARIZERS if terms else None), batch)


def with_liger(model: nn.Module, *rest: Any) -> Step:
    from liger_kernel.transformers import monkey_patch

    monkey_patch._apply_liger_kernel_to_instance(model=model)
    return peft_step(model, *rest)


CONTENDERS: dict[str, tuple[Callable[..., Step], str | None]] = {
    "PEFT's PiSSA, stock loss": (peft_step, None),
    "PEFT's PiSSA, public objective": (lambda *rest: peft_step(*rest, public=True), None),
    "BA-LoRA, ours": (lambda *rest: our_step(*rest, terms=True), None),
    "BA-LoRA, ours, cached": (lambda *rest: our_step(*rest, terms=True, cached=True), None),
    "PiSSA, ours": (lambda *rest: our_step(*rest, terms=False), None),
    "PEFT's PiSSA, Liger": (with_liger, "liger_kernel"),
}


def measured_step(make: Callable[..., Step], config: Any, options: Options, rank: int, checkpointing: bool) -> dict:
    """Milliseconds and peak GiB of one contender's step, or why there are none."""
    cases.free_memory(options)
    longest = 32 if options.small else 512
    try:
        model = cases.make_model(config, options, options.dtype)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        step = make(model, options, rank, cases.examples(4, config.vocab_size, longest, exactly=True))
        cases.seconds_of(step, options, repeats=1, warm_up=0)  # the caches that a first step fills are no part of it
        seconds = cases.seconds_of(step, options, repeats=1 if options.small else 5)
    except torch.cuda.OutOfMemoryError:
        return {"ms": "does not fit", "GiB": None}
    peak = cases.peak_gib(options)
    return {"ms": round(1e3 * statistics.median(seconds), 1), "GiB": peak and round(peak, 2)}


def step(options: Options, deadline: float) -> Iterator[dict]:
    """A training step of 4 × 512 tokens, half of them valid, r = 128, by contender, shape and checkpointing."""
    if options.small:
        shapes, rank = {"tiny": lambda: cases.tiny_config(options)}, 4
    else:  # the shape of the README first
        order = ("LLaMA-2-7B", "SmolLM2-135M", "Llama-3.2-1B", "Gemma-7B", "Llama-3.2-3B")
        shapes, rank = {name: cases.CONFIGS[name] for name in order}, 128
    for shape, make_config in shapes.items():
        for checkpointing in (False, True):
            unit: dict = {}
            for name, (make, package) in CONTENDERS.items():
                row = {"model": shape, "checkpointing": "yes" if checkpointing else "no", "contender": name}
                if package and not (options.is_cuda and cases.installed(package)):
                    yield row | {"ms": "not installed" if options.is_cuda else "needs a GPU"}
                    continue
                if time.monotonic() > deadline:
                    yield row | {"ms": "no time left"}
                    continue
                measured = measured_step(make, make_config(), options, rank, checkpointing)
                unit = unit or measured
                yield row | measured | {f"{key} ratio": ratio(measured, unit, key) for key in ("ms", "GiB")}


def ratio(measured: dict, unit: dict, key: str) -> float | None:
    numbers = measured.get(key), unit.get(key)
    return round(numbers[0] / numbers[1], 3) if all(isinstance(number, float) for number in numbers) else None


# ------------------------------------------------------------------------------------------------------------------
# The objective alone, beside what memory and matrix units allow
# ------------------------------------------------------------------------------------------------------------------


def limits(options: Options) -> tuple[float, float]:
    """Operations a second of one large product, and bytes a second of one large copy."""
    size = 256 if options.small else 8192
    a, b = (torch.randn(size, size, device=options.device).to(options.dtype) for _ in range(2))
    product = statistics.median(cases.seconds_of(lambda: a @ b, options, repeats=5))
    source = torch.empty(2**20 if options.small else 2**30, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    copy = statistics.median(cases.seconds_of(lambda: target.copy_(source), options, repeats=5))
    return 2 * size**3 / product, 2 * source.numel() / copy


def objective(options: Options, deadline: float) -> Iterator[dict]:
    """One evaluation with its gradient over V and chunk sizes; the floor is its three products at the measured rate."""
    rate, bandwidth = limits(options)
    yield {"V": "limits", "10¹² operations/s": round(rate / 1e12, 2), "GB/s": round(bandwidth / 1e9, 1)}
    shapes = [(24, 512, 16)] if options.small else [(1024, 32_000, 4096), (2048, 128_256, 2048), (2048, 256_000, 3072)]
    for num_tokens, vocabulary, width in shapes:
        made = (options.dtype, options.device)
        hidden, teacher, head, targets = contenders.objective_inputs((num_tokens, vocabulary, width), *made)
        factor = torch.randn(width, width, device=options.device)  # any costs the same
        floor = 3 * 2 * num_tokens * vocabulary * width / rate
        for name, settings in (("task", None), ("iclr2026", contenders.REGULARIZERS)):
            for rows in (64, 256, 1024, 4096):
                if time.monotonic() > deadline:
                    return
                memory = rows * vocabulary * 14 / 2**20  # of two fp32 buffers, one more, and the head's own product
                states = hidden.clone().requires_grad_()
                given = teacher if settings else None
                rest = (given, head, factor, targets, settings, num_tokens, 1, memory)
                cases.free_memory(options)
                before = torch.cuda.memory_allocated() / 2**30 if options.is_cuda else 0.0

                def evaluate(states=states, rest=rest) -> None:
                    train.objective_from_hidden(states, *rest)[0].backward()

                seconds = statistics.median(cases.seconds_of(evaluate, options, repeats=1 if options.small else 3))
                peak = cases.peak_gib(options)
                share = (floor if settings else floor * 2 / 3) / seconds
                row = {"V": vocabulary, "M": num_tokens, "d": width, "terms": name, "rows per chunk": rows}
                row |= {"ms": round(1e3 * seconds, 2), "GiB": peak and round(peak - before, 2)}
                yield row | {"share of the products' rate": round(share, 3)}


# ------------------------------------------------------------------------------------------------------------------
# PiSSA's start
# ------------------------------------------------------------------------------------------------------------------


def init(options: Options, deadline: float) -> Iterator[dict]:
    """PiSSA's factors of one matrix of each shape: ours, the whole decomposition, and PEFT's fast one (niter 4)."""
    configs = (
        {"tiny": cases.tiny_config(options)}
        if options.small
        else {name: cases.CONFIGS[name]() for name in ("SmolLM2-135M", "Llama-3.2-1B", "LLaMA-2-7B")}
    )
    rank = 4 if options.small else 128
    for name, config in configs.items():
        with torch.device("meta"):
            skeleton = transformers.AutoModelForCausalLM.from_config(config)
        counts: dict[tuple, int] = {}
        for layer in find_target_modules(skeleton, TARGET_MODULES, rank).values():
            shape = (layer.out_features, layer.in_features)
            counts[shape] = counts.get(shape, 0) + 1
        for shape, count in counts.items():
            weight = torch.randn(shape, device=options.device) / shape[1] ** 0.5
            ways = {
                "ours": lambda W: train.principal_factors(W, rank, 1.0),
                "torch.svd_lowrank, niter 4": lambda W: torch.svd_lowrank(W, rank, niter=4),
                "torch.linalg.svd": lambda W: torch.linalg.svd(W, full_matrices=False),
            }
            row = {"model": name, "matrix": f"{shape[0]} × {shape[1]}", "count": count}
            for way, run in ways.items():
                if time.monotonic() > deadline:
                    return
                once = way.endswith(".svd") and not options.small  # it takes seconds
                seconds = statistics.median(
                    cases.seconds_of(
                        functools.partial(run, weight), options, 1 if once else 2, warm_up=0 if once else 1
                    )
                )
                yield row | {"by": way, "ms": round(1e3 * seconds, 2), "all of them, s": round(count * seconds, 2)}


# ------------------------------------------------------------------------------------------------------------------
# Where a step goes
# ------------------------------------------------------------------------------------------------------------------

# These operators make the host wait for the device. All other operators that are no views launch one kernel or more.
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "linalg_eigh", "_linalg_eigh", "linalg_svd")
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "expand", "squeeze", "unsqueeze"}
VIEWS |= {"split", "split_with_sizes", "chunk", "unbind", "as_strided", "diagonal", "reshape", "alias", "detach"}
VIEWS |= {"empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"}


class Counted(TorchDispatchMode):
    """Counts operators that compute, those that make the host wait, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.kernels = self.waits = self.num_bytes = self.product_operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in VIEWS:
            return result
        self.kernels += 1
        self.waits += name in WAITS
        seen = {}
        for value in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor):
                seen[id(value)] = seen.get(id(value), 0) + value.numel() * value.element_size()
        self.num_bytes += sum(seen.values())
        if name in ("mm", "addmm", "addmm_", "bmm"):
            a, b = args[-2:]
            self.product_operations += 2 * a.numel() * b.shape[-1]
        return result


def profile(options: Options, deadline: float) -> Iterator[dict]:
    """One BA-LoRA step of LLaMA-2-7B by part: its time, the operators that compute, their bytes, the host's waits."""
    config, rank = (cases.tiny_config(options), 4) if options.small else (cases.CONFIGS["LLaMA-2-7B"](), 128)
    model = cases.make_model(config, options, options.dtype)
    wrapper = contenders.adapted(model, rank, cases.random_factors(model, rank))
    longest = 32 if options.small else 512
    batch = cases.packed(cases.examples(4, config.vocab_size, longest, exactly=True), options)
    parts = contenders.step_parts(wrapper, {"batch": batch})
    train.stack_factors(model)  # as a step of gradient accumulation finds them
    for part in parts.values():  # the first step fills caches
        part()
    seconds = {name: cases.seconds_of(part, options, repeats=1, warm_up=0)[0] for name, part in parts.items()}
    whole = sum(seconds.values())
    for name, part in parts.items():
        with Counted() as counted:
            part()
        row = {"part": name, "ms": round(1e3 * seconds[name], 2), "share": round(seconds[name] / whole, 3)}
        row |= {"operators": counted.kernels, "host waits": counted.waits, "GB": round(counted.num_bytes / 1e9, 4)}
        yield row
    yield from launches(parts, options)


def launches(parts: dict[str, Step], options: Options) -> Iterator[dict]:
    """Kernels and waits of one whole step as the CUDA runtime saw them."""
    if not options.is_cuda:
        yield {"part": "launches by the CUDA runtime", "ms": "needs a GPU"}
        return
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        for part in parts.values():
            part()
        torch.cuda.synchronize()
    counts = {event.key: event.count for event in recorded.key_averages()}
    kernels = sum(count for key, count in counts.items() if "LaunchKernel" in key)
    waits = sum(count for key, count in counts.items() if "Synchronize" in key)
    yield {"part": "whole step by the CUDA runtime", "operators": kernels, "host waits": waits - 1}


# ------------------------------------------------------------------------------------------------------------------
# Savings of the forms for a GPU, counted without one: operators, bytes and host waits, before and after. Meta tensors
# have shapes and no numbers, so any machine counts what a large one would run.
# ------------------------------------------------------------------------------------------------------------------

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
    most = chunked.most_rows(chunked.bytes_per_row(vocabulary, 2, 2 if fused else 4, 2, not fused), memory_mib, CARD)
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
    """The cost of stacking in all forward and backward passes of one optimizer step of four micro-batches."""
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
