"""The checks of bench/gpu.py: every path that a GPU takes, against something that shares no code with it."""

import dataclasses
import itertools
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contenders
import gpu_cases as cases
import torch
import torch.nn.functional as F
from gpu_cases import Options, check, note, relative_error
from torch import Tensor, nn

import train
from common import chunked
from common.layers import TARGET_MODULES
from common.packing import enable_packing, model_inputs

FORMULATIONS = {
    name: train.Regularizers({"consistency": 0.5, "diversity": 0.4, "spectral": 0.3}, train.Arguments(**published))
    for name, published in train.FORMULATIONS.items()
}

# ------------------------------------------------------------------------------------------------------------------
# The objective
# ------------------------------------------------------------------------------------------------------------------


def expected_objective(z: Tensor, teacher: Tensor, targets: Tensor, settings: Any) -> tuple[float, Tensor]:
    """Value and gradient by tests/oracle.py, of logits in float64."""
    oracle = cases.oracle()
    logits, teacher_logits = z.cpu().numpy(), teacher.cpu().numpy()
    weights, args = settings.weights, settings.settings
    terms = [
        (1.0, oracle.task(logits, targets.cpu().numpy())),
        (weights["consistency"], oracle.consistency(logits, teacher_logits, args.temperature)),
        (weights["diversity"], oracle.topk_entropy(logits, args.entropy_top_k or None)),
        (weights["spectral"], oracle.spectral(logits, args.spectral_k, args.spectral_norm)),
    ]
    gradient = sum(weight * term[1] for weight, term in terms)
    return sum(weight * term[0] for weight, term in terms), torch.from_numpy(gradient).to(z.device)


def objective(options: Options) -> Iterator[dict]:
    """The objective without logits, fp32 and bf16, both formulations, one chunk and several, V up to 256,000."""
    shapes = [(24, 512, 16)] if options.small else [(192, 32_000, 1024), (96, 128_256, 512), (48, 256_000, 512)]
    for shape, dtype in itertools.product(shapes, (torch.float32, torch.bfloat16)):
        num_tokens, vocabulary, _ = shape
        hidden, teacher, head, targets = contenders.objective_inputs(shape, dtype, options.device, scale=3.0)
        factor = chunked.head_factor(head)
        z, z_teacher = (states.double() @ head.double().T for states in (hidden, teacher))
        # bf16: a logit of size z is off by up to z·2⁻⁹.
        limits = (1e-5, 1e-4) if dtype == torch.float32 else (2e-3, 2e-2)
        for name, settings in FORMULATIONS.items():
            value, gradient = expected_objective(z, z_teacher, targets, settings)
            gradient = gradient @ head.double()
            for memory in (vocabulary * 64 / 2**20, 4096.0):
                states = hidden.clone().requires_grad_()
                rest = (teacher, head, factor, targets, settings, num_tokens, 1, memory)
                loss, _ = train.objective_from_hidden(states, *rest)
                loss.backward()
                what = f"{name}, V = {vocabulary:,}, {str(dtype)[6:]}, {'one chunk' if memory == 4096 else 'chunks'}"
                yield check(f"{what}: value", abs(loss.item() - value) / abs(value), limits[0])
                yield check(f"{what}: gradient", relative_error(states.grad, gradient), limits[1])


def spectral(options: Options) -> Iterator[dict]:
    """L_SVDR of many tokens, where a subspace iteration takes the decomposition's place, against float64."""
    shape = (560, 530) if options.small else (2048, 4096)
    for decay in (0.3, 1.0):
        generator = torch.Generator(options.device).manual_seed(0)
        Y = torch.randn(*shape, generator=generator, device=options.device)
        Y *= torch.arange(1, shape[1] + 1, device=options.device) ** -decay
        value, gradient = chunked.spectral_value_and_gradient(Y, 10, "frobenius")
        exact = Y.double()
        eigenvalues, U = torch.linalg.eigh(exact @ exact.T)
        sigma, U = eigenvalues.clamp(min=0).sqrt().flip(0), U.flip(1)[:, :10]
        norm = exact.norm()
        ratio = sigma[:10].sum() / norm
        polar = (U / sigma[:10]) @ (U.T @ exact)
        expected = -(polar - ratio * exact / norm) / norm
        what = f"{shape[0]} × {shape[1]}, singular values ~ i^-{decay}"
        yield check(f"{what}: value", abs(value.item() + ratio.item()) / ratio.item(), 1e-5)
        yield check(f"{what}: gradient", relative_error(gradient, expected), 1e-3)


# ------------------------------------------------------------------------------------------------------------------
# Adapters
# ------------------------------------------------------------------------------------------------------------------


