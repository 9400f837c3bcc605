"""Each regularizer, value and gradient, against float64 numpy formulas with gradients derived by hand (oracle.py)."""

import numpy as np
import oracle
import pytest
import torch

import train

RNG = np.random.default_rng(0)

STUDENT_TERMS = {
    "topk_entropy_3": (lambda z: train.topk_entropy_loss(z, 3), lambda z: oracle.topk_entropy(z, 3)),
    "topk_entropy_20": (lambda z: train.topk_entropy_loss(z, 20), lambda z: oracle.topk_entropy(z, 20)),
    "entropy": (lambda z: train.topk_entropy_loss(z, None), lambda z: oracle.topk_entropy(z, None)),
    "covariance": (train.covariance_loss, oracle.covariance),
    "spectral_frobenius_2": (
        lambda z: train.spectral_loss(z, 2, "frobenius"),
        lambda z: oracle.spectral(z, 2, "frobenius"),
    ),
    "spectral_nuclear_2": (lambda z: train.spectral_loss(z, 2, "nuclear"), lambda z: oracle.spectral(z, 2, "nuclear")),
    "spectral_frobenius_10": (
        lambda z: train.spectral_loss(z, 10, "frobenius"),
        lambda z: oracle.spectral(z, 10, "frobenius"),
    ),
}
PAIR_TERMS = {
    "consistency_t1": (
        lambda z, p: train.consistency_loss(z, p, 1.0),
        lambda z, p: oracle.consistency(z, p, 1.0),
    ),
    "consistency_t2": (
        lambda z, p: train.consistency_loss(z, p, 2.0),
        lambda z, p: oracle.consistency(z, p, 2.0),
    ),
    "consistency_masked": (
        lambda z, p: train.consistency_loss(z, p, 2.0, z.detach().argmax(dim=1)),
        lambda z, p: oracle.consistency(z, p, 2.0, z.argmax(axis=1)),
    ),
    "normalized_mse": (train.normalized_mse_consistency_loss, oracle.normalized_mse_consistency),
}

INPUTS = {
    "random": RNG.normal(size=(7, 12)),
    "tall": RNG.normal(size=(12, 3)),
    "one_token": RNG.normal(size=(1, 9)),
    "equal_rows": np.tile(RNG.normal(size=(1, 9)), (5, 1)),
    "very_large": RNG.normal(size=(6, 9)) * 1e4,
    "zero": np.zeros((4, 6)),
    "repeated": np.eye(4, 6),
    "no_token": np.zeros((0, 6)),
}

SMOOTH = [name for name in INPUTS if name not in ("zero", "repeated")]


def value_and_gradient(term, logits: np.ndarray, dtype: torch.dtype) -> tuple[float, np.ndarray]:
    z = torch.tensor(logits, dtype=dtype, requires_grad=True)
    value = term(z)
    assert value.shape == ()
    (gradient,) = torch.autograd.grad(value, z)
    return value.item(), gradient.double().numpy()


def assert_close(actual, expected, tolerance: float, scale: float) -> None:
    """Values relative to max(1, |value|); gradients relative to their norm, with rounding of size `scale` allowed."""
    assert actual[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    difference = np.linalg.norm(actual[1] - expected[1])
    assert difference <= tolerance * np.linalg.norm(expected[1]) + scale


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("name", STUDENT_TERMS)
def test_student_terms_equal_the_formula_in_float64(name, kind):
    term, formula = STUDENT_TERMS[name]
    logits = INPUTS[kind]
    size = max(np.abs(logits).max(initial=0), 1)
    # What float64 leaves of a gradient that is exactly zero grows with the logits (covariance: with their cube).
    floor = 1e-13 * (size**3 if name == "covariance" else 1)
    assert_close(value_and_gradient(term, logits, torch.float64), formula(logits), 1e-9, floor)


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("name", PAIR_TERMS)
def test_pair_terms_equal_the_formula_in_float64(name, kind):
    term, formula = PAIR_TERMS[name]
    student = INPUTS[kind]
    teacher = np.random.default_rng(1).normal(size=student.shape) * max(np.abs(student).max(initial=1), 1)
    teacher_tensor = torch.tensor(teacher)
    actual = value_and_gradient(lambda z: term(z, teacher_tensor), student, torch.float64)
    assert_close(actual, formula(student, teacher), 1e-9, 1e-13)


@pytest.mark.parametrize("name", STUDENT_TERMS)
def test_float32_keeps_five_digits(name):
    term, formula = STUDENT_TERMS[name]
    logits = np.random.default_rng(2).normal(size=(64, 200)).astype(np.float32).astype(np.float64) * 5
    assert_close(value_and_gradient(term, logits, torch.float32), formula(logits), 1e-5, 1e-9)


@pytest.mark.parametrize("name", STUDENT_TERMS)
def test_bfloat16_logits_are_computed_in_float32(name):
    term, formula = STUDENT_TERMS[name]
    z = torch.tensor(np.random.default_rng(3).normal(size=(30, 40)) * 5, dtype=torch.bfloat16)
    assert term(z).item() == pytest.approx(formula(z.double().numpy())[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["zero", "repeated"])
@pytest.mark.parametrize("name", [*STUDENT_TERMS, *PAIR_TERMS])
def test_equal_singular_values_have_a_finite_value_and_gradient(name, kind):
    logits = INPUTS[kind]
    if name in STUDENT_TERMS:
        term, formula = STUDENT_TERMS[name]
        expected = formula(logits)
    else:
        pair, formula = PAIR_TERMS[name]
        expected = formula(logits, 0 * logits)

        def term(z):
            return pair(z, torch.zeros_like(z))

    actual = value_and_gradient(term, logits, torch.float64)
    assert actual[0] == pytest.approx(expected[0], abs=1e-12)
    assert np.isfinite(actual[1]).all()


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
def test_spectral_of_a_rank_deficient_matrix(norm):
    low_rank = RNG.normal(size=(8, 2)) @ RNG.normal(size=(2, 11))
    for k in (1, 2, 5, 50):
        value, gradient = value_and_gradient(lambda z, k=k: train.spectral_loss(z, k, norm), low_rank, torch.float64)
        assert_close((value, gradient), oracle.spectral(low_rank, k, norm), 1e-9, 1e-13)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "two_phase", "linear_warmup", "quadratic_warmup"])
