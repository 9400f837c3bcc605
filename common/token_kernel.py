"""The objective's token terms in two Triton kernels, which read a chunk's logits twice instead of about twenty times.

They work in place, in the head's own type (such as bf16), and never hold the plain form's fp32 copies of the logits.
common/chunked.py's `plain_token_terms` is the plain form, which is the fallback and the reference of a trial.
"""

import functools
import os
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import first_line

try:
    import triton
    import triton.language as tl
except ImportError:  # only torch for CUDA brings Triton
    triton = None

enabled = True  # False: the plain form, everywhere
WIDTH, GROUP = 4096, 64  # entries that a program takes at once; entries that share a maximum
NONE, TOP_K, ALL = range(3)  # the entries that the entropy is over

if triton is not None:

    @triton.jit
    def _read(
        z_ptr, teacher_ptr, stats_ptr, targets_ptr, maxima_ptr, V, T,
        HAS_TEACHER: tl.constexpr, MASKED: tl.constexpr, ENTROPY: tl.constexpr,
        WIDTH: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        """One row's maximum m, Σe^{z−m}, Σe^{(z−n)/T}, the teacher's two, Σ p̃_P (z_P − z), Σe^{z−m}(z−m), n; maxima.

        The sums over T and the teacher's are over the tokens of L_CR: all, or MASKED all but the target. n is the
        largest logit of these tokens.
        """
        row = tl.program_id(0).to(tl.int64)
        z_ptr += row * V
        teacher_ptr += row * V
        lanes = tl.arange(0, WIDTH)
        m = tl.load(z_ptr).to(tl.float32)
        target = tl.load(targets_ptr + row)
        first = 0
        if MASKED:
            first = tl.where(target == 0, 1, 0)
        n = tl.load(z_ptr + first).to(tl.float32)
        mt = m
        if HAS_TEACHER:
            mt = tl.load(teacher_ptr + first).to(tl.float32)
        s = 0.0
        sharp = 0.0
        st = 0.0
        cross = 0.0
        weighted = 0.0
        for start in range(0, V, WIDTH):
            inside = start + lanes < V
            z = tl.load(z_ptr + start + lanes, mask=inside, other=float("-inf")).to(tl.float32)
            if ENTROPY == 1:
                groups = V // GROUP
                group = start // GROUP + tl.arange(0, WIDTH // GROUP)
                largest = tl.max(tl.reshape(z, (WIDTH // GROUP, GROUP)), axis=1)
                tl.store(maxima_ptr + row * groups + group, largest, mask=group < groups)
            new = tl.maximum(m, tl.max(z, axis=0))
            shift = m - new
            shifted = tl.where(inside, z - new, 0.0)
            p = tl.where(inside, tl.exp(shifted), 0.0)
            if ENTROPY == 2:
                weighted = (weighted + shift * s) * tl.exp(shift) + tl.sum(p * shifted, axis=0)
            s = s * tl.exp(shift) + tl.sum(p, axis=0)
            if HAS_TEACHER:
                compared = inside
                if MASKED:
                    compared = inside & (start + lanes != target)
                new_n = tl.maximum(n, tl.max(tl.where(compared, z, float("-inf")), axis=0))
                near = tl.where(compared, z - new_n, 0.0)
                sharp = sharp * tl.exp((n - new_n) / T) + tl.sum(tl.where(compared, tl.exp(near / T), 0.0), axis=0)
                n = new_n
                zt = tl.load(teacher_ptr + start + lanes, mask=compared, other=float("-inf")).to(tl.float32)
                new_t = tl.maximum(mt, tl.max(zt, axis=0))
                factor = tl.exp((mt - new_t) / T)
                pt = tl.where(compared, tl.exp(tl.where(compared, zt - new_t, 0.0) / T), 0.0)
                cross = cross * factor + tl.sum(pt * tl.where(compared, zt - z, 0.0), axis=0)
                st = st * factor + tl.sum(pt, axis=0)
                mt = new_t
            m = new
        stats_ptr += row * 8
        tl.store(stats_ptr, m)
        tl.store(stats_ptr + 1, s)
        tl.store(stats_ptr + 2, sharp)
        tl.store(stats_ptr + 3, mt)
        tl.store(stats_ptr + 4, st)
        tl.store(stats_ptr + 5, cross)
        tl.store(stats_ptr + 6, weighted)
        tl.store(stats_ptr + 7, n)

    @triton.jit
    def _write(
        z_ptr, teacher_ptr, stats_ptr, targets_ptr, V, T, consistency, diversity,
        HAS_TEACHER: tl.constexpr, MASKED: tl.constexpr, ADAPTIVE: tl.constexpr, ENTROPY: tl.constexpr,
        WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One row's gradient in place of its logits, by what `_read` found; `consistency`: λ₁, pointer if ADAPTIVE."""
        row = tl.program_id(0).to(tl.int64)
        z_ptr += row * V
        teacher_ptr += row * V
        stats_ptr += row * 8
        m = tl.load(stats_ptr)
        s = tl.load(stats_ptr + 1)
        sharp = tl.load(stats_ptr + 2)
        mt = tl.load(stats_ptr + 3)
        st = tl.load(stats_ptr + 4)
        weighted = tl.load(stats_ptr + 6)
        n = tl.load(stats_ptr + 7)
        target = tl.load(targets_ptr + row)
        weight = tl.load(consistency) * T if ADAPTIVE else consistency * T
        lanes = tl.arange(0, WIDTH)
        for start in range(0, V, WIDTH):
            inside = start + lanes < V
            z = tl.load(z_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32)
            shifted = z - m
            p = tl.exp(shifted) / s
            gradient = p - tl.where(start + lanes == target, 1.0, 0.0)
            if ENTROPY == 2:  # p·(log p + H), where H = log s − Σ p (z − m)
                gradient += diversity * p * (shifted - weighted / s)
            if HAS_TEACHER:
                zt = tl.load(teacher_ptr + start + lanes, mask=inside, other=0.0).to(tl.float32)
                difference = tl.exp((z - n) / T) / sharp - tl.exp((zt - mt) / T) / st
                if MASKED:
                    difference = tl.where(start + lanes == target, 0.0, difference)
                gradient += weight * difference
            tl.store(z_ptr + start + lanes, gradient, mask=inside)


@torch.no_grad()
def token_terms(
    z: Tensor,
    teacher: Tensor | None,
    targets: Tensor,
    weights: Mapping[str, float | Tensor],
    settings: Any,
    sums: Tensor,
    needs_gradient: bool,
) -> None:
    """`plain_token_terms` for any floating type of `z` and `teacher`; does not change `teacher`."""
    entropy, diversity = NONE, weights.get("diversity")
    if diversity is not None:
        entropy = TOP_K if settings.entropy_top_k else ALL
    rows, V = z.shape
    T = 1.0 if teacher is None else float(settings.temperature)
    stats = z.new_empty(rows, 8, dtype=torch.float32)
    # If k blocks are a large part of the row, the blocks' maxima do not help to find the k largest.
    by_blocks = entropy == TOP_K and settings.entropy_top_k * GROUP < V // 4
    maxima = z.new_empty(rows, V // GROUP if by_blocks else 0, dtype=z.dtype)
    is_masked = teacher is not None and settings.mask_target
    shared = {"HAS_TEACHER": teacher is not None, "MASKED": is_masked, "WIDTH": WIDTH, "num_warps": 8}
    reads = TOP_K if by_blocks else ALL if entropy == ALL else NONE
    second = z if teacher is None else teacher
    _read[(rows,)](z, second, stats, targets, maxima, V, T, ENTROPY=reads, GROUP=GROUP, **shared)
    m, s, sharp, mt, st, cross, weighted, n = stats.unbind(1)
    sums[0] += (s.log() + m - z.gather(1, targets[:, None])[:, 0].float()).sum()
    if teacher is not None:
        sums[1] += T**2 * ((cross / st + n - mt) / T + sharp.log() - st.log()).sum()
    if entropy == ALL:
        sums[2] += (weighted / s - s.log()).sum()
    if entropy == TOP_K:
        k = settings.entropy_top_k
        values, indices = top_k_of_blocks(z, maxima, k, GROUP) if by_blocks else top_k(z, k)
        log_q = F.log_softmax(values.float(), dim=1)  # (m, K)
        q = log_q.exp()
        negative_entropy = (q * log_q).sum(dim=1, keepdim=True)
        sums[2] += negative_entropy.sum()
    if not needs_gradient:
        return
    consistency = 0.0 if teacher is None else weights["consistency"]
    is_adaptive = isinstance(consistency, Tensor)  # passed as a pointer: a number would make the host wait for it
    lambdas = (consistency if is_adaptive else float(consistency), float(diversity or 0))
    _write[(rows,)](z, second, stats, targets, V, T, *lambdas, ADAPTIVE=is_adaptive, ENTROPY=entropy, **shared)
    if entropy == TOP_K and diversity > 0:
        gradient = diversity * q * (log_q - negative_entropy)
        z.scatter_(1, indices, (z.gather(1, indices).float() + gradient).to(z.dtype))


def is_usable(head_weight: Tensor, plain: Callable[..., None]) -> bool:
    """Whether `token_terms` can replace `plain` for this head: on a GPU with Triton, after a trial."""
    if not enabled or triton is None or head_weight.dtype == torch.float64:
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, for tests
    return (head_weight.is_cuda or interpreted) and _agrees(plain, head_weight.device, head_weight.dtype)


@functools.cache
def _agrees(plain: Callable[..., None], device: torch.device, dtype: torch.dtype) -> bool:
    """Compares `token_terms` with `plain` on a few rows of both formulations; prints a note if they differ.

    The rows are as wide as needed for the code path of a language model's vocabulary: the top K by blocks.
    """
    generator = torch.Generator().manual_seed(0)
    V = 2 * WIDTH + 3
    z, teacher = ((4 * torch.randn(3, V, generator=generator)).to(device, dtype) for _ in range(2))
    targets = torch.randint(V, (3,), generator=generator).to(device)
    tolerance, problem = 1e-4 if dtype == torch.float32 else 1e-2, ValueError("its numbers are others")
    try:
        adaptive = torch.tensor(0.5, device=device)
        for T, k, is_masked, consistency in ((2.0, 20, False, 0.5), (1.0, None, True, adaptive)):
            weights = {"consistency": consistency, "diversity": 0.4}
            settings = SimpleNamespace(temperature=T, entropy_top_k=k, mask_target=is_masked)
            sums, expected_sums = (torch.zeros(3, device=device) for _ in range(2))
            gradient, expected = z.clone(), z.float()
            token_terms(gradient, teacher, targets, weights, settings, sums, True)
            plain(expected, teacher.float(), targets, weights, settings, expected_sums, True)
            error = (gradient.float() - expected).norm() / expected.norm()
            if not torch.allclose(sums, expected_sums, rtol=1e-4) or not error < tolerance:
                break
        else:
            return True
    except Exception as error:  # compilers and drivers raise kinds of their own
        problem = error
    print_note(problem)
    return False


def give_up(error: Exception) -> None:
    """Switches to the plain form for the rest of the run, after an error that the trial did not show; prints why."""
    global enabled
    enabled = False
    print_note(error)


def print_note(error: Exception) -> None:
    print(f"note: the objective's fused kernels do not serve here ({first_line(error)}); the plain form does")


def top_k(z: Tensor, k: int, block: int = 64) -> tuple[Tensor, Tensor]:
    """`z.topk(k)` of wide rows in two steps, exact: the k largest entries lie in the k blocks of the largest maxima."""
    rows, width = z.shape
    whole = width // block * block
    if min(k, width) * block >= width // 4:
        return z.topk(min(k, width), dim=1)
    return top_k_of_blocks(z, z[:, :whole].view(rows, -1, block).amax(dim=2), k, block)


def top_k_of_blocks(z: Tensor, maxima: Tensor, k: int, block: int) -> tuple[Tensor, Tensor]:
    """`top_k`, given the maxima of every whole block, (rows, width // block)."""
    rows, width = z.shape
    chosen = maxima.topk(k, dim=1).indices  # (m, k)
    candidates = (chosen[:, :, None] * block + torch.arange(block, device=z.device)).flatten(1)
    whole = width // block * block
    if whole < width:
        rest = torch.arange(whole, width, device=z.device).expand(rows, -1)
        candidates = torch.cat([candidates, rest], dim=1)
    values, positions = z.gather(1, candidates).topk(k, dim=1)
    return values, candidates.gather(1, positions)