def adapter(options: Options) -> Iterator[dict]:
    """An adapted layer, forward and backward, fp32 and bf16, against the formula in float64 with gradients by hand."""
    tokens, width, out, rank = (7, 24, 40, 3) if options.small else (1024, 2048, 5632, 64)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        base = nn.Linear(width, out, bias=False, device=options.device, dtype=dtype).requires_grad_(False)
        layer = train.LoRALinear(base, rank, 2 * rank, train.principal_factors(base.weight, rank, 2.0))
        layer.lora_B.data += 0.05
        x = torch.randn(tokens, width, device=options.device).to(dtype).requires_grad_()
        upstream = torch.randn(tokens, out, device=options.device).to(dtype)
        y = layer(x)
        y.backward(upstream)
        s, W, X, G = layer.scaling, base.weight.double(), x.detach().double(), upstream.double()
        factors = (layer.lora_A, layer.lora_B, layer.initial_A, layer.initial_B)
        A, B, A0, B0 = (factor.detach().to(dtype).double() for factor in factors)
        total = W + s * (B @ A - B0 @ A0)
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        expected = {"y": (y, X @ total.T), "∂x": (x.grad, G @ total)}
        expected |= {"∂A": (layer.lora_A.grad, s * (G @ B).T @ X), "∂B": (layer.lora_B.grad, s * G.T @ (X @ A.T))}
        for name, (mine, theirs) in expected.items():
            yield check(f"{name}, {str(dtype)[6:]}", relative_error(mine, theirs), limit)


def factors(options: Options) -> Iterator[dict]:
    """PiSSA's A₀ and B₀: the residual is the best one of Eckart and Young's, by float64; also of a steep spectrum."""
    n, m, rank = (40, 64, 8) if options.small else (1024, 2816, 128)
    generator = torch.Generator(options.device).manual_seed(0)
    made = {"generator": generator, "device": options.device, "dtype": torch.float64}
    for name, decay in (("flat", 0.0), ("steep", -5.0)):
        left, right = (torch.linalg.qr(torch.randn(size, n, **made)).Q for size in (n, m))
        sigma = torch.logspace(0, decay, n, device=options.device, dtype=torch.float64)
        weight = ((left * sigma) @ right.T).float()
        for transposed in (False, True):
            W = weight.T if transposed else weight
            A, B = train.principal_factors(W, rank, 2.0)
            residual = (W.double() - 2 * B.double() @ A.double()).norm()
            excess = ((residual - sigma[rank:].norm()) / weight.double().norm()).item()
            yield check(f"{name} spectrum, {W.shape[0]} × {W.shape[1]}, excess", max(excess, 0.0), 1e-6)


class WrittenOut(nn.Module):
    """PEFT's LoRA layer: y = W x + s·B(A x), the low-rank product in fp32 but under autocast."""

    def __init__(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float):
        super().__init__()
        self.weight, self.scaling = weight, scaling
        self.A, self.B = nn.Parameter(A.clone()), nn.Parameter(B.clone())

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)
        return F.linear(x, self.weight) + (low_rank * self.scaling).to(x.dtype)


def write_out(model: nn.Module, rank: int, factors: dict[str, tuple[Tensor, Tensor]] | None = None) -> nn.Module:
    """PEFT's PiSSA in plain torch, in place: the residual frozen, A and B trained; `factors` None: exact ones."""
    layers = train.find_target_modules(model, TARGET_MODULES, rank)
    for name, layer in layers.items():
        if factors is None:
            U, S, Vh = torch.linalg.svd(layer.weight.double(), full_matrices=False)
            root = S[:rank].sqrt()
            A, B = (root[:, None] * Vh[:rank]).to(layer.weight), (U[:, :rank] * root).to(layer.weight)
        else:
            A, B = factors[name]
        residual = (layer.weight.double() - B.double() @ A.double()).to(layer.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, WrittenOut(residual, A, B, 1.0))
    return model


