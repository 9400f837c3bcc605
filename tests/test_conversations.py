"""Conversations: TRL is the peer for which tokens are trained; the templates are those of its installed package."""

import contextlib
import csv
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from conftest import MERGED, ROOT, make_model, make_tokenizer, relative_error
from transformers import AutoTokenizer, GenerationConfig

import train
from common.cli import UserError
from common.conversations import COLUMNS, KEYS, build_dataset, encode_pieces, first_screen
from common.layers import TARGET_MODULES
from common.packing import enable_packing
from common.pretrained import resolve_demo
from common.tables import load_records
from common.templates import (
    ALPACA_PROMPT,
    IGNORE_INDEX,
    LEAVES_OUT,
    OPENS_THOUGHT,
    Template,
    encode_prompt,
    encode_response,
)


def talk(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of a user and an assistant in turns."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return ([{"role": "system", "content": system}] if system else []) + messages


CONVERSATIONS = {
    "one turn": talk("Hi", "Hello there"),
    "three turns": talk("Hi", "Hello", "And?", "  more \n", "So", "Yes\n\nindeed"),
    "a system's turn": talk("Hi", "Hello", "And?", "more", system="Be brief"),
    "a question at the end": talk("Hi", "Hello", "And?"),
    "the same text twice": talk("Hello", "Hello", "Hello", "Hello"),
}
TEMPLATES = (
    "llama3",
    "qwen2_5",
    "qwen3",
    "qwen3_instruct_2507",
    "gemma",
    "gemma3",
    "phi3",
    "cohere",
    "cohere2",
    "lfm2",
)


def chat_tokenizer(template: str):
    """The tests' tokenizer with a template, and with what looks like a special token in it as one."""
    tokenizer = make_tokenizer()
    special = sorted(set(re.findall(r"<\|[\w▁]+\|>|<｜[\w▁]+｜>|<(?:start|end)_of_turn>|<turn\|>|<\|\w+>", template)))
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": special})
    tokenizer.chat_template = template
    return tokenizer


def published(name: str) -> str:
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def of_trl(tokenizer, template: str, messages) -> list[tuple[int, bool]]:
    """Tokens and whether TRL's `assistant_only_loss` trains them: its call of the tokenizer, with its template."""
    made = tokenizer.apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    return list(zip(made["input_ids"], map(bool, made["assistant_masks"]), strict=True))


def of_ours(tokenizer, messages, first: int = 0) -> list[tuple[int, bool]]:
    return [(token, on) for ids, on in Template(tokenizer, "chat").pieces(messages, first) for token in ids]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_trained_tokens_are_those_of_trl(name, conversation):
    """By the marks of TRL's template, and turn by turn by the published one, which has none."""
    from trl.chat_template_utils import get_training_chat_template

    messages, plain = CONVERSATIONS[conversation], published(name)
    tokenizer = chat_tokenizer(plain)
    marked = get_training_chat_template(tokenizer)
    if name == "gemma" and messages[0]["role"] == "system":
        with pytest.raises(UserError, match="System role not supported"):
            of_ours(tokenizer, messages)
        return
    theirs = of_trl(tokenizer, marked, messages)
    turn_by_turn = of_ours(tokenizer, messages)
    tokenizer.chat_template = marked
    assert of_ours(tokenizer, messages) == theirs
    assert any(on for _, on in theirs)
    trained, expected = (tokenizer.decode([token for token, on in pairs if on]) for pairs in (turn_by_turn, theirs))
    if name == "qwen2_5":  # its marks begin before the end of the prompt that a server gives: one "\n" per answer
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert expected == "".join(f"\n{answer}<|im_end|>\n" for answer in answers)
        assert trained == "".join(f"{answer}<|im_end|>\n" for answer in answers)
    elif name == "qwen3":  # TRL's writes empty thoughts into earlier turns, where Qwen's own has none
        thought = "<think>\n\n</think>\n\n"
        last = thought if messages[-1]["role"] == "assistant" else ""
        *earlier, final = expected.replace(thought, "").split("<|im_end|>\n")[:-1]
        assert trained == "".join(f"{turn}<|im_end|>\n" for turn in [*earlier, last + final])
    else:
        assert turn_by_turn == theirs


@pytest.mark.parametrize("name", ["qwen3", "llama3", "phi3"])
def test_what_is_written_is_the_whole_conversation(name):
    messages = talk("Hi", "<think>\nhm\n</think>\n\nHello", "And?", "<think>\nso\n</think>\n\nyes")
    tokenizer = chat_tokenizer(published(name))
    pairs = of_ours(tokenizer, messages)
    assert [token for token, _ in pairs] == tokenizer.apply_chat_template(messages)["input_ids"]
    last = of_ours(tokenizer, messages, first=3)
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert [token for token, on in last if not on] == prompt
    assert last[len(prompt) :] == pairs[len(prompt) :]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGING = "{% for m in messages %}{{ m.role }}:{{ m.content }}<|end|>{% endfor %}" + (
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_the_border_is_exact_where_the_tokenizer_merges_across_it():
    tokenizer = chat_tokenizer(MERGING)
    messages = talk("Hi", "The sum", "And?", "That")
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    assert whole.count(tokenizer.convert_tokens_to_ids(MERGED)) == 2  # the trap is there
    pairs = of_ours(tokenizer, messages)
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert [token for token, _ in pairs[: len(prompt)]] == prompt
    assert tokenizer.decode([token for token, on in pairs if on]) == "The sum<|end|>That<|end|>"


def test_a_turn_that_is_not_trained_needs_no_prompt_of_its_own():
    """It stands in later prompts alone, where a server tokenises it with the text before it."""
    messages = talk("Hi", "The sum", "And?", "That")
    messages[1]["weight"] = 0
    assert trained_of({"messages": messages}, chat_tokenizer(MERGING))[1] == "That<|end|>"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML.replace("for m in messages", "for m in messages[-1:]"), "drops message 1"),
        (CHATML.replace("<|im_end|>", ""), "ends no turn by a special token"),
        (
            CHATML.replace("assistant\n{% endif", "assistant\n<aside>{% endif"),
            "does not end as the template begins",
        ),
        (CHATML.replace("{{ m.role }}", "{{ m.role.nothing() }}"), "the chat template refuses it"),
    ],
)
def test_a_template_that_cannot_be_trained_with(template, expected):
    with pytest.raises(UserError, match=expected):
        of_ours(chat_tokenizer(template), talk("Hi", "Hello", "And?", "more"))


