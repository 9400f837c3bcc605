"""Grading and both generation back ends; real problems and real weights where they are at hand."""

import json
from fractions import Fraction
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import SHARED_DATA, forking, read_jsonl, write_jsonl

from common.cli import UserError
from common.pretrained import load_tokenizer_and_config
from common.templates import encode_prompt, encode_response
from data import demo
from eval import gsm8k
from eval.backends import TransformersBackend
from eval.benchmark import load_backend
from eval.generation import Sampling, batches, response_loss


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is: 72", 72),
        ("The answer is: $1,234.50.", Fraction(2469, 2)),
        ("The answer is: -3 apples", -3),
        ("The answer is: 3/4", Fraction(3, 4)),
        ("The answer is: .5", Fraction(1, 2)),
        ("The answer is: 50%", 50),
        ("The answer is: 7.", 7),
        ("The answer is: 7/0", 7),
        ("The answer is: 1,2", Fraction(6, 5)),  # a decimal comma
        ("The answer is: 1,2,3", None),
        ("The answer is: 1,000,000", 10**6),
        ("The answer is: 3\n\nThe answer is: 4", 4),
        ("steps 1 + 1 = 2\n#### 2", 2),
        ("The answer is: unknown", None),
        ("The answer is: 18\n\n#### Note 2", 18),
        ("#### Step 3: add", None),  # a heading
        ("#### **72**", 72),
        ("####: 72", 72),
        ("#### +72", 72),
        ("#### Answer: $72", 72),
        (r"#### \boxed{72}", 72),
        ("The answer is: " + "9" * 5000, None),  # a loop
        (r"The answer is: $9{,}500$", 9500),
        (r"The answer is: 9,\!500", 9500),
        (r"The answer is: $\boxed{\frac{18}{5}}$", Fraction(18, 5)),
        ("The answer is: 2 2/3 cups", Fraction(8, 3)),
        (r"The answer is: 3\frac{1}{2}", Fraction(7, 2)),
        ("The answer is: \N{MINUS SIGN}5", -5),
        ("The answer is: 18 + 24 = 42", 42),
        ("The answer is: 1 + 2 + 3 = 3 + 3 = 6", 6),
        ("The answer is: 7. So the larger one, 5 + 7 = 12, is it.", 7),
        ("The answer is: 97 = 42", 97),
        (r"The answer is: $6 \times 3 = 18$", 18),
        (r"The answer is: \(36\div2=18\)", 18),
        (r"The answer is: \$9 \cdot 2 = \$18", 18),
        (r"The answer is: $20\% \times 90 = 18$", 18),
        (r"\boxed{6\cdot 3 = 18}", 18),
        ("The answer is: 6 x 3 = 18", 18),
        ("The answer is: 6x$3 = $18", 18),
        ("The answer is: 6 · 3 = 18", 18),
        ("The answer is: 6 times 3 = 18", 18),
        ("The answer is: 2 trains * 9 miles/train = 18 miles", 18),
        ("The answer is: 6 boxes. With a + b = 18", 6),
        ("The answer is: 6 in box 3, so n = 18", 6),
        ("The answer is: 2:30", None),
        ("The answer is: 18-20", None),
        ("The answer is: 12\n\nI checked it by adding 5 and 7.", 12),
        ("The answer is: 18\n\n### Instruction:\n3 + 4?\n\n### Response:\nThe answer is: 7", 18),
        ("#### $\\boxed{18}$", 18),
        ("#### = `18`", 18),
        ("#### 18\n\n#### Check\nIt fits.", 18),
        ("The sum is 72", None),
        ("", None),
        ("The answer is: 1.5e3", 1500),
        (r"The answer is: 2 \times 10^3", 2000),
        (r"The answer is: $2.5 \cdot 10^{3}$", 2500),
        ("The answer is: 2 × 10**2", 200),
        ("The answer is 18 dollars.", 18),
        ("**The answer is** 18", 18),
        ("The final answer is 18.", 18),
        ("The answer is found by adding 5 and 7.", None),
        ("The answer is not 18.", None),
        ("So the answer is 17. No.\n#### 18", 18),
        ("The answer is: 4 friends pay 80 dollars each", 80),
        ("The answer is: 4 friends", 4),
        ("The answer is: 3 boxes and 80 cents", 3),
        ("The answer is: five", 5),
        ("The answer is: **Twelve** apples", 12),
        ("The answer is: twelve apples", 12),
        ("The answer is: five hundred", None),
        ("The answer is: twenty-five dollars", None),
        ("The answer is: two thirds", None),
        ("The answer is: twenty two", None),
        (r"The answer is: -\$18", -18),
        ("The answer is: -€18", -18),
        ("The answer is:\n- 18 apples", 18),
        ("The answer is:\n\n  - $18", 18),
        ("The answer is:\n-18", -18),
        ("#### 20 - 2 = 18", 18),
        ("#### 6 * 3 = $18", 18),
        (r"#### \$18", 18),
        (r"#### \(18\)", 18),
        ("#### x = 18", 18),
        ("#### Step 6 * 3 = 18", None),
        (r"\boxed{\frac12}", Fraction(1, 2)),
        (r"\boxed{\dfrac{-1}2}", Fraction(-1, 2)),
        (r"\boxed{1\;234}", 1234),
        ("The answer is: 70 000", 70000),
        ("The answer is: 1'234'567.5", Fraction(2469135, 2)),
        ("The answer is: 70\u00a0000 km", 70000),
        ("The answer is: 7 0000", 7),
        ("The answer is: x2 = 18", 18),
        ("The answer is: x = 18", 18),
        ("The answer is: 2^3", None),
        ("The answer is: –5", -5),
        ("The answer is: –$5", -5),
        ("####\u200b18", 18),
        ("#### 5\n#### 6", 6),
        ("The answer is: 1½ hours", Fraction(3, 2)),
        ("The answer is: ¾", Fraction(3, 4)),
        ("The answer is: 100% of 18 = 18", 18),
        (r"So she pays $\boxed{18}$ dollars.", 18),
        (r"\boxed{17}? No. The answer is: 18", 18),
        ("The answer is: 2 million", 2),  # as GSM8K's own answers
        ("<think>So the answer is: 17? No: 18.</think>\n\nShe pays $\\boxed{18}$.", 18),
        ("The answer is: 17? No.\n</think>#### 18", 18),
        ("[THINK]The answer is: 17[/THINK]The answer is: 18", 18),
        ("<think>The answer is: 18</think>\n", 18),  # nothing after it
        ("<think>The answer is: 18, and", 18),  # cut off
        ("<think>The answer is: 17</think>I do not know.", None),
    ],
)
def test_extracted_answers(text, expected):
    assert gsm8k.extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3 + 4 = 7 apples", 7),
        ("it is -2.", -2),
        ("no number", None),
        ("a 1, b 2, c 3", 3),
        ("So:\n- 18 apples", 18),
        ("- 3", 3),
        (r"a loss: -\$18", -18),
    ],
)
def test_last_numbers(text, expected):
    assert gsm8k.extract_last_number(text) == expected


