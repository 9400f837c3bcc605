"""finetune_bert_l_sst2.py on tiny random models of each architecture, with a word-level tokenizer made here."""

import copy
import dataclasses
import itertools
import json
import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import transformers
from conftest import ROOT, on_ranks, read_jsonl, relative_error, run_apart, write_jsonl
from safetensors.torch import load_file, save_file
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight
from test_user_errors import error_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

import finetune_bert_l_sst2 as nlu
import train
from common import classifiers
from common import metrics as scoring
from common.checkpoints import BEST_TENSORS, BestState, complete_checkpoints
from common.classifiers import apply_probe, default_targets, encode, final_linear, fit_probe, load_classifier, run_model
from common.cli import RunStopped, UserError, run_script
from common.labelled import Split, demo_data, set_aside
from common.metrics import calibration_error, score, softmax
from common.runs import config_text
from data import sentiment
from eval import results
from experiments import nlu_robustness as robustness
from experiments import plans, price, tiny_models

WORDS = ["a", "the", "film", "is", "good", "bad", "great", "poor", "not", "very", "dull", "bright", "it", "was", "and"]
WORDS += ["but", "or", "plot", "cast", "end"]
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(vocab_size=32, initializer_range=0.3, **SMALL),
    "roberta": lambda: transformers.RobertaConfig(
        vocab_size=32, initializer_range=0.3, type_vocab_size=1, pad_token_id=0, max_position_embeddings=130, **SMALL
    ),
    "deberta-v3": lambda: transformers.DebertaV2Config(
        vocab_size=32,
        initializer_range=0.3,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type="p2c|c2p",
        pooler_hidden_size=16,
        position_biased_input=False,
        **SMALL,
    ),
    "xlnet": lambda: transformers.XLNetConfig(  # classifies by the last position, and pads on the left
        vocab_size=32, initializer_range=0.3, d_model=16, n_layer=2, n_head=2, d_inner=32, pad_token_id=0
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=32, initializer_range=0.3, n_layer=2, n_head=2, n_embd=16, n_positions=130, eos_token_id=1
    ),
}


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    vocab = {word: index for index, word in enumerate(["[PAD]", "[SEP]", "[CLS]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "gpt2":  # as published: no padding token, nothing added
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", unk_token="[UNK]")
    single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    if kind == "xlnet":
        single, pair = "$A [SEP] [CLS]:2", "$A [SEP] $B:1 [SEP]:1 [CLS]:2"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[("[CLS]", 2), ("[SEP]", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", sep_token="[SEP]", cls_token="[CLS]", unk_token="[UNK]"
    )


def make_encoder(folder: Path, kind: str = "bert") -> Path:
    """A pre-trained model without a classifier, on disk."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(CONFIGS[kind]()).save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)
    return folder


RESAMPLES = scoring.BOOTSTRAP_SAMPLES


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch) -> None:
    """Intervals take most of a tiny run's time; test_scores_equal_scikit_learns has all of them."""
    monkeypatch.setattr(scoring, "BOOTSTRAP_SAMPLES", 50)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    tiny_models.make("tiny-t5", tmp_path_factory.getbasetemp() / "t5")
    made = {kind: make_encoder(tmp_path_factory.mktemp(kind), kind) for kind in CONFIGS}
    return made | {"t5": tmp_path_factory.getbasetemp() / "t5"}


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(3, 12)))


def reviews(path: Path, count: int = 60) -> Path:
    """Sentences whose label a linear probe can learn: the last word is `good` or `bad`."""
    rng = np.random.default_rng(1)
    rows = [{"sentence": f"{sentence(rng)} {('bad', 'good')[i % 2]}", "label": i % 2} for i in range(count)]
    return write_jsonl(path, rows)


def run(tmp_path: Path, *argv, output: str = "out") -> dict:
    """The script's results.json."""
    settings = ["--output-dir", tmp_path / output, "--epochs=1", "--batch-size=8", "--rank=4", "--learning-rate=0.01"]
    nlu.main([str(word) for word in (*settings, *argv)])
    return json.loads((tmp_path / output / "results.json").read_text())


# ---------------------------------------------------------------------------------------------- the objective


def arguments(**settings) -> nlu.Arguments:
    published = nlu.FORMULATIONS[settings.get("formulation", "iclr2026")]
    return nlu.Arguments(method="ba-lora", **{**published, "spectral_k": 1, **settings})


@pytest.mark.parametrize("formulation", ["iclr2026", "arxiv2024"])
@pytest.mark.parametrize("shape", [(16, 2), (6, 3), (2, 5), (1, 3)])
def test_the_objective_is_the_published_formula_with_the_gradient_of_finite_differences(formulation, shape):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=shape) * 3, rng.normal(size=shape)
    labels = torch.tensor(rng.integers(shape[1], size=shape[0]))
    args = arguments(formulation=formulation)

    def formula(z: np.ndarray) -> float:
        if formulation == "iclr2026":
            consistency = oracle.consistency(z, teacher, 2.0)[0]
        else:
            consistency = oracle.normalized_mse_consistency(z, teacher)[0]
        value = oracle.task(z, labels.numpy())[0] + args.lambda_consistency * consistency
        value += args.lambda_diversity * oracle.covariance(z)[0]
        return value + (args.lambda_spectral * oracle.spectral(z, 1, "nuclear")[0] if min(shape) > 1 else 0)

    z = torch.tensor(student, requires_grad=True)
    loss, _ = nlu.nlu_objective(z, torch.tensor(teacher), labels, args, 0.5)
    assert loss.item() == pytest.approx(formula(student), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, z)
    step = 1e-6
    for index in np.ndindex(*shape):
        change = np.zeros(shape)
        change[index] = step
        numeric = (formula(student + change) - formula(student - change)) / (2 * step)
        assert gradient[index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    ("k", "classes", "head", "told"),
    [
        (5, 2, "initial", "--spectral-k 1 or less acts"),
        (5, 3, "initial", "--spectral-k 2 or less acts"),
        (1, 2, "initial", None),
        (5, 10, "initial", None),
        (4, 5, "initial", None),
        (4, 5, "probe", "starts as the constant -1, since a probe's logits add up to 0; --spectral-k 3"),
        (2, 3, "probe", "k = 2 on 3 classes starts as the constant -1"),
        (3, 5, "probe", None),
    ],
)
def test_a_k_that_covers_the_rank_has_no_gradient_and_is_told(k, classes, head, told):
    """A probe's logits add up to 0, so their rank is one less than their classes."""
    rng = np.random.default_rng(0)
    labels = [i % classes for i in range(90)]
    features = (rng.normal(size=(90, 12)) + np.eye(12)[labels]).astype(np.float32)
    if head == "probe":
        fitted = fit_probe(features, labels, features, labels)
    else:
        fitted = torch.tensor(rng.normal(size=(classes, 12)), dtype=torch.float32), torch.zeros(classes)
    z = torch.tensor(apply_probe(fitted, features), requires_grad=True)
    assert (z.sum(dim=1).abs().max() < 1e-4) == (head == "probe")
    args = arguments(spectral_k=k, teacher_head=head, lambda_diversity=0.0, batch_size=90)
    note = nlu.note_on_regularizers(args, classes)
    assert (note is None) if told is None else (told in note)
    without = dataclasses.replace(args, lambda_spectral=0.0)
    losses = [nlu.nlu_objective(z, z.detach(), torch.tensor(labels), each, 0.0)[0] for each in (args, without)]
    gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    assert (relative_error(*gradients) > 1e-5) == (told is None)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])  # GPT-2's head has no bias
def test_a_probes_two_logits_stay_each_others_negative_and_leave_the_spectrum_no_choice(
    tmp_path, encoders, kind, capsys
):
    """Trained with all terms, large weights: in the merged model Z has rank 1 still. From a random head it has two."""
    settings = ("--model", encoders[kind], "--data", reviews(tmp_path / "data.jsonl"), "--spectral-k=1")
    settings += ("--lambda-consistency=1", "--lambda-diversity=1", "--lambda-spectral=1", "--epochs=2")
    for head in ("probe", "initial"):
        run(tmp_path, *settings, "--teacher-head", head, output=head)
        assert ("constant -1 with every k" in capsys.readouterr().out) == (head == "probe")
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / head / "merged").eval()
        words = torch.randint(4, 4 + len(WORDS), (6, 7), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            z = merged(words).logits
        lines = read_jsonl(tmp_path / head / "metrics.jsonl")
        logged = [line["spectral"] for line in lines if "spectral" in line]
        ratio = (z.sum(dim=1).norm() / z.norm()).item()
        if head == "probe":
            assert ratio < 1e-4
            assert logged == pytest.approx([-1.0] * len(logged), abs=1e-5)
        else:
            assert ratio > 1e-2
            assert max(logged) > -0.999


def test_schedules_scale_their_terms():
    z, teacher, labels = torch.randn(8, 3), torch.randn(8, 3), torch.arange(8) % 3
    args = arguments(consistency_schedule="cosine", regularizer_schedule="two_phase")
    for progress in (0.0, 0.22, 1.0):
        loss, terms = nlu.nlu_objective(z, teacher, labels, args, progress)
        expected = terms["task"] + oracle.lambda_at("cosine", 0.15, progress, 0.1) * terms["consistency"]
        expected += oracle.lambda_at("two_phase", 0.03, progress, 0.1) * (terms["diversity"] + terms["spectral"])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss, terms = nlu.nlu_objective(
        z, teacher, labels, arguments(consistency_schedule="adaptive", lambda_diversity=0.0, lambda_spectral=0.0), 0.0
    )
    adaptive = oracle.adaptive_lambda(0.15, teacher.double().numpy())
    assert loss.item() == pytest.approx((terms["task"] + adaptive * terms["consistency"]).item(), rel=1e-5)


def test_regression_is_a_mean_squared_error_to_the_label_and_to_the_teacher():
    z, teacher, labels = torch.randn(8, 1), torch.randn(8, 1), torch.rand(8) * 5
    loss, terms = nlu.nlu_objective(z, teacher, labels, arguments(), 0.0)
    expected = ((z[:, 0] - labels) ** 2).mean() + 0.15 * ((z - teacher) ** 2).mean()
    assert set(terms) == {"task", "consistency"}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


# ---------------------------------------------------------------------------------------------- adapters and heads


def test_deberta_v3_base_has_the_published_number_of_adapter_parameters():
    model = copy.deepcopy(price.skeleton("microsoft/deberta-v3-base", num_classes=2))
    assert round(model.num_parameters() / 1e6) == 184
    train.add_adapters(model, "lora", 8, 8.0, default_targets(model))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_327_104


TWINS = {"deberta-v3-base": "deberta-v3", "roberta-large": "roberta", "roberta-base": "roberta", "t5-base": "t5"}
TWINS |= {"bert-large": "bert", "gpt2-xl": "gpt2"}


def planned_runs() -> list:
    """Every model and method of the experiments on GLUE, with options of its own."""
    found, files = {}, ("seed", "data", "test-data", "limit")
    for experiment in ("glue", "glue-imbalance", "glue-noise"):
        for one in plans.expand(experiment).runs:
            options = {name: value for name, value in one.settings.items() if name not in files}
            if options["task"] == "mnli":
                model = one.labels.get("model", "deberta-v3-base")
                found[str(options)] = pytest.param(model, options, id=f"{model}-{options['method']}")
    assert len(found) == 4 * len(TWINS)
    others = [("xlnet", {"task": "mnli", "method": method}) for method in ("lora", "pissa", "ba-lora")]
    return [*found.values(), *others]


@pytest.mark.parametrize(("model", "options"), planned_runs())
def test_peft_restores_each_planned_runs_adapter_and_head_on_the_untouched_encoder(tmp_path, encoders, model, options):
    """On a small model of the same architecture."""
    import peft

    three = [{"premise": "it is", "hypothesis": f"a {word} film", "label": i % 3} for i, word in enumerate(WORDS * 2)]
    data, encoder = write_jsonl(tmp_path / "pairs.jsonl", three), encoders[TWINS.get(model, model)]
    words = [*plans.as_words(options), "--model", encoder, "--data", data, "--test-data", data, "--max-length=32"]
    summary = run(tmp_path, *words, "--epochs=1", "--batch-size=8", "--rank=4", "--learning-rate=0.01")
    assert (summary["steps"], summary["class_names"][0]) == (5, "entailment")
    if options["method"] == "full":
        return
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged").eval()
    torch.manual_seed(99)  # another random head
    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    base.config.pad_token_id = merged.config.pad_token_id
    batch = {"input_ids": torch.randint(4, 24, (5, 9)), "attention_mask": torch.ones(5, 9, dtype=torch.long)}
    batch["input_ids"][:, -1] = merged.config.eos_token_id if model == "t5-base" else 1  # by which T5 classifies
    with torch.no_grad():
        before = base.eval()(**batch).logits
        restored = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()(**batch).logits
        expected = merged(**batch).logits
    assert (restored - expected).abs().max() < 1e-5
    assert (before - expected).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "labels"), [("bert", "cab"), ("gpt2", "cab"), ("roberta", range(20))])