def step(options: Options) -> Iterator[dict]:
    """One PiSSA step of ours, packed, against PEFT's, or one written out, padded: the loss, and what SGD would change.

    The change ∂B·A + B·∂A of the product does not depend on the signs that the singular vectors come with.
    """
    rank, config = (4 if options.small else 32), cases.tiny_config(options)
    rows = cases.examples(4, config.vocab_size, 40 if options.small else 512)
    ours = cases.make_model(config, options, torch.float32)
    wrapper = contenders.adapted(ours, rank)
    batch = cases.packed(rows, options)
    loss, _ = wrapper(batch, None, len(batch["targets"]), 1)
    loss.backward()
    changes = {
        name: layer.lora_B.grad @ layer.lora_A + layer.lora_B @ layer.lora_A.grad
        for name, layer in train.adapter_layers(ours).items()
    }
    peers = {"written out": lambda model: write_out(model.double(), rank)}
    if cases.installed("peft"):
        peers["PEFT"] = lambda model: contenders.peft_model(model, rank)
    else:
        yield note("PEFT", "not installed")
    for peer, make in peers.items():
        model = make(cases.make_model(config, options, torch.float32))
        expected = model(**cases.padded(rows, options)).loss
        expected.backward()
        yield check(f"{peer}: loss", abs(loss.item() / expected.item() - 1), 1e-5)
        modules = (model.base_model.model if peer == "PEFT" else model).get_submodule
        worst = 0.0
        for name, change in changes.items():
            layer = modules(name)
            A, B = (
                (layer.A, layer.B)
                if peer != "PEFT"
                else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            )
            worst = max(worst, relative_error(change, B.grad @ A + B @ A.grad))
        yield check(f"{peer}: change of all {len(changes)} matrices", worst, 1e-3)


# ------------------------------------------------------------------------------------------------------------------
# Whole models
# ------------------------------------------------------------------------------------------------------------------


def packing(options: Options) -> Iterator[dict]:
    """Sequences laid end to end, against one at a time by eager attention in float64."""
    config = cases.tiny_config(options)
    rows = cases.examples(3, config.vocab_size, 48 if options.small else 512)
    reference = cases.make_model(config, options, torch.float32).double()
    reference.set_attn_implementation("eager")
    alone = [torch.tensor([row["input_ids"]], device=options.device) for row in rows]
    with torch.no_grad():
        expected = [reference.get_decoder()(ids, use_cache=False).last_hidden_state[0] for ids in alone]
    wanted = [("sdpa", torch.float32), ("sdpa", torch.bfloat16)]
    if options.is_cuda and cases.installed("flash_attn"):
        wanted.append(("flash_attention_2", torch.bfloat16))
    else:
        yield note("flash_attention_2", "not installed" if options.is_cuda else "needs a GPU")
    for attention, dtype in wanted:
        model = cases.make_model(config, options, torch.float32).to(dtype)
        model.set_attn_implementation(attention)
        what = f"{attention}, {str(dtype)[6:]}"
        yield check(f"{what}: packs, 0 is yes", float(not enable_packing(model)), 0.0)
        shares = attention == "sdpa"
        batch = cases.on_device(train.PackingCollator(share_beginning=shares)(rows), options)
        with torch.no_grad():
            states = model.get_decoder()(**model_inputs(batch), use_cache=False).last_hidden_state[0]
        shared = batch["shared_length"]
        together = torch.cat([part[shared if number else 0 :] for number, part in enumerate(expected)])
        yield check(f"{what}: states", relative_error(states, together), 1e-4 if dtype == torch.float32 else 4e-2)


def twenty_steps(options: Options, dtype: torch.dtype, steps: int, **choices: bool) -> list[float]:
    """The losses of twenty AdamW steps on four batches in turn, from the same weights."""
    config = cases.tiny_config(options, **({} if options.small else {"initializer_range": 0.02}))
    model = cases.make_model(config, options, torch.float32).to(dtype)
    if choices.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = contenders.our_step(contenders.adapted(model, 4 if options.small else 32), contenders.REGULARIZERS, 1e-3)
    longest = 40 if options.small else 512
    batches = [cases.packed(cases.examples(4, config.vocab_size, longest, seed), options) for seed in range(4)]
    return [step(batches[number % len(batches)]) for number in range(steps)]


def bf16(options: Options) -> Iterator[dict]:
    """Twenty steps in bf16 against the same in fp32, and with gradient checkpointing against without."""
    reference = twenty_steps(options, torch.float32, 20)
    yield check("fp32: the loss falls, last / first", reference[-1] / reference[0], 0.98)
    again = twenty_steps(options, torch.float32, 20, checkpointing=True)
    worst = max(abs(a / b - 1) for a, b in zip(again, reference, strict=True))
    yield check("gradient checkpointing, fp32: largest difference of a loss", worst, 1e-3)
    for checkpointing in (False, True):
        losses = twenty_steps(options, torch.bfloat16, 20, checkpointing=checkpointing)
        worst = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
        yield check(f"bf16{', checkpointing' * checkpointing}: largest difference of a loss", worst, 0.03)