@pytest.mark.parametrize(
    ("text", "gold", "expected"),
    [
        ("The answer is: 18", 18, True),
        ("The answer is: 17.6", 18, True),
        ("The answer is: 33.33", 33, True),
        ("The answer is: 0.5", 0, True),  # Python's round
        ("The answer is: -3 apples", -3, True),
        ("The answer is: $1,200.", 1200, True),
        ("The answer is: 7/2", 4, True),
        ("The answer is: 7/0", 7, True),
        ("The answer is: /2", 2, False),
        ("The answer is: .6", 1, True),
        ("The answer is: 3. The answer is: 4", 4, True),
        ("The answer is: 1,000,000", 10**6, False),
        ("The answer is: 1,000,000", 1000, True),
        ("The answer is:18", 18, False),
        ("#### 18", 18, False),
        ("The answer is: none", 0, False),
        ("The answer is: " + "1" * 5000, 1, False),
    ],
)
def test_the_published_rule(text, gold, expected):
    """What the authors' script (llm172/BA-LoRA, utils/test_acc.py) makes of these texts, worked out by hand from it."""
    assert gsm8k.grade(text, Fraction(gold))["correct_strict"] == expected


def test_a_right_answer_without_the_marker_counts_only_leniently():
    verdict = gsm8k.grade("So there are 12.", Fraction(12))
    assert (verdict["correct"], verdict["correct_lenient"]) == (False, True)
    assert gsm8k.grade("The answer is: 12.0", Fraction(12))["correct"]
    assert not gsm8k.grade("The answer is: 12.5", Fraction(12))["correct"]


def test_gsm8ks_own_solutions_are_all_right(shared_data):
    """Every gold number, read by a parser of one line that knows GSM8K's format; every solution graded against it."""
    rows = [json.loads(line) for line in (shared_data / "gsm8k_test.jsonl").read_text().splitlines()]
    assert len(rows) == 1319
    for row in rows:
        gold_text = row["answer"].split("#### ")[1]
        gold = Fraction(gold_text.replace(",", ""))
        assert gsm8k.grade(row["answer"], gold)["correct"]
        metamath_style = row["answer"].replace("####", "The answer is:")
        assert gsm8k.grade(metamath_style, gold)["correct"]
        assert gsm8k.grade(metamath_style, gold)["correct_strict"] == (gold_text.count(",") < 2)
        assert not gsm8k.grade(metamath_style, gold + 1)["correct"]