def test_autopeft_needs_the_adapters_folder_alone(tmp_path, encoders, kind, labels):
    """A trained head of other names and another order included: the classes' names are the adapter's."""
    import peft

    torch.manual_seed(1)
    config = CONFIGS[kind]()
    config.id2label, config.pad_token_id = dict(enumerate("bcx")), 0
    base = tmp_path / "base"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(base)
    make_tokenizer(kind).save_pretrained(base)
    rng = np.random.default_rng(1)
    data = [{"sentence": sentence(rng), "label": labels[i % len(labels)]} for i in range(60)]
    task = [] if labels == "cab" else ["--task=stsb", "--fields=sentence"]
    run(tmp_path, "--model", base, "--data", write_jsonl(tmp_path / "data.jsonl", data), "--max-length=16", *task)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged").eval()
    line = (tmp_path / "out" / "adapter" / "README.md").read_text().partition("```python\n")[2].partition("\n```")[0]
    assert ("ignore_mismatched_sizes" in line) == (kind == "roberta")  # there the base has a head of another size
    loaded = eval(line.replace('"this folder"', f"{str(tmp_path / 'out' / 'adapter')!r}"), {"peft": peft})
    batch = {"input_ids": torch.randint(4, 24, (5, 9)), "attention_mask": torch.ones(5, 9, dtype=torch.long)}
    with torch.no_grad():
        assert (loaded.eval()(**batch).logits - merged(**batch).logits).abs().max() < 1e-5
    assert list(loaded.config.id2label.values()) == (list("abc") if labels == "cab" else ["LABEL_0"])


