"""Independent float64 oracle for the loss terms of BA-LoRA (arXiv 2408.04556).

Every term returns `(value, gradient with respect to the student logits)`; the gradients are derived by hand.
M is the number of rows (tokens or examples), V the number of columns (vocabulary or classes).
A term over M = 0 rows is `(0.0, zeros)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.integer]
Term = tuple[float, Floats]

RELATIVE_RANK_TOLERANCE = 1e-12
Z_95 = 1.959963984540054


def _float64(logits: Floats) -> Floats:
    """The array as float64, so that no caller's precision leaks in."""
    return np.asarray(logits, dtype=np.float64)


def _zero(logits: Floats) -> Term:
    """A term that is 0 with a zero gradient."""
    return 0.0, np.zeros_like(logits)


def log_softmax(logits: Floats) -> Floats:
    """Row-wise z − max z − ln Σ exp(z − max z)."""
    shifted = logits - logits.max(axis=1, keepdims=True)  # (M, V)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def entropy_rows(logits: Floats) -> Floats:
    """H = −Σ p ln p of the softmax of every row."""
    log_p = log_softmax(logits)  # (M, V)
    return -(np.exp(log_p) * log_p).sum(axis=1)  # (M,)


def task(logits: Floats, targets: Ints) -> Term:
    """Mean cross-entropy −(1/M) Σ ln p[target]; gradient (p − onehot) / M."""
    z = _float64(logits)
    rows = np.arange(z.shape[0])
    if rows.size == 0:
        return _zero(z)
    log_p = log_softmax(z)  # (M, V)
    gradient = np.exp(log_p)
    gradient[rows, targets] -= 1.0
    return float(-log_p[rows, targets].mean()), gradient / rows.size


def consistency(
    student_logits: Floats, teacher_logits: Floats, temperature: float, left_out: Floats | None = None
) -> Term:
    """T² · mean KL(softmax(Z_P/T) ‖ softmax(Z_F/T)), arXiv 2408.04556; gradient T (q − p) / M.

    Where `left_out` names a token of each row, its column is deleted from both, and its gradient is 0.
    """
    student, teacher = _float64(student_logits), _float64(teacher_logits)
    if left_out is not None and len(student):
        kept = np.arange(student.shape[1]) != left_out[:, None]
        rows = (len(student), -1)
        value, gradient = consistency(student[kept].reshape(rows), teacher[kept].reshape(rows), temperature)
        whole = np.zeros_like(student)
        whole[kept] = gradient.ravel()
        return value, whole
    m = student.shape[0]
    if m == 0:
        return _zero(student)
    log_q = log_softmax(student / temperature)  # (M, V)
    log_p = log_softmax(teacher / temperature)  # (M, V)
    p = np.exp(log_p)
    divergence = (p * (log_p - log_q)).sum(axis=1)  # (M,)
    return float(temperature**2 * divergence.mean()), temperature * (np.exp(log_q) - p) / m


def _unit_rows(z: Floats) -> tuple[Floats, Floats]:
    """Rows z / ‖z‖ (a zero row stays zero) and their norms, with 1 in place of 0."""
    norms = np.linalg.norm(z, axis=1, keepdims=True)  # (M, 1)
    norms = np.where(norms > 0.0, norms, 1.0)
    return z / norms, norms


def normalized_mse_consistency(student_logits: Floats, teacher_logits: Floats) -> Term:
    """Mean of (f − p)² over all M·V elements, f and p the L2-normalised rows (arXiv 2408.04556, v1 to v5).

    With g = 2 (f − p) / (MV) the gradient is (g − f (f·g)) / ‖z‖, and zero for a zero row.
    """
    student, teacher = _float64(student_logits), _float64(teacher_logits)
    if student.shape[0] == 0:
        return _zero(student)
    f, norms = _unit_rows(student)  # (M, V), (M, 1)
    p, _ = _unit_rows(teacher)  # (M, V)
    g = 2.0 * (f - p) / f.size  # (M, V)
    gradient = (g - f * (f * g).sum(axis=1, keepdims=True)) / norms
    gradient[~student.any(axis=1)] = 0.0
    return float(np.mean((f - p) ** 2)), gradient


def topk_entropy(logits: Floats, top_k: int | None) -> Term:
    """−mean H(softmax over the K largest logits), arXiv 2408.04556; gradient p (ln p + H) / M on those K.

    Among equal logits the lower column index comes first.
    """
    z = _float64(logits)
    m, v = z.shape
    if m == 0:
        return _zero(z)
    k = v if top_k is None else min(top_k, v)
    columns = np.argsort(-z, axis=1, kind="stable")[:, :k]  # (M, K)
    top = np.take_along_axis(z, columns, axis=1)  # (M, K)
    log_p = log_softmax(top)  # (M, K)
    entropy = entropy_rows(top)  # (M,)
    gradient = np.zeros_like(z)
    np.put_along_axis(gradient, columns, np.exp(log_p) * (log_p + entropy[:, None]) / m, axis=1)
    return float(-entropy.mean()), gradient


