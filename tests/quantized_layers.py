"""Quantized bases on the branches that CUDA takes, by bitsandbytes' CPU back end; run by test_quantized.py in the
environment that has bitsandbytes, .venv-harness.

On a CPU bitsandbytes trains 8 bit by another function and packs 4 bit anew for AVX-512: both are switched off here.
"""

import bitsandbytes as bnb
import bitsandbytes.autograd._functions as functions
import peft
import pytest
import torch
from conftest import make_model, make_tokenizer, relative_error
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import train
from common import pretrained, tensors
from common.layers import TARGET_MODULES, find_target_modules, save_activations
from common.packing import enable_packing

KINDS = ("8bit", "4bit", "4bit, scales quantized too")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def _as_on_cuda(monkeypatch):
    def matmul(A, B, out=None, state=None, threshold=0.0, bias=None):
        state.threshold = threshold or state.threshold
        return functions.MatMul8bitLt.apply(A, B, out, bias, state)

    real = bnb.nn.Linear4bit.__init__

    def without_packing(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = False

    monkeypatch.setattr(bnb, "matmul", matmul)
    monkeypatch.setattr(functions, "matmul", matmul)
    monkeypatch.setattr(bnb.nn.Linear4bit, "__init__", without_packing)


def quantized(kind, weight, bias):
    """The layer of bitsandbytes for this weight, and the weight that it stands for, by its format's definition."""
    num_out, num_in = weight.shape
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(num_in, num_out, bias=bias is not None, has_fp16_weights=False, threshold=6.0)
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        meant = (weight / scale).round() * scale
    else:
        how = {"quant_type": "nf4", "compute_dtype": torch.bfloat16, "compress_statistics": "scales" in kind}
        layer = bnb.nn.Linear4bit(num_in, num_out, bias=bias is not None, **how)
        # QLoRA's table (arXiv 2305.14314, appendix E), per block of 64 entries in units of their largest.
        table = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803]
        table = torch.tensor([*table, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0])
        blocks = weight.reshape(-1, 64)
        scale = blocks.abs().amax(dim=1, keepdim=True)
        meant = (table[((blocks / scale)[..., None] - table).abs().argmin(dim=-1)] * scale).view_as(weight)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer.to("cpu").requires_grad_(False), meant


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_a_quantized_layer_is_the_dequantized_layers_arithmetic(kind, has_bias):
    """Values and gradients against float64, before a forward pass and after one, which moves 8 bit's scales."""
    torch.manual_seed(0)
    bias = torch.randn(96) if has_bias else None
    layer, W = quantized(kind, 0.05 * torch.randn(96, 128), bias)
    limit = 2e-2 if "scales" in kind else 5e-3  # scales of 8 bits
    for _ in range(2):
        assert relative_error(tensors.dequantized(layer), W) < limit
        layer(torch.randn(1, 3, 128, dtype=torch.bfloat16))
    A0, B0 = train.principal_factors(W, 8, 0.5)
    adapter = train.LoRALinear(layer, 8, 4.0, (A0, B0)).train()
    with torch.no_grad():
        adapter.lora_A += 0.05 * torch.randn_like(A0)
        adapter.lora_B += 0.05 * torch.randn_like(B0)
    x, G = torch.randn(2, 5, 128).bfloat16().requires_grad_(), torch.randn(2, 5, 96).bfloat16()
    y = adapter(x)
    y.backward(G)
    A, B, A0, B0, W, X, g = (
        t.detach().double() for t in (adapter.lora_A, adapter.lora_B, A0, B0, W, x.flatten(0, 1), G.flatten(0, 1))
    )
    delta = 0.5 * (B @ A - B0 @ A0)
    expected = X @ (W + delta).T + (0 if bias is None else bias.double())
    for name, actual, right in (
        ("y", y.flatten(0, 1), expected),
        ("x", x.grad.flatten(0, 1), g @ (W + delta)),
        ("A", adapter.lora_A.grad, 0.5 * B.T @ g.T @ X),
        ("B", adapter.lora_B.grad, 0.5 * g.T @ X @ A.T),
    ):
        assert relative_error(actual, right) < 2e-2, name  # bf16, and 8 bit rounds the activations too


