"""The fused kernels by Triton's interpreter, run by test_gpu_paths.py in a process of its own: TRITON_INTERPRET=1 must
stand before anything imports Triton."""

import pytest
import torch
from conftest import relative_error
from test_objective import ICLR, SETTINGS, definition, fused, make_inputs

from common import chunked, token_kernel


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels in narrow blocks, so that a row takes several; returns the calls."""
    calls, kernel = [], token_kernel.token_terms
    monkeypatch.setattr(token_kernel, "WIDTH", 512)
    monkeypatch.setattr(token_kernel, "_agrees", lambda *_: True)
    monkeypatch.setattr(token_kernel, "token_terms", lambda *args: (calls.append(args), kernel(*args))[1])
    return calls


class Spy:
    """A kernel that notes the ENTROPY that it is launched with."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.launched.append(options["ENTROPY"])
            self.kernel[grid](*args, **options)

        return launch


NAMES = ("iclr2026", "arxiv2024", "masked", "masked_over_all", "zero_weights", "no_teacher", "task_alone", "adaptive")


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_equal_the_definition(name, interpreted):
    """Values and gradient, fp32 within rounding; rows of several blocks with a remainder, and of less than one."""
    for shape in ((3, 1511, 16), (3, 40, 8)):
        inputs = make_inputs(shape)
        loss, terms, gradient = fused(inputs, SETTINGS[name])
        expected_loss, expected_terms, expected_gradient = definition(inputs, SETTINGS[name])
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5, abs=1e-7)
        assert terms == pytest.approx(expected_terms, rel=1e-5, abs=1e-6)
        assert relative_error(gradient, expected_gradient) < 1e-5
    assert len(interpreted) == 2


def test_the_kernels_in_bfloat16_and_of_very_large_logits(interpreted):
    """As the plain form's own tests of both."""
    inputs = make_inputs((20, 700, 16), dtype=torch.bfloat16)
    loss, _, gradient = fused(inputs, ICLR)
    expected_loss, _, expected_gradient = definition(inputs, ICLR)
    assert interpreted[0][0].dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-3)
    assert relative_error(gradient, expected_gradient) < 2e-2
    hidden, teacher, head, _ = make_inputs((4, 600, 8))
    for settings in (ICLR, SETTINGS["masked"]):
        inputs = (hidden * 2e3, teacher * 2e3, head, (hidden @ head.T).argmax(dim=1))
        loss, _, gradient = fused(inputs, settings)
        expected_loss, _, expected_gradient = definition(inputs, settings)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert relative_error(gradient, expected_gradient) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["iclr2026", "masked_over_all"])
def test_the_kernels_equal_the_definition_on_a_language_models_vocabulary(name, dtype, monkeypatch):
    """At the kernels' own width, where the top K are found by blocks: several blocks of a row, and a remainder."""
    ways, by_blocks = [], token_kernel.top_k_of_blocks
    monkeypatch.setattr(
        token_kernel, "top_k_of_blocks", lambda *args: (ways.append(args[0].shape), by_blocks(*args))[1]
    )
    monkeypatch.setattr(token_kernel, "_agrees", lambda *_: True)
    inputs = make_inputs((3, 12_803, 16), dtype=dtype)
    loss, _, gradient = fused(inputs, SETTINGS[name])
    expected_loss, _, expected_gradient = definition(inputs, SETTINGS[name])
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5 if dtype == torch.float32 else 2e-3)
    assert relative_error(gradient, expected_gradient) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert ways == ([(3, 12_803)] if name == "iclr2026" else [])


def test_a_fault_after_the_trial_leaves_the_rest_to_the_plain_form(monkeypatch, capsys):
    """Whatever a kernel has already written, the step's numbers are right; one note, and no kernel runs again."""
    monkeypatch.setattr(token_kernel, "_agrees", lambda *_: True)
    monkeypatch.setattr(token_kernel, "enabled", True)
    started = []

    class Broken:
        def __getitem__(self, grid):
            def launch(z, *rest, **options):
                started.append(grid)
                z.zero_()
                raise RuntimeError("out of resource: shared memory\nmore")

            return launch

    monkeypatch.setattr(token_kernel, "_write", Broken())
    inputs = make_inputs((20, 700, 16))
    expected_loss, _, expected_gradient = definition(inputs, ICLR)
    for _ in range(2):
        loss, _, gradient = fused(inputs, ICLR)
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert relative_error(gradient, expected_gradient) < 1e-5
    assert len(started) == 1
    assert capsys.readouterr().out.count("do not serve here (out of resource: shared memory); the plain form does") == 1


def test_a_trial_decides_whether_the_kernels_serve(monkeypatch, capsys):
    """Against the plain form they do; against another formula, or where they raise, that form does, and says so."""
    head = torch.zeros(2, 2, dtype=torch.bfloat16)

    def other(z, *rest):
        chunked.plain_token_terms(z, *rest)
        z *= 1.05

    launched, read = [], token_kernel._read
    monkeypatch.setattr(token_kernel, "_read", Spy(read, launched))
    assert token_kernel.is_usable(head, chunked.plain_token_terms)
    assert capsys.readouterr().out == ""
    assert {token_kernel.TOP_K, token_kernel.ALL} <= set(launched)  # the ways of both formulations on real vocabularies
    assert not token_kernel.is_usable(head, other)
    assert "its numbers are others" in capsys.readouterr().out
    monkeypatch.setattr(token_kernel, "_read", None)
    token_kernel._agrees.cache_clear()
    assert not token_kernel.is_usable(head, chunked.plain_token_terms)
    assert "do not serve here" in capsys.readouterr().out
    monkeypatch.setattr(token_kernel, "enabled", False)
    assert not token_kernel.is_usable(head, chunked.plain_token_terms)