def covariance(logits: Floats) -> Term:
    """(1/D) Σ_{i≠j} C_ij², C = Z_cᵀ Z_c / (N−1), arXiv 2408.04556; gradient 4 Z_c C_off / (D (N−1)).

    Z_c C_off has zero column sums already, so centring adds nothing to the gradient.
    """
    z = _float64(logits)
    n, d = z.shape
    if n <= 1:
        return _zero(z)
    centred = z - z.mean(axis=0, keepdims=True)  # (N, D)
    off_diagonal = centred.T @ centred / (n - 1)  # (D, D)
    np.fill_diagonal(off_diagonal, 0.0)
    gradient = 4.0 * centred @ off_diagonal / (d * (n - 1))  # (N, D)
    return float((off_diagonal**2).sum() / d), gradient


def _polar(u: Floats, vt: Floats, k: int) -> Floats:
    """Σ_{i≤k} u_i v_iᵀ, the gradient of Σ_{i≤k} σ_i."""
    return u[:, :k] @ vt[:k]  # (M, V)


def spectral(logits: Floats, k: int, norm: str) -> Term:
    """−Σ_{i≤k} σ_i / n, n = ‖Z‖_F ("frobenius") or Σ σ_j ("nuclear"), arXiv 2408.04556.

    Gradient −(U_k V_kᵀ − (Σ_{i≤k} σ_i / n) ∂n) / n, ∂n = Z / ‖Z‖_F or U Vᵀ; null directions are left out
    of U and V (the minimum-norm subgradient).
    """
    if norm not in ("frobenius", "nuclear"):
        raise ValueError(f"unknown norm: {norm!r}")
    z = _float64(logits)
    if not z.any():
        return _zero(z)
    u, sigma, vt = np.linalg.svd(z, full_matrices=False)  # (M, R), (R,), (R, V)
    rank = int((sigma > RELATIVE_RANK_TOLERANCE * sigma[0]).sum())
    k = min(k, sigma.size)
    size = float(np.linalg.norm(z) if norm == "frobenius" else sigma.sum())
    size_gradient = z / size if norm == "frobenius" else _polar(u, vt, rank)  # (M, V)
    ratio = float(sigma[:k].sum()) / size
    return -ratio, -(_polar(u, vt, min(k, rank)) - ratio * size_gradient) / size


def _ramp(start: float, length: float, progress: float) -> float:
    """0 up to `start`, 1 from `start + length`, linear between; a step where the length is 0."""
    if length <= 0.0:
        return float(progress >= start)
    return min(1.0, max(0.0, (progress - start) / length))


def lambda_at(schedule: str, weight: float, progress: float, warmup_fraction: float) -> float:
    """The weight of a term at progress t in [0, 1]; `warmup_fraction` serves the two warm-up schedules only.

    cosine: λ (0.1 + 0.9 · ½ (1 + cos πt)); two_phase: 0 up to 20 %, a linear ramp over 5 %, then λ.
    """
    if schedule == "constant":
        return weight
    if schedule == "cosine":
        return weight * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))
    if schedule == "two_phase":
        return weight * _ramp(0.20, 0.05, progress)
    if schedule == "linear_warmup":
        return weight * _ramp(0.0, warmup_fraction, progress)
    if schedule == "quadratic_warmup":
        return weight * _ramp(0.0, warmup_fraction, progress) ** 2
    raise ValueError(f"unknown schedule: {schedule!r}")


def adaptive_lambda(weight: float, teacher_logits: Floats) -> float:
    """0.1 λ + 0.9 λ · mean(1 − H(softmax(z_P)) / ln V); over no rows the confidence is 0."""
    z = _float64(teacher_logits)
    if z.shape[0] == 0:
        return 0.1 * weight
    confidence = float(np.mean(1.0 - entropy_rows(z) / math.log(z.shape[1])))
    return 0.1 * weight + 0.9 * weight * confidence


def finite_difference(function: Callable[[Floats], float], x: Floats, step: float = 1e-6) -> Floats:
    """(f(x + h e) − f(x − h e)) / 2h for every entry e of a small array."""
    point = np.array(x, dtype=np.float64)  # a copy: the caller's array is left alone
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        centre = point[index]
        point[index] = centre + step
        above = function(point.copy())
        point[index] = centre - step
        below = function(point.copy())
        point[index] = centre
        gradient[index] = (above - below) / (2.0 * step)
    return gradient


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval (low, high) of a proportion; (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, Z_95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)