# ---------------------------------------------------------------------------------------------- formats


MESSAGES = talk("Add 1 and 1", "It is 2", "And 2?", "It is 4")
SHAREGPT = [{"from": ("human", "gpt")[i % 2], "value": message["content"]} for i, message in enumerate(MESSAGES)]


def encoded(rows: list[dict], tokenizer, fields=("instruction", "output"), max_length=512, **options):
    return build_dataset(datasets.Dataset.from_list(rows), tokenizer, list(fields), max_length, **options)


def test_every_format_gives_the_same_tokens():
    tokenizer = chat_tokenizer(CHATML)
    expected = encoded([{"messages": MESSAGES}], tokenizer)[0][0]
    assert expected["input_ids"] == tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    assert encoded([{"conversations": SHAREGPT}], tokenizer)[0][0] == expected
    assert encoded([{"dialogue": MESSAGES}], tokenizer, fields=["dialogue"])[0][0] == expected
    by_key = {key: [message[key] for message in SHAREGPT] for key in ("from", "value")}
    assert encoded([{"conversations": by_key}], tokenizer)[0][0] == expected
    halves = encoded([{"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}], tokenizer)[0][0]
    assert halves["input_ids"] == expected["input_ids"]
    assert halves == encoded([{"messages": MESSAGES}], tokenizer, train_on="last")[0][0]
    learnt = [label for label in halves["labels"] if label != IGNORE_INDEX]
    assert tokenizer.decode(learnt) == "It is 4<|im_end|>\n"


def test_messages_of_a_csv_are_read_as_those_of_a_list(tmp_path):
    """A cell of csv is text: JSON, where it holds messages. Where one of two cells is no such text, both are texts."""
    tokenizer = chat_tokenizer(CHATML)
    path = tmp_path / "data.csv"
    for names, cells in ((("prompt", "completion"), (MESSAGES[:3], MESSAGES[3:])), (("messages",), (MESSAGES,))):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([names, [json.dumps(cell) for cell in cells]])
        found = build_dataset(load_records(str(path)), tokenizer, ["instruction", "output"], 512)[0][0]
        assert found == encoded([dict(zip(names, cells, strict=True))], tokenizer)[0][0]
    row = encoded([{"prompt": "As JSON:", "completion": json.dumps(MESSAGES)}], tokenizer)[0][0]
    assert row["input_ids"] == tokenizer("As JSON:")["input_ids"] + encode_response(tokenizer, json.dumps(MESSAGES))


def test_a_function_call_of_sharegpt_is_a_tool_call():
    """LLaMA-Factory's form of the rows that OpenAI's form has below it; a text that is no call stays a text."""
    tool = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    turns = [("human", "?"), ("function_call", json.dumps(call)), ("observation", "sunny"), ("gpt", "Sunny.")]
    sharegpt = {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": json.dumps([tool])}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ]
    tokenizer = chat_tokenizer(published("qwen2_5"))
    dataset = encoded([sharegpt], tokenizer, max_length=4096)[0]
    expected = tokenizer.apply_chat_template(messages, tools=[{"type": "function", "function": tool}], tokenize=False)
    assert tokenizer.decode(dataset[0]["input_ids"]) == expected
    assert "<tool_call>" in tokenizer.decode([label for label in dataset[0]["labels"] if label != IGNORE_INDEX])
    plain = {"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": "weather()"}]}
    assert "weather()<|im_end|>" in tokenizer.decode(encoded([plain], tokenizer)[0][0]["input_ids"])
    empty = {"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": None}]}
    with pytest.raises(UserError, match="example 1, message 2: an assistant turn that is empty"):
        encoded([empty], tokenizer)


def test_examples_are_tokenised_again_when_the_code_has_changed(tmp_path):
    """Two versions of the package with one cache: the second one trains what the second one makes of an input."""
    code = f"""if True:
        import common, sys, datasets
        from common.conversations import build_dataset
        from common.tables import load_records
        from transformers import AutoTokenizer
        assert common.__file__.startswith(sys.argv[1])
        datasets.config.HF_DATASETS_CACHE = {str(tmp_path / "cache")!r}
        tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
        for _ in range(2):
            made, _ = build_dataset(load_records("data.jsonl"), tokenizer, ["instruction", "output"], 512)
        print(tokenizer.decode(made[0]["input_ids"]))"""
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "data.jsonl").write_text(json.dumps(NAMED | {"input": "this"}))
    written = (ROOT / "common" / "conversations.py").read_text()
    for number, between in enumerate(("\\n", " / "), 1):
        folder = tmp_path / str(number)
        shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
        changed = written.replace('texts[0] = "\\n".join(', f'texts[0] = "{between}".join(')
        assert (changed != written) == (number == 2)
        (folder / "common" / "conversations.py").write_text(changed)
        command, env = [sys.executable, "-c", code, folder], {**os.environ, "PYTHONPATH": folder}
        ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ("Ask\nthis" if number == 1 else "Ask / this") in ended.stdout, ended.stderr
        assert len(list((tmp_path / "cache").rglob("cache-*.arrow"))) == number  # the same code reads what it wrote


