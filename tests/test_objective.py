"""The objective without logits against its definition, differentiated by autograd in float64."""

import itertools
import math

import oracle
import pytest
import torch
import transformers
from conftest import encode_turn, make_model, relative_error
from test_training import make_trainer

import train
from common import chunked, token_kernel
from common.conversations import build_dataset, num_valid
from common.layers import TARGET_MODULES, save_activations
from common.packing import PER_SEQUENCE, attend_per_sequence, enable_packing
from common.pretrained import head_is_linear
from common.tables import load_records
from common.teacher_cache import TeacherCache

WEIGHTS = {"consistency": 0.5, "diversity": 0.4, "spectral": 0.3}


def regularizers(formulation="iclr2026", off=(), weights=None, **settings):
    """The regularizers of a formulation with these weights, without the terms that are `off`."""
    weights = {name: weight for name, weight in (WEIGHTS | (weights or {})).items() if name not in off}
    return train.Regularizers(weights, train.Arguments(**train.FORMULATIONS[formulation] | settings))


ICLR, ARXIV = regularizers(), regularizers("arxiv2024")
SETTINGS = {
    "iclr2026": ICLR,
    "arxiv2024": ARXIV,
    "adaptive": regularizers(consistency_schedule="adaptive"),
    "masked": regularizers(mask_target=True),
    "masked_over_all": regularizers("arxiv2024", mask_target=True, consistency_schedule="adaptive"),
    "no_teacher": regularizers(weights={"consistency": 0.0}),
    "zero_weights": regularizers(weights={"diversity": 0.0, "spectral": 0.0}),
    "consistency_alone": regularizers(off=("diversity", "spectral")),
    "diversity_alone": regularizers(off=("consistency", "spectral")),
    "spectral_alone": regularizers(off=("consistency", "diversity")),
    "no_diversity_over_all": regularizers("arxiv2024", off=("diversity",)),
    "task_alone": None,
}
SHAPES = [(40, 300, 16), (1, 300, 16), (7, 2000, 32), (90, 130, 20), (5, 10, 8), (0, 30, 8)]  # M, V, d


def make_inputs(shape, seed=0, dtype=torch.float32):
    num_tokens, vocabulary, width = shape
    generator = torch.Generator().manual_seed(seed)
    hidden, teacher = (torch.randn(num_tokens, width, generator=generator).to(dtype) for _ in range(2))
    head = (torch.randn(vocabulary, width, generator=generator) * 0.7).to(dtype)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return hidden, teacher, head, targets


def evaluate(function, hidden, *rest):
    hidden = hidden.clone().requires_grad_()
    loss, terms = function(hidden, *rest)
    loss.backward()
    return loss.detach(), {name: float(value) for name, value in terms.items()}, hidden.grad


def fused(inputs, settings, memory_mib=256.0, num_tokens=None):
    hidden, teacher, head, targets = inputs
    teacher = teacher if settings and settings.needs_teacher else None
    count = num_tokens or 2 * len(targets) + 1
    factor = None if settings is None else chunked.head_factor(head)
    return evaluate(train.objective_from_hidden, hidden, teacher, head, factor, targets, settings, count, 2, memory_mib)


def definition(inputs, settings, num_tokens=None):
    """`objective` on the materialised float64 logits of the same numbers."""
    hidden, teacher, head, targets = (x.double() if x.is_floating_point() else x for x in inputs)
    teacher = teacher @ head.T if settings and settings.needs_teacher else None
    count = num_tokens or 2 * len(targets) + 1
    return evaluate(lambda h, *rest: train.objective(h @ head.T, *rest), hidden, teacher, targets, settings, count, 2)


@pytest.mark.parametrize(
    ("memory_mib", "cached_bytes"),
    [(0.001, 2**21), (0.05, 2**21), (256.0, 2**21), (256.0, 5000)],
    ids=["token_by_token", "chunks", "one_chunk", "blocks"],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_values_and_gradient_equal_the_definition(name, shape, memory_mib, cached_bytes, monkeypatch):
    monkeypatch.setattr(chunked, "CACHED_BYTES", cached_bytes)
    for seed in range(3):
        inputs = make_inputs(shape, seed)
        loss, terms, gradient = fused(inputs, SETTINGS[name], memory_mib)
        expected_loss, expected_terms, expected_gradient = definition(inputs, SETTINGS[name])
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5, abs=1e-7)
        assert terms == pytest.approx(expected_terms, rel=1e-5, abs=1e-6)
        if shape[0]:
            assert relative_error(gradient, expected_gradient) < 1e-5


