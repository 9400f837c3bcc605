"""The objective's arithmetic without whole logits: token terms in chunks, L_SVDR from the leading singular pairs.

`objective` in train.py is the definition that tests compare this with. token_kernel.py has the token terms in Triton.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import token_kernel
from common.token_kernel import top_k

FUSED_TERMS = ("consistency", "diversity", "spectral")  # the terms of train.py's TERMS that are computed here
CPU_MEMORY = 128.0  # MiB
CARD_SHARE, CARD_MOST = 1 / 32, 1 / 8  # of a GPU's memory
FEWEST_ROWS = 1024  # with fewer rows, the product with the head leaves a GPU's matrix units idle
CACHED_BYTES = 2**21  # size of a block's operand that stays in a CPU's cache


class WithGradient(torch.autograd.Function):
    """A loss with a gradient that is known already: that with respect to the hidden states, (M, d)."""

    @staticmethod
    def forward(ctx, hidden, loss, gradient):
        ctx.save_for_backward(gradient)
        ctx.input_dtype = hidden.dtype
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_loss):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss).to(ctx.input_dtype), None, None


def fused_terms(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    head_weight: Tensor,
    head_factor: Tensor | None,
    targets: Tensor,
    weights: Mapping[str, float | Tensor],
    settings: Any,
    num_tokens: int | Tensor,
    num_micro_batches: int,
    memory_mib: float | None,
) -> tuple[Tensor, dict[str, float | Tensor]]:
    """train.py's `objective` with the terms of FUSED_TERMS, its value and gradient computed in one pass.

    Args:
        weights, settings: of train.py's `Regularizers`. The others: see `objective_from_hidden`.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    needs_gradient = hidden.requires_grad and torch.is_grad_enabled()
    with torch.no_grad():
        sums, gradient = token_sums(
            hidden, teacher_hidden, head_weight, targets, weights, settings, needs_gradient, memory_mib
        )
        sums /= num_tokens
        if needs_gradient:
            gradient /= num_tokens
        task, consistency, diversity, accuracy = sums.unbind()
        loss, terms = task, {"task": task.clone()} | ({} if needs_gradient else {"accuracy": accuracy})
        if teacher_hidden is not None and "consistency" in weights:
            terms["consistency"] = consistency.clone()
            loss = loss + weights["consistency"] * consistency
        if "diversity" in weights:
            terms["diversity"] = diversity.clone()
            loss = loss + weights["diversity"] * diversity
        if "spectral" in weights:
            factor = head_factor.to(dtype)
            spectral, spectral_gradient = spectral_value_and_gradient(
                hidden.to(dtype) @ factor, settings.spectral_k, settings.spectral_norm
            )
            spectral = spectral.to(dtype) / num_micro_batches
            if needs_gradient and weights["spectral"] > 0:
                gradient += (weights["spectral"] / num_micro_batches) * (spectral_gradient @ factor.T)
            terms["spectral"] = spectral
            loss = loss + weights["spectral"] * spectral
    return (WithGradient.apply(hidden, loss, gradient) if needs_gradient else loss), terms