def test_the_script_predicts_what_its_merged_checkpoint_predicts(tmp_path, encoders):
    """In padded batches too, where the base's tokenizer pads on the other side than GPT-2's classifier wants."""
    data = reviews(tmp_path / "reviews.jsonl")
    base = shutil.copytree(encoders["gpt2"], tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(base, padding_side="left").save_pretrained(base)
    assert transformers.AutoTokenizer.from_pretrained(base).padding_side == "left"
    run(tmp_path, "--model", base, "--data", data, "--test-data", data)
    rows = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    classify = transformers.pipeline("text-classification", str(tmp_path / "out" / "merged"), device="cpu")
    texts = [row["sentence"] for row in read_jsonl(data)]
    for row, answer in zip(rows, classify(texts, batch_size=8), strict=True):
        assert row["predicted"] == answer["label"]
        assert row["confidence"] == pytest.approx(answer["score"], abs=1e-5)


@pytest.mark.parametrize("head", ["initial", "probe"])
def test_the_teacher_is_the_encoder_without_adapters_under_the_head_it_started_from(
    tmp_path, encoders, head, monkeypatch
):
    seen = {}

    def keep(model, examples, collator, args, *rest, **more):
        seen["head"] = {name: tensor.clone() for name, tensor in final_linear(model).state_dict().items()}
        trainer = original(model, examples, collator, args, *rest, **more)
        trained = {name: tensor.clone() for name, tensor in final_linear(model).state_dict().items()}
        assert relative_error(trained["weight"], seen["head"]["weight"]) > 1e-3
        final_linear(model).load_state_dict(seen["head"])
        with train.adapters_disabled(model):
            seen["teacher"] = run_model(model, examples, collator).logits
        final_linear(model).load_state_dict(trained)
        seen["column"] = np.stack([example["teacher_logits"] for example in examples])
        return trainer

    original = nlu.fit
    monkeypatch.setattr(nlu, "fit", keep)
    data = reviews(tmp_path / "reviews.jsonl")
    run(tmp_path, "--model", encoders["bert"], "--data", data, "--teacher-head", head, "--epochs=3")
    assert np.abs(seen["column"] - seen["teacher"]).max() < 1e-5
    assert np.ptp(seen["column"], axis=0).max() > 1e-3


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_are_what_the_final_layer_turns_into_logits(encoders, kind):
    args = nlu.Arguments(model=str(encoders[kind]), method="full")
    tokenizer, config = nlu.load_tokenizer(args, args.model, 3)
    model = load_classifier(args.model, config, seed=1)
    rng = np.random.default_rng(3)
    examples = encode(tokenizer, config, [(sentence(rng), sentence(rng)) for _ in range(9)], 128)
    outputs = run_model(model, examples, nlu.Collator.of(tokenizer, config), batch_size=4)
    layer = final_linear(model)
    bias = torch.zeros(3) if layer.bias is None else layer.bias.detach()
    assert np.abs(apply_probe((layer.weight.detach(), bias), outputs.features) - outputs.logits).max() < 1e-5
    for example, logits, mean in zip(examples, outputs.logits, outputs.mean_states, strict=True):  # alone, unpadded
        inputs = {name: torch.tensor([row]) for name, row in example.items()}
        with torch.no_grad():
            assert np.abs(model(**inputs).logits[0].numpy() - logits).max() < 1e-4
            states = model.base_model(**inputs).last_hidden_state[0]
        assert np.abs(states.mean(dim=0).numpy() - mean).max() < 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_classes", [1, 2, 3])
def test_the_probe_on_raw_features_is_scikit_learns(num_classes, bias):
    """One of the features is constant. The penalty is the best on the validation examples, where another one is best
    than on the training examples. One class: numbers, by ridge regression."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(4)
    features = (rng.normal(size=(80, 12)) * np.geomspace(1, 60, 12) + 7).astype(np.float32)
    features[:, 3] = 7
    z = features @ rng.normal(size=(12, num_classes)) / 20 + rng.normal(size=(80, num_classes)) * 10
    labels = z[:, 0] if num_classes == 1 else z.argmax(axis=1)
    both = (features[:40], labels[:40], features[40:], labels[40:])
    fitted = fit_probe(*both, bias=bias, regression=num_classes == 1)
    ours = apply_probe(fitted, features)
    scaler = StandardScaler(with_mean=bias).fit(features[:40])
    scaled = scaler.transform(features)
    peers = [
        Ridge(alpha=1 / C, fit_intercept=bias)
        if num_classes == 1
        else LogisticRegression(C=C, fit_intercept=bias, max_iter=2000)
        for C in classifiers.PROBE_PENALTIES
    ]
    peers = [peer.fit(scaled[:40], labels[:40]) for peer in peers]
    parts = [slice(40), slice(40, 80)]
    best = [max(peers, key=lambda peer, part=part: peer.score(scaled[part], labels[part])) for part in parts]
    assert best[1] is not best[0]
    if num_classes == 1:
        assert ours[:, 0] == pytest.approx(best[1].predict(scaled), rel=1e-3, abs=1e-4)
    else:
        assert np.abs(softmax(ours) - best[1].predict_proba(scaled)).max() < 1e-3


def test_the_probes_head_is_where_every_method_starts(tmp_path, encoders):
    data = reviews(tmp_path / "reviews.jsonl")
    for method in ("lora", "full"):
        settings = ("--teacher-head=probe", "--learning-rate=1e-9", "--method", method)
        results = run(tmp_path, "--model", encoders["bert"], "--data", data, *settings, output=method)["results"]
        assert results["held out"][method]["accuracy"] == results["held out"]["probe"]["accuracy"]


def test_full_trains_every_parameter_and_writes_no_adapter(tmp_path, encoders):
    argv = ["--model", encoders["bert"], "--data", reviews(tmp_path / "r.jsonl"), "--method=full"]
    results = run(tmp_path, *argv, "--learning-rate=1e-4")  # at 0.01 the state before training is the best
    assert not (tmp_path / "out" / "adapter").exists()
    before = transformers.AutoModel.from_pretrained(encoders["bert"]).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged").bert.state_dict()
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert "embeddings.word_embeddings.weight" in moved
    assert "encoder.layer.1.output.dense.weight" in moved
    assert results["adapter_parameters"] == sum(tensor.numel() for tensor in before.values())


# ---------------------------------------------------------------------------------------------- tasks and data

HUB_COLUMNS = {
    "cola": ["sentence", "label", "idx"],
    "sst2": ["sentence", "label", "idx"],
    "mrpc": ["sentence1", "sentence2", "label", "idx"],
    "qqp": ["question1", "question2", "label", "idx"],
    "stsb": ["sentence1", "sentence2", "label", "idx"],
    "mnli": ["premise", "hypothesis", "label", "idx"],
    "qnli": ["question", "sentence", "label", "idx"],
    "rte": ["sentence1", "sentence2", "label", "idx"],
}


@pytest.mark.parametrize("task", HUB_COLUMNS)
def test_each_glue_task_runs_on_files_in_the_hubs_layout(tmp_path, encoders, task, capsys):
    rng = np.random.default_rng(2)
    classes = {"mnli": 3, "stsb": 1}.get(task, 2)

    def fixture(name: str, count: int) -> Path:
        rows = []
        for index in range(count):
            label = round(float(rng.uniform(0, 5)), 3) if classes == 1 else index % classes
            row = {column: sentence(rng) for column in HUB_COLUMNS[task]} | {"label": label, "idx": index}
            rows.append(row)
        return write_jsonl(tmp_path / f"{name}.jsonl", rows)

    summary = run(
        tmp_path, "--task", task, "--model", encoders["bert"], "--data", fixture("train", 40), "--test-data",
        fixture("validation", 12),
    )  # fmt: skip
    of_task = {"cola": {"matthews", "accuracy"}, "mrpc": {"accuracy", "f1"}, "qqp": {"accuracy", "f1"}}
    expected = of_task.get(task, {"pearson", "spearman", "rmse", "mae"} if classes == 1 else {"accuracy"})
    details = {"confusion_matrix", "class_accuracy", "calibration_error", "macro_f1", "auc"} if classes > 1 else set()
    scores = summary["results"]["validation"]["ba-lora"]
    assert set(scores) == expected | details
    # The report finds the same score, which the predictions give when counted.
    found = results.load_run(str(tmp_path / "out"), None)
    rows = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    labels, predicted = zip(*((row["label"], row["predicted"]) for row in rows), strict=True)
    counted = {
        "accuracy": lambda: np.mean([label == guess for label, guess in zip(labels, predicted, strict=True)]),
        "matthews": lambda: metrics.matthews_corrcoef(labels, predicted),
        "pearson": lambda: np.corrcoef(labels, predicted)[0, 1],
    }
    (benchmark, of_benchmark), column = found.summaries.popitem(), results.NLU[task]
    assert (benchmark, found.method, found.columns) == (task, "BA-LoRA", results.NLU)
    assert of_benchmark[column.score]["value"] == pytest.approx(counted[column.score]())

    note = "L_DR and L_SVDR are off" if classes == 1 else f"--spectral-k {classes - 1} or less acts"
    assert capsys.readouterr().out.count(note) == 1


def test_the_configuration_repeats_the_run(tmp_path, encoders):
    """config.yaml of a run without --test-data, whose list of files is empty."""
    data = reviews(tmp_path / "train.jsonl")
    first = run(tmp_path, "--model", encoders["bert"], "--data", data)
    again = tmp_path / "again"
    nlu.main(["--config", str(tmp_path / "out" / "config.yaml"), "--output-dir", str(again)])
    assert json.loads((again / "results.json").read_text())["results"] == first["results"]
    assert (again / "predictions.jsonl").read_bytes() == (tmp_path / "out" / "predictions.jsonl").read_bytes()


def test_a_run_that_is_done_is_left_and_one_that_is_not_is_replaced(tmp_path, encoders, monkeypatch, capsys):
    argv = ["--model", encoders["bert"], "--data", reviews(tmp_path / "train.jsonl"), "--skip-done"]
    run(tmp_path, *argv)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, *argv)
    assert ended.value.code == 0
    assert "done: " in capsys.readouterr().out
    with pytest.raises(UserError, match="seed = 42, not 7"):
        run(tmp_path, *argv, "--seed", 7)
    reviews(tmp_path / "train.jsonl", count=40)
    with pytest.raises(UserError, match="another content of --data"):
        run(tmp_path, *argv)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    (tmp_path / "out" / "results.json").unlink()  # killed before the end
    run(tmp_path, *argv)
    assert (tmp_path / "out" / "results.json").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("no run of this script")
    with pytest.raises(UserError, match="is not empty"):
        run(tmp_path, *argv, output="other")
    (tmp_path / "other" / "config.yaml").write_text(config_text(train.Arguments()))  # of train.py
    with pytest.raises(UserError, match="is not empty"):
        run(tmp_path, *argv, output="other")
    assert (tmp_path / "other" / "precious.txt").exists()


def test_a_test_file_named_like_the_training_data_stays_a_test_file(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    reviews(tmp_path / "train" / "part.jsonl", count=40)
    (tmp_path / "other").mkdir()
    reviews(tmp_path / "other" / "train.jsonl", count=20)
    monkeypatch.chdir(tmp_path)
    data = nlu.load_data(nlu.Arguments(data="train", test_data=["other/train.jsonl"], fields=["sentence"]))
    assert len(data.train) + len(data.validation) == 40
    assert {name: len(split) for name, split in data.tests.items()} == {"train": 20}


def test_an_empty_text_of_a_pair_is_one(tmp_path):
    """As QQP has it."""
    questions = [{"question1": "who?", "question2": ("", "why?")[i > 0], "label": i % 2} for i in range(24)]
    path = write_jsonl(tmp_path / "qqp.jsonl", questions)
    data = nlu.load_data(nlu.Arguments(task="qqp", data=str(path), fields=["question1", "question2"]))
    assert ("who?", "") in [*data.train.texts, *data.validation.texts, *data.tests["held out"].texts]


@pytest.mark.parametrize("what", ["model", "data", "working directory"])
def test_overwrite_deletes_nothing_that_the_run_reads(tmp_path, encoders, what, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(encoders["bert"], out / "merged")
    data = reviews((out if what == "data" else tmp_path) / "train.jsonl")
    argv = ["--model", out / "merged" if what == "model" else encoders["bert"], "--data", data, "--overwrite"]
    if what == "working directory":
        monkeypatch.chdir(out)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    words = [*argv, "--output-dir", "." if what == "working directory" else out]
    assert "which --overwrite would delete" in error_of(nlu, words, monkeypatch, capsys)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_linked_output_folder_is_emptied_and_stays_a_link(tmp_path, encoders):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old.txt").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    run(tmp_path, "--model", encoders["bert"], "--data", reviews(tmp_path / "data.jsonl"), "--overwrite")
    assert (tmp_path / "out").is_symlink()
    assert not (tmp_path / "disk" / "old.txt").exists()
    assert (tmp_path / "disk" / "merged" / "config.json").is_file()


@pytest.mark.parametrize("method", ["lora", "ba-lora"])
def test_peft_restores_a_pooler_that_the_checkpoint_lacked(tmp_path, method, capsys):
    """A BERT that was trained as a language model has none: it is made at random, trained, saved with the head."""
    import peft

    torch.manual_seed(0)
    folder = tmp_path / "mlm"
    transformers.BertForMaskedLM(CONFIGS["bert"]()).save_pretrained(folder)
    make_tokenizer("bert").save_pretrained(folder)
    run(tmp_path, "--model", folder, "--data", reviews(tmp_path / "reviews.jsonl"), "--method", method)
    assert "has no bert.pooler.dense: random, and trained" in capsys.readouterr().out
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "merged").eval()
    torch.manual_seed(99)  # another random pooler and head
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    batch = {"input_ids": torch.randint(4, 24, (5, 9)), "attention_mask": torch.ones(5, 9, dtype=torch.long)}
    with torch.no_grad():
        restored = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()(**batch).logits
        assert (restored - merged(**batch).logits).abs().max() < 1e-5


def test_training_that_diverges_ends_in_one_line(tmp_path, encoders, monkeypatch, capsys):
    argv = ["--model", encoders["bert"], "--data", reviews(tmp_path / "data.jsonl"), "--output-dir", tmp_path / "out"]
    argv += ["--method=full", "--learning-rate=1e20", "--batch-size=8"]
    monkeypatch.setattr("sys.argv", ["finetune_bert_l_sst2.py", *map(str, argv)])
    with pytest.raises(SystemExit) as exit_:
        run_script(nlu.main)
    assert exit_.value.code == 1
    assert "stopped: NaN or Inf in step" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_run_says_that_it_ends_below_the_probe_or_where_it_began(tmp_path, encoders, monkeypatch, capsys):
    data = reviews(tmp_path / "reviews.jsonl")
    argv = ["--model", encoders["bert"], "--data", data, "--test-data", data]
    run(tmp_path, *argv, "--learning-rate=1e-9")
    assert "note: ba-lora ends below the linear probe of the untouched encoder on reviews" in capsys.readouterr().out
    falling = iter(range(9, 0, -1))
    monkeypatch.setattr(nlu, "validation_score", lambda *_: next(falling))
    summary = run(tmp_path, *argv, "--teacher-head=probe", "--overwrite")
    printed = capsys.readouterr().out
    assert summary["validation"]["step"] == 0
    assert "no state of the training was better by validation than the model before it" in printed
    assert "below the linear probe" not in printed  # it is the probe


def test_validations_are_spread_over_fractional_epochs(tmp_path, encoders):
    """54 examples by 8: 7 steps per epoch, 11 in an epoch and a half; four validations per epoch and one at the end."""
    data = reviews(tmp_path / "reviews.jsonl")
    run(tmp_path, "--model", encoders["bert"], "--data", data, "--test-data", data, "--epochs=1.5",
        "--evals-per-epoch=4")  # fmt: skip
    lines = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    steps = [line["step"] for line in lines if "validation" in line]
    assert steps == [-(-7 * i // 4) for i in range(7)]  # the first before training; the last is step 11, the last


def test_a_rare_class_is_among_the_probes_examples(monkeypatch):
    monkeypatch.setattr(classifiers, "PROBE_EXAMPLES", 40)
    rng = np.random.default_rng(3)
    labels = [0, 1] * 200 + [2]
    features = rng.normal(size=(401, 4)) + np.eye(4)[np.array(labels)] * 5
    weight, bias = fit_probe(features, labels, features, labels)
    assert (weight.shape, bias.shape) == ((3, 4), (3,))
    assert (apply_probe((weight, bias), features.astype(np.float32)).argmax(axis=1) == labels).mean() > 0.95


def test_sst2_without_header(tmp_path, encoders, shared_data):
    args = nlu.Arguments(
        data=str(shared_data / "sst2_train.tsv"),
        test_data=[str(shared_data / "sst2_dev.tsv")],
        fields=["0"],
        label="1",
    )
    data = nlu.load_data(args)
    assert len(data.train) + len(data.validation) == 6920
    assert sum(data.train.labels) + sum(data.validation.labels) == 3610
    assert data.tests["sst2_dev"].texts[0] == ("one long string of cliches",)
    summary = run(
        tmp_path, "--model", encoders["bert"], "--data", args.data, "--test-data", *args.test_data, "--fields", "0",
        "--label", "1", "--limit", "100",
    )  # fmt: skip
    assert summary["results"]["sst2_dev"]["ba-lora"]["accuracy"]["of"] == 872


GOOD = [{"sentence": f"a {word} film", "label": i % 2} for i, word in enumerate(WORDS)]
PAIRS = [{"sentence1": f"a {word} film", "sentence2": "it is good", "label": i % 2} for i, word in enumerate(WORDS)]
BAD_DATA = {
    "missing column": (GOOD, GOOD, ["--label", "verdict"], "no field 'verdict'"),
    "missing text column": (GOOD, GOOD, ["--fields", "text"], "no field 'text'"),
    "unseen label": (GOOD, [*GOOD, {"sentence": "odd", "label": 7}], [], "example 21: label 7 is none of"),
    "one class": ([row | {"label": 1} for row in GOOD], GOOD, [], "1 class"),
    "empty text": ([*GOOD, {"sentence": "  ", "label": 0}], GOOD, [], "example 21: 'sentence' is empty"),
    "no text": (GOOD, [*GOOD, {"sentence": None, "label": 0}], [], "example 21: 'sentence' is empty"),
    "no label": ([*GOOD, {"sentence": "odd", "label": None}], GOOD, [], "example 21: it has no label: fill it in"),
    "no example": (GOOD[:1], GOOD, ["--task", "rte"], "no field 'sentence1'"),
    "three fields": (GOOD, GOOD, ["--fields", "a", "b", "c"], "one or two columns"),
    "regression on words": ([row | {"label": "high"} for row in GOOD], GOOD, ["--task=stsb"], "no number: 'high'"),
    "a class too many": ([*GOOD, {"sentence": "odd", "label": 2}], GOOD, ["--task=sst2"], "label 2 is none of"),
    "too long": (GOOD, GOOD, ["--max-length=4000"], "512 positions"),
    "rank": (GOOD, GOOD, ["--rank=17"], "rank 17 is larger"),
    "both texts empty": ([*PAIRS, PAIRS[0] | {"sentence1": "", "sentence2": ""}], PAIRS, ["--task=rte"], "example 21"),
    "no number": ([row | {"label": float("nan")} for row in GOOD], GOOD, ["--task=stsb"], "NaN is no value of JSON"),
    "numbers for classes": ([row | {"label": 0.25} for row in GOOD], GOOD, [], "--task stsb learns to predict them"),
    "warm-up": (GOOD, GOOD, ["--warmup-ratio=1"], "--warmup-ratio is 1.0"),
    "the demo's own tests": (GOOD, GOOD, ["--data=demo"], "leave out --task and --test-data"),
    "positions": (GOOD, GOOD, ["--max-length=130", "--model=roberta"], "129 positions"),
    "a target in the head": (GOOD, GOOD, ["--target-modules=dense", "--model=roberta"], "classifier.dense too"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_named_in_one_line_before_any_weight_is_read(tmp_path, encoders, case, monkeypatch, capsys):
    rows, eval_rows, extra, message = BAD_DATA[case]
    monkeypatch.setattr(nlu, "load_classifier", lambda *_: pytest.fail("a weight was read"))
    files = write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "dev.jsonl", eval_rows)
    argv = ["--model", encoders["bert"], "--data", files[0], "--test-data", files[1], "--output-dir", tmp_path / "out"]
    if "--task=stsb" in extra:
        extra = [*extra, "--fields", "sentence"]
    extra = [word.replace("=roberta", f"={encoders['roberta']}") for word in extra]
    assert message in error_of(nlu, [*argv, *extra], monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


UNFIT_BASES = {
    "quantized": "is quantized (gptq): name the model as it was before",
    "added tokens": "token 24 of the data is beyond the model's 24 embeddings",
    "added padding": "no embedding for its padding '<pad>', token 24: declare another pad_token",
}


@pytest.mark.parametrize("case", UNFIT_BASES)
@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "run"])
def test_a_base_that_the_classifier_cannot_take_is_refused_by_a_dry_run_too(tmp_path, case, dry, monkeypatch, capsys):
    monkeypatch.setattr(nlu, "load_classifier", lambda *_: pytest.fail("a weight was read"))
    config = CONFIGS["bert"]()
    config.vocab_size = 24  # as many as the tokenizer has
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer("bert")
    if case == "quantized":
        told = json.loads((tmp_path / "base" / "config.json").read_text())
        told["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (tmp_path / "base" / "config.json").write_text(json.dumps(told))
    elif case == "added tokens":
        tokenizer.add_tokens(["<e1>"])
    else:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"sentence": f"the <e1> film is {word}", "label": i % 2} for i, word in enumerate(WORDS)]
    argv = ["--model", tmp_path / "base", "--data", write_jsonl(tmp_path / "data.jsonl", rows), *dry]
    assert UNFIT_BASES[case] in error_of(nlu, [*argv, "--output-dir", tmp_path / "out"], monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


def test_a_pair_that_nothing_separates_is_said(tmp_path, encoders, capsys):
    rows = [{"a": f"the film is {word}", "b": "it was", "label": i % 2} for i, word in enumerate(WORDS * 2)]
    argv = ["--data", write_jsonl(tmp_path / "data.jsonl", rows), "--max-length=64", "--method=full", "--dry-run"]
    for kind in ("gpt2", "bert", "t5"):
        for fields in (["a", "b"], ["a"]):
            nlu.main(list(map(str, [*argv, "--model", encoders[kind], "--fields", *fields])))
            is_told = "puts nothing between the two texts of a pair" in capsys.readouterr().out
            assert is_told == (kind == "gpt2" and len(fields) == 2), (kind, fields)
    alike = [make_tokenizer("gpt2")(*pair)["input_ids"] for pair in (("the film is", "good"), ("the film", "is good"))]
    assert alike[0] == alike[1]


@pytest.mark.parametrize("kind", ["bert", "xlnet"])
def test_the_texts_of_a_pair_have_their_segments_in_training_and_from_the_exported_tokenizer(tmp_path, encoders, kind):
    """Tokens and segments are counted by hand; the tokenizer's class names no segments, as most of transformers 5's."""
    assert "token_type_ids" not in make_tokenizer(kind).model_input_names
    rng = np.random.default_rng(2)
    pairs = [(sentence(rng), sentence(rng)) for _ in range(40)]
    rows = [{"a": pair[0], "b": pair[1], "label": i % 2} for i, pair in enumerate(pairs)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    run(tmp_path, "--model", encoders[kind], "--data", data, "--test-data", data, "--fields", "a", "b")
    merged = str(tmp_path / "out" / "merged")
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    confidences, without = [], []
    for pair in pairs:
        first, second = ([*(4 + WORDS.index(word) for word in text.split()), 1] for text in pair)
        ids, segments = first + second, [0] * len(first) + [1] * len(second)
        ids, segments = ([*ids, 2], [*segments, 2]) if kind == "xlnet" else ([2, *ids], [0, *segments])
        with torch.no_grad():
            logits = model(torch.tensor([ids]), token_type_ids=torch.tensor([segments])).logits
            without.append(model(torch.tensor([ids])).logits.softmax(dim=-1).max().item())
        confidences.append(logits.softmax(dim=-1).max().item())
    assert np.abs(np.array(without) - confidences).max() > 1e-3
    found = [row["confidence"] for row in read_jsonl(tmp_path / "out" / "predictions.jsonl")]
    assert found == pytest.approx(confidences, abs=1e-5)
    for name in ("merged", "adapter"):
        classify = transformers.pipeline("text-classification", merged, tokenizer=str(tmp_path / "out" / name))
        answers = classify([{"text": pair[0], "text_pair": pair[1]} for pair in pairs])
        assert [answer["score"] for answer in answers] == pytest.approx(confidences, abs=1e-5)


def test_an_end_token_in_a_text_is_text_for_a_model_that_classifies_by_it(encoders):
    """T5's forward pass refuses examples with different numbers of end tokens."""
    args = nlu.Arguments(model=str(encoders["t5"]), method="full")
    tokenizer, config = nlu.load_tokenizer(args, args.model, 2)
    texts = [(f"the {tokenizer.eos_token} bad film",), ("it was bad",)]
    examples = encode(tokenizer, config, texts, 64)
    assert [example["input_ids"].count(tokenizer.eos_token_id) for example in examples] == [1, 1]
    model = load_classifier(args.model, config, seed=1)
    assert run_model(model, examples, nlu.Collator.of(tokenizer, config)).logits.shape == (2, 2)


def test_positions_that_are_counted_from_the_padding_stay_where_they_were_trained(tmp_path):
    """RoBERTa with its padding token 1 and a tokenizer that pads with 0: every position would be another one."""
    config = CONFIGS["roberta"]()
    config.pad_token_id = 1
    torch.manual_seed(0)
    model = transformers.RobertaModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    make_tokenizer("roberta").save_pretrained(tmp_path / "base")
    config.pad_token_id = 0
    moved = transformers.RobertaModel(config).eval()
    moved.load_state_dict(model.state_dict())
    words = torch.randint(4, 24, (2, 7))
    with torch.no_grad():
        assert (model(words).last_hidden_state - moved(words).last_hidden_state).abs().max() > 0.1
    with pytest.raises(UserError, match="pads with token 0, its configuration with 1"):
        nlu.load_tokenizer(nlu.Arguments(), str(tmp_path / "base"), 2)


def test_a_tokenizer_that_names_no_attention_mask_gets_one(tmp_path, encoders):
    """Texts of several lengths in one batch have the logits that transformers gives each of them alone."""
    folder = trained_classifier(tmp_path / "model", "bert", ("0", "1"))
    tokenizer = make_tokenizer("bert")
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    tokenizer.save_pretrained(folder)
    texts = [("the film is good",), ("it was bad but the cast was great and not dull",)]
    split = Split(texts, [0, 1])
    model, base = loaded(folder, nlu.Data(split, split, {}, ["0", "1"], ("accuracy",)))
    examples = encode(base.tokenizer, base.config, texts, 64)
    alone = [{"input_ids": tokenizer(text)["input_ids"]} for (text,) in texts]
    ours = run_model(model, examples, nlu.Collator.of(base.tokenizer, base.config)).logits
    assert np.abs(ours - plain_logits(folder, alone)[0]).max() < 1e-5


@pytest.mark.parametrize("change", ["module.", "model.", "one layer", "one embedding"])
def test_an_encoder_that_the_files_lack_is_not_made_at_random(tmp_path, encoders, change):
    """As DistributedDataParallel and Lightning name weights, or with one weight left out."""
    folder = shutil.copytree(encoders["bert"], tmp_path / "model")
    weights, left_out = load_file(folder / "model.safetensors"), "none"
    if change.endswith("."):
        weights, told = {change + name: tensor for name, tensor in weights.items()}, f"have {change}embeddings"
    else:
        ends = {"one layer": "1.intermediate.dense.bias", "one embedding": "position_embeddings.weight"}
        left_out = next(name for name in weights if name.endswith(ends[change]))
        told = f"lack 1 weights in this form, such as bert.{left_out}"
        del weights[left_out]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    split = Split([("a film",)], [0])
    with pytest.raises(UserError, match=re.escape(told)):
        loaded(folder, nlu.Data(split, split, {}, ["0", "1"], ("accuracy",)))


def test_the_best_state_is_kept_and_vain_training_stops(tmp_path, encoders, monkeypatch):
    scores = iter([0.6, 0.5, 0.9, 0.4, 0.3])  # the first before training
    states = []

    def metric(name, predicted, labels):
        if len(labels) == 6 and len(states) < 5:
            states.append(predicted.copy())
            return next(scores)
        return original(name, predicted, labels)

    original = nlu.metric
    monkeypatch.setattr(nlu, "metric", metric)
    data = reviews(tmp_path / "reviews.jsonl")
    summary = run(
        tmp_path, "--model", encoders["bert"], "--data", data, "--test-data", data, "--epochs=20", "--patience=2"
    )
    steps_per_epoch = -(-54 // 8)
    assert summary["validation"]["step"] == 2 * steps_per_epoch
    assert summary["steps"] == 4 * steps_per_epoch
    logged = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    assert [row["validation"] for row in logged if "validation" in row] == [0.6, 0.5, 0.9, 0.4, 0.3]


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ([0.6, 0.5, 0.5], 0),
        ([0.6, 0.6, 0.5], 1),  # of equals the trained one, the first
        ([0.6, 0.5, 0.7], 2),
        ([-math.inf, 0.5, -math.inf], 1),
        ([0.6, -math.inf, -math.inf], None),
        ([-math.inf] * 3, None),
    ],
)
def test_the_state_before_training_may_be_the_best_but_saves_no_training_without_a_score(tmp_path, scores, step):
    model, best = torch.nn.Linear(2, 1), BestState(patience=9)
    for number, value in enumerate(scores):
        model.weight.data.fill_(number)
        best.update(value, number, model)
    tensors, summary = best.for_checkpoint()[BEST_TENSORS]
    save_file(tensors, tmp_path / BEST_TENSORS, summary)
    best = BestState(patience=9)
    best.load(tmp_path)
    if step is None:
        with pytest.raises(RunStopped, match="NaN or Inf, or one number for all"):
            best.put_back(model)
    else:
        best.put_back(model)
        assert (best.best_step, model.weight[0, 0].item()) == (step, step)