def test_texts_go_into_their_own_templates(tokenizer):
    row = encoded([{"prompt": "Ab", "completion": "The"}], tokenizer)[0][0]
    assert row["input_ids"] == tokenizer("Ab")["input_ids"] + encode_response(tokenizer, "The")
    named = encoded([{"q": "Ab", "a": "The"}], tokenizer, fields=["q", "a"])[0][0]
    assert named["input_ids"] == encode_prompt(tokenizer, "Ab") + encode_response(tokenizer, "The")


def test_a_conversation_is_cut_after_a_whole_turn_or_dropped_and_counted():
    tokenizer = chat_tokenizer(CHATML)
    whole = tokenizer.apply_chat_template(MESSAGES)["input_ids"]
    half = tokenizer.apply_chat_template(MESSAGES[:2])["input_ids"]
    rows = [{"messages": MESSAGES}, {"messages": talk("x" * 600, "never")}]
    for max_length, kept in ((len(whole), whole), (len(whole) - 1, half), (len(half), half)):
        dataset, dropped = encoded(rows, tokenizer, max_length=max_length)
        assert (dataset["input_ids"][0], len(dataset), dropped) == (kept, 1, 1)
    assert encoded(rows, tokenizer, max_length=len(half) - 1)[1] == 2


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"messages": None}, {"messages": MESSAGES}], "messages is no list of messages"),
        ([{"messages": {"role": ["user", "assistant"], "content": ["a"]}}], "messages is no list of messages"),
        ([{"messages": MESSAGES}, {"instruction": "a", "output": "b"}], "has instruction and output, where"),
        ([{"prompt": "a", "completion": "b"}, {"conversations": SHAREGPT}], "has conversations, where"),
    ],
)
def test_bad_data_gets_one_line_that_names_the_example(rows, expected, tmp_path, monkeypatch, capfd):
    """Exit code 2, before any model is loaded."""
    from test_user_errors import error_of

    monkeypatch.setattr(train.pretrained, "load_model", None)
    make_model(vocab_size=300).save_pretrained(tmp_path / "base")
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "base")
    good = {name: {"messages": MESSAGES, "prompt": "x", "completion": "y"}[name] for name in rows[0]}
    rows = [good, *rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", tmp_path / "base", "--data", tmp_path / "data.jsonl", "--output-dir", tmp_path / "out"]
    line = error_of(train, [*argv, "--rank", 4], monkeypatch, capfd)
    number = len(rows) if "where" in expected else 2
    assert f"data.jsonl, example {number}" in line
    assert expected in line


# ---------------------------------------------------------------------------------------------- served as trained


@pytest.mark.parametrize("name", ["alpaca", "raw", "chat"])
@pytest.mark.parametrize("source", ["tiny", "demo"])
def test_the_saved_template_renders_the_prompt_of_training(name, source, tmp_path):
    tokenizer = (
        chat_tokenizer(CHATML) if source == "tiny" else AutoTokenizer.from_pretrained(resolve_demo("demo", "model"))
    )
    template = Template(tokenizer, name)
    template.save(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path)
    messages = talk("Add 1 and 1", "The sum is 2", "Again", "it is")
    tokens = [token for ids, _ in template.pieces(messages) for token in ids]
    first = served.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert tokens[: len(first)] == first
    if name == "alpaca":
        assert served.decode(first) == ALPACA_PROMPT.format(instruction="Add 1 and 1")
    mask = [on for ids, on in template.pieces(messages) for _ in ids]
    assert mask[: len(first) + 1] == [False] * len(first) + [True]
    assert served.init_kwargs["trained_template"] == name
    assert tokens[::-1][: tokens[::-1].index(template.end_token_id)] in ([], served("\n")["input_ids"])


def test_generation_stops_where_an_answer_ended_in_training():
    tokenizer = chat_tokenizer(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for before, after in ((None, end), (257, [257, end]), ([3, end], [3, end])):
        config = GenerationConfig(eos_token_id=before)
        Template(tokenizer, "chat").end_answers(config)
        assert config.eos_token_id == after


# ---------------------------------------------------------------------------------------------- several spans


@pytest.mark.parametrize("packed", [False, True])
def test_the_objective_over_several_spans_is_the_formula_on_the_logits(packed):
    """Packed and padded: the terms by their definition in float64, on logits of one conversation at a time."""
    tokenizer = chat_tokenizer(CHATML)
    conversations = (MESSAGES, talk("Add 3", "It is 3", "5?", "No", "So?", "Yes!"), talk("Hi", "Hello"))
    writer = Template(tokenizer, "chat")
    examples = [encode_pieces(writer.pieces(messages), 512, whole_turns=True) for messages in conversations]
    model = make_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    train.add_adapters(model, "ba-lora", 4, 4, TARGET_MODULES)
    for layer in train.adapter_layers(model).values():
        layer.lora_B.data += 0.05
    students, teachers, targets = [], [], []
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            student = model(ids).logits[0].double()
            with train.adapters_disabled(model):
                teacher = model(ids).logits[0].double()
        places = [i for i, label in enumerate(example["labels"][1:]) if label != IGNORE_INDEX]
        assert any(b - a > 1 for a, b in itertools.pairwise(places)) or len(students) == 2
        students.append(student[places])
        teachers.append(teacher[places])
        targets += [example["labels"][i + 1] for i in places]
    assert not packed or enable_packing(model)
    batch = (train.PackingCollator() if packed else train.PaddingCollator(0))(examples)
    assert batch["targets"].tolist() == targets
    assert not packed or batch["shared_length"] > 0
    regularizers = train.Regularizers(
        {"consistency": 0.5, "diversity": 0.4, "spectral": 0.3}, train.Arguments(**train.FORMULATIONS["iclr2026"])
    )
    loss, terms = train.BALoRAModel(model)(batch, regularizers, len(targets), 1)
    exact, parts = train.objective(
        torch.cat(students), torch.cat(teachers), torch.tensor(targets), regularizers, len(targets), 1
    )
    assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
    for name in ("task", "consistency", "diversity", "spectral"):
        assert relative_error(terms[name], parts[name]) < 1e-4


# ---------------------------------------------------------------------------------------------- what people write


CALL = {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": {"city": "Rome"}}}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_time", "description": "Tells it", "parameters": CITY}}]
NAMED = {"instruction": "Ask", "output": "Say"}