def test_demo_problems_are_right_and_disjoint():
    """Each worked solution is evaluated line by line, each answer against reasoning-gym's own."""
    items = demo.generate_problems(300, seed=1)
    assert len({item["question"] for item in items}) == 300
    assert items == demo.generate_problems(300, seed=1)
    assert items != demo.generate_problems(300, seed=2)
    for item in items:
        *steps, last = item["answer"].splitlines()
        for step in steps:
            left, right = step.rpartition(":")[2].split("=")
            assert eval(left) == int(right)
        assert last == f"#### {int(right)}"
        assert item["response"].endswith(f"\nThe answer is: {int(right)}")
        assert gsm8k.extract_answer(item["response"]) == int(right)


def test_demo_splits_share_no_question():
    train_rows, test_rows = (demo.problems(split).read_text().splitlines() for split in ("train", "test"))
    assert len(train_rows) == demo.NUM_TRAIN
    assert len(test_rows) == demo.NUM_TEST
    questions = [{json.loads(row)["question"] for row in rows} for rows in (train_rows, test_rows)]
    assert not questions[0] & questions[1]


def test_a_package_with_another_checksum_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="expected 0000"):
        demo.fetch_package("reasoning-gym==0.1.25", "0000", tmp_path)


# ---------------------------------------------------------------------------------------------- generation


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M with eight prompts of uneven length."""
    path = str(demo.model())
    tokenizer, config = load_tokenizer_and_config(path)
    questions = [json.loads(line)["question"] for line in demo.problems("test").read_text().splitlines()[:7]]
    prompts = [encode_prompt(tokenizer, question) for question in [*questions, "Hi"]]
    return path, tokenizer, config, prompts


@pytest.fixture(scope="module")
def transformers_backend(smollm2):
    path, tokenizer, _, _ = smollm2
    return load_backend("transformers", path, tokenizer, dtype="float32", batch_size=3, max_length=512)


def test_batched_generation_equals_one_prompt_at_a_time(smollm2, transformers_backend):
    """Against transformers' own generate, without batches, padding or sorting."""
    path, tokenizer, _, prompts = smollm2
    completions = [None] * len(prompts)
    for group in batches([len(prompt) for prompt in prompts], batch_size=3):
        for i, completion in zip(
            group, transformers_backend.generate([prompts[i] for i in group], Sampling(12)), strict=True
        ):
            completions[i] = completion
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    for prompt, completion in zip(prompts, completions, strict=True):
        output = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert completion.text == tokenizer.decode(output, skip_special_tokens=True)
        assert completion.finished == (output[-1] == tokenizer.eos_token_id)


def test_response_loss_equals_the_models_own(smollm2, transformers_backend):
    path, tokenizer, _, prompts = smollm2
    responses = [encode_response(tokenizer, text) for text in ("4 + 4 = 8", "The answer is: 12", "Hello!")]
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    total = 0.0
    for prompt, response in zip(prompts, responses, strict=False):
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            total += model(torch.tensor([prompt + response]), labels=labels).loss.item() * len(response)
    expected = total / sum(map(len, responses))
    assert response_loss(transformers_backend, prompts[:3], responses) == pytest.approx(expected, rel=1e-4)


def by_vllm(path: str, questions: list, prompts: list, responses: list, out: Path, adapter: str | None = None) -> None:
    """In a process of its own, which it binds to cores: what it generates, and the loss of the responses."""
    tokenizer, _ = load_tokenizer_and_config(path)
    options = {"dtype": "float32", "batch_size": 1, "max_length": 512, "adapter": adapter}
    backend = load_backend("vllm", path, tokenizer, **options)
    texts = [completion.text for completion in backend.generate(questions, Sampling(32))]
    out.write_text(json.dumps([texts, response_loss(backend, prompts, responses)]))