def quantized(options: Options) -> Iterator[dict]:
    """bitsandbytes' 4 and 8 bit: the plain model of the dequantized weights is the teacher, and the loss falls."""
    if not (options.is_cuda and cases.installed("bitsandbytes") and cases.installed("accelerate")):
        yield note("bitsandbytes", "needs a GPU" if not options.is_cuda else "bitsandbytes or accelerate not installed")
        return
    from common import pretrained, tensors

    config, rank = cases.tiny_config(options), 16
    rows = cases.examples(4, config.vocab_size, 256)
    batch = cases.packed(rows, options)
    with tempfile.TemporaryDirectory() as folder:
        cases.make_model(config, options, torch.bfloat16).save_pretrained(folder)
        for bits in ("4bit", "8bit"):
            args = train.Arguments(model=folder, load_in=bits, method="ba-lora")
            model = pretrained.load_model(args, folder, torch.bfloat16)
            plain = cases.make_model(config, options, torch.bfloat16)
            for name, layer in train.find_target_modules(model, TARGET_MODULES, rank).items():
                plain.get_submodule(name).weight.data = tensors.dequantized(layer).to(torch.bfloat16)
            wrapper = contenders.adapted(model, rank)
            with torch.no_grad():
                teacher = wrapper.of_teacher(wrapper.hidden_states, batch)
                enable_packing(plain)
                expected = train.BALoRAModel(plain).hidden_states(batch)
            yield check(f"{bits}: the teacher", relative_error(teacher, expected), 6e-2)
            step = contenders.our_step(wrapper, contenders.REGULARIZERS, 1e-3)
            losses = [step(batch) for _ in range(5)]
            yield check(f"{bits}: the loss falls, last / first", losses[-1] / losses[0], 0.9999)


# ------------------------------------------------------------------------------------------------------------------
# Checkpoint, kill and resume
# ------------------------------------------------------------------------------------------------------------------


def train_for_resume(output_dir: str, device: str, small: bool, steps: int, slowly: float) -> None:
    """A run of train.py's loop with a checkpoint at each second step, from the newest one; sleeps at every step."""
    from common import checkpoints
    from common.ranks import start_ranks
    from common.training import Training, random_order

    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.set_num_threads(1)  # the threads of a process do not survive a fork
    torch.use_deterministic_algorithms(True, warn_only=True)
    options = Options(device, small)
    config = cases.tiny_config(options)
    args = train.Arguments(model="m", data="d", output_dir=output_dir, rank=4, batch_size=2, gradient_accumulation=2)
    args = dataclasses.replace(args, learning_rate=1e-3, save_steps=2, max_steps=steps, resume=True, logging_steps=1)
    args = train.resolve_arguments(args)
    wrapper = contenders.adapted(cases.make_model(config, options, torch.float32), args.rank)
    checkpoint = checkpoints.checkpoint_to_resume(args)
    rows = cases.examples(16, config.vocab_size, 40)
    collator = train.PackingCollator()

    def collate(examples: list[dict]) -> dict:
        time.sleep(slowly / 2)
        return collator(examples)

    Path(output_dir).mkdir(parents=True, exist_ok=True)
    training = Training(args, start_ranks(args), 2, len(rows), random_order(len(rows), args.seed))
    train.fit(training, wrapper, rows, None, collate, checkpoint=checkpoint)
    tensors = checkpoints.trained_tensors(wrapper.model)
    torch.save(tensors, Path(output_dir) / "end.pt")


def resume(options: Options) -> Iterator[dict]:
    """A run that is killed after its first checkpoint, and resumed, ends in the adapter of one that is not."""
    if not cases.installed("accelerate"):
        yield note("killed and resumed", "accelerate not installed, which the loop needs")
        return
    steps = 6

    context = multiprocessing.get_context("spawn" if options.is_cuda else "fork")  # CUDA does not survive a fork

    def start(folder: Path, slowly: float) -> multiprocessing.Process:
        rest = (str(folder), options.device, options.small, steps, slowly)
        process = context.Process(target=train_for_resume, args=rest)
        process.start()
        return process

    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        first, uninterrupted = start(killed, 1.0), start(whole, 0.0)
        while first.is_alive() and not (killed / "checkpoints" / "checkpoint-2" / "manifest.json").is_file():
            time.sleep(0.05)
        first.kill()
        first.join()
        yield check("killed before its end, 0 is yes", float(first.exitcode != -signal.SIGKILL), 0.0)
        resumed = start(killed, 0.0)
        for process in (resumed, uninterrupted):
            process.join()
        codes = abs(resumed.exitcode) + abs(uninterrupted.exitcode)
        yield check("exit codes of the resumed and the whole run", float(codes), 0.0)
        mine, theirs = (torch.load(run / "end.pt", map_location="cpu") for run in (killed, whole))
        worst = max(relative_error(mine[name], theirs[name]) for name in theirs)
        # Attention's backward pass adds up in no fixed order on a GPU.
        yield check("largest difference of a trained factor", worst, 1e-4 if options.is_cuda else 0.0)
