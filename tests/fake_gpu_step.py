"""A training step of LLaMA-2-7B's shapes on fake CUDA tensors: shapes, types and devices without numbers or a GPU.

autograd's engine wants the streams of a real device, so the backward pass runs on meta tensors, after the same forward
pass: no branch of it asks for the kind of device. torch without CUDA knows no guard for its devices; GUARD.so registers
one that does nothing. Run by test_gpu_paths.py in a process of its own:

    python tests/fake_gpu_step.py GUARD.so OUT.json

Writes for each part of a step where the host waits for the device, and what is copied between them, by the line of this
project that asks; and how often attention for sequences of any lengths was launched.
"""

import collections
import contextlib
import json
import sys
import traceback
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import train
from common import chunked, token_kernel
from common.layers import TARGET_MODULES, save_activations
from common.packing import enable_packing
from common.templates import IGNORE_INDEX

ROOT = str(Path(__file__).resolve().parent.parent)
# What reads a result of the device: values, sizes that depend on values, a decomposition's verdict.
WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "masked_select",
    "_unique2",
    "_linalg_eigh",
    "_linalg_svd",
}
COPIES = {"_to_copy", "copy_", "index_put_", "fill_"}


class Watched(TorchDispatchMode):
    """Counts waits and copies by the project's line; a value that is asked for is 1, so that every check passes."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.waits, self.copies, self.attentions = collections.Counter(), collections.Counter(), 0

    def place(self) -> str:
        frames = reversed(traceback.extract_stack())
        ours = (
            f for f in frames if f.filename.startswith(ROOT) and ".venv" not in f.filename and f.filename != __file__
        )
        frame = next(ours, None)
        return f"{Path(frame.filename).name}: {frame.line}" if frame else "torch"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.attentions += name == "_varlen_attn"
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = any(x.device.type == self.device for x in given)
        by_mask = name in ("index", "index_put_") and any(x.dtype == torch.bool for x in given[1:])
        if on_gpu and (name in WAITS or by_mask):
            self.waits[f"{name}, {self.place()}"] += 1
        if name in ("equal", "allclose"):
            return True
        if name == "_local_scalar_dense":
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 0
        out = function(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        if name in COPIES and len({x.device.type for x in given + made}) > 1:
            self.copies[f"{name}, {self.place()}"] += 1
        return out


class Kernel:
    """Stands in for a Triton kernel, which takes no fake tensors: checks what it is given."""

    def __getitem__(self, grid):
        def launch(z, teacher, stats, targets, *rest, **options):
            tensors = [z, teacher, stats, targets, *(x for x in rest if isinstance(x, torch.Tensor))]
            assert all(x.device == z.device and x.is_contiguous() for x in tensors)
            assert (z.dtype, teacher.dtype, stats.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
            assert grid == (len(z),)

        return launch


def flash(
    q,
    k,
    v,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    real=F.scaled_dot_product_attention,
):
    """What torch chooses on a GPU for bf16 without a mask; here it would choose by what the CPU has."""
    assert q.dtype == torch.bfloat16
    if attn_mask is not None:  # transformers' own, which packing is tried against
        return real(q, k, v, attn_mask, scale=scale, enable_gqa=enable_gqa)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, False, scale=scale)[0]


class Generator:
    """torch's own asks the driver."""

    def __init__(self, device=None):
        self.device = torch.device(device or "cpu")

    def manual_seed(self, seed):
        return self


def randn(*size, generator=None, real=torch.randn, **options):
    assert generator is None or torch.device(options.get("device", "cpu")).type == generator.device.type
    return real(*size, **options)


def model_of(layers: int, device: str) -> transformers.PreTrainedModel:
    sizes = {"hidden_size": 4096, "intermediate_size": 11_008, "num_attention_heads": 32, "vocab_size": 32_000}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=4096)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def batch_of(lengths: list[int], device: str) -> dict:
    """A packed micro-batch: each sequence's second half is its answer, and 24 tokens are shared."""
    rows = []
    for seed, length in enumerate(lengths):
        ids = [
            *range(24),
            *range(1000 * seed, 1000 * seed + length - 24),
        ]
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (length // 2) + ids[length // 2 :]})
    with unset_fake_temporarily():
        batch = train.PackingCollator()(rows)
    return {
        k: torch.empty(v.shape, dtype=v.dtype, device=device) if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
    }


def part(found: dict, name: str, device: str, function):
    with Watched(device) as watched:
        result = function()
    found[name] = {"waits": watched.waits, "copies": watched.copies, "attentions": watched.attentions}
    return result


def step(found: dict, device: str, layers: int, args: train.Arguments) -> None:
    """The parts of a step on `device`; on meta, which no forward pass is measured on, the backward pass."""
    model = model_of(layers, device).requires_grad_(False)
    targets = TARGET_MODULES
    initial = {
        name: (torch.empty(128, layer.in_features, device=device), torch.empty(layer.out_features, 128, device=device))
        for name, layer in train.find_target_modules(model, targets, 128).items()
    }
    with mock.patch("common.layers.require_adapters"):  # PEFT's adapters cannot be made of fake tensors
        train.add_adapters(model, "ba-lora", 128, 128, targets, initial=initial)

    def start() -> train.BALoRAModel:
        assert enable_packing(model)
        save_activations(model)
        return train.BALoRAModel(model).train()

    wrapper = part(found, "start", device, start)
    trained = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5)
    batch = batch_of([512] * 4, device)
    regularizers = train.Regularizers.at(args, 0.5)

    def forward() -> torch.Tensor:
        train.stack_factors(model)
        return wrapper(batch, regularizers, len(batch["targets"]), 1)[0]

    def update() -> None:
        train.stack_factors(model, hold=False)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    part(found, "first forward", device, forward)  # the caches that it fills are no part of a later step
    loss = part(found, "forward", device, forward)
    if device == "meta":
        part(found, "backward", device, loss.backward)
    else:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
    part(found, "update", device, update)
    assert {x.device.type for x in [*wrapper.parameters(), *wrapper.buffers()]} == {device}
    found["types"] = sorted({f"{p.grad.dtype} of {p.dtype} on {p.grad.device.type}" for p in trained})


def main(guard: str, out: str) -> None:
    torch.ops.load_library(guard)
    replaced = [(torch, "Generator", Generator), (torch, "randn", randn), (F, "scaled_dot_product_attention", flash)]
    replaced += [(chunked, "card_bytes", lambda device=None: 80 * 2**30), (token_kernel, "is_usable", lambda *_: True)]
    replaced += [(token_kernel, name, Kernel()) for name in ("_read", "_write")]
    replaced += [(FakeTensorMode, "avoid_device_init", property(lambda self: True))]
    data_ptr = lambda x: (x.untyped_storage()._cdata << 40) + x.storage_offset()  # noqa: E731
    found = {}
    with contextlib.ExitStack() as stack:
        for thing, name, value in replaced:
            stack.enter_context(mock.patch.object(thing, name, value))
        # Of another number of layers each: what is bounded does not grow with it.
        for layers, formulation, schedule in ((1, "iclr2026", "cosine"), (3, "arxiv2024", "adaptive")):
            args = train.Arguments(**train.FORMULATIONS[formulation] | {"consistency_schedule": schedule})
            parts = found[formulation] = {"cuda": {}, "meta": {}}
            with FakeTensorMode(), mock.patch.object(FakeTensor, "data_ptr", data_ptr):
                step(parts["cuda"], "cuda", layers, args)
            with mock.patch.object(torch.Tensor, "data_ptr", data_ptr):
                step(parts["meta"], "meta", layers, args)
    Path(out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