def parts(text: str) -> list[dict[str, str]]:
    """A content in two parts."""
    return [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]


def trained_of(row: dict, tokenizer) -> tuple[str, str]:
    """The text of one example, and what of it is trained."""
    example = encoded([row], tokenizer, max_length=8192)[0][0]
    learnt = [label for label in example["labels"] if label != IGNORE_INDEX]
    return tokenizer.decode(example["input_ids"]), tokenizer.decode(learnt)


EARLIER = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]


@pytest.mark.parametrize(
    ("row", "same"),
    [
        (NAMED | {"input": "this"}, {"instruction": "Ask\nthis", "output": "Say"}),
        (NAMED | {"context": "this", "input": " "}, {"instruction": "Ask\nthis", "output": "Say"}),
        ({"instruction": "1+2", "output": 3}, {"instruction": "1+2", "output": "3"}),
        (NAMED | {"input": "[]", "images": "[]"}, {"instruction": "Ask\n[]", "output": "Say"}),
        (NAMED | {"input": [], "tools": "[]", "history": "[]"}, NAMED),
        ({"messages": MESSAGES, "system": "[]"}, {"messages": [{"role": "system", "content": "[]"}, *MESSAGES]}),
        ({"messages": [m | {"tool_calls": "[]", "images": "[]"} for m in MESSAGES]}, {"messages": MESSAGES}),
        ({"messages": MESSAGES, "system_prompt": "Be"}, {"messages": [{"role": "system", "content": "Be"}, *MESSAGES]}),
        (
            {"messages": [{"role": "system", "content": "Be"}, *MESSAGES], "history": [["Who?", "Ada"]]},
            {"messages": [{"role": "system", "content": "Be"}, *EARLIER, *MESSAGES]},
        ),
        ({"messages": json.dumps(MESSAGES)}, {"messages": MESSAGES}),
        ({"messages": [m | {"content": parts(m["content"])} for m in MESSAGES]}, {"messages": MESSAGES}),
    ],
)  # fmt: skip
def test_another_way_to_write_the_same(row, same):
    tokenizer = chat_tokenizer(CHATML)
    assert trained_of(row, tokenizer) == trained_of(same, tokenizer)


def test_history_and_system_beside_an_instruction(tokenizer):
    row = NAMED | {"system": "Be brief", "history": [["Who?", "Ada"]]}
    text, trained = trained_of(row, tokenizer)
    around = [ALPACA_PROMPT.format(instruction=question) for question in ("Who?", "Ask")]
    end = tokenizer.eos_token
    assert text.removeprefix(tokenizer.bos_token or "") == f"Be brief\n\n{around[0]}Ada{end}{around[1]}Say{end}"
    assert trained == f"Ada{end}Say{end}"