@pytest.mark.parametrize(("term", "tolerance"), [("task", 1e-5), ("consistency", 1e-5), ("diversity", 1e-5)])
def test_each_terms_own_gradient(term, tolerance):
    """One term at a time, so that a large one cannot hide a small one."""
    settings = None
    if term != "task":
        settings = regularizers(weights={name: 1e4 * (name == term) for name in WEIGHTS})
    for shape in SHAPES[:-1]:
        inputs = make_inputs(shape, seed=5)
        assert relative_error(fused(inputs, settings)[2], definition(inputs, settings)[2]) < tolerance


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
@pytest.mark.parametrize("shape", [(40, 300, 16), (7, 2000, 32), (90, 130, 20), (700, 1500, 600)], ids=str)
def test_the_spectral_term_in_hidden_space(norm, shape):
    """Value within 1e-5 and gradient within 1e-3 of the float64 SVD of the logits; the largest shape iterates."""
    hidden, _, head, _ = make_inputs(shape)
    hidden = hidden * torch.linspace(1, 0.05, shape[2])  # a spectrum that decays, as real hidden states' does
    factor = chunked.head_factor(head)
    value, gradient = chunked.spectral_value_and_gradient(hidden @ factor, 10, norm)
    z = (hidden.double() @ head.double().T).requires_grad_()
    expected = train.spectral_loss(z, 10, norm)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    if not (norm == "nuclear" and min(shape) <= 10):  # the constant −1 has no gradient
        assert relative_error(gradient @ factor.T, z.grad @ head.double()) < 1e-3
    else:
        assert (gradient @ factor.T).norm() < 1e-6


def test_repeated_singular_values_and_rank_deficiency():
    """σ_k = σ_{k+1}: the value is defined; what comes is a subgradient (norm-one directions of the right number)."""
    Y = torch.eye(12, 20)
    value, gradient = chunked.spectral_value_and_gradient(Y, 5, "frobenius")
    assert value.item() == pytest.approx(-5 / math.sqrt(12))
    polar = -(gradient * math.sqrt(12)) + Y * 5 / 12
    assert torch.linalg.svdvals(polar.double()) == pytest.approx([1.0] * 5 + [0.0] * 7, abs=1e-5)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((30, 3), (3, 25)))
    for norm in ("frobenius", "nuclear"):
        expected, expected_gradient = oracle.spectral((left @ right).numpy(), 10, norm)  # k above the rank
        value, gradient = chunked.spectral_value_and_gradient((left @ right).float(), 10, norm)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        assert (gradient - torch.tensor(expected_gradient)).norm() < 1e-5
    value, gradient = chunked.spectral_value_and_gradient(torch.zeros(4, 5), 3, "frobenius")
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("norm", ["frobenius", "nuclear"])
@pytest.mark.parametrize("rows", [4, 20, 600])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_come_out_as_nan(norm, rows, value):
    """The guard of the training step sees them; an eigendecomposition would raise an error, or not."""
    Y = torch.randn(rows, 700, generator=torch.Generator().manual_seed(0))
    Y[1, 2] = value
    for loss, gradient in [chunked.spectral_value_and_gradient(Y, 2, norm)]:
        assert loss.isnan()
        assert gradient.isnan().all()
    assert train.spectral_loss(Y, 2, norm).isnan()


def test_a_head_with_dependent_columns():
    hidden, _, head, _ = make_inputs((20, 60, 12))
    head[:, 3] = head[:, 5]
    factor = chunked.head_factor(head)
    sigma = torch.linalg.svdvals(hidden @ factor)
    assert relative_error(sigma, torch.linalg.svdvals(hidden @ head.T)[:12]) < 1e-5


