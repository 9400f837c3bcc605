"""Forgetting: every measure by its formula in float64, exact zeros of equal weights, and texts of every kind."""

import json
import shutil

import datasets
import numpy as np
import peft
import pytest
import scipy.special
import scipy.stats
import torch
import transformers
from conftest import make_model, make_tokenizer, read_jsonl, save_noisy, save_tiny, write_jsonl
from test_user_errors import error_of

from common import intervals
from common.cli import UserError
from data import sentiment
from eval import forgetting

TEXTS = ["Sea turtles are rare.", "def f(x):\n    return x", "No.", "Ünïcödé too: " + "long " * 30]


@pytest.fixture
def texts(tmp_path):
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in [*TEXTS, "", "x"]])


@pytest.fixture
def tuned(tmp_path):
    """A model that is near the base: its weights with noise."""
    return save_noisy(tmp_path / "tuned", 0.1)


@pytest.fixture
def run(tmp_path, checkpoint, texts):
    """Runs the script on the tiny model; returns its items and its summary."""

    def run(*options, out=tmp_path / "out", data=texts):
        named = [] if "--data" in options else ["--data", data]
        argv = ["--base", checkpoint, *named, "--batch-size", 3, "--output-dir", out, *options]
        forgetting.main([str(word) for word in argv])
        items = read_jsonl(out / "forgetting.jsonl")
        return items, json.loads((out / "forgetting.json").read_text())

    return run


def by_formula(before, after, token_ids):
    """The seven means over one document's predicted tokens, from (T, V) logits, in numpy's float64."""
    p, q = (scipy.special.softmax(np.asarray(logits, dtype=np.float64)[:-1], axis=-1) for logits in (before, after))
    places = range(len(token_ids) - 1)
    return {
        "loss_before": np.mean([-np.log(p[t, token_ids[t + 1]]) for t in places]),
        "loss_after": np.mean([-np.log(q[t, token_ids[t + 1]]) for t in places]),
        "kl_base_tuned": np.mean([scipy.stats.entropy(p[t], q[t]) for t in places]),
        "kl_tuned_base": np.mean([scipy.stats.entropy(q[t], p[t]) for t in places]),
        "agreement": np.mean(p.argmax(-1) == q.argmax(-1)),
        "entropy_before": np.mean([scipy.stats.entropy(p[t]) for t in places]),
        "entropy_after": np.mean([scipy.stats.entropy(q[t]) for t in places]),
    }


def expected_of(base, tuned, texts=TEXTS):
    """`by_formula` of every text, each alone and without padding, and its predicted tokens."""
    tokenizer, found = make_tokenizer(), []
    for text in texts:
        token_ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            logits = [model(torch.tensor([token_ids])).logits[0].float().numpy() for model in (base, tuned)]
        found.append((by_formula(*logits, token_ids), len(token_ids) - 1))
    return found


# ------------------------------------------------------------------------------------------------ measures


@pytest.mark.parametrize("limits", [{}, {"CHUNK": 258 * 7, "MOST_LOGITS": 258 * 40}], ids=["whole", "in parts"])
def test_every_measure_by_its_formula(run, tuned, checkpoint, monkeypatch, limits):
    """Batches with padding, and parts of documents, against each document alone in a float64 model."""
    for name, value in limits.items():
        monkeypatch.setattr(forgetting, name, value)
    items, summary = run("--ckpt", tuned)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in (checkpoint, tuned)
    ]
    expected = expected_of(*models)
    assert [(item["text"], item["tokens"]) for item in items] == [
        (text, n) for text, (_, n) in zip(TEXTS, expected, strict=True)
    ]
    assert summary["left_out"] == 2  # no token, and one
    for item, (means, _) in zip(items, expected, strict=True):
        assert {name: item[name] for name in means} == pytest.approx(means, rel=1e-4)
    counts = np.array([n for _, n in expected])
    for name in expected[0][0]:
        overall = sum(means[name] * n for means, n in expected) / counts.sum()
        assert summary[name]["value"] == pytest.approx(overall, rel=1e-4)
        interval = intervals.ratio([means[name] * n for means, n in expected], counts.tolist())["interval_95"]
        assert summary[name]["interval_95"] == pytest.approx(interval, rel=1e-3)
        assert summary[name]["of"] == 4
    assert summary["tokens"] == counts.sum()
    change = summary["loss_after"]["value"] - summary["loss_before"]["value"]
    assert summary["forgetting"]["value"] == pytest.approx(change)
    assert summary["kl_base_tuned"]["value"] > 0.01  # the two are really apart
    assert 0 < summary["agreement"]["value"] < 1


