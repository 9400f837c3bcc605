"""Fewer activations kept for the backward pass, in gated feed-forwards and in frozen norms. Exact."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from common.partitioned import device_of, gathered, shape_of


def save_activations(model: "transformers.PreTrainedModel") -> int:
    """Replaces the forward of gated SiLU MLPs and frozen RMSNorms by one that keeps half as much for the backward pass.

    Each replacement is tried against the module's own forward first. Returns how many were replaced.
    """
    # The embedding has the activations' type: adapters are fp32, and quantized weights are stored as integers.
    count, dtype = 0, model.get_input_embeddings().weight.dtype
    for module in model.modules():
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            linear = getattr(module.gate_proj, "base", module.gate_proj)
            lean, width = _lean_mlp, linear.in_features
        elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            if module.weight.requires_grad:
                continue
            lean, width = _lean_norm, shape_of(module.weight)[0]
        else:
            continue
        device = device_of(next(module.parameters()))
        x = torch.linspace(-2, 2, 3 * width, device=device).view(3, width).to(dtype)
        with torch.no_grad(), gathered(module.parameters()):
            if torch.allclose(lean(module, x).float(), module(x).float(), rtol=1e-2, atol=1e-4):
                module.forward = functools.partial(lean, module)
                count += 1
    return count


def _lean_mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    product = _SwiGLU.apply(gate, up)
    # down_proj's adapter would keep the product for its gradient; the product is cheap to compute again.
    kept = gate.detach(), up.detach()

    def pack(tensor: Tensor) -> Any:
        return kept if tensor.data_ptr() == product.data_ptr() else tensor

    def unpack(packed: Any) -> Tensor:
        return F.silu(packed[0]).mul_(packed[1]) if isinstance(packed, tuple) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return mlp.down_proj(product)


def _lean_norm(norm: nn.Module, x: Tensor) -> Tensor:
    if x.is_cuda:  # torch's fused kernel, which keeps x and each row's 1 / rms too
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon)


class _SwiGLU(torch.autograd.Function):
    """silu(gate)·up; keeps only gate and up for the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · weight with a frozen weight, computed in fp32; keeps x and each row's 1 / rms."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.float()
        scale = torch.linalg.vecdot(rows, rows).div_(rows.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, scale)
        return (rows * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, grad):
        # With g the gradient at x·scale and d the width: scale·g − scale³·(g·x / d)·x
        x, weight, scale = ctx.saved_tensors
        rows, grad_rows = x.float(), (grad * weight).float()
        mean = torch.linalg.vecdot(grad_rows, rows)[..., None] / x.shape[-1]
        return grad_rows.mul_(scale).addcmul_(rows, mean.mul_(scale**3), value=-1).to(x.dtype), None, None