@pytest.mark.parametrize("name", ["iclr2026", "masked"])
def test_very_large_logits(name):
    """Of the target too, far above the others, which --mask-target compares alone."""
    hidden, teacher, head, _ = make_inputs((12, 400, 8))
    inputs = (hidden * 2e3, teacher * 2e3, head, (hidden @ head.T).argmax(dim=1))
    loss, _, gradient = fused(inputs, SETTINGS[name])
    expected_loss, _, expected_gradient = definition(inputs, SETTINGS[name])
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert relative_error(gradient, expected_gradient) < 1e-3  # fp32 logits of 10⁴ know their differences to 10⁻³


@pytest.mark.parametrize("name", ["iclr2026", "arxiv2024"])
def test_bfloat16_inputs(name):
    """bf16 hidden states and head: against float64 of the same bf16 numbers, to what rounding logits to bf16 explains.

    A logit of size z is off by up to z·2⁻⁹; here |z| ≲ 10 and the errors are independent over tokens and words.
    """
    inputs = make_inputs((200, 500, 16), dtype=torch.bfloat16)
    loss, _, gradient = fused(inputs, SETTINGS[name])
    expected_loss, _, expected_gradient = definition(inputs, SETTINGS[name])
    assert gradient.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-3)
    assert relative_error(gradient, expected_gradient) < 2e-2


@pytest.mark.parametrize(("width", "k"), [(49_152, 20), (1000, 3), (1003, 7), (64, 64), (50, 60), (130, 1)])
def test_top_k_in_two_steps(width, k):
    z = torch.randn(9, width, generator=torch.Generator().manual_seed(0))
    values, indices = token_kernel.top_k(z, k)
    assert torch.equal(values, z.topk(min(k, width)).values)
    assert torch.equal(z.gather(1, indices), values)


def test_chunks_follow_the_memory_budget():
    hidden, head = torch.zeros(1000, 4), torch.zeros(2**15, 4)
    for memory, count in itertools.product((1.0, 10.0, 100.0, 1e4), (1, 2, 3)):
        rows = [part.stop - part.start for part in chunked.chunks(hidden, head, count, memory)]
        assert sum(rows) == 1000
        assert max(rows) * count * 2**15 * 4 <= memory * 2**20
        assert max(rows) - min(rows) <= 1


@pytest.mark.parametrize(("name", "num_buffers"), [("task_alone", 1), ("no_teacher", 1), ("iclr2026", 2)])
def test_the_logits_of_student_and_teacher_fit_the_budget_together(name, num_buffers, monkeypatch):
    monkeypatch.setattr(token_kernel, "is_usable", lambda *_: False)
    logits_of, sizes = chunked.logits_of, []

    def spied(*args):
        z = logits_of(*args)
        sizes.append(z.numel() * z.element_size())
        return z

    monkeypatch.setattr(chunked, "logits_of", spied)
    fused(make_inputs((64, 2**13, 4)), SETTINGS[name], memory_mib=1.0)
    assert max(sizes) * num_buffers == 2**20  # of 64 rows with 32 KiB each


# ---------------------------------------------------------------------------------------------- the model around it


def test_a_plain_head_is_found_by_trying():
    assert head_is_linear(make_model())
    assert head_is_linear(make_model(tie_word_embeddings=False))
    with_bias = make_model(tie_word_embeddings=False)
    with_bias.lm_head.bias = torch.nn.Parameter(torch.ones(258))
    assert not head_is_linear(with_bias)
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    capped = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**shape, **heads, final_logit_softcapping=1.0, initializer_range=0.5)
    ).eval()
    assert not head_is_linear(capped)


def model_and_batch(architecture, tokenizer, packed=False, **extra):
    """A model of an architecture's configuration with adapters away from their start, and a batch of three lengths."""
    shape = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | extra
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{architecture}Config")(**shape, **heads, initializer_range=0.2)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    train.add_adapters(model, "ba-lora", 4, 4, TARGET_MODULES)
    assert not packed or enable_packing(model)
    for layer in train.adapter_layers(model).values():
        layer.lora_B.data += 0.05
    examples = [encode_turn(tokenizer, "ab" * n, "The sum is " + "c" * n, 400) for n in (1, 30, 7)]
    return model, (train.PackingCollator() if packed else train.PaddingCollator(0))(examples)