def test_equal_weights_differ_by_exactly_nothing(run, checkpoint, tmp_path):
    """A copy; an adapter whose factor B is 0; in fp32 and in bf16."""
    shutil.copytree(checkpoint, tmp_path / "copy")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(make_model(), config).save_pretrained(tmp_path / "adapter")
    for number, options in enumerate(
        [
            ("--ckpt", tmp_path / "copy"),
            ("--adapter", tmp_path / "adapter"),
            ("--ckpt", tmp_path / "copy", "--dtype", "bfloat16"),
        ]
    ):
        items, summary = run(*options, out=tmp_path / f"out-{number}")
        if "--adapter" in options:
            assert (summary["ckpt"], summary["adapter"]) == (str(checkpoint), str(tmp_path / "adapter"))
        for name in ("forgetting", "kl_base_tuned", "kl_tuned_base", "entropy_change"):
            assert (summary[name]["value"], summary[name]["interval_95"]) == (0, [0, 0])
        assert (summary["agreement"]["value"], summary["agreement"]["interval_95"]) == (1, [1, 1])
        assert all(item["kl_base_tuned"] == item["kl_tuned_base"] == 0 for item in items)
        assert summary["loss_before"]["value"] == summary["loss_after"]["value"] > 1


@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_a_bf16_model_are_fp32(tied):
    """Of bf16 hidden states, by hand: h Eᵀ in fp32; the embeddings stay bf16."""
    model = make_model(tie_word_embeddings=tied).bfloat16()
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        hidden = model.model(input_ids).last_hidden_state
        expected = hidden.float() @ model.lm_head.weight.float().T
        forgetting.with_fp32_logits(model)
        logits = model(input_ids).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected)
    assert not torch.equal(logits, logits.bfloat16().float())
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_the_interval_is_the_bootstrap_over_documents():
    """Against scipy's, which resamples pairs of a sum and its count."""
    generator = np.random.default_rng(4)
    counts = generator.integers(2, 60, size=40)
    sums = counts * generator.normal(0.3, 0.2, size=40)
    score = intervals.ratio(sums.tolist(), counts.tolist())
    reference = scipy.stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=1,
    )
    assert score["value"] == pytest.approx(sums.sum() / counts.sum())
    assert score["interval_95"] == pytest.approx(reference.confidence_interval, abs=0.005)
    assert score["of"] == 40


# ------------------------------------------------------------------------------------------------ texts


def texts_of(*options):
    argv = forgetting.parse_arguments(forgetting.Arguments, "", [str(word) for word in options])
    return forgetting.read_texts(argv)