def base_folder(folder, has_biases):
    """A tiny Llama, or a Qwen2, whose attention has biases."""
    model = make_model(**SIZES, initializer_range=0.05)
    if has_biases:
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**(model.config.to_dict() | {"model_type": "qwen2"})))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return folder / "base"


def plain(model, folder):
    """The model of the folder in fp32, its layers' weights as the quantized `model` has them."""
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, layer in find_target_modules(model, TARGET_MODULES, 4).items():
        twin.get_submodule(name).weight.data = tensors.dequantized(layer).float()
    return twin


def batch_of(count):
    rows = [
        {"input_ids": [2, 3, *range(4 + i, 20 + i)], "labels": [-100] * 6 + list(range(8 + i, 20 + i))}
        for i in range(count)
    ]
    return train.PackingCollator()(rows)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("has_biases", [False, True], ids=["llama", "qwen2"])
def test_a_quantized_model_trains(bits, has_biases, tmp_path):
    """Its teacher is the dequantized model, its start the teacher; every factor has a gradient, and the loss falls."""
    folder = str(base_folder(tmp_path, has_biases))
    model = pretrained.load_model(train.Arguments(model=folder, load_in=bits), folder, torch.bfloat16)
    layers = find_target_modules(model, TARGET_MODULES, 4)
    assert {type(layer).__name__ for layer in layers.values()} == {f"Linear{bits}{'Lt' if bits == '8bit' else ''}"}
    twin = plain(model, folder)
    train.add_adapters(model, "ba-lora", 4, 4, TARGET_MODULES)
    for name, layer in train.adapter_layers(model).items():
        A, B = train.principal_factors(twin.get_submodule(name).weight, 4, 1.0)
        assert relative_error(layer.initial_B @ layer.initial_A, B @ A) < 1e-2, name
    assert enable_packing(model)
    save_activations(model)
    wrapper, batch = train.BALoRAModel(model).train(), batch_of(3)
    enable_packing(twin)
    expected = train.BALoRAModel(twin).hidden_states(batch)
    args = train.Arguments(**train.FORMULATIONS["iclr2026"], spectral_k=4)
    settings = train.Regularizers({"consistency": 0.5, "diversity": 0.1, "spectral": 0.1}, args)
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3), []
    for _ in range(5):
        train.stack_factors(model)
        loss, terms = wrapper(batch, settings, len(batch["targets"]), 1)
        loss.backward()
        train.stack_factors(model, hold=False)
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == 1:
            assert abs(float(terms["consistency"])) < 1e-4
    assert relative_error(wrapper.of_teacher(wrapper.hidden_states, batch), expected) < 6e-2
    assert losses[-1] < losses[0] - 0.01


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_pefts_pissa_on_a_quantized_base_subtracts_the_dequantized_weights_factors(bits, tmp_path):
    """--init-adapter of an adapter that PEFT has begun by PiSSA: A₀ and B₀ are those of the weights that are there."""
    folder = str(base_folder(tmp_path, has_biases=False))
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"])
    made = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    made.save_pretrained(tmp_path / "adapter")
    words = {"model": folder, "data": folder, "init_adapter": str(tmp_path / "adapter"), "method": "pissa"}
    args = train.Arguments(**words, dtype="bfloat16", output_dir=str(tmp_path / "out"))
    args = train.resolve_arguments(args)
    base = train.inspect_base(args)
    args.load_in = bits  # which asks for a GPU before
    accelerator = type("One", (), {"device": torch.device("cpu"), "is_main_process": False})
    model = train.load_student(args, base, accelerator, None)
    layers = train.adapter_layers(model)
    assert len(layers) == 4
    for name, layer in layers.items():
        W = tensors.dequantized(layer.base).float()
        U, S, Vh = torch.linalg.svd(W)
        assert relative_error(layer.initial_B @ layer.initial_A, (U[:, :4] * S[:4]) @ Vh[:4]) < 1e-3, name