def token_sums(
    hidden: Tensor,
    teacher_hidden: Tensor | None,
    head_weight: Tensor,
    targets: Tensor,
    weights: Mapping[str, float | Tensor],
    settings: Any,
    needs_gradient: bool,
    memory_mib: float | None,
) -> tuple[Tensor, Tensor | None]:
    """L_task, L_CR, L_DR and, without gradient, hits, summed over tokens, (4,); the weighted sum's gradient, (M, d).

    Args:
        weights, settings: of train.py's `Regularizers`. L_CR is computed where its weight and the teacher are given.
    """
    if "consistency" not in weights:
        teacher_hidden = None

    def summed(fused: bool) -> tuple[Tensor, Tensor | None]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(4, dtype=dtype, device=hidden.device)
        gradient = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if needs_gradient else None
        token_terms, held = (token_kernel.token_terms, head_weight.dtype) if fused else (plain_token_terms, dtype)
        for rows in chunks(hidden, head_weight, 1 if teacher_hidden is None else 2, memory_mib, in_place=fused):
            z = logits_of(hidden[rows], head_weight, held)
            teacher = None if teacher_hidden is None else logits_of(teacher_hidden[rows], head_weight, held)
            for block in blocks(z):
                teacher_block = None if teacher is None else teacher[block]
                token_terms(z[block], teacher_block, targets[rows][block], weights, settings, sums, needs_gradient)
            del teacher
            if needs_gradient:
                gradient[rows] = z.to(head_weight.dtype) @ head_weight
        return sums, gradient

    if needs_gradient and token_kernel.is_usable(head_weight, plain_token_terms):
        try:
            return summed(fused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler may fail on shapes that the trial did not have
            token_kernel.give_up(error)
    return summed(fused=False)


def plain_token_terms(
    z: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    weights: Mapping[str, float | Tensor],
    settings: Any,
    sums: Tensor,
    needs_gradient: bool,
) -> None:
    """Adds one block's L_task, L_CR and L_DR, summed over its tokens, to `sums`; z becomes the gradient of all three.

    Overwrites `z` and `teacher`, (m, V), and needs one more buffer of their size. With --mask-target both softmax of
    L_CR leave out the token y.

        ∂L_task/∂z = softmax(z) − onehot(y)
        ∂L_CR/∂z   = T·(softmax(z/T) − softmax(z_P/T))
        ∂L_DR/∂z   = p·(log p + H(p)) on the top-K entries (all of them where K is None), p their softmax
    """
    onehot = targets[:, None]
    if not needs_gradient:
        sums[3] += (z.argmax(dim=1) == targets).sum()
    top_values, diversity = None, weights.get("diversity")
    if diversity is not None and settings.entropy_top_k:
        top_values, top_indices = top_k(z, settings.entropy_top_k)
        z -= top_values[:, :1].clone()  # minus the row's maximum: exp cannot overflow, and softmax stays the same
        top_values = top_values - top_values[:, :1]
    else:
        z -= z.amax(dim=1, keepdim=True)
    at_target = z.gather(1, onehot)
    buffer = torch.empty_like(z)

    if teacher is not None:
        T, weight = settings.temperature, weights["consistency"] * settings.temperature
        if settings.mask_target:
            teacher.scatter_(1, onehot, -torch.inf)
        teacher -= teacher.amax(dim=1, keepdim=True)
        difference = torch.sub(teacher, z, out=buffer)
        if settings.mask_target:
            difference.scatter_(1, onehot, 0.0)
        teacher_p = teacher.div_(T).exp_()
        teacher_sum = teacher_p.sum(dim=1, keepdim=True)
        cross = torch.linalg.vecdot(difference, teacher_p)[:, None] / (T * teacher_sum)
        if settings.mask_target:  # by the maximum of the others, since far below the target's they would all underflow
            others = buffer.copy_(z).scatter_(1, onehot, -torch.inf)
            largest = others.amax(dim=1, keepdim=True)
            student_p, cross = others.sub_(largest).div_(T).exp_(), cross + largest / T
        else:
            student_p = torch.div(z, T, out=buffer).exp_()
        student_sum = student_p.sum(dim=1, keepdim=True)
        sums[1] += T**2 * (cross + student_sum.log() - teacher_sum.log()).sum()
        if needs_gradient:
            # T·(softmax(z/T) − softmax(z_P/T)), in the teacher's buffer
            consistency_gradient = teacher_p.mul_(-weight / teacher_sum).addcmul_(student_p, weight / student_sum)

    over_vocabulary = diversity is not None and top_values is None
    if over_vocabulary:
        buffer.copy_(z)
    p = z.exp_()
    p_sum = p.sum(dim=1, keepdim=True)
    sums[0] += (p_sum.log() - at_target).sum()
    p /= p_sum
    if over_vocabulary:
        log_p = buffer.sub_(p_sum.log())
        negative_entropy = torch.linalg.vecdot(p, log_p)[:, None]
        sums[2] += negative_entropy.sum()
        if diversity > 0:
            # p + λ₂·p·(log p + H), still without the one-hot
            p.mul_(log_p.sub_(negative_entropy).mul_(diversity).add_(1.0))
    if needs_gradient:
        p.scatter_add_(1, onehot, p.new_full((), -1.0).expand_as(onehot))
        if teacher is not None:
            p += consistency_gradient
    if top_values is not None:
        log_q = F.log_softmax(top_values, dim=1)  # (m, K)
        q = log_q.exp()
        negative_entropy = (q * log_q).sum(dim=1, keepdim=True)
        sums[2] += negative_entropy.sum()
        if needs_gradient and diversity > 0:
            p.scatter_add_(1, top_indices, diversity * q * (log_q - negative_entropy))


def logits_of(hidden: Tensor, head_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Z = H Eᵀ (m, V), rounded as the model's own head rounds it, then held in `dtype`."""
    return (hidden.to(head_weight.dtype) @ head_weight.T).to(dtype)


@torch.no_grad()
def head_factor(head_weight: Tensor) -> Tensor:
    """L (d × d) with L Lᵀ = EᵀE: H L has the singular values of the logits H Eᵀ, whatever the vocabulary's size.

    Computed once, in fp64. Where E has dependent columns, the symmetric root of EᵀE takes the place of Cholesky's.
    """
    gram = head_weight.new_zeros(head_weight.shape[1], head_weight.shape[1], dtype=torch.float64)
    for rows in head_weight.split(8192):
        rows = rows.double()
        gram.addmm_(rows.T, rows)
    factor, info = torch.linalg.cholesky_ex(gram)
    if info != 0:
        eigenvalues, vectors = torch.linalg.eigh(gram)
        factor = vectors * eigenvalues.clamp(min=0).sqrt()
    return factor.to(torch.promote_types(head_weight.dtype, torch.float32))


SPECTRAL_EXACT_SIZE = 512  # up to here a full eigendecomposition is as fast as an iteration


@torch.no_grad()
def spectral_value_and_gradient(Y: Tensor, k: int, norm: str) -> tuple[Tensor, Tensor]:
    """`spectral_loss` of Y (M × d) and its gradient, from the leading eigenpairs of Y Yᵀ or YᵀY.

    With Y = U S Vᵀ the gradient of Σ_{i≤k} σ_i is U_k V_kᵀ. Where σ_k = σ_{k+1} it is one of the subgradients.
    """
    total = torch.linalg.vector_norm(Y, dtype=torch.float64)
    size = total.item()  # the only value that the host waits for
    if size == 0:
        return Y.new_zeros(()), torch.zeros_like(Y)
    if not math.isfinite(size):  # the decomposition may raise an error for NaN or Inf
        return Y.new_full((), math.nan), torch.full_like(Y, math.nan)
    if norm == "frobenius":
        iterate = min(Y.shape) > max(SPECTRAL_EXACT_SIZE, 4 * k)
        sigma, polar = leading_by_iteration(Y, k, Y.is_cuda) if iterate else leading_by_eigh(Y, k)
        total_gradient = Y / total.to(Y.dtype)
    elif norm == "nuclear":
        sigma, polar, total_gradient = leading_by_eigh(Y, k, min(Y.shape))
        total = sigma.sum()
    else:
        raise ValueError(f"unknown norm {norm!r}: 'frobenius' or 'nuclear'")
    ratio = sigma[:k].sum() / total
    gradient = (polar - total_gradient * ratio.to(Y.dtype)) / total.to(Y.dtype)
    return -ratio.to(Y.dtype), -gradient


def leading_by_eigh(Y: Tensor, *counts: int) -> tuple[Tensor, ...]:
    """All singular values of Y in fp64, and U_k V_kᵀ for each k in `counts`.

    By an eigendecomposition of the smaller Gram matrix in fp64.
    """
    wide = Y.shape[0] <= Y.shape[1]
    exact = Y.double() if wide else Y.double().T
    eigenvalues, vectors = torch.linalg.eigh(exact @ exact.T)
    sigma, U = eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    # Y itself is rounded: a singular value below this limit is noise, and its vectors are arbitrary.
    noise = 4 * len(sigma) ** 0.5 * torch.finfo(Y.dtype).eps * sigma[0]
    sigma = torch.where(sigma > noise, sigma, torch.zeros_like(sigma))
    inverse = torch.where(sigma > 0, 1 / sigma, torch.zeros_like(sigma))
    polars = ((U[:, :k] * inverse[:k]) @ (U[:, :k].T @ exact) for k in counts)
    return sigma, *((polar if wide else polar.T).to(Y.dtype) for polar in polars)


def leading_by_iteration(
    Y: Tensor, k: int, on_gpu: bool = False, tolerance: float = 1e-5, max_iterations: int = 60
) -> tuple[Tensor, Tensor]:
    """The k leading singular values of Y in fp64, and U_k V_kᵀ, by block subspace iteration with Rayleigh–Ritz.

    It has converged when every leading pair's residual ‖Y Yᵀ u − σ² u‖ is at most `tolerance`·σ²; if it does not
    converge, the eigendecomposition takes over. On a GPU, the host waits for every residual that is read: there the
    basis is wider, and the first residuals are not read.
    """
    width, unseen = (min(6 * k + 4, *Y.shape), 4) if on_gpu else (3 * k + 10, 1)
    generator = torch.Generator(Y.device).manual_seed(0)
    basis = torch.randn(Y.shape[0], width, generator=generator, device=Y.device, dtype=Y.dtype)
    for _ in range(unseen):
        basis = torch.linalg.qr(Y @ (Y.T @ basis)).Q
    for _ in range(max_iterations):
        projected = Y.T @ basis  # (d, b)
        eigenvalues, rotation = torch.linalg.eigh((projected.T @ projected).double())
        eigenvalues, rotation = eigenvalues.flip(0), rotation.flip(1).to(Y.dtype)
        image = Y @ (projected @ rotation)  # Y Yᵀ u for the Ritz vectors u, (M, b)
        U = basis @ rotation[:, :k]
        squares = eigenvalues[:k].to(Y.dtype)
        residual = torch.linalg.vector_norm(image[:, :k] - U * squares, dim=0)
        if (residual <= tolerance * squares).all():
            sigma = eigenvalues[:k].sqrt()
            return sigma, (U / sigma.to(Y.dtype)) @ (projected @ rotation[:, :k]).T
        basis = torch.linalg.qr(image).Q
    return leading_by_eigh(Y, k)


# ------------------------------------------------------------------------------------------------------------------
# How many chunks and blocks the logits are computed in, by memory and by the device's speed
# ------------------------------------------------------------------------------------------------------------------


def bytes_per_row(vocabulary: int, num_buffers: int, itemsize: int, head_itemsize: int, one_more: bool) -> int:
    """The bytes that one row of logits needs in `num_buffers` buffers with `itemsize` bytes an entry.

    Args:
        head_itemsize: bytes an entry of the head's own output; if smaller than `itemsize`, that output is held too.
        one_more: whether the terms need another buffer of a whole chunk; on a CPU they need one of a block only.
    """
    rounded = head_itemsize if head_itemsize < itemsize else 0
    return vocabulary * ((num_buffers + one_more) * itemsize + rounded)


def most_rows(row: int, memory_mib: float | None, card: int | None) -> int:
    """How many rows of `row` bytes a chunk may have.

    Args:
        memory_mib: the user's budget. None: 128 MiB on a CPU; on a GPU 1/32 of its memory, or the size of 1,024 rows if
            that is more, up to 1/8. All of the memory counts, not the free part: a resumed run has the same chunks.
        card: the GPU's memory in bytes; None: a CPU.
    """
    if memory_mib is None and card is not None:
        budget = max(card * CARD_SHARE, min(FEWEST_ROWS * row, card * CARD_MOST))
    else:
        budget = (CPU_MEMORY if memory_mib is None else memory_mib) * 2**20
    return max(1, int(budget / row))


def card_bytes(device: torch.device | None = None) -> int | None:
    """The memory of this GPU, without `device` of the present one; None: a CPU."""
    is_cuda = torch.cuda.is_available() if device is None else device.type == "cuda"
    return torch.cuda.get_device_properties(device).total_memory if is_cuda else None


def chunks(
    hidden: Tensor, head_weight: Tensor, num_buffers: int, memory_mib: float | None, in_place: bool = False
) -> Iterator[slice]:
    """Equal chunks of rows. The (m, V) logits of one chunk fit into the budget `num_buffers` times.

    Args:
        in_place: the terms overwrite the head's own output and need no other buffer.
    """
    head_itemsize = head_weight.dtype.itemsize
    itemsize = head_itemsize if in_place else torch.promote_types(hidden.dtype, torch.float32).itemsize
    row = bytes_per_row(len(head_weight), num_buffers, itemsize, head_itemsize, hidden.is_cuda and not in_place)
    count = math.ceil(len(hidden) / most_rows(row, memory_mib, card_bytes(hidden.device)))
    for index in range(count):
        yield slice(len(hidden) * index // count, len(hidden) * (index + 1) // count)


def blocks(z: Tensor) -> Iterator[slice]:
    """Blocks of a chunk's rows that fit a CPU's cache: the terms pass over them a dozen times. A GPU gets one block."""
    if z.is_cuda:  # one block already reaches the memory's bandwidth; another block would launch a dozen kernels more
        yield slice(None)
        return
    size = max(1, CACHED_BYTES // (z.shape[1] * z.element_size()))
    for first in range(0, len(z), size):
        yield slice(first, first + size)