def test_schedules_follow_the_authors_code(schedule):
    for progress in (0.0, 0.05, 0.1, 0.2, 0.21, 0.225, 0.25, 0.5, 0.9, 1.0):
        expected = oracle.lambda_at(schedule, 0.3, progress, 0.4)
        assert 0.3 * train.schedule_factor(schedule, progress, 0.4) == pytest.approx(expected, abs=1e-12)


def test_the_adaptive_weight_follows_the_teachers_confidence():
    def factor(logits: torch.Tensor) -> float:
        return train.adaptive_factor(train.teacher_confidence(logits)).item()

    teacher = RNG.normal(size=(6, 30)) * 4
    assert 0.2 * factor(torch.tensor(teacher)) == pytest.approx(oracle.adaptive_lambda(0.2, teacher), rel=1e-9)
    assert factor(torch.zeros(3, 30)) == pytest.approx(0.1, abs=1e-6)  # knows nothing
    certain = torch.full((3, 30), -1e4)
    certain[:, 0] = 1e4
    assert factor(certain) == pytest.approx(1.0)
    assert factor(torch.zeros(0, 30)) == pytest.approx(oracle.adaptive_lambda(1.0, np.zeros((0, 30))))


def test_the_objective_is_the_weighted_sum_of_its_terms():
    student, teacher = RNG.normal(size=(5, 12)), RNG.normal(size=(5, 12))
    targets = RNG.integers(12, size=5)
    settings = train.Regularizers(
        {"consistency": 0.3, "diversity": 0.2, "spectral": 0.1},
        train.Arguments(**train.FORMULATIONS["iclr2026"] | {"entropy_top_k": 4, "spectral_k": 2}),
    )
    num_tokens, num_micro_batches = 20, 4  # this micro-batch is a quarter of the step
    loss, terms = train.objective(
        torch.tensor(student), torch.tensor(teacher), torch.tensor(targets), settings, num_tokens, num_micro_batches
    )
    expected = {
        "task": oracle.task(student, targets)[0] / 4,
        "consistency": oracle.consistency(student, teacher, 2.0)[0] / 4,
        "diversity": oracle.topk_entropy(student, 4)[0] / 4,
        "spectral": oracle.spectral(student, 2, "frobenius")[0] / 4,
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9)
    total = expected["task"] + 0.3 * expected["consistency"] + 0.2 * expected["diversity"] + 0.1 * expected["spectral"]
    assert loss.item() == pytest.approx(total, rel=1e-9)


def test_published_defaults():
    args = train.resolve_arguments(train.Arguments(model="m", data="d", output_dir="does/not/exist"))
    halfway = train.Regularizers.at(args, 0.5)
    assert halfway.weights == pytest.approx({"consistency": 0.025 * 0.55, "diversity": 0.005, "spectral": 0.005})
    assert (args.spectral_k, args.entropy_top_k, args.temperature) == (10, 20, 2.0)
    assert train.Regularizers.at(args, 0.1).weights["diversity"] == 0.0
    old = train.Arguments(model="m", data="d", output_dir="does/not/exist", formulation="arxiv2024")
    old = train.resolve_arguments(old)
    assert train.Regularizers.at(old, 0.0).weights == {"consistency": 1e-4, "diversity": 3e-4, "spectral": 1e-4}
    assert (old.temperature, old.entropy_top_k, old.spectral_norm) == (1.0, 0, "nuclear")
