"""What only a GPU uses, tested without one: Triton's interpreter for the kernels, the arithmetic of chunks, counts."""

import collections
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, make_model, relative_error
from test_training import make_trainer
from torch.utils._python_dispatch import TorchDispatchMode

import train
from common import chunked, packing, ranks, token_kernel
from common.layers import TARGET_MODULES
from experiments import bf16_forms


def test_the_kernels_by_tritons_interpreter():
    """tests/interpreted_kernels.py, where Triton has not been imported yet."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted_kernels.py"]
    variables = os.environ | {"TRITON_INTERPRET": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:]
    assert "15 passed" in finished.stdout


GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_step_of_llama_2_7b_on_a_gpu_waits_three_times_and_copies_twice(tmp_path):
    """tests/fake_gpu_step.py: nothing on another device or in another type, and no wait that grows with the layers."""
    (tmp_path / "guard.cpp").write_text(GUARD)
    torch_folder = Path(torch.__file__).parent
    words = ["g++", "-std=c++20", "-shared", "-fPIC", "guard.cpp", "-o", "guard.so", f"-I{torch_folder}/include"]
    subprocess.run([*words, f"-L{torch_folder}/lib", "-lc10"], cwd=tmp_path, check=True)
    command = [sys.executable, "tests/fake_gpu_step.py", tmp_path / "guard.so", tmp_path / "found.json"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    # L_SVDR alone looks: at the norm, and at its decomposition's verdict and residual (the iteration) or verdict alone.
    for formulation, waits in (("iclr2026", 3), ("arxiv2024", 2)):
        on_gpu, on_meta = found[formulation]["cuda"], found[formulation]["meta"]
        places = list(on_gpu["forward"]["waits"])
        assert sum(on_gpu["forward"]["waits"].values()) == len(places) == waits, places
        assert all(", chunked.py: " in place for place in places)
        # One attention a layer, of the teacher and of the student, whatever the number of sequences.
        assert on_gpu["forward"]["attentions"] == 2 * {"iclr2026": 1, "arxiv2024": 3}[formulation]
        copies = on_gpu["forward"]["copies"]  # ends and keys' places, for teacher and student
        assert sum(copies.values()) == 2 and all("packing.py: on_device = " in place for place in copies), copies
        empty = {"waits": {}, "copies": {}, "attentions": 0}
        assert on_gpu["update"] == on_meta["backward"] == on_meta["update"] == empty
        assert on_gpu["types"] == ["torch.float32 of torch.float32 on cuda"]
        assert on_meta["types"] == ["torch.float32 of torch.float32 on meta"]


def memory_of(capsys, tmp_path, *options):
    """GiB by part that --dry-run prints for LLaMA-2-7B, and the lines above."""
    transformers.LlamaConfig().save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--data", "metamath", "--output-dir", str(tmp_path / "out")]
    train.main([*words, "--dry-run", *options])
    head, _, parts = capsys.readouterr().out.partition("memory per ")
    found = dict(re.findall(r"^  (\w+) +([\d.]+) GiB$", parts, re.MULTILINE))
    return {name: float(size) for name, size in found.items()}, head, parts.splitlines()[0]


def test_a_dry_run_estimates_for_the_gpu_that_is_named(tmp_path, capsys, monkeypatch):
    """bf16 and a GPU's chunks, on a machine without one; the gradients in fp32 that DeepSpeed's step makes."""
    parts, _, first = memory_of(capsys, tmp_path, "--dry-run-gpu", "80")
    assert first == "GPU, estimated for a micro-batch of 2048 tokens in bfloat16:"
    # 2,048 tokens: logits of both models in fp32 and one buffer more beside the head's bf16; three states; a factor.
    expected = 2048 * 32_000 * (3 * 4 + 2) + 3 * 2048 * 4096 * 4 + 12 * 4096**2
    assert parts["objective"] == pytest.approx(expected / 2**30, abs=0.01)
    assert "program" not in parts and "update" not in parts
    smaller, _, _ = memory_of(capsys, tmp_path, "--dry-run-gpu", "8")
    assert smaller["objective"] == pytest.approx((expected - 1024 * 32_000 * 14) / 2**30, abs=0.01)
    on_cpu, _, first = memory_of(capsys, tmp_path)
    assert first.startswith("process, ") and first.endswith("in float32:") and "program" in on_cpu
    monkeypatch.setenv("WORLD_SIZE", "8")
    deepspeed = ["--method", "full", "--deepspeed", str(ROOT / "configs" / "ds_zero2.json"), "--batch-size", "1"]
    parts, _, _ = memory_of(capsys, tmp_path, "--dry-run-gpu", "80", *deepspeed, "--max-length", "64")
    count = 6_738_415_616
    assert parts["optimizer"] == pytest.approx(count * 12 / 8 / 2**30, abs=0.01)
    passes = parts["activations"] + parts["objective"] + parts["transient"]
    assert passes + parts["update"] == pytest.approx(count * 4 / 8 / 2**30, abs=0.02)
    assert parts["together"] == pytest.approx(sum(parts.values()) - parts["together"], abs=0.03)


def test_an_error_of_a_full_gpu_is_one_line_with_what_takes_less(capsys, monkeypatch):
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity ...")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        ranks.run_rank(main)
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: stopped: CUDA out of memory. Tried to allocate 2.00 GiB. These take less memory")
    named = {word.strip(",.;") for word in line.split() if word.startswith("--")}
    assert {option.removeprefix("--").replace("-", "_") for option in named} <= set(
        train.Arguments.__dataclass_fields__
    )


@pytest.mark.parametrize(("method", "expected"), [("full", True), ("ba-lora", False)])
def test_communication_overlaps_where_gradients_fill_buckets(method, expected):
    """Not where adapters are trained, unless the configuration says so itself."""
    for path in sorted(ROOT.glob("configs/ds_*.json")):
        args = train.Arguments(method=method, deepspeed=str(path))
        assert ranks.deepspeed_config(args, 4, True, 64)["zero_optimization"]["overlap_comm"] is expected


def test_on_a_cpu_the_plain_form_serves():
    assert not token_kernel.is_usable(torch.zeros(2, 2), chunked.plain_token_terms)


@pytest.mark.parametrize("gib", [24, 80])
@pytest.mark.parametrize("vocabulary", [32_000, 128_256, 256_000])
def test_a_gpus_chunks_have_rows_enough_and_fit(gib, vocabulary):
    """1,024 at least, but for the largest vocabularies on small cards; never more than an eighth of the card."""
    card = gib * 2**30
    for row in (chunked.bytes_per_row(vocabulary, 2, 4, 2, True), chunked.bytes_per_row(vocabulary, 2, 2, 2, False)):
        rows = chunked.most_rows(row, None, card)
        assert rows >= min(1024, card // 8 // row)
        assert rows * row <= card / 8
        assert rows >= card // 32 // row
        assert chunked.most_rows(row, 128.0, card) * row <= 2**27  # the user's limit holds
        assert chunked.most_rows(row, None, None) == chunked.most_rows(row, 128.0, None)
    assert chunked.bytes_per_row(vocabulary, 2, 4, 2, True) == 14 * vocabulary


class Counted(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["differences", "residual"])
@pytest.mark.parametrize("initial", [True, False])
def test_the_forms_of_the_bf16_study_are_the_same_function(form, initial):
    """In fp64 terms: value and gradients of train.py's form, after the factors have moved."""
    torch.manual_seed(0)
    weight, x, G = torch.randn(10, 14), torch.randn(2, 3, 14), torch.randn(2, 3, 10)
    factors = train.principal_factors(weight, 4, 2.0) if initial else None
    found = {}
    for name in ("stacked", form):
        with contextlib.ExitStack() as stack:
            for patch in bf16_forms.patches(name):
                stack.enter_context(patch)
            base = torch.nn.Linear(14, 10, bias=False).requires_grad_(False)
            base.weight.data = weight.clone()
            torch.manual_seed(1)
            layer = train.LoRALinear(base, 4, 8.0, factors)
            with torch.no_grad():
                layer.lora_A += 0.1 * torch.randn(4, 14)
                layer.lora_B += 0.1 * torch.randn(10, 4)
            given = x.clone().requires_grad_()
            y = layer(given)
            y.backward(G)
            found[name] = (y, given.grad, layer.lora_A.grad, layer.lora_B.grad)
    for ours, theirs in zip(found[form], found["stacked"], strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_the_bf16_study_runs_what_is_missing(checkpoint, data_file, tmp_path, monkeypatch, capsys):
    """A row for each run, fp32 at distance 0 from itself; started again, it trains nothing and prints the table."""
    main, started = train.main, []
    tiny = ["--model", str(checkpoint), "--data", str(data_file), "--fields", "instruction", "output", "--rank", "4"]

    def on_tiny(words):
        started.append(words)
        main([*words, *tiny, "--eval-share", "0.25", "--init-cache", str(tmp_path / "cache")])

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(train, "main", on_tiny)
    monkeypatch.setattr(bf16_forms, "ROWS", tmp_path / "results" / "rows.jsonl")
    monkeypatch.setattr(bf16_forms, "ARMS", (("pissa", 1e-2, 3), ("lora", 1e-2, 3)))
    launched, start = [], subprocess.run

    def launch(words, **options):
        return launched.append(words) if "torch.distributed.run" in words else start(words, **options)

    monkeypatch.setattr(subprocess, "run", launch)
    for _ in range(2):
        bf16_forms.main(["--seeds", "42"])
        assert len(started) == 7
    assert [words[-2:] for words in launched] == [["--seeds", "42"]] * 2  # ZeRO-2's own process, which made no row here
    rows = bf16_forms.read_rows(bf16_forms.ROWS)
    assert [row["form"] for row in rows] == [*bf16_forms.FORMS[:4], *bf16_forms.FORMS[:3]]
    for row in rows:
        assert row["distance"] == 0 if row["form"] == "fp32" else 0 < row["distance"] < 0.5, row
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=0.3)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| lora, 3 steps  | stacked     | 1     |")