def test_a_begin_token_that_no_template_writes_stays():
    """SmolLM2's begin token begins every turn: a text that was rendered by hand needs it."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_demo("demo", "model"))
    prompt = f"{tokenizer.bos_token}user\nHi<|im_end|>\n{tokenizer.bos_token}assistant\n"
    text, trained = trained_of({"prompt": prompt, "completion": "Hello.<|im_end|>\n"}, tokenizer)
    assert (text, trained) == (f"{prompt}Hello.<|im_end|>", "Hello.<|im_end|>")


def llama2_form(folder, **config):
    """A tokenizer.json with the parts of Llama-2's, and settings of its class."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=700, special_tokens=special)
    bpe.train_from_iterator([ALPACA_PROMPT, "Hello there", "The answer is 4"] * 9, trainer)
    bpe.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.save(str(folder / "tokenizer.json"))
    config |= {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    return AutoTokenizer.from_pretrained(folder)


def byte_level(folder, begins: bool):
    """Of GPT-2's and Qwen's form; with a begin token, of Llama-3's."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([ALPACA_PROMPT, "Hello there", "The answer is 4"] * 9, trainer)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    if begins:
        bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokens = {"eos_token": "</s>", **({"bos_token": "<s>"} if begins else {})}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **tokens)


FORMS = {
    "llama 2": llama2_form,
    "llama 2, legacy": lambda folder: llama2_form(folder, legacy=True),
    "llama 2, not legacy": lambda folder: llama2_form(folder, legacy=False),
    "llama 3": lambda folder: byte_level(folder, True),
    "gpt 2": lambda folder: byte_level(folder, False),
    "gemma": lambda folder: transformers.GemmaTokenizer().train_new_from_iterator([ALPACA_PROMPT, "The answer"], 500),
}
MISTRAL = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("name", ["alpaca", "raw", "chat"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_tokenizer_is_served_the_tokens_of_training(form, name, tmp_path):
    tokenizer = FORMS[form](tmp_path)
    tokenizer.chat_template = MISTRAL.replace("{{ bos_token }}", "{{ bos_token }}" * bool(tokenizer.bos_token))
    template = Template(tokenizer, name)
    template.save(tmp_path / "merged")
    served = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = talk("Hello there", "The answer is 4", "Which?", "  this\n")
    pairs = [(token, on) for ids, on in template.pieces(messages) for token in ids]
    for turn in (1, 3):
        prompt = served.apply_chat_template(messages[:turn], add_generation_prompt=True)["input_ids"]
        assert [token for token, _ in pairs[: len(prompt)]] == prompt
        assert not pairs[len(prompt) - 1][1]
        assert pairs[len(prompt)][1]


def test_a_text_that_carries_its_begin_and_end_tokens(tokenizer):
    plain = trained_of({"prompt": "Ask", "completion": "Say"}, tokenizer)
    begin, end = tokenizer.bos_token or "", tokenizer.eos_token
    assert trained_of({"prompt": f"{begin}Ask", "completion": f"Say{end}"}, tokenizer) == plain


@pytest.mark.parametrize("name", [None, "qwen3"])
@pytest.mark.parametrize("mask", [{"weight": 0}, {"train": False}, {"weight": 0.0}])
def test_a_turn_without_weight_is_not_trained(mask, name):
    """In the middle and at the end; by generation marks and without."""
    template = CHATML
    if name:
        from trl.chat_template_utils import get_training_chat_template

        template = get_training_chat_template(chat_tokenizer(published(name)))
    tokenizer = chat_tokenizer(template)
    for turn in (1, 3):
        masked = [message | (mask if i == turn else {"weight": 1}) for i, message in enumerate(MESSAGES)]
        trained = trained_of({"messages": masked}, tokenizer)[1]
        assert (MESSAGES[turn]["content"] in trained, MESSAGES[4 - turn]["content"] in trained) == (False, True)
    dataset, dropped = encoded([{"messages": MESSAGES} | mask, {"messages": MESSAGES}], tokenizer)
    assert (len(dataset), dropped) == (1, 1)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "lfm2_2_5"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tool_calls_are_written_by_the_template_and_trained(name, as_text):
    tokenizer = chat_tokenizer(published(name))
    call = CALL["function"] | {"arguments": json.dumps(CALL["function"]["arguments"])} if as_text else CALL["function"]
    calls = [CALL | {"function": call}]
    talk_ = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "tool_calls": json.dumps(calls) if as_text else calls},
        {"role": "tool", "name": "get_time", "content": "12:00"},
        {"role": "assistant", "content": "Noon"},
    ]
    text, trained = trained_of({"messages": talk_, "tools": json.dumps(TOOLS) if as_text else TOOLS}, tokenizer)
    plain = [message | ({"content": "", "tool_calls": [CALL]} if i == 1 else {}) for i, message in enumerate(talk_)]
    whole = tokenizer.apply_chat_template(plain, tools=TOOLS, tokenize=False)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert whole.startswith(text)
    assert "get_time" in trained
    assert "Rome" in trained
    assert "Noon" in trained
    assert "12:00" not in trained


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3", "nemotron_3_nano"])
def test_a_prompt_that_opens_a_thought(name):
    tokenizer = chat_tokenizer(published(name))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜end▁of▁sentence｜>"]})
    messages = talk("Hi", "Hello", "And?", "more")
    pairs = of_ours(tokenizer, messages)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == tokenizer.decode([token for token, _ in pairs])
    trained = tokenizer.decode([token for token, on in pairs if on])
    assert [word for word in ("Hi", "Hello", "And?", "more") if word in trained] == ["Hello", "more"]


ABOUT_TOOLS = [
    {"role": "user", "content": "Time?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_time", "content": "noon"},
    {"role": "assistant", "content": "SECOND"},
]
EVERY_KIND = {
    "one turn": (talk("Hi", "FIRST"), None),
    "two turns": (talk("Hi", "FIRST", "And?", "SECOND"), None),
    "a thought": (talk("Hi", "<think>\nhm\n</think>\n\nFIRST"), None),
    "tools": (ABOUT_TOOLS, TOOLS),
}


def spans_of(tokenizer, pairs) -> list[str]:
    """The trained texts, without thoughts: TRL's templates keep empty and earlier ones that the published leave out."""
    groups = itertools.groupby(pairs, key=lambda pair: pair[1])
    texts = [tokenizer.decode([token for token, _ in group]) for is_trained, group in groups if is_trained]
    return [re.sub(r"(?s)(<think>)?[^<]*</think>\s*", "", text) for text in texts]


def follow_the_remedy(error: str, tokenizer, messages, tools) -> None:
    """What an error advises, until the conversation is trained."""
    name = "chat"
    if "write calls and results as texts of assistant and user" in error:
        roles = ["user" if message["role"] == "tool" else message["role"] for message in messages]
        texts = [message["content"] or "get_time()" for message in messages]
        messages, tools = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)], None
    elif "write them into the system's turn" in error:
        messages, tools = [{"role": "system", "content": json.dumps(tools)}, *messages], None
    else:
        assert "take --template raw" in error
        name = "raw"
    try:
        assert any(on for _, on in Template(tokenizer, name).pieces(messages, tools=tools))
    except UserError as next_error:
        assert str(next_error) != error
        follow_the_remedy(str(next_error), tokenizer, messages, tools)


def every_template() -> list[str]:
    trl = importlib.util.find_spec("trl")
    folder = trl and Path(trl.origin).parent / "chat_templates"
    return [path.stem for path in sorted(folder.glob("*.jinja")) if "_training" not in path.stem] if folder else []