def loss_and_gradients(model, batch):
    loss, _ = train.BALoRAModel(model)(batch, ICLR, len(batch["targets"]), 1)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    for name, gradient in theirs[1].items():
        assert relative_error(ours[1][name], gradient) < 1e-4, name


@pytest.mark.parametrize(
    ("architecture", "sliding_window"),
    [("Llama", None), ("Mistral", None), ("Mistral", 4096), ("Qwen2", None), ("Gemma", None)],
)
def test_packed_batches_equal_padded_ones(architecture, sliding_window, tokenizer):
    """Loss and gradients of the adapters, with the stock attention under padding as the reference."""
    extra = {"sliding_window": sliding_window} if architecture == "Mistral" else {}
    model, padded = model_and_batch(architecture, tokenizer, **extra)
    expected = loss_and_gradients(model, padded)
    model, packed = model_and_batch(architecture, tokenizer, packed=True, **extra)
    assert packed["shared_length"] > 100  # the template's head stands there once
    assert packed["input_ids"].numel() == padded["attention_mask"].sum() - 2 * packed["shared_length"]
    assert_equal_gradients(loss_and_gradients(model, packed), expected)


def test_dropout_in_packed_attention_doubles_the_half_of_the_weights_that_it_keeps():
    """Queries of 0 attend n positions equally, and every value is 1: each output is 2/n times a count of kept weights,
    with mean 1 and variance 1/n. Each head is a draw."""
    query, value = torch.zeros(1, 4000, 11, 1), torch.ones(1, 4000, 11, 1)
    torch.manual_seed(0)
    layout = {"sequence_lengths": [5, 8], "shared_length": 2}
    output, _ = attend_per_sequence(None, query, query, value, None, dropout=0.5, **layout)
    for weights, n in zip(output[0, :, :, 0], [*range(1, 6), *range(3, 9)], strict=True):
        assert torch.allclose(weights * n / 2, (weights * n / 2).round(), atol=1e-5)
        assert weights.mean().item() == pytest.approx(1, abs=5 / math.sqrt(4000 * n))
        assert weights.var().item() == pytest.approx(1 / n, rel=0.15)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        (["123a", "123b", "12345"], 3),
        (["1234", "1234"], 3),  # the last prompt token predicts a response token: it stays each example's own
        (["12", "1234"], 1),
        (["a1", "b1"], 0),
        (["1234"], 0),
        (["", "1234"], 0),
    ],
)
def test_a_beginning_is_shared_short_of_the_first_valid_position(prompts, shared):
    """Tokens are characters; rebuilt from the packed row, every example is whole and every target in its place."""
    examples = [
        {"input_ids": [*map(ord, prompt + "xyz")], "labels": [-100] * len(prompt) + [*map(ord, "xyz")]}
        for prompt in prompts
    ]
    batch = train.PackingCollator()(examples)
    assert batch["shared_length"] == shared
    row, positions = batch["input_ids"][0].tolist(), batch["position_ids"][0].tolist()
    targets = dict(zip(batch["valid_positions"].tolist(), batch["targets"].tolist(), strict=True))
    head, start = row[:shared], 0
    for index, (example, length) in enumerate(zip(examples, batch["sequence_lengths"], strict=True)):
        own = length - (shared if index else 0)
        before = head if index else []
        assert before + row[start : start + own] == example["input_ids"]
        assert positions[start : start + own] == list(range(len(before), length))
        predicted = [targets.get(i) for i in range(start, start + own)]
        expected = [label if label != -100 else None for label in example["labels"][len(before) + 1 :]]
        assert predicted == [*expected, None]
        start += own
    assert start == len(row)