# ---------------------------------------------------------------------------------------------- labels by name

ORDERS = list(itertools.permutations(("entailment", "neutral", "contradiction")))


def trained_classifier(folder: Path, kind: str, names: tuple[str, ...]) -> Path:
    """A checkpoint with a classifier of `names`, in this order, that tells sentences apart."""
    torch.manual_seed(1)
    config = CONFIGS[kind]()
    config.num_labels, config.pad_token_id = len(names), 1 if kind == "gpt2" else 0
    if len(names) > 1:
        config.id2label, config.label2id = dict(enumerate(names)), {name: row for row, name in enumerate(names)}
    model = AutoModelForSequenceClassification.from_config(config)
    final_linear(model).weight.data.normal_(0, 2)
    model.save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)
    return folder


def plain_logits(folder: Path, examples: list[dict]) -> tuple[np.ndarray, list[str]]:
    """What transformers alone makes of each example, and its classes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = [model(**{name: torch.tensor([row]) for name, row in one.items()}).logits[0] for one in examples]
    return torch.stack(rows).numpy(), list(model.config.id2label.values())


def loaded(folder: Path, data: nlu.Data, **settings) -> tuple[transformers.PreTrainedModel, nlu.Base]:
    args = nlu.Arguments(model=str(folder), **settings)
    base = nlu.inspect_base(args, data)
    return nlu.load_pretrained(args, base, torch.device("cpu")), base


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_trained_classifier_scores_as_plain_transformers_in_every_order_of_its_labels(tmp_path, kind, capsys):
    rng = np.random.default_rng(5)
    rows = [{"premise": sentence(rng), "hypothesis": sentence(rng), "label": ORDERS[0][i % 3]} for i in range(40)]
    file = write_jsonl(tmp_path / "data.jsonl", rows)
    data = nlu.load_data(nlu.Arguments(task="mnli", data=str(file), fields=["premise", "hypothesis"]))
    for number, order in enumerate(ORDERS):
        order = tuple(name.upper() for name in order) if number % 2 else order
        folder = trained_classifier(tmp_path / str(number), kind, order)
        model, base = loaded(folder, data)
        examples = encode(base.tokenizer, base.config, data.train.texts, 128)
        expected, names = plain_logits(folder, examples)
        assert np.ptp(expected) > 0.5
        ours = run_model(model, examples, nlu.Collator.of(base.tokenizer, base.config)).logits
        places = [[name.lower() for name in names].index(name) for name in data.class_names]
        assert np.abs(ours - expected[:, places]).max() < 1e-4
        assert ("taken by name" in capsys.readouterr().out) == (number > 0)
        assert list(model.config.id2label.values()) == list(ORDERS[0])
    # The last order through a whole run without a change, and out again.
    run(tmp_path, "--model", folder, "--task=mnli", "--data", file, "--test-data", file, "--learning-rate=1e-12")
    predicted = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    for source in (folder, tmp_path / "out" / "merged"):
        examples = encode(base.tokenizer, base.config, [(row["premise"], row["hypothesis"]) for row in rows], 128)
        expected, names = plain_logits(source, examples)
        assert [row["predicted"] for row in predicted] == [names[row.argmax()].lower() for row in expected]
        assert [row["confidence"] for row in predicted] == pytest.approx(
            softmax(expected).max(axis=1).tolist(), abs=1e-4
        )


@pytest.mark.parametrize(
    ("theirs", "ours", "rows"),
    [
        (("positive", "negative"), ("negative", "positive"), [1, 0]),
        (("neg", "neutral", "pos"), ("neg", "pos"), [0, 2]),  # a part of them
        (("LABEL_0", "LABEL_1"), ("0", "1"), [0, 1]),
        (("LABEL_0", "LABEL_1"), ("negative", "positive"), None),  # which is which, nobody says
        (("0", "1", "2"), ("0", "1"), None),
        (("good", "bad"), ("yes", "no"), None),
        (("neg", "pos"), ("neg", "neutral", "pos"), None),
    ],
)
def test_a_head_whose_names_do_not_match_is_started_anew_and_said_so(tmp_path, theirs, ours, rows, capsys):
    folder = trained_classifier(tmp_path / "model", "bert", theirs)
    before = load_file(folder / "model.safetensors")["classifier.weight"]
    split = Split([("a film",)], [0])
    model, _ = loaded(folder, nlu.Data(split, split, {}, list(ours), ("accuracy",)))
    after = final_linear(model).weight.detach()
    assert after.shape[0] == model.config.num_labels == model.num_labels == len(ours)
    assert model.config.problem_type == "single_label_classification"
    printed = capsys.readouterr().out
    if rows is None:
        assert "started anew" in printed
        assert not any(torch.equal(one, other) for one in after for other in before)
    else:
        assert torch.equal(after, before[rows])
        assert "started anew" not in printed


def test_labels_of_every_kind_are_read_or_named(tmp_path):
    def data(*labels, **settings):
        rows = [{"sentence": f"a {word} film", "label": labels[i % len(labels)]} for i, word in enumerate(WORDS * 2)]
        path = write_jsonl(tmp_path / "data.jsonl", rows)
        return nlu.load_data(nlu.Arguments(data=str(path), fields=["sentence"], **settings))

    def of_csv(*labels):
        path = tmp_path / "data.csv"
        lines = [f"{word} film,{labels[i % len(labels)]}" for i, word in enumerate(WORDS)]
        path.write_text("\n".join(["text,label", *lines]) + "\n")
        return nlu.load_data(nlu.Arguments(data=str(path), fields=["text"]))

    assert of_csv("10", "9").class_names == ["9", "10"]
    assert of_csv("1", "²").class_names == ["1", "²"]  # a digit that is no number
    for labels, message in ((("1", "2", ""), "it has no label: fill it in"), (("0.5", "1"), "--task stsb")):
        with pytest.raises(UserError, match=message):
            of_csv(*labels)
    assert data(1.0, 0.0).class_names == ["0", "1"]
    assert data("negative", "positive", task="sst2").train.labels == data(0, 1, task="sst2").train.labels
    assert data("1.0", "0.0", task="rte").class_names == ["entailment", "not_entailment"]
    spaced = data("neg", "pos ", " pos")
    assert (spaced.class_names, spaced.notes[0].split(" of ")[0]) == (["neg", "pos"], "note: 26 labels")
    assert "-1 is trained as a class" in data(-1, 0, 1).notes[0]
    counts = {name: data("a", "b", "b", "b").train.labels.count(row) for row, name in enumerate("ab")}
    assert data("a", "b", "b", "b").counts() == f"classes: a {counts['a']}, b {counts['b']}"
    for labels, settings, message in (
        (([0], [1]), {}, "example 1: 'label' is a list"),
        (([0], [1]), {"task": "sst2"}, "example 1: 'label' is a list"),
        (("Pos", "pos", "neg"), {}, "'Pos' and 'pos' differ only in case, spaces or the form"),
        (("positivit\u00e9", "neg", "positivite\u0301"), {}, r"'positivite\u0301' and 'positivit\xe9' differ only in"),
        (("pos", "neg", "pos\u200b"), {}, r"'pos' and 'pos\u200b' differ only in case"),
        (("very good", "neg", "very  good"), {}, "'very  good' and 'very good' differ only in case"),
        (("1", "01", "2"), {}, "differ only in case"),
        (("1", "+1", "-1"), {}, "differ only in case"),
        (("-1", "1", "\u22121"), {}, r"'-1' and '\u22121' differ only in case"),
        (("negative", "Positive"), {"task": "sst2"}, "'positive' is written otherwise"),
        ((0, -1), {"task": "sst2"}, "a label that is not known"),
        ((0, 1), {"metric": "pearson"}, "choose among accuracy, macro_f1, matthews, f1"),
        ((0, 1, 2), {"metric": "f1"}, "does not fit"),
        ((0.5, 0.7), {"task": "stsb", "class_weights": "balanced"}, "--class-weights needs classes"),
        ((2.5,), {"task": "stsb"}, "have the same number"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            data(*labels, **settings)


def test_what_may_be_read_otherwise_than_it_is_meant_is_said_or_refused(tmp_path):
    """Labels that stand for none known, the class of F1, a header, files of several splits, a file named validation."""

    def csv(name: str, labels, count: int = 40, header: str = "sentence,label\n") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        lines = [f"{Path(name).stem} film {i},{labels[i % len(labels)]}" for i in range(count)]
        (tmp_path / name).write_text(header + "\n".join(lines) + "\n")
        return str(tmp_path / name)

    def data(path: str, fields=("sentence",), label="label", **settings):
        return nlu.load_data(nlu.Arguments(data=path, fields=list(fields), label=label, **settings))

    for label in ("NA", "nan", "None", "<NA>", "null"):
        found = data(csv("na.csv", ["neg", "pos", label])).notes
        assert [note.split(";")[0] for note in found] == [f"note: {label} is trained as a class here"]
    whole = csv("f1.csv", ["hate", "normal"])
    assert data(whole, metric="f1").notes == ["note: f1 is that of the class 'normal'"]
    assert (data(whole).notes, data(whole).f1_class) == ([], None)

    with pytest.raises(UserError, match="the first line alone has the label 'label': if it is a header"):
        data(whole, ["0"], "1")
    for header in ("", "0,1\n"):  # pandas writes the latter
        found = data(csv("plain.csv", ["0", "1"], header=header), ["0"], "1")
        assert (sum(map(len, (found.train, found.validation, *found.tests.values()))), found.class_names) == (
            40,
            ["0", "1"],
        )

    for name, count in (("train", 30), ("dev", 20), ("test", 10)):
        csv(f"split/{name}.csv", ["hate", "normal"], count)
    folder = str(tmp_path / "split")
    found = data(folder, test_data=[folder], validation_data=None)
    assert (len(found.train) + len(found.validation), len(found.tests["split"]), found.notes) == (30, 10, [])
    found = data(whole, validation_data=folder, test_data=[folder])
    assert (len(found.validation), found.validation.texts[0], len(found.tests["split"])) == (20, ("dev film 0",), 10)

    shutil.copy(whole, tmp_path / "copy.csv")
    found = data(
        whole, validation_data=str(tmp_path / "copy.csv"), test_data=[csv("validation.csv", ["hate", "normal"])]
    )
    assert found.notes == ["note: 40 of the 40 examples of validation are trained on too"]
    pairs = [{"a": "x" if i else "", "b": "y" if i else None, "label": i % 2} for i in range(30)]
    with pytest.raises(UserError, match="example 1: 'a' is empty or no text: ''"):
        data(str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), ["a", "b"])


def test_what_is_not_used_of_the_data_is_said(tmp_path):
    """Other columns, texts beyond --max-length, and held-out texts that are trained on with another label."""

    def rows(name: str, count: int, shift: int = 0) -> str:
        cells = [{"sentence": f"film {i}" + " more" * 3 * (i % 4), "label": (i + shift) % 2} for i in range(count)]
        return str(write_jsonl(tmp_path / name, [row | {"split": "test", "empty": None} for row in cells]))

    tests = [rows("same.jsonl", 8), rows("other.jsonl", 12, shift=1)]
    data = nlu.load_data(
        nlu.Arguments(
            data=rows("a.jsonl", 40), validation_data=rows("b.jsonl", 44), fields=["sentence"], test_data=tests
        )
    )
    assert data.notes == [
        f"note: columns of {tmp_path / 'a.jsonl'} that are not used: split",
        f"note: columns of {tmp_path / 'b.jsonl'} that are not used: split",
        "note: 40 of the 44 examples of validation are trained on too",
        "note: 8 of the 8 examples of same are trained on too",
        "note: 12 of the 12 examples of other are trained on with another label or answer",
    ]
    sizes = [len(text.split()) + 2 for (text,) in data.tests["other"].texts]  # a token a word, one before, one behind
    assert sorted(set(sizes)) == [4, 7, 10, 13]
    for longest in (13, 10, 9):
        found = dataclasses.replace(data, notes=[])
        classifiers.encode_data(found, make_tokenizer("bert"), CONFIGS["bert"](), longest)
        count = sum(size > longest for size in sizes)
        line = f"note: {count} of the 12 examples of other are cut after {longest} tokens"
        assert found.notes[-1:] == [line] * (count > 0)


def test_every_class_has_its_share_of_what_is_held_out():
    labels = [0] * 700 + [1] * 250 + [2] * 49 + [3]
    rest, held = set_aside(Split([(str(i),) for i in range(1000)], labels), "data")
    assert [held.labels.count(label) for label in range(4)] == [70, 25, 5, 0]
    assert len(rest) + len(held) == 1000
    assert {*rest.texts, *held.texts} == {(str(i),) for i in range(1000)}


def test_a_state_is_selected_on_the_validation_file_by_the_metric_asked_for(tmp_path, encoders, capsys):
    data, other = reviews(tmp_path / "train.jsonl"), reviews(tmp_path / "other.jsonl", 23)
    argv = ["--model", encoders["bert"], "--data", data, "--validation-data", other, "--test-data", other]
    summary = run(tmp_path, *argv, "--metric=macro_f1", "--class-weights=balanced", "--evals-per-epoch=2")
    shared = "23 of the 23 examples of validation are trained on too"  # the same reviews, fewer of them
    assert shared in capsys.readouterr().out
    assert summary["examples"] == {"train": 60, "validation": 23}
    rows = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    labels, predicted = zip(*((row["label"], row["predicted"]) for row in rows), strict=True)
    assert summary["validation"]["macro_f1"] == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))


def test_balanced_class_weights_are_scikit_learns(tmp_path):
    rows = [{"sentence": f"{word} film", "label": int(i % 5 == 0)} for i, word in enumerate(WORDS * 4)]
    args = nlu.Arguments(
        data=str(write_jsonl(tmp_path / "data.jsonl", rows)), fields=["sentence"], class_weights="balanced"
    )
    labels = np.array(nlu.load_data(args).train.labels)
    expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=labels)
    assert args.loss_weights == pytest.approx(expected.tolist())
    z, y = torch.randn(len(labels), 2, dtype=torch.double), torch.tensor(labels)
    loss, _ = nlu.nlu_objective(z, None, y, args, 0.0)
    per_example = -torch.log_softmax(z, dim=1)[torch.arange(len(y)), y].numpy()
    assert loss.item() == pytest.approx(np.mean(expected[labels] * per_example))


# ---------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("kind", ["bert", "gpt2"])  # GPT-2's head has no bias
def test_numbers_come_out_in_the_units_they_came_in(tmp_path, encoders, kind, capsys):
    rng = np.random.default_rng(7)
    rows = [{"a": " ".join(["good"] * (i % 9 + 1)), "b": "it", "label": 1000 + 50 * (i % 9)} for i in range(90)]
    data = write_jsonl(tmp_path / "data.jsonl", [rows[i] for i in rng.permutation(90)])
    argv = ["--task=stsb", "--fields", "a", "b", "--data", data, "--test-data", data]
    summary = run(tmp_path, "--model", encoders[kind], *argv, "--epochs=6", "--method=full", "--learning-rate=3e-3")
    rows = read_jsonl(data)
    texts, labels = [(row["a"], row["b"]) for row in rows], np.array([row["label"] for row in rows])
    tokenizer, config = nlu.load_tokenizer(nlu.Arguments(model=str(encoders[kind])), str(encoders[kind]), 1)
    plain = plain_logits(tmp_path / "out" / "merged", encode(tokenizer, config, texts, 128))[0][:, 0]
    scores = summary["results"]["data"]["full"]
    assert scores["rmse"]["value"] == pytest.approx(np.sqrt(np.mean((plain - labels) ** 2)), rel=1e-3)
    assert scores["mae"]["value"] == pytest.approx(np.mean(np.abs(plain - labels)), rel=1e-3)
    assert scores["rmse"]["value"] < 400  # of 1,200: from a head near 0 without a scale, 54 steps come nowhere near
    # A trained head that goes on is read in its own units.
    unchanged = ("--learning-rate=1e-12", "--method=full")
    assert "in the units of the labels" not in capsys.readouterr().out
    run(tmp_path, "--model", tmp_path / "out" / "merged", *argv, *unchanged, output="again")
    again = [row["predicted"] for row in read_jsonl(tmp_path / "again" / "predictions.jsonl")]
    assert again == pytest.approx(plain.tolist(), rel=1e-4)
    assert "final layer are taken to be in the units of the labels" in capsys.readouterr().out


def test_a_constant_prediction_is_no_best_state(encoders):
    split = Split([("a good film",), ("a bad plot",), ("it was dull",)], [1.0, 2.0, 4.0])
    data = nlu.Data(split, split, {}, [], ("pearson",))
    model, base = loaded(encoders["bert"], data)
    split.examples = encode(base.tokenizer, base.config, split.texts, 128)
    collator = nlu.Collator.of(base.tokenizer, base.config)
    assert np.isfinite(nlu.validation_score(model, data, collator))
    final_linear(model).weight.data.zero_()
    assert nlu.validation_score(model, data, collator) == -np.inf


def test_a_model_without_padding_and_end_token_pads_with_another_special_token_or_is_refused(tmp_path):
    folder = make_encoder(tmp_path / "model", "gpt2")
    tokenizer = make_tokenizer("gpt2")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="no special token that can pad: declare its pad_token"):
        nlu.load_tokenizer(nlu.Arguments(), str(folder), 2)
    tokenizer.bos_token = "[CLS]"
    tokenizer.save_pretrained(folder)
    data = reviews(tmp_path / "data.jsonl")
    run(tmp_path, "--model", folder, "--data", data, "--test-data", data)
    examples = [{"input_ids": tokenizer(row["sentence"])["input_ids"]} for row in read_jsonl(data)]
    expected, names = plain_logits(tmp_path / "out" / "merged", examples)
    predicted = read_jsonl(tmp_path / "out" / "predictions.jsonl")
    assert [row["predicted"] for row in predicted] == [names[row.argmax()] for row in expected]


# ---------------------------------------------------------------------------------------------- scores


def test_calibration_error_of_known_cases():
    sure = np.array([[9.0, -9.0]] * 10)
    assert calibration_error(sure, np.array([0] * 10)) == pytest.approx(0.0, abs=1e-6)
    assert calibration_error(sure, np.array([0] * 7 + [1] * 3)) == pytest.approx(0.3, abs=1e-6)
    three_quarters = np.log([[0.75, 0.25]] * 8)
    assert calibration_error(three_quarters, np.array([0] * 6 + [1] * 2)) == pytest.approx(0.0, abs=1e-9)
    # Nine of ten are right at 0.95, and ten of ten at 0.55: (0.05 + 0.45) / 2, though one gap is negative.
    mixed = np.log([[0.95, 0.05]] * 10 + [[0.55, 0.45]] * 10)
    assert calibration_error(mixed, np.array([0] * 9 + [1] + [0] * 10)) == pytest.approx(0.25)
    # Ten of ten at 0.70, and six of ten at 0.90: two of the fifteen bins; three bins would add up the gaps to 0.
    mixed = np.log([[0.7, 0.3]] * 10 + [[0.9, 0.1]] * 10)
    assert calibration_error(mixed, np.array([0] * 16 + [1] * 4)) == pytest.approx(0.3)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_scores_equal_scikit_learns(num_classes, monkeypatch):
    monkeypatch.setattr(scoring, "BOOTSTRAP_SAMPLES", RESAMPLES)
    rng = np.random.default_rng(num_classes)
    labels = rng.integers(num_classes, size=200)
    logits = np.round(rng.normal(size=(200, num_classes)) + np.eye(num_classes)[labels], 1)  # with ties
    predicted, names = logits.argmax(axis=1), [str(name) for name in range(num_classes)]
    scores = score(logits, labels.tolist(), ("accuracy", "matthews", *["f1"] * (num_classes == 2)), names)
    probabilities = softmax(logits)
    given = probabilities[:, 1] if num_classes == 2 else probabilities
    expected = {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "matthews": metrics.matthews_corrcoef(labels, predicted),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "auc": metrics.roc_auc_score(labels, given, multi_class="ovr", average="macro"),
    } | ({"f1": metrics.f1_score(labels, predicted)} if num_classes == 2 else {})
    for name, value in expected.items():
        assert scores[name]["value"] == pytest.approx(value, abs=1e-12), name
        low, high = scores[name]["interval_95"]
        assert low < value < high < low + 0.25, name  # 200 examples: about ±7 points
    assert scores["confusion_matrix"] == metrics.confusion_matrix(labels, predicted).tolist()
    recalls = metrics.recall_score(labels, predicted, average=None)
    assert [share["value"] for share in scores["class_accuracy"].values()] == pytest.approx(recalls.tolist())
    # A class without an example.
    logits, labels = np.array([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 1.0, 3.0]]), [0, 1, 0]
    scores = score(logits, labels, ("accuracy",), ["a", "b", "c"])
    f1 = metrics.f1_score(labels, logits.argmax(axis=1), average="macro", labels=[0, 1, 2], zero_division=0.0)
    assert scores["macro_f1"]["value"] == pytest.approx(f1)
    assert scores["auc"]["value"] is None
    json.dumps(scores, allow_nan=False)


@pytest.mark.parametrize(("num_classes", "each", "has_interval"), [(12, 1, False), (4, 2, False), (3, 4, True)])
def test_auc_has_an_interval_only_where_nearly_all_resamples_hold_every_class(num_classes, each, has_interval):
    """The share that holds every class, counted over all resamples by inclusion and exclusion: 5e-5, 0.62, 0.98."""
    count, names = num_classes * each, list(map(str, range(num_classes)))
    lacking = ((-1) ** k * math.comb(num_classes, k) * (1 - k / num_classes) ** count for k in range(num_classes + 1))
    assert (sum(lacking) > 0.9) == has_interval
    labels = np.repeat(np.arange(num_classes), each)
    logits = np.random.default_rng(0).normal(size=(count, num_classes)) + np.eye(num_classes)[labels]
    auc = score(logits, labels.tolist(), ("accuracy",), names)["auc"]
    given = softmax(logits)
    assert auc["value"] == pytest.approx(metrics.roc_auc_score(labels, given, multi_class="ovr", average="macro"))
    assert (auc["interval_95"] is not None) == has_interval
    kinds = dict.fromkeys(("probe", "probe_mean_states", "lora"), score(logits, labels.tolist(), (), names))
    row = scoring.score_table({"held out": kinds}, "lora", (), names).splitlines()[-1]
    assert row.count(f"{100 * auc['value']:.1f} [no interval]") == (0 if has_interval else 3)


# ---------------------------------------------------------------------------------------------- interruptions and ranks


def same_scores(ours: dict, theirs: dict, rel: float) -> None:
    """Every number of `results` and of the choice among states."""

    def numbers(value):
        if isinstance(value, dict | list):
            return [
                number for part in (value.values() if isinstance(value, dict) else value) for number in numbers(part)
            ]
        return [value] if isinstance(value, int | float) else []

    for name in ("results", "validation"):
        assert numbers(ours[name]) == pytest.approx(numbers(theirs[name]), rel=rel)
        assert numbers(ours[name])


def movement(output: Path, encoder: Path) -> torch.Tensor:
    """How far the merged weights went from the encoder's, and the classifier's weights, in one vector."""
    base, merged = load_file(encoder / "model.safetensors"), load_file(output / "merged" / "model.safetensors")
    started = {name: base.get(name.partition(".")[2], torch.zeros(())) for name in merged}
    return torch.cat([(merged[name].double() - started[name].double()).flatten() for name in sorted(merged)])


def test_a_run_killed_and_resumed_is_an_uninterrupted_run(tmp_path, encoders):
    """With dropout; to the bit. 49 examples by 8, four epochs: 28 steps and 8 validations."""
    argv = ["--model", encoders["bert"], "--data", reviews(tmp_path / "reviews.jsonl"), "--epochs=4", "--batch-size=8"]
    argv += ["--rank=4", "--learning-rate=0.01", "--evals-per-epoch=2", "--patience=99", "--save-steps=3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def ended(output: Path, *options: str, **how) -> tuple[int, str]:
        return run_apart("finetune_bert_l_sst2", [*argv, "--output-dir", output, *options], tmp_path, **how)

    code, text = ended(whole)
    assert code == 0, text
    assert not (whole / "checkpoints").exists()
    code, text = ended(killed, ends=(signal.SIGKILL, "checkpoint-9", 8))
    assert (code, len(complete_checkpoints(killed))) == (-signal.SIGKILL, 2), text
    assert not (killed / "results.json").exists()
    code, text = ended(killed, "--resume")
    assert code == 0, text
    assert "going on from" in text
    same_scores(*(json.loads((output / "results.json").read_text()) for output in (killed, whole)), rel=0)
    assert torch.equal(movement(killed, encoders["bert"]), movement(whole, encoders["bert"]))
    lines = [read_jsonl(output / "metrics.jsonl") for output in (killed, whole)]
    ours, theirs = ([row["validation"] for row in rows if "validation" in row] for rows in lines)
    assert ours == theirs
    assert len(ours) == 9
    code, text = ended(killed, "--resume", "--seed=42")
    assert (code, "done: " in text) == (0, True), text


def test_two_ranks_end_where_one_process_ends(tmp_path, encoders, monkeypatch):
    """With dropout. 49 examples are 7 micro-batches: in the last step of an epoch one rank has none."""
    monkeypatch.setattr(scoring, "BOOTSTRAP_SAMPLES", RESAMPLES)  # as the ranks, which are processes of their own
    data = reviews(tmp_path / "reviews.jsonl")
    argv = ["--model", encoders["bert"], "--data", data, "--epochs=3", "--batch-size=7", "--spectral-k=1"]
    one = run(tmp_path, *argv, "--gradient-accumulation=2", output="one")
    argv += ["--rank=4", "--learning-rate=0.01", "--output-dir", tmp_path / "two"]
    printed = on_ranks(2, argv, tmp_path, "finetune_bert_l_sst2")
    assert printed.count("best state: ") == 1
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (two["processes"], two["steps"], one["steps"]) == (2, 12, 12)
    expected, actual = (movement(tmp_path / name, encoders["bert"]) for name in ("one", "two"))
    assert expected.norm() > 0.01
    assert (actual - expected).norm() < 1e-4 * expected.norm()
    same_scores(two, one, rel=1e-4)


# ---------------------------------------------------------------------------------------------- the demo's sentences


def test_ratings_become_labels_by_their_sign():
    rows = sentiment.rated_sentences(
        "1\t2.5\tGood &amp; new\r\n2\t-0.1\tBad\r\n3\t0.0\tNeither\r\n4\t-3\tgood  & NEW\r\n"
    )
    assert [(row["sentence"], row["label"]) for row in rows] == [("Good & new", "positive"), ("Bad", "negative")]


def test_no_sentence_of_the_demo_is_in_two_splits():
    data = demo_data()
    splits = [data.train, data.validation, data.tests["movies"]]
    texts = [{text.casefold() for (text,) in split.texts} for split in splits]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 10_605 - 37 - 2
    assert [len(data.tests[name]) for name in ("amazon", "editorials", "tweets")] == [1500] * 3
    assert 0.45 < np.mean(data.train.labels) < 0.55


# ---------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(
    ("file", "published"),
    [
        ("glue_deberta_v3_base", {"rank": 8, "alpha": 8.0, "spectral_k": 5, "teacher_head": "initial"}),
        ("glue_roberta_large", {"rank": 8, "alpha": 8.0}),
        ("glue_bert_large", {"rank": 8, "alpha": 16.0, "batch_size": 32}),
        ("glue_gpt2_xl", {"rank": 8, "alpha": 16.0, "batch_size": 16}),
        (
            "bert_large_sst2",
            {"rank": 16, "alpha": 32.0, "epochs": 1.0, "learning_rate": 5e-5, "weight_decay": 0.01}
            | {"target_modules": ["query", "value"], "max_length": 128, "batch_size": 32, "task": "sst2"},
        ),
    ],
)
def test_configurations_have_the_published_values(tmp_path, file, published):
    argv = ["--config", f"{nlu.ROOT}/configs/{file}.yaml", "--output-dir", str(tmp_path / "out")]
    args = nlu.resolve_arguments(argv if "task" in published else [*argv, "--task", "mrpc"])
    assert {name: getattr(args, name) for name in published} == published
    assert (args.lambda_consistency, args.lambda_diversity, args.lambda_spectral) == (0.15, 0.03, 0.03)
    assert 2e-5 <= args.learning_rate <= 6e-4
    assert args.fields == (["sentence"] if "task" in published else ["sentence1", "sentence2"])


def test_options_stand_in_groups_and_those_of_language_models_alone_are_refused(capsys):
    for option in ("--packing", "--entropy-top-k", "--spectral-norm", "--init-adapter", "--init-cache"):
        with pytest.raises(UserError, match=f"unknown option {option}"):
            nlu.resolve_arguments([option, "1"])
    with pytest.raises(SystemExit):
        nlu.resolve_arguments(["--help"])
    shown = capsys.readouterr().out
    groups = re.findall(r"^\W+ (\w+)(?: options)? \W+$", shown, re.MULTILINE)  # in boxes of lines, or of ASCII
    assert groups == ["options", "first", "data", "adapter", "regularizer", "optimization", "interruption"]
    words = re.findall(r"^\W (--[a-z][a-z-]*)", shown, re.MULTILINE)
    assert sorted(words) == sorted(f"--{name.replace('_', '-')}" for name in nlu.Arguments.__dataclass_fields__)


def test_a_command_line_that_names_no_experiment_runs_the_demo_where_there_is_no_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    args = nlu.resolve_arguments(["--method", "lora", "--output-dir", str(tmp_path / "out")])
    assert (args.model, args.data, args.method) == ("demo", "demo", "lora")
    assert "no CUDA GPU" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # HF_HUB_OFFLINE is set: the hub does not answer
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert nlu.resolve_arguments(["--output-dir", str(tmp_path / "out")]).data == "demo"
    assert "hub cannot be reached" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- the robustness study


@pytest.fixture
def pools(monkeypatch) -> None:
    labels = np.arange(3000) % 2
    monkeypatch.setitem(robustness.POOLS, "train", robustness.Pool([], labels, np.zeros((3000, 1))))


def test_noise_flips_its_share_and_more_noise_flips_the_same_and_more(pools):
    truth = robustness.POOLS["train"].labels
    rows, clean = robustness.training_set("noise 0", 3)
    assert (clean == truth[rows]).all()
    assert (len(rows), len(set(rows)), clean.sum()) == (600, 600, 300)
    flipped = {}
    for amount in (10, 20, 40):
        same_rows, labels = robustness.training_set(f"noise {amount}", 3)
        assert (same_rows == rows).all()
        flipped[amount] = set(np.flatnonzero(labels != clean))
        assert len(flipped[amount]) == 6 * amount
    assert flipped[10] < flipped[20] < flipped[40]
    assert set(robustness.training_set("noise 10", 4)[0]) != set(rows)


@pytest.mark.parametrize(("condition", "positive"), [("imbalance 10", 55), ("imbalance 50", 12)])
def test_imbalance_keeps_the_size_and_flips_nothing(pools, condition, positive):
    rows, labels = robustness.training_set(condition, 0)
    assert (labels == robustness.POOLS["train"].labels[rows]).all()
    assert (len(set(rows)), labels.sum()) == (600, positive)


def test_a_line_that_was_cut_short_costs_one_run(tmp_path):
    cells = robustness.study_cells(dict.fromkeys(((m, h) for m in robustness.METHODS for h in robustness.HEADS), 1e-3))
    assert len(set(cells)) == 5 * 6 * (4 * 2 + 1)
    assert {cell.seed for cell in cells[: len(cells) // 5]} == {0}
    lines = [json.dumps(cell.__dict__ | {"scores": {}}) for cell in cells[:3]]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines)[:-9])
    assert list(robustness.read_results(path)) == cells[:2]


def test_every_combination_of_terms_is_run_once_at_one_rate_and_starts_with_the_others_off(tmp_path, monkeypatch):
    rates = {
        (method, head): 1e-3 if head == "probe" else 5e-4 for method in robustness.METHODS for head in robustness.HEADS
    }
    cells = robustness.terms_cells(rates)
    assert len(set(cells)) == len(cells) == 8 * 5 * 2 + (4 * 5 + 4) * 2 + 4 * 5
    at_random = [cell for cell in cells if (cell.phase, cell.head) == ("terms", "initial")]
    assert {cell.learning_rate for cell in at_random} == {5e-4}
    assert len({cell.terms for cell in at_random}) == 8
    for name, value in {"path": "", "config": None, "targets": ["query"]}.items():
        monkeypatch.setitem(robustness.PARTS, name, value)
    pool = robustness.Pool([{"input_ids": [1]}] * 4, np.array([0, 1, 0, 1]), np.zeros((4, 3), np.float32))
    monkeypatch.setitem(robustness.POOLS, "train", pool)
    monkeypatch.setattr(
        robustness, "load_classifier", lambda *_: torch.nn.ModuleDict({"classifier": torch.nn.Linear(3, 2)})
    )
    monkeypatch.setattr(robustness, "final_linear", lambda model: model["classifier"])
    monkeypatch.setattr(nlu, "add_trainable", lambda model, _: model)
    for cell in at_random[:8]:
        _, _, args = robustness.start(cell, np.arange(4), pool.labels, str(tmp_path))
        found = (args.lambda_consistency, args.lambda_diversity, args.lambda_spectral)
        names = cell.terms.split("+")
        assert found == (0.15 * ("CR" in names), 0.03 * ("DR" in names), 0.03 * ("SVDR" in names))


def test_wrong_labels_learnt_and_the_tempered_error_by_hand(monkeypatch):
    """Of four labels two are wrong, and one of these is given back. Three of four predictions are right, and the logits
    are eight times those of a probability of 3/4: the best temperature is 8, and the error then 0."""
    for name, labels in {"train": [0, 1, 0, 1, 0], "validation": [0, 0, 0, 1], "movies": [0, 0, 0, 1]}.items():
        monkeypatch.setitem(robustness.POOLS, name, robustness.Pool([], np.array(labels), np.zeros((5, 1))))
    overconfident = np.array([[8 * np.log(3), 0.0]] * 4)
    trained = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    logits = {"trained": trained, "validation": overconfident, "movies": overconfident}
    found = robustness.after_many_epochs(logits, np.array([1, 2, 3, 4]), np.array([1, 1, 1, 1]))
    assert found["learnt"] == 0.5
    assert found["temperature"] == pytest.approx(8, rel=0.05)
    assert found["tempered"] < 0.01


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_dry_run_says_what_the_run_then_is(method, tmp_path, encoders, capsys):
    """Parameters, steps, examples and classes as the run itself counts them; nothing is written."""
    data = reviews(tmp_path / "train.jsonl")
    argv = ["--model", str(encoders["bert"]), "--data", str(data), "--fields", "sentence", "--method", method]
    argv += ["--rank=2", "--batch-size=7", "--epochs=1.5", "--output-dir", str(tmp_path / "out")]
    nlu.main([*argv, "--dry-run"])
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    nlu.main(argv)
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (
        f"parameters: {summary['adapter_parameters']:,} trained and {summary['head_parameters']:,} of the head" in said
    )
    assert f"steps: {summary['steps']} of 7 examples" in said
    assert (
        f"{summary['examples']['train']} examples to train on, {summary['examples']['validation']} to select by" in said
    )


@pytest.fixture(scope="module")
def kept_rows() -> dict:
    return robustness.read_results(ROOT / robustness.Arguments.results)


def test_the_page_is_printed_from_the_committed_rows(kept_rows):
    page = (ROOT / robustness.Arguments.page).read_text()
    assert page == robustness.page_text(kept_rows)
    assert not re.search(r"\{\w+\}", page)


def test_effects_of_terms_and_losses_are_those_of_the_rows():
    """A made-up calibration error, 1·CR + 2·DR + 4·SVDR + 8·CR·DR in percent, and a seed that lacks a run."""
    rows = {}
    for head, seed in itertools.product(robustness.HEADS, range(3)):
        for names in itertools.chain.from_iterable(itertools.combinations(robustness.TERMS, n) for n in range(4)):
            c, d, s = (name in names for name in robustness.TERMS)
            cell = robustness.Cell("terms", seed, "noise 20", "ba-lora", head, 1e-3, "+".join(names) or "none")
            value = (seed + c + 2 * d + 4 * s + 8 * c * d) / 100
            if (seed, names) != (2, ("CR", "SVDR")):
                rows[cell] = {"scores": {"movies": {"calibration_error": value}}}
    found = {
        (head, term, given): robustness.effect(rows, "calibration_error", head, "noise 20", term, given)
        for head, term, given in itertools.product(robustness.HEADS, ("CR", "DR"), (None, "CR", "DR"))
        if term != given
    }
    for head in robustness.HEADS:
        assert found[head, "CR", None] == pytest.approx({0: 5, 1: 5})
        assert found[head, "DR", None] == pytest.approx({0: 6, 1: 6})
        assert found[head, "DR", "CR"] == pytest.approx({0: 10, 1: 10} | ({2: 10} if head == "initial" else {}))
        assert found[head, "CR", "DR"] == pytest.approx({0: 9, 1: 9, 2: 9})
    assert robustness.effect(rows, "calibration_error", "initial", "noise 20", "SVDR") == pytest.approx({0: 4, 1: 4})
    rows = {
        robustness.Cell("study", seed, condition, "lora", "probe", 1e-3): {"scores": {"movies": {"accuracy": value}}}
        for seed in range(2)
        for condition, value in zip(robustness.CONDITIONS, (0.9 + 0.01 * seed, 0.8, 0.7, 0.6, 0.5, 0.5), strict=True)
    }
    pooled = robustness.losses(rows, "lora", "probe", robustness.LEVELS["noise 10, 20, 40"])
    assert pooled == pytest.approx({0: 20, 1: 21})
    del rows[robustness.Cell("study", 1, "noise 40", "lora", "probe", 1e-3)]  # of a study that is not finished
    assert robustness.losses(rows, "lora", "probe", robustness.LEVELS["noise 10, 20, 40"]) == pytest.approx({0: 20})
    table = robustness.with_holm(["", "a", "b"], [[{0: 1.0}, {0: 1.0, 1: 2.0}]], ["row"])
    assert table.splitlines()[2].count("not run") == 1
    assert f"p = {1 - 2 * math.atan(3) / math.pi:.3f}" in table  # Student's t is 3, with one degree of freedom


def test_what_the_page_says_of_holm_s_correction_is_so(kept_rows):
    """Of the 36 comparisons of accuracy: how many differ at all, and which three remain."""
    from scipy import stats

    found = {}
    for head, other, condition in itertools.product(robustness.HEADS, robustness.METHODS[:-1], robustness.CONDITIONS):
        ours, theirs = (
            robustness.values(kept_rows, condition, method, head, "accuracy", "movies") for method in ("ba-lora", other)
        )
        differences = [ours[seed] - theirs[seed] for seed in ours]
        if len(set(differences)) > 1:
            found[head, other, condition] = stats.ttest_1samp(differences, 0).pvalue
    ranked = sorted(found, key=found.get)
    remaining = {arm for place, arm in enumerate(ranked) if all(
        found[ranked[before]] * (len(ranked) - before) < 0.05 for before in range(place + 1)
    )}  # fmt: skip
    assert remaining == {
        ("probe", "lora", "imbalance 10"),
        ("probe", "lora", "noise 20"),
        ("probe", "full", "imbalance 10"),
    }