@pytest.mark.parametrize("name", every_template())
def test_every_template_of_trl_is_trained_as_trl_does_or_refused_with_a_remedy(name):
    """TRL's marks may begin before the end of a server's prompt; each answer and its end are the same."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = chat_tokenizer(published(name))
    try:
        marked = get_training_chat_template(tokenizer)
    except ValueError:
        marked = None  # TRL ships it for generation alone
    for messages, tools in EVERY_KIND.values():
        try:
            template = Template(tokenizer, "chat")
            pieces = template.pieces(messages, tools=tools)
        except UserError as error:
            follow_the_remedy(str(error), tokenizer, messages, tools)
            continue
        template.require_served(messages, pieces, tools)
        pairs = [(token, on) for ids, on in pieces for token in ids]
        ours = spans_of(tokenizer, pairs)
        assert "noon" not in "".join(ours)
        if messages == EVERY_KIND["a thought"][0]:
            assert "hm" in tokenizer.decode([token for token, on in pairs if on])
        if marked is None:
            assert "FIRST" in ours[0] or "Rome" in ours[0]
            continue
        made = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
        )
        theirs = spans_of(tokenizer, zip(made["input_ids"], map(bool, made["assistant_masks"]), strict=True))
        if (
            name == "diffusion_gemma" and tools
        ):  # what begins the result stops the model, and the last prompt ends there
            ours = [text.removesuffix("<|tool_response>").removeprefix("<|turn>model\n") for text in ours]
        assert len(ours) == len(theirs)
        assert all(their.endswith(our) for our, their in zip(ours, theirs, strict=True)), (ours, theirs)


def test_the_day_in_a_template_is_the_same_on_every_day(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer('{{ strftime_now("%d %b %Y") }}' + CHATML)
    template = Template(tokenizer, "chat")
    template.save(tmp_path)
    served = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False)
    assert served.startswith("26 Jul 2024<|im_start|>")
    template.require_served(MESSAGES, template.pieces(MESSAGES), None, AutoTokenizer.from_pretrained(tmp_path))


def test_what_a_template_does_to_thoughts_is_announced():
    """A server's prompt that opens one, where an answer has none; and earlier thoughts that are left out."""
    r1, qwen = chat_tokenizer(published("deepseek_r1_distill")), chat_tokenizer(published("qwen3"))
    r1.add_special_tokens({"additional_special_tokens": ["<｜end▁of▁sentence｜>"]})
    thoughts = talk("Hi", "<think>\nhm\n</think>\n\nHello", "And?", "<think>\nso\n</think>\n\nmore")
    for tokenizer, messages, expected in (
        (r1, talk("Hi", "Hello"), {OPENS_THOUGHT: 1}),
        (r1, thoughts[:2], {}),
        (qwen, thoughts[:2], {}),
        (qwen, thoughts, {LEAVES_OUT: 1}),
    ):
        dataset, _ = encoded([{"messages": messages}], tokenizer)
        assert dataset.notes.template == expected
        assert all(what in first_screen(dataset) for what in expected)


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3", "glm4moe"])
def test_a_thought_that_begins_without_its_tag_is_a_thought(name):
    """As servers of R1 and QwQ return it, because the prompt has opened it."""
    tokenizer = chat_tokenizer(published(name))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜end▁of▁sentence｜>"]})
    whole, opened = (talk("Hi", f"{tag}I add.\n</think>\n\nTwo.") for tag in ("<think>\n", ""))
    assert "I add." in trained_of({"messages": whole}, tokenizer)[1]
    assert trained_of({"messages": opened}, tokenizer) == trained_of({"messages": whole}, tokenizer)
    dataset, _ = encoded([{"messages": [*opened, *MESSAGES]}], tokenizer)
    assert ("I add." in tokenizer.decode(dataset[0]["input_ids"])) != (LEAVES_OUT in dataset.notes.template)


EXAONE = CHATML.replace("m.content", "m.content.split('</thought>')[-1].strip()")  # EXAONE-Deep's kind


@pytest.mark.parametrize(
    ("template", "lost", "answer"),
    [
        (EXAONE, "I add.", {"content": "<thought>\nI add.\n</thought>\nTwo."}),
        ("qwen3", "Well,", {"content": "Well,\n<think>\nI add.\n</think>\n\nTwo."}),
        ("qwen3", "So?", {"content": "I add.</think> So? </think> Two."}),
        ("llama3_1", "I look.", {"content": "I look.", "tool_calls": [CALL]}),
    ],
)
def test_a_last_answer_is_written_whole_or_refused_and_an_earlier_one_announced(template, lost, answer):
    tokenizer = chat_tokenizer(template if template == EXAONE else published(template))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant"} | answer]
    result = [{"role": "tool", "content": "noon"}] if "tool_calls" in answer else MESSAGES[:1]
    after = {"messages": [*messages, *result, MESSAGES[1]], "tools": TOOLS}
    after |= {} if "tool_calls" in answer else {"tools": None}
    assert lost not in tokenizer.apply_chat_template(after["messages"], tools=after["tools"], tokenize=False)
    assert encoded([after], tokenizer, max_length=4096)[0].notes.template == {LEAVES_OUT: 1}
    with pytest.raises(UserError, match="example 1: the chat template leaves out a part of message 2, the last answer"):
        encoded([after | {"messages": messages}], tokenizer, max_length=4096)
    untrained = [{"messages": [*MESSAGES[:2], messages[0], messages[1] | {"weight": 0}], "tools": after["tools"]}]
    assert encoded(untrained, tokenizer, max_length=4096)[0].notes.template == {LEAVES_OUT: 1}