@pytest.mark.parametrize(("architecture", "packable"), [("GPT2LMHeadModel", True), ("BloomForCausalLM", False)])
@torch.no_grad()
def test_a_model_that_cannot_be_packed_says_so(architecture, packable):
    """By transformers' own logits of one sequence at a time. GPT-2 has absolute positions and its own attention. Bloom
    takes two sequences for one, and attends across them."""
    kind = getattr(transformers, architecture)
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = kind(kind.config_class(**shape, initializer_range=0.3, bos_token_id=1, eos_token_id=1)).eval()
    before = model.config._attn_implementation
    one, two = torch.tensor([[3, 4, 5, 6, 9]]), torch.tensor([[3, 4, 21, 22]])
    alone = torch.cat([model(one).logits[0], model(two).logits[0, 2:]])
    assert enable_packing(model) == packable
    assert model.config._attn_implementation == (PER_SEQUENCE if packable else before)
    batch = {"input_ids": torch.cat([one, two[:, 2:]], dim=1), "position_ids": torch.tensor([[0, 1, 2, 3, 4, 2, 3]])}
    packed = model(**batch, sequence_lengths=[5, 4], shared_length=2, use_cache=False).logits[0]
    assert (relative_error(packed, alone) < 1e-5) == packable


@torch.no_grad()
def test_the_adapters_own_backward_equals_autograd():
    """LoRALinear's hand-written function against the same formula in plain autograd, in float64."""
    torch.manual_seed(0)
    with torch.enable_grad():
        base = torch.nn.Linear(12, 9).double()
        layer = train.LoRALinear(base, 3, 6, train.principal_factors(base.weight, 3, 2.0)).double()
        layer.base.requires_grad_(False)
        layer.lora_B.data += 0.1
        x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(2, 5, 9, dtype=torch.float64)
        (layer(x) * weight).sum().backward()
        actual = [x.grad, layer.lora_A.grad, layer.lora_B.grad]
        factors = [factor.detach().clone().requires_grad_() for factor in (x, layer.lora_A, layer.lora_B)]
        delta = factors[2] @ factors[1] - layer.initial_B @ layer.initial_A
        y = torch.nn.functional.linear(factors[0], layer.base.weight + layer.scaling * delta, layer.base.bias)
        (y * weight).sum().backward()
        for mine, factor in zip(actual, factors, strict=True):
            assert relative_error(mine, factor.grad) < 1e-12


@pytest.mark.parametrize("architecture", ["Llama", "Gemma", "Qwen2"])
def test_keeping_fewer_activations_changes_no_gradient(architecture, tokenizer):
    """Gated MLPs and norms with and without `save_activations`: loss and every adapter's gradient."""
    results, kept = [], []
    for lean in (False, True):
        model, batch = model_and_batch(architecture, tokenizer, num_hidden_layers=4)
        # Four MLPs, nine norms; Gemma's are GELU's.
        assert not lean or save_activations(model) == (0 if architecture == "Gemma" else 13)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(loss_and_gradients(model, batch))
        kept.append(sum(sizes.values()))
    assert_equal_gradients(*reversed(results))
    assert architecture == "Gemma" or kept[1] < 0.9 * kept[0]


def test_fewer_activations_are_kept_under_a_bfloat16_base(tokenizer):
    """Where the adapters are fp32: loss and gradients are those of the modules' own forward."""
    examples = [encode_turn(tokenizer, "ab" * n, "The sum is " + "c" * n, 400) for n in (1, 9)]
    results = []
    for lean in (False, True):
        model = make_model(initializer_range=0.1).to(torch.bfloat16)
        train.add_adapters(model, "ba-lora", 4, 4, TARGET_MODULES)
        assert not lean or save_activations(model) == 7  # two MLPs, five norms
        loss, gradients = loss_and_gradients(model, train.PaddingCollator(0)(examples))
        results.append((loss, torch.cat([gradient.flatten() for gradient in gradients.values()])))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-2)
    assert relative_error(results[1][1], results[0][1]) < 3e-2