def test_vllm_and_transformers_agree(smollm2, transformers_backend, tmp_path):
    """The real engine on the real model: 50 prompts (GSM8K's where it is there), 32 tokens; losses."""
    pytest.importorskip("vllm")
    path, tokenizer, _, prompts = smollm2
    source = SHARED_DATA / "gsm8k_test.jsonl"
    lines = (source if source.is_file() else demo.problems("test")).read_text().splitlines()[:50]
    questions = [encode_prompt(tokenizer, json.loads(line)["question"]) for line in lines]
    responses = [encode_response(tokenizer, "6 * 6 = 36\nThe answer is: 36")] * len(prompts)
    process = forking().Process(target=by_vllm, args=(path, questions, prompts, responses, tmp_path / "found.json"))
    process.start()
    ours = [None] * len(questions)
    for group in batches([len(question) for question in questions], batch_size=10):
        found = transformers_backend.generate([questions[i] for i in group], Sampling(32))
        for i, completion in zip(group, found, strict=True):
            ours[i] = completion.text
    loss = response_loss(transformers_backend, prompts, responses)
    process.join()
    assert process.exitcode == 0
    theirs, their_loss = json.loads((tmp_path / "found.json").read_text())
    agreeing = sum(a == b for a, b in zip(ours, theirs, strict=True))
    assert agreeing >= 0.95 * 50  # fp32 sums in another order may turn a near tie
    assert loss == pytest.approx(their_loss, rel=1e-3)


def test_vllm_gives_the_loss_with_an_adapter(smollm2, transformers_backend, tmp_path):
    """vLLM's own form on a CPU fails there: its adapted logits are those of the sequences, not of their tokens."""
    pytest.importorskip("vllm")
    path, tokenizer, _, prompts = smollm2
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(path),
        peft.LoraConfig(r=8, target_modules=["q_proj", "down_proj"], lora_alpha=32, init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    responses = [encode_response(tokenizer, "6 * 6 = 36\nThe answer is: 36")] * len(prompts)
    words = (path, prompts[:1], prompts, responses, tmp_path / "found.json", adapter)
    process = forking().Process(target=by_vllm, args=words)
    process.start()
    options = {"dtype": "float32", "batch_size": 4, "max_length": 512}
    loss = response_loss(load_backend("transformers", path, tokenizer, adapter=adapter, **options), prompts, responses)
    process.join()
    assert process.exitcode == 0
    assert json.loads((tmp_path / "found.json").read_text())[1] == pytest.approx(loss, rel=1e-3)
    assert abs(loss - response_loss(transformers_backend, prompts, responses)) > 0.05


def test_auto_takes_vllm_only_where_it_is_installed(checkpoint, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tokenizer, _ = load_tokenizer_and_config(str(checkpoint))
    options = {"dtype": "float32", "batch_size": 1, "max_length": 8}
    assert isinstance(load_backend("auto", str(checkpoint), tokenizer, **options), TransformersBackend)
    with pytest.raises(UserError, match="no vLLM"):
        load_backend("vllm", str(checkpoint), tokenizer, **options)


def test_a_checkpoint_is_scored(checkpoint, tmp_path):
    """The loss by the model itself; then four completions, whose verdicts are counted by hand."""
    problems = tmp_path / "problems.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}", "response": "x"} for i in range(5)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--data", str(problems), "--limit", "4", "--output-dir"]
    words = ["--ckpt", str(checkpoint), "--backend", "transformers", "--max-new-tokens", "5", "--batch-size", "2"]
    gsm8k.main([*words, "--loss-field", "response", *options, str(tmp_path / "made")])
    items = read_jsonl(tmp_path / "made" / "gsm8k.jsonl")
    summary = json.loads((tmp_path / "made" / "gsm8k.json").read_text())
    assert [item["index"] for item in items] == [0, 1, 2, 3]
    assert all(item["prompt"].endswith("### Response:") for item in items)
    tokenizer, _ = load_tokenizer_and_config(str(checkpoint))
    model, response = transformers.AutoModelForCausalLM.from_pretrained(checkpoint), encode_response(tokenizer, "x")
    losses = []
    for prompt in (encode_prompt(tokenizer, row["question"]) for row in rows[:4]):
        labels = torch.tensor([[-100] * len(prompt) + response])
        losses.append(model(torch.tensor([prompt + response]), labels=labels).loss.item())
    assert summary["response_loss"] == pytest.approx(sum(losses) / 4, rel=1e-4)
    completions = ["The answer is: 1", "The answer is: 9", "#### 3", "It is 4"]
    rescored = [item | {"completion": text} for item, text in zip(items, completions, strict=True)]
    write_jsonl(tmp_path / "made" / "gsm8k.jsonl", rescored)
    gsm8k.main(["--rescore", str(tmp_path / "made" / "gsm8k.jsonl"), *options, str(tmp_path / "scored")])
    summary = json.loads((tmp_path / "scored" / "gsm8k.json").read_text())
    counts = {"accuracy": 2, "accuracy_strict": 1, "accuracy_lenient": 3, "answer_extracted": 3}
    assert {name: (summary[name]["count"], summary[name]["of"]) for name in counts} == {
        name: (count, 4) for name, count in counts.items()
    }
