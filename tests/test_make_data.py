"""Data files of experiments: what is in them, told from the sources; the same command gives the same file."""

import collections
import json

import pytest
import torch
import transformers
from conftest import make_model, make_tokenizer, read_jsonl, write_jsonl
from test_user_errors import error_of

from data import demo
from experiments import make_data

PROBLEMS = [
    {"question": f"What is {i} times 7?", "answer": f"{i} x 7 = <<{i}*7={7 * i}>>{7 * i}\n#### {7 * i}"}
    for i in range(1, 13)
]


def made(tmp_path, kind, *options):
    target = tmp_path / f"{kind}.jsonl"
    make_data.main([kind, str(target), *map(str, options)])
    return read_jsonl(target)


@pytest.fixture
def gsm8k_file(tmp_path):
    path = tmp_path / "source.jsonl"
    write_jsonl(path, PROBLEMS)
    return path


def test_problems_are_in_neither_of_the_demos_files_nor_in_one_another(tmp_path):
    first, second = (made(tmp_path, "problems", "--count", 30, "--skip", skip) for skip in (0, 30))
    demos = [json.loads(line) for split in ("train", "test") for line in demo.problems(split).read_text().splitlines()]
    questions = [row["question"] for row in [*demos, *first, *second]]
    assert len(first) == len(second) == 30
    assert len(set(questions)) == len(questions)
    assert made(tmp_path, "problems", "--count", 30, "--skip", 30) == second


def test_gsm8k_gets_the_response_that_is_trained(tmp_path, gsm8k_file):
    rows = made(tmp_path, "gsm8k", "--data", gsm8k_file, "--skip", 2, "--count", 3)
    assert [row["question"] for row in rows] == [row["question"] for row in PROBLEMS[2:5]]
    assert [row["response"] for row in rows] == [f"{i} x 7 = {7 * i}\nThe answer is: {7 * i}" for i in (3, 4, 5)]
    assert [row["answer"] for row in rows] == [row["answer"] for row in PROBLEMS[2:5]]


def test_texts_are_their_fields_one_under_the_other(tmp_path, gsm8k_file):
    rows = made(tmp_path, "texts", "--data", gsm8k_file, "--fields", "question", "answer", "--count", 2)
    assert rows == [{"text": f"{row['question']}\n{row['answer']}"} for row in PROBLEMS[:2]]


def test_answers_are_the_models_greedy_ones(tmp_path):
    """In batches with padding, against transformers' own generate, a prompt at a time."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [["Hello there, who are you?", "And?"], ["Add 2 and 2."], ["Why?"]]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps({"turns": turn}) + "\n" for turn in turns))
    words = ("--data", tmp_path / "questions.jsonl", "--model", tmp_path / "model", "--count", 3)
    rows = made(tmp_path, "answers", *words)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.generation_config = transformers.GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    for (first, *_), row in zip(turns, rows, strict=True):
        prompt = f"<user>{first}\n<assistant>"
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            output = model.generate(ids, max_new_tokens=make_data.ANSWER_TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert row == {"text": prompt + tokenizer.decode(output, skip_special_tokens=True)}


def test_a_class_is_made_rare_and_labels_are_flipped(tmp_path):
    """One to nine; what is flipped at 10 % is flipped at 20 % too."""
    rows = made(tmp_path, "sentences", "--split", "train", "--count", 100, "--ratio", 9)
    assert collections.Counter(row["label"] for row in rows) == {"negative": 90, "positive": 10}
    labels = {}
    for noise in (0, 10, 20):
        rows = made(tmp_path, "sentences", "--split", "train", "--count", 100, "--noise", noise, "--seed", 3)
        labels[noise] = [row["label"] for row in rows]
    flipped = {n: {i for i in range(100) if labels[n][i] != labels[0][i]} for n in (10, 20)}
    assert (len(flipped[10]), len(flipped[20])) == (10, 20)
    assert flipped[10] < flipped[20]


def test_bad_input(tmp_path, gsm8k_file, monkeypatch, capsys):
    def error(*words):
        capsys.readouterr()
        return error_of(make_data, [*words, tmp_path / "out.jsonl"], monkeypatch, capsys)

    assert "invalid choice: 'problem'" in error("problem")
    assert "texts needs --count" in error("texts", "--data", gsm8k_file)
    assert "has 12 rows, and 10 + 5 are asked for" in error("gsm8k", "--data", gsm8k_file, "--skip", 10, "--count", 5)
    assert "has no field 'text'" in error("texts", "--data", gsm8k_file, "--count", 2)
    assert "has no field 'turns'" in error("answers", "--data", gsm8k_file, "--count", 2)
    assert not (tmp_path / "out.jsonl").exists()