def test_a_failed_trial_of_packing_leaves_the_model_as_it_was(monkeypatch):
    model = make_model()
    before = model.config._attn_implementation

    def refuse(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    assert not enable_packing(model)
    assert model.config._attn_implementation == before


# ---------------------------------------------------------------------------------------------- the teacher cache


def teacher_cache(folder, model, dataset):
    return TeacherCache(folder / "cache", model, dataset, [num_valid(row) for row in dataset["labels"]])


def cached_run(folder, tokenizer, max_steps):
    trainer = make_trainer(
        make_model(), tokenizer, folder / "data.jsonl", folder / "out", max_steps=max_steps, overwrite=True
    )
    trainer.model.teacher_cache = teacher_cache(folder, trainer.model.model, trainer.train_dataset)
    return trainer


def count_teacher_passes(trainer) -> list:
    calls, original = [], trainer.model.of_teacher

    def counted(states, inputs):
        calls.append(len(inputs["example_ids"]))
        return original(states, inputs)

    trainer.model.of_teacher = counted
    return calls


def adapter(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_the_teacher_cache_is_exact_and_skips_the_pass(tokenizer, data_file, tmp_path):
    """Two epochs of 16 examples: the first fills it, the second and any later run read it."""
    first = cached_run(tmp_path, tokenizer, max_steps=4)
    calls = count_teacher_passes(first)
    first.train()
    assert sum(calls) == 16
    again = cached_run(tmp_path, tokenizer, max_steps=4)
    calls = count_teacher_passes(again)
    again.train()
    assert calls == []
    without = make_trainer(make_model(), tokenizer, data_file, tmp_path / "plain", max_steps=4)
    without.train()
    expected = adapter(without)
    for run in (first, again):
        for name, tensor in adapter(run).items():
            assert relative_error(tensor, expected[name]) < 1e-5, name


def test_an_interrupted_cache_goes_on(tokenizer, data_file, tmp_path):
    first = cached_run(tmp_path, tokenizer, max_steps=1)  # 8 of 16 examples
    first.train()
    del first
    second = cached_run(tmp_path, tokenizer, max_steps=2)
    assert int(second.model.teacher_cache.done.sum()) == 8
    calls = count_teacher_passes(second)
    second.train()
    assert sum(calls) == 8


def test_a_stale_cache_is_never_met(tokenizer, data_file, tmp_path):
    def files(model, count):
        records = load_records(str(data_file)).select(range(count))
        dataset, _ = build_dataset(records, tokenizer, ["instruction", "output"], 512)
        teacher_cache(tmp_path, model, dataset)
        return len(list((tmp_path / "cache").glob("*.states")))

    assert files(make_model(seed=0), 16) == 1
    assert files(make_model(seed=0), 16) == 1
    assert files(make_model(seed=1), 16) == 2  # other weights
    assert files(make_model(seed=0), 15) == 3  # other data
    model = make_model(seed=0)
    model.config._name_or_path, model.config.use_cache = "elsewhere", False
    model.set_attn_implementation("eager")
    assert files(model, 16) == 3  # the same states, but for rounding
    other = make_model(seed=0, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    input_ids = torch.arange(8)[None]
    with torch.no_grad():
        states = [one.model(input_ids).last_hidden_state for one in (make_model(seed=0), other)]
    assert relative_error(*states) > 1e-3  # the same weights
    assert files(other, 16) == 4


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("variant", ["definition", "padded"])
def test_twenty_steps_end_in_the_same_adapter(variant, tokenizer, data_file, tmp_path):
    """The objective without logits against the definition, and packed batches against padded ones. Each step has the
    weights of the part of the training that was done before it."""
    options = {"max_steps": 20, "learning_rate": 1e-3, "lambda_consistency": 0.1, "lambda_spectral": 0.05}
    options |= {"consistency_schedule": "cosine", "regularizer_schedule": "two_phase"}
    fused = make_trainer(make_model(), tokenizer, data_file, tmp_path / "fused", **options)
    history = fused.train().progress.history
    for name, schedule, weight in (("consistency", "cosine", 0.1), ("spectral", "two_phase", 0.05)):
        expected = [oracle.lambda_at(schedule, weight, step / 20, 0.1) for step in range(20)]
        assert [line[f"lambda_{name}"] for line in history] == pytest.approx(expected, rel=1e-6), name
    other = make_trainer(make_model(), tokenizer, data_file, tmp_path / "other", packing=variant != "padded", **options)
    if variant == "definition":
        other.model.forward = definition_forward(other.model)
    other.train()
    expected = adapter(other)
    for name, tensor in adapter(fused).items():
        assert relative_error(tensor, expected[name]) < 1e-4, name


def definition_forward(wrapper):
    def forward(inputs, regularizers, num_tokens, num_micro_batches):
        teacher = wrapper.of_teacher(wrapper.logits, inputs)
        return train.objective(
            wrapper.logits(inputs), teacher, inputs["targets"], regularizers, num_tokens, num_micro_batches
        )

    return forward