def test_a_key_is_used_where_the_text_is_another_without_it():
    """Qwen's template has the words `tool` and `loop`, and a place for `reasoning_content` alone."""
    keys = {"tool": "calc", "loop": "x", "name": "ada", "reasoning_content": "hm"}
    rows = [{"messages": [MESSAGES[0] | keys, MESSAGES[1] | keys]}]
    dataset, _ = encoded(rows, chat_tokenizer(published("qwen3")))
    assert "hm" in first_screen(dataset)
    assert dataset.notes.keys == {"tool": 2, "loop": 2, "name": 2}
    dataset, _ = encoded(
        rows, chat_tokenizer(CHATML.replace("{{ m.role }}", "{{ m.role }}{{ m.name if m.role == 'user' }}"))
    )
    assert "userada" in first_screen(dataset)
    assert dataset.notes.keys == {"tool": 2, "loop": 2, "reasoning_content": 2}


@pytest.mark.parametrize("content", ["You help.", "", None])
def test_tools_within_the_systems_turn_are_the_examples_tools(content):
    """GLM-4's form for fine-tuning."""
    tokenizer = chat_tokenizer(published("qwen2_5"))
    system = [{"role": "system", "content": content}] if content else []
    row = {"messages": [{"role": "system", "content": content, "tools": TOOLS}, *MESSAGES]}
    made, expected = (encoded([one], tokenizer, max_length=4096)[0] for one in (row, {"messages": system + MESSAGES, "tools": TOOLS}))  # fmt: skip  # noqa: E501
    assert made[0] == expected[0]
    assert "get_time" in first_screen(made)
    assert made.notes.keys == {}
    assert encoded([row | {"tools": json.dumps(TOOLS)}], tokenizer, max_length=4096)[0][0] == expected[0]
    with pytest.raises(UserError, match="example 1 has other tools in its system's turn than beside it"):
        encoded([row | {"tools": [*TOOLS, *TOOLS]}], tokenizer)


def test_template_arguments_are_in_training_and_in_the_exported_template():
    tokenizer = chat_tokenizer(published("qwen3"))
    jinja = Template(tokenizer, "chat", {"enable_thinking": False}).jinja
    expected = tokenizer.apply_chat_template(
        MESSAGES[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    tokenizer.chat_template = jinja
    assert tokenizer.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True) == expected


@pytest.mark.parametrize("name", ["alpaca", "raw"])
def test_a_token_that_both_starts_and_ends_a_text_stays_at_the_start(name):
    """OPT's </s>: the prompt is the start token and the text's own tokens."""
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token
    single = {"single": f"{end} $A", "special_tokens": [(end, tokenizer.eos_token_id)]}
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(**single)
    tokenizer.bos_token = end
    assert tokenizer("Hi")["input_ids"] == [
        tokenizer.eos_token_id,
        *tokenizer("Hi", add_special_tokens=False)["input_ids"],
    ]
    for messages in (talk("Hi", "Hello"), talk("Hi", "Hello", "And?", "More")):
        template = Template(tokenizer, name)
        pieces = template.pieces(messages)
        text = ALPACA_PROMPT.format(instruction="Hi") if name == "alpaca" else "Hi"
        assert pieces[0] == (tokenizer(text)["input_ids"], False)
        assert template.require_served(messages, pieces) == set()


@pytest.mark.parametrize("kind", ["GemmaTokenizer", "LlamaTokenizer"])
def test_tokenizer_model_goes_out_where_it_has_every_token(kind, tmp_path):
    """llama.cpp's converter reads it in place of tokenizer.json."""
    texts = iter([ALPACA_PROMPT + f" {number} apples are 4, too" for number in range(100)])
    sizes = {"vocab_size": 330, "pad_id": 3, "user_defined_symbols": ["<turn>", "<mask>"], "byte_fallback": True}
    model = tmp_path / "base" / "tokenizer"
    model.parent.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_prefix=str(model), model_type="bpe", minloglevel=2, **sizes
    )
    names = {
        "tokenizer_class": kind,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    }
    names |= {"additional_special_tokens": ["<turn>"]}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    Template(tokenizer, "alpaca").save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.with_suffix(".model").read_bytes()
    text = "<turn> 4 naïve apples</s>"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] == tokenizer(text)["input_ids"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    Template(tokenizer, "alpaca").save(tmp_path / "more")
    assert not (tmp_path / "more" / "tokenizer.model").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "more")("<|new|>")["input_ids"][-1] == len(tokenizer) - 1


@pytest.mark.parametrize(
    "value", [0, 1, 0.0, -1.5, True, False, None, [], [None, [0, False]], {"a": {"b": [True, {}]}}, 'I am 🦙 "%}\n\\é']
)
def test_a_template_argument_has_the_value_that_the_caller_of_a_template_gives(value):
    tokenizer = chat_tokenizer("{{ x }}{{ x is none }}{{ x is boolean }}" + CHATML)
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, x=value)
    tokenizer.chat_template = Template(tokenizer, "chat", {"x": value}).jinja
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == expected


