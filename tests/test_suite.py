"""All benchmarks on one engine: what is left is what each script alone leaves, and one failure is not everyone's."""

import json
import shlex
import signal

import pytest
from conftest import make_model, make_tokenizer, run_apart, write_jsonl
from test_benchmark import comparable
from test_mt_bench import QUESTIONS
from test_user_errors import error_of

from common.cli import parse_arguments
from eval import benchmark, code_tasks, suite

GSM8K = [{"question": f"{i} and {'1' * (i + 1)}?", "answer": f"{i}\n#### {i}"} for i in range(5)]
MATH = [{"problem": f"What is {i}?", "solution": rf"\boxed{{{i}}}", "level": "Level 1"} for i in range(4)]
MBPP = [
    {"task_id": i, "text": "Add.", "code": "def add(a, b):\n    return a + b", "test_list": ["assert add(1, 2) == 3"]}
    for i in (601, 602)
]
NAMES = list(suite.SCRIPTS)


@pytest.fixture
def argv(tmp_path):
    """Valid arguments of the suite on the tiny model, 12 tokens of each of the first two items."""
    checkpoint = tmp_path / "base"
    make_model(max_position_embeddings=2048).save_pretrained(checkpoint)  # HumanEval's bytes are many
    make_tokenizer().save_pretrained(checkpoint)
    words = ["--ckpt", checkpoint, "--backend", "transformers", "--max-new-tokens", 12, "--batch-size", 2, "--limit", 2]
    rows_of = {"gsm8k": GSM8K, "hendrycks_math": MATH, "mbpp": MBPP, "mt_bench": QUESTIONS}
    for name, rows in rows_of.items():
        path = tmp_path / f"{name}-data.jsonl"
        write_jsonl(path, rows)
        words += [f"--{name.replace('_', '-')}", path]
    return list(map(str, words))


@pytest.fixture
def loads(monkeypatch):
    """The length that every loaded engine was made for, whoever loaded it."""
    lengths = []
    load = suite.load_backend

    def counted(*checkpoint, max_length, **options):
        lengths.append(max_length)
        return load(*checkpoint, max_length=max_length, **options)

    monkeypatch.setattr(suite, "load_backend", counted)
    monkeypatch.setattr(benchmark, "load_backend", counted)
    return lengths


def run(argv, out, *options):
    """Runs the suite; returns its exit code."""
    try:
        suite.main([*argv, "--output-dir", str(out), *map(str, options)])
    except SystemExit as ended:
        return ended.code
    return 0


def results(out):
    """Items and summary of every benchmark in a folder."""
    found = {}
    for name in NAMES:
        if (out / f"{name}.json").exists():
            summary = json.loads((out / f"{name}.json").read_text())
            found[name] = (out / f"{name}.jsonl").read_text(), comparable(summary)
    return found


def test_one_engine_leaves_what_five_scripts_leave(argv, tmp_path, loads):
    """Items byte by byte and summaries; each command, run alone, makes its result again on completions of its own."""
    assert run(argv, tmp_path / "suite") == 0
    (length,) = loads
    loads.clear()
    for name, script in suite.SCRIPTS.items():
        summary = json.loads((tmp_path / "suite" / f"{name}.json").read_text())
        program, path, *words = shlex.split(summary["command"])
        assert (program[:6], path.rpartition("/")[2]) == ("python", f"{name}.py")
        words[words.index("--output-dir") + 1] = str(tmp_path / "alone")
        script.main(words)
    assert results(tmp_path / "suite") == results(tmp_path / "alone")
    assert list(results(tmp_path / "suite")) == NAMES
    assert len(loads) == 5
    assert length == max(loads)  # long enough for every one
    assert len(set(loads)) > 1
    kept = {path.name for path in (tmp_path / "suite").iterdir()}
    assert kept == {path.name for path in (tmp_path / "alone").iterdir()}
    assert "failures.json" not in kept


def test_what_is_done_needs_no_engine(argv, tmp_path, loads, capsys):
    """--skip-done; and a benchmark whose completions are all there is graded without a model."""
    run(argv, tmp_path / "out", "--skip-done")
    before = results(tmp_path / "out")
    capsys.readouterr()
    assert run(argv, tmp_path / "out", "--skip-done") == 0
    assert capsys.readouterr().out.count("is done: ") == 5
    (tmp_path / "out" / "gsm8k.json").unlink()
    assert run(argv, tmp_path / "out", "--skip-done") == 0
    assert "accuracy" in capsys.readouterr().out
    assert results(tmp_path / "out") == before
    assert len(loads) == 1
    assert run(argv, tmp_path / "out", "--skip-done", "--prompt", "raw") == 2  # others are refused
    assert results(tmp_path / "out") == before