def test_the_bf16_studys_table_on_the_page_is_that_of_the_committed_rows():
    assert bf16_forms.table(bf16_forms.read_rows(bf16_forms.ROWS)) in (ROOT / "docs" / "performance.md").read_text()


def test_the_bf16_studys_table_pairs_the_seeds():
    """Means and differences by hand: seeds 1 and 2, of which the second lacks a form."""
    row = {"method": "pissa", "steps": 9, "distance": 0.5}
    losses = {("fp32", 1): 0.1, ("fp32", 2): 0.2, ("stacked", 1): 0.3, ("stacked", 2): 0.6, ("residual", 1): 0.25}
    rows = [row | {"form": form, "seed": seed, "loss": loss} for (form, seed), loss in losses.items()]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in bf16_forms.table(rows).splitlines()[2:]]
    half = 12.7062 * (0.2 / 2**0.5) / 2**0.5  # Student's t with one degree of freedom
    assert cells[1][2:5] == ["2", "0.4500 ± 0.2121", f"+0.3000 [{0.3 - half:+.4f}, {0.3 + half:+.4f}]"]
    assert cells[2][2:6] == ["1", "0.2500", "+0.1500 (one pair)", "-0.0500 (one pair)"]


class WholeGradients(TorchDispatchMode):
    """How often the gradient of a slice was made as large as a tensor of this many tokens."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.count = tokens, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.count += function.overloadpacket.__name__ == "slice_backward" and out.shape[2] == self.tokens
        return out


@pytest.mark.parametrize("count", [2, 4, 32])
def test_packed_attentions_backward_does_not_grow_with_the_square_of_the_sequences(count):
    """Queries, keys and values have one slice each whose gradient is as large as they are."""
    tokens = 20 + (count - 1) * 12
    qkv = [torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2)]
    output, _ = packing.attend_per_sequence(None, *qkv, None, sequence_lengths=[20] * count, shared_length=8)
    with WholeGradients(tokens) as whole:
        output.square().sum().backward()
    assert whole.count == 3


def by_definition(q, k, v, ends_q, ends_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """torch's attention for sequences of any lengths, which no CPU has. FlashAttention's causal mask: the last query
    sees the last key."""
    assert window_size == (-1, 0) and {ends_q.dtype, ends_k.dtype} == {torch.int32}
    outputs = []
    for start_q, end_q, start_k, end_k in zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True):
        assert end_q - start_q <= max_q and end_k - start_k <= max_k
        own = [
            x[a:b].transpose(0, 1)[None] for x, a, b in ((q, start_q, end_q), (k, start_k, end_k), (v, start_k, end_k))
        ]
        seen = torch.ones(end_q - start_q, end_k - start_k, dtype=torch.bool).tril(
            int((end_k - start_k) - (end_q - start_q))
        )
        out = F.scaled_dot_product_attention(*own, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("shared", [0, 3])
def test_attention_in_one_launch_is_that_of_each_sequence(shared, monkeypatch):
    """Values and gradients; queries and keys of different lengths where a beginning is shared, grouped heads."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_definition)
    lengths = [5, 4, 9]
    tokens = sum(lengths) - 2 * shared
    given = packing.for_one_launch(lengths, shared, torch.device("cpu"))
    assert given["cu_seq_lens_k"].tolist() == [0, 5, 9, 18]
    qkv = [torch.randn(1, heads, tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    each, _ = packing.attend_per_sequence(None, *qkv, None, 0.3, sequence_lengths=lengths, shared_length=shared)
    once = packing.attend_in_one_launch(*qkv, 0.3, **given)[None]
    assert torch.allclose(once, each, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(each)
    for mine, theirs in zip(*(torch.autograd.grad((x * weights).sum(), qkv) for x in (once, each)), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["pissa", "lora"])
def test_factors_stacked_once_change_no_bit(method, dtype):
    """Forward and backward, with checkpointing too; no pass stacks them again."""
    gradients, negations = [], {}
    for held, checkpointing in itertools.product((False, True), repeat=2):
        model = make_model().to(dtype).train()
        torch.manual_seed(0)
        train.add_adapters(model, method, 4, 8, TARGET_MODULES)
        for layer in train.adapter_layers(model).values():
            layer.lora_B.data += 0.05
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        train.stack_factors(model, hold=held)
        ids = torch.arange(20)[None]
        with Counted() as counted:
            model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        negations[held, checkpointing] = counted.counts["neg"]
    for other in gradients[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other, gradients[0], strict=True))
    passes = 14 if method == "pissa" else 0  # PiSSA's stack has −B₀ in it
    assert negations[False, False] - negations[True, False] == 2 * passes
    assert negations[False, True] - negations[True, True] == 3 * passes


@pytest.mark.parametrize("fused", [False, True])
def test_no_stacked_factors_outlive_an_update(fused, tokenizer, data_file, tmp_path, monkeypatch):
    """Held in every pass of a step, and never stale: the run is that of factors stacked in every pass, bit for bit."""
    ends = []
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, fused=fused))
    for held in (True, False):
        trainer = make_trainer(make_model(), tokenizer, data_file, tmp_path / str(held), max_steps=3)
        layers, seen = train.adapter_layers(trainer.model.model).values(), set()
        forward = trainer.model.forward

        def watched(*args, layers=layers, seen=seen, forward=forward, trainer=trainer, held=held):
            seen.add(all(layer.stacked is not None for layer in layers) or not held)
            if not held:
                train.stack_factors(trainer.model.model, hold=False)
            return forward(*args)

        trainer.model.forward = watched
        trainer.train()
        assert seen == {True}
        assert all(layer.stacked is None for layer in layers)
        ends.append([parameter.detach().clone() for parameter in trainer.model.parameters() if parameter.requires_grad])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*ends, strict=True))


def test_the_iteration_agrees_with_the_eigendecomposition_and_looks_seldom_on_a_gpu():
    """There by fewer rounds that look at the residual."""
    generator = torch.Generator().manual_seed(0)
    for decay in (0.3, 1.0):
        Y = torch.randn(600, 550, generator=generator) * torch.arange(1, 551) ** -decay
        looks, (expected_sigma, expected_polar) = [], chunked.leading_by_eigh(Y, 10)
        for on_gpu in (False, True):
            with Counted() as counted:
                sigma, polar = chunked.leading_by_iteration(Y, 10, on_gpu)
            looks.append(counted.counts["_linalg_eigh"])
            assert relative_error(sigma, expected_sigma[:10]) < 1e-6
            assert relative_error(polar, expected_polar) < 1e-3
        assert looks[1] < looks[0]