def test_a_tokenizer_with_code_of_its_own_needs_the_flag_and_goes_out_whole(tmp_path, monkeypatch):
    base, ran = tmp_path / "base", tmp_path / "ran"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    make_model(vocab_size=300).save_pretrained(base)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_mine.MyTokenizer"]}}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    code = "from transformers import PreTrainedTokenizerFast\n\nclass MyTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (base / "tokenization_mine.py").write_text(f"open({str(ran)!r}, 'a').close()\n{code}")
    (tmp_path / "data.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    argv = ["--model", base, "--data", tmp_path / "data.jsonl", "--output-dir", tmp_path / "out", "--max-steps", 1]
    argv = [*map(str, argv), "--rank", "4"]
    with contextlib.suppress(UserError):
        train.main([*argv, "--dry-run"])
    assert not ran.exists()
    train.main([*argv, "--trust-remote-code"])
    assert ran.exists()
    for name in ("merged", "adapter"):
        found = AutoTokenizer.from_pretrained(tmp_path / "out" / name, trust_remote_code=True)
        assert type(found).__name__ == "MyTokenizer"
        assert found("Ab c")["input_ids"] == tokenizer("Ab c")["input_ids"]


def test_a_served_prompt_that_differs_is_refused():
    """Generation marks around something else than the answer to the prompt."""
    template = CHATML.replace("{{ m.content }}<|im_end|>", "{% if m.role == 'assistant' %}!{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}")  # fmt: skip  # noqa: E501
    with pytest.raises(UserError, match="message 2 differs between training and serving, from token"):
        encoded(
            [{"messages": MESSAGES}], chat_tokenizer(template.replace("assistant\n{% endif", "assistant\n?{% endif"))
        )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, "1, message 1: unknown role 'narrator'"),
        ({"messages": talk("Hi", " ")}, "example 1, message 2: an assistant turn that is empty"),
        ({"messages": [*MESSAGES, MESSAGES[1]]}, "example 1, message 5: two assistant turns in a row"),
        ({"messages": MESSAGES[1:]}, "example 1, message 1: an assistant turn without a turn before it to answer"),
        ({"messages": [{"role": "system", "content": "a"}, *MESSAGES[1:]]}, "message 2: an assistant turn without"),
        ({"messages": MESSAGES[:1]}, "example 1 has no assistant turn"),
        ({"messages": MESSAGES, "tools": "[{}]"}, "example 1: the chat template has no place for tools"),
        ({"messages": [*MESSAGES, {"role": "tool", "content": "x"}]}, "drops message 5, of the role tool"),
        ({"prompt": "a", "completion": "b", "label": False}, "has a column 'label': preference data"),
        ({"prompt": "a", "completion": "b", "label": "False"}, "has a column 'label': preference data"),
        ({"prompt": "a", "completion": "b", "label": 1}, "has a column 'label': preference data"),
        ({"prompt": "a", "completion": "b", "label": 0.0}, "has a column 'label': preference data"),
        ({"instruction": "a", "output": "b", "kto_tag": True}, "has a column 'kto_tag': preference data"),
        ({"prompt": "a", "completion": "b", "rejected": "c"}, "has a column 'rejected': preference data"),
        ({"prompt": "a", "completion": "b", "response_rejected": "c"}, "has a column 'response_rejected': preference"),
        ({"messages": MESSAGES, "images": ["x.png"]}, "has a column 'images': texts alone"),
        ({"messages": [{"role": "user", "content": None}, MESSAGES[1]]}, "message 1: a user turn that is empty"),
        ({"messages": [{"role": "user", "text": "Hi"}, MESSAGES[1]]}, "its keys are role, text"),
        ({"messages": [{"role": "system", "content": " "}, *MESSAGES]}, "message 1: a system turn that is empty"),
        ({"messages": [{"role": "system", "content": "a"}, *MESSAGES], "system": "b"}, "two different system turns"),
        ({"messages": MESSAGES, "weight": 0.5}, "its weight is 0.5: it must be 0 or 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of its content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]}, "a part of its content"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [CALL]}]}, "drops the tool calls of message 2"),
        (NAMED | {"tools": TOOLS}, "--template alpaca has no place for tools"),
    ],
)  # fmt: skip
def test_what_is_refused_and_the_remedy_works(row, expected, tmp_path):
    tokenizer = chat_tokenizer(CHATML.replace("in messages %}", "in messages if m.role != 'tool' %}"))
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        encoded([row], tokenizer)
    if "--skip-bad" in str(caught.value):
        (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"messages": MESSAGES}) + "\n")
        records = load_records(str(tmp_path / "data.jsonl"))
        dataset, dropped = build_dataset(records, tokenizer, ["instruction", "output"], 512, skip_bad=True)
        assert (len(dataset), dropped) == (1, 1)
    if "take it away" in str(caught.value) and "images" in row:
        encoded([row | {"images": None}], tokenizer)


def test_the_page_prints_what_happens_to_every_name():
    page = (ROOT / "docs" / "own-model.md").read_text()
    for table in (COLUMNS, KEYS):
        assert "\n".join(f"| `{name}` | {fate} |" for name, fate in table.items()) in page


def test_what_is_not_used_is_announced_and_a_bad_example_can_be_skipped(tmp_path, capsys):
    rows = [
        {"messages": [*MESSAGES[:3], MESSAGES[3] | {"mood": "x", "thinking": "hm"}], "topic": "sums", "empty": None}
    ]
    rows += [{"messages": MESSAGES[1:]}, {"messages": talk("x" * 600, "never")}]
    (tmp_path / "data" / ".ipynb_checkpoints").mkdir(parents=True)
    (tmp_path / "data" / ".ipynb_checkpoints" / "train-checkpoint.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data" / "eval.jsonl").write_text(json.dumps(rows[0]) + "\n")
    make_model(vocab_size=300).save_pretrained(tmp_path / "base")
    chat_tokenizer(CHATML).save_pretrained(tmp_path / "base")
    argv = [
        "--model",
        tmp_path / "base",
        "--data",
        tmp_path / "data",
        "--output-dir",
        tmp_path / "out",
        "--rank",
        4,
        "--dry-run",
    ]
    with pytest.raises(UserError, match="example 2, message 1: an assistant turn without a turn before it to answer"):
        train.main([*map(str, argv)])
    train.main([*map(str, argv), "--skip-bad"])
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index("not used: columns topic") :]  # a library may speak before
    assert lines[:3] == [
        "not used: columns topic",
        "not used: keys of messages mood, thinking",
        "not used: files .ipynb_checkpoints, eval.jsonl",
    ]
    assert lines[3].startswith("skipped 1 examples")
    assert "1 whole" in lines[5]
    assert "1 dropped: longer than 512 tokens" in lines[5]
    assert "assistant" in lines[9]
    assert "⟦It is 2<|im_end|>" in "\n".join(lines)