def test_texts_by_name(monkeypatch):
    """HumanEval's with their solutions; the editorials in their order; PEFT's first hundred of the stream."""
    found = texts_of("--limit", 164)
    code = [text for source, text in found if source == "code"]
    assert len(code) == 164
    for text in (code[0], code[-1]):
        namespace = {}
        exec(text, namespace)
    assert namespace["generate_integers"](2, 8) == [2, 4, 6, 8]
    sentences = [text for source, text in found if source == "sentences"]
    rows = sentiment.sentences("editorials").read_text().splitlines()
    assert sentences == [json.loads(row)["sentence"] for row in rows[:164]]
    asked = []

    def load(name, *, split, streaming):
        asked.append((name, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: ({"text": f"page {i}"} for i in range(1000)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts_of("--data", "peft") == [("peft", f"page {i}") for i in range(100)]
    assert asked == [("HuggingFaceFW/finewiki", "train", True)]


def test_ones_own_tables(tmp_path):
    (tmp_path / "a.csv").write_text('body,n\n"one, two",1\nthree,2\n')
    (tmp_path / "b.tsv").write_text("0\tfirst\n1\tsecond\n")
    assert [text for _, text in texts_of("--data", tmp_path / "a.csv", "--field", "body")] == ["one, two", "three"]
    assert [text for _, text in texts_of("--data", tmp_path / "b.tsv", "--field", 1)] == ["first", "second"]


def test_every_source_has_its_own_numbers(run, tuned, texts, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "Something else."}) + "\n")
    _, both = run("--ckpt", tuned, "--data", texts, other)
    printed = capsys.readouterr().out
    assert list(both["by_source"]) == [str(texts), str(other)]
    for path in (texts, other):
        _, alone = run("--ckpt", tuned, "--data", path, out=tmp_path / path.stem)
        of_source = both["by_source"][str(path)]
        for name in forgetting.MEASURES:
            assert of_source[name]["value"] == pytest.approx(alone[name]["value"], rel=1e-4)
        assert f"forgetting, {path.name}" in printed
    assert both["documents"] == 5


def test_texts_are_cut_at_max_length(run, tuned):
    items, summary = run("--ckpt", tuned, "--max-length", 9)
    assert [item["tokens"] for item in items] == [8, 8, 2, 8]
    assert summary["arguments"]["max_length"] == 9


# ------------------------------------------------------------------------------------------------ diversity


def test_distinct_answers_among_samples(run, tuned, tmp_path):
    """Three samples of two items: two answers and one; three texts and two."""
    answers = [("1", "a 1"), ("1", "b 1"), ("2", "c 2"), (None, "x"), (None, "x"), (None, "y")]
    rows = [
        {"index": n // 3, "sample": n % 3, "extracted": answer, "completion": text}
        for n, (answer, text) in enumerate(answers)
    ]
    path = tmp_path / "gsm8k.jsonl"
    write_jsonl(path, rows)
    _, summary = run("--ckpt", tuned, "--completions", path)
    found = summary["diversity"][str(path)]
    assert found["answers"]["value"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert found["completions"]["value"] == pytest.approx((3 / 3 + 2 / 3) / 2)
    assert (found["answers"]["of"], found["samples"]) == (2, 3)
    rows = [{"index": 0, "sample": n, "program": "return 1", "completion": text} for n, text in enumerate("xy")]
    found = forgetting.distinct(str(write_jsonl(tmp_path / "humaneval.jsonl", rows)))
    assert (found["answers"]["value"], found["completions"]["value"]) == (1 / 2, 2 / 2)


# ------------------------------------------------------------------------------------------------ runs


def test_an_interrupted_run_goes_on(run, tuned, tmp_path, monkeypatch):
    """What one batch left behind is not measured again; and the results are those of a run that was not stopped."""
    whole = run("--ckpt", tuned, out=tmp_path / "whole")
    measured, sums_of = [], forgetting.sums_of

    def stopped(*tensors):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(1)
        return sums_of(*tensors)

    monkeypatch.setattr(forgetting, "sums_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        run("--ckpt", tuned)
    assert not (tmp_path / "out" / "forgetting.json").exists()
    measured.clear()
    items, summary = run("--ckpt", tuned)
    assert len(measured) == 1
    assert items == whole[0]
    assert summary["forgetting"] == whole[1]["forgetting"]
    monkeypatch.setattr(forgetting, "load_pair", None)
    run("--ckpt", tuned, "--overwrite")  # all is on disk


def test_results_that_are_there_are_left_or_refused(run, tuned, checkpoint, tmp_path, capsys):
    run("--ckpt", tuned)
    with pytest.raises(UserError, match="is there already"):
        run("--ckpt", tuned)
    with pytest.raises(SystemExit) as ended:
        run("--ckpt", tuned, "--skip-done", "--batch-size", 1)  # which decides nothing
    assert ended.value.code == 0
    assert "forgetting is done" in capsys.readouterr().out
    with pytest.raises(UserError, match="was made with max_length = 768, not 9"):
        run("--ckpt", tuned, "--skip-done", "--max-length", 9)
    make_model(seed=1).save_pretrained(checkpoint)  # another base
    with pytest.raises(UserError, match="was made with other weights"):
        run("--ckpt", tuned, "--skip-done")


def test_bad_input(checkpoint, tuned, texts, tmp_path, monkeypatch, capsys):
    """One line each, before a model is loaded, and nothing is left behind."""
    monkeypatch.setattr(forgetting, "load_pair", None)

    def error(*options, base=("--base", checkpoint), ckpt=("--ckpt", tuned)):
        capsys.readouterr()
        named = [] if "--data" in options else ["--data", texts]
        argv = [*base, *ckpt, *named, "--output-dir", tmp_path / "out", *options]
        return error_of(forgetting, argv, monkeypatch, capsys)

    other = tmp_path / "other"
    shutil.copytree(tuned, other)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    assert f"{other} and {checkpoint} have no common tokenizer (they differ in '<new>')" in error("--ckpt", other)
    save_tiny(other, vocab_size=300)
    assert "has 300 logits" in error("--ckpt", other)
    assert "no --base" in error(base=())
    assert "one of --ckpt and --adapter" in error(ckpt=())
    assert "one of --ckpt and --adapter" in error("--adapter", tmp_path)
    assert "is no LoRA adapter" in error(ckpt=("--adapter", tmp_path))
    assert "no such model folder" in error("--base", "./nowhere")
    assert "has no field 'body'; its fields are text" in error("--field", "body")
    assert "no such data file" in error("--data", "./nowhere.jsonl")
    assert "cannot load HuggingFaceFW/finewiki from the hub" in error("--data", "peft")
    assert "--max-length is 1" in error("--max-length", 1)
    assert "--limit is 0" in error("--limit", 0)
    line = error("--data", "code", "--limit", 3)
    assert "holds 512 tokens and" in line and "are needed: lower --max-length" in line
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    assert "no text of two tokens" in error("--data", tmp_path / "short.jsonl")
    (tmp_path / "numbers.jsonl").write_text('{"text": 3}\n')
    assert "row 0 of" in error("--data", tmp_path / "numbers.jsonl")
    assert "--completions nowhere: No such file" in error("--completions", "nowhere")
    assert "is no results file" in error("--completions", texts)
    (tmp_path / "greedy.jsonl").write_text('{"index": 0, "completion": "a"}\n')
    assert "has one sample of an item" in error("--completions", tmp_path / "greedy.jsonl")
    assert not (tmp_path / "out").exists()