def test_one_failure_stops_no_other(argv, tmp_path, loads, capsys, monkeypatch):
    """A mistake of the user's, a fault while grading or generating: each is told and kept, and the rest is done."""
    broken = argv.copy()
    broken[broken.index("--mt-bench") + 1] = str(tmp_path / "nowhere.jsonl")
    out = tmp_path / "out"
    assert run(broken, out) == 2
    assert set(results(out)) == set(NAMES) - {"mt_bench"}
    captured = capsys.readouterr()
    assert f"mt_bench.py: error: no such data file or folder: {tmp_path / 'nowhere.jsonl'}" in captured.err
    assert "1 of 5 benchmarks failed: mt_bench" in captured.err
    failures = json.loads((out / "failures.json").read_text())
    assert list(failures) == ["mt_bench"]
    assert failures["mt_bench"]["error"].startswith("no such data file")
    assert "--skip-done" not in shlex.split(failures["mt_bench"]["command"])

    def fault(*_, **__):
        raise RuntimeError("the sandbox burnt down\nall of it")

    with monkeypatch.context() as patched:
        patched.setattr("eval.humaneval.run_items", fault)
        assert run([*argv, "--benchmarks", "humaneval", "gsm8k"], out, "--overwrite") == 1
    assert "RuntimeError: the sandbox burnt down" in capsys.readouterr().err
    failures = json.loads((out / "failures.json").read_text())
    assert list(failures) == ["mt_bench", "humaneval"]  # what is known of others stays
    with monkeypatch.context() as patched:
        from eval.backends import TransformersBackend

        generate, calls = TransformersBackend.generate, []

        def generate_but_once(self, *arguments):
            calls.append(1)
            return fault() if len(calls) == 1 else generate(self, *arguments)

        patched.setattr(TransformersBackend, "generate", generate_but_once)
        loads.clear()
        assert run(argv, tmp_path / "other") == 1
        assert len(loads) == 2  # an engine that failed is not used again
    assert set(results(tmp_path / "other")) == set(NAMES) - {"gsm8k"}
    assert run(argv, out, "--overwrite") == 0
    assert not (out / "failures.json").exists()


def test_a_suite_that_is_killed_keeps_what_was_generated(argv, tmp_path, loads):
    """Killed while the second benchmark generates and started again: only what is missing is made, and all is as if
    nothing had happened."""
    run(argv, tmp_path / "whole")
    out = tmp_path / "killed"
    words, moment = [*argv, "--output-dir", out], ("hendrycks_math.completions.jsonl", 3)
    code, text = run_apart("eval.suite", words, tmp_path, ends=(signal.SIGKILL, *moment))
    assert code == -signal.SIGKILL, text
    assert (out / "gsm8k.json").exists()
    made = {path.name: path.read_bytes() for path in out.glob("*.completions.jsonl")}
    assert run(argv, out, "--skip-done") == 0
    for name, text in made.items():
        assert (out / name).read_bytes().startswith(text.rpartition(b"\n")[0])
    skipping = {name: items for name, (items, _) in results(out).items()}
    assert skipping == {name: items for name, (items, _) in results(tmp_path / "whole").items()}


def test_options_reach_every_benchmark(argv):
    """Each benchmark's own parser takes them; one's own data and the judge's options go where they belong."""
    words = [*argv, "--samples", "3", "--temperature", "0.5", "--skip-done", "--judge-model", "m", "--adapter", "a"]
    found = suite.commands(parse_arguments(suite.Arguments, "", words))
    assert list(found) == NAMES
    for name, script in suite.SCRIPTS.items():
        args = parse_arguments(script.Arguments, "", found[name])
        assert (args.samples, args.temperature, args.skip_done, args.adapter, args.limit) == (3, 0.5, True, "a", 2)
        assert args.max_new_tokens == 12
        own = f"--{name.replace('_', '-')}"
        assert args.data == (argv[argv.index(own) + 1] if own in argv else "human-eval")
        assert getattr(args, "judge_model", None) == ("m" if name == "mt_bench" else None)
    plain = suite.commands(parse_arguments(suite.Arguments, "", ["--ckpt", "x"]))
    longest = {name: parse_arguments(suite.SCRIPTS[name].Arguments, "", plain[name]).max_new_tokens for name in NAMES}
    assert longest == {"gsm8k": 1024, "hendrycks_math": 2048, "humaneval": 512, "mbpp": 512, "mt_bench": 1024}
    with_program = parse_arguments(code_tasks.Arguments, "", plain["mbpp"])
    assert with_program.samples == 1


def test_bad_input(argv, tmp_path, monkeypatch, capsys):
    """One line, once, and nothing left behind."""

    def error(*options):
        capsys.readouterr()
        return error_of(suite, [*argv, "--output-dir", tmp_path / "out", *options], monkeypatch, capsys)

    assert "no such model folder: ./nowhere" in error("--ckpt", "./nowhere")
    assert "--limit is 0" in error("--limit", 0)
    assert "choose from gsm8k" in error("--benchmarks", "glue")
    assert "did you mean --benchmarks" in error("--benchmark", "gsm8k")
    assert "no --ckpt" in error_of(suite, [], monkeypatch, capsys)
    assert not (tmp_path / "out").exists()
