"""MT-Bench: what the judge is asked, what its faults do, and that nothing it has said is lost."""

import http.server
import json
import shlex
import signal
import threading

import datasets
import pytest
from conftest import read_jsonl, run_apart, write_jsonl
from test_user_errors import error_of

from common.cli import UserError
from eval import mt_bench

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 2, "category": "math", "turns": ["1 + 1?", "And 1 more?"]},
    {"question_id": 3, "category": "stem", "turns": ["Why?", "Really?"]},
]
REFERENCES = [{"question_id": 2, "choices": [{"index": 0, "turns": ["It is 2.", "It is 3."]}]}]
PROMPTS = [
    {"name": "single-v1", "system_prompt": "S1", "prompt_template": "Q {question} A {answer}"},
    {"name": "single-math-v1", "system_prompt": "S2", "prompt_template": "Q {question} R {ref_answer_1} A {answer}"},
    {
        "name": "single-v1-multi-turn",
        "system_prompt": "S3",
        "prompt_template": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    },
    {
        "name": "single-math-v1-multi-turn",
        "system_prompt": "S4",
        "prompt_template": "Q {question_1} R {ref_answer_1} Q {question_2} R {ref_answer_2} A {answer_1} A {answer_2}",
    },
]


class StubJudge(http.server.ThreadingHTTPServer):
    """Answers with `reply(request body, how often it was asked this)`: a text, or a status with a body."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), self.Handler)
        self.asked: list[dict] = []
        self.headers_seen: list[str | None] = []
        self.reply = lambda body, count: "Rating: [[7]]"
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(404, b"{}")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            count = self.server.asked.count(body)
            self.server.asked.append(body)
            self.server.headers_seen.append(self.headers.get("Authorization"))
            reply = self.server.reply(body, count)
            if isinstance(reply, str):
                reply = (200, json.dumps({"choices": [{"message": {"content": reply}}]}).encode())
            self._send(*reply)

        def _send(self, status, data, location=None):
            self.send_response(status)
            if location is not None:
                self.send_header("Location", location)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass


@pytest.fixture
def stub():
    server = StubJudge()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """FastChat's three files, small; and no pauses between attempts."""
    monkeypatch.setattr(mt_bench, "FIRST_PAUSE", 0.001)
    for name, rows in (("question", QUESTIONS), ("prompts", PROMPTS), ("references", REFERENCES)):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def judged_by(url, files):
    """Options of a run of the tiny model that is judged."""
    argv = ["--backend", "transformers", "--max-new-tokens", 6, "--judge-model", "stub", "--judge-url", url]
    argv += ["--data", files / "question.jsonl", "--judge-prompts", files / "prompts.jsonl"]
    return [*argv, "--references", files / "references.jsonl"]


@pytest.fixture
def run(files, checkpoint):
    """Runs the script on the tiny model; returns the items and the summary."""

    def run(*options, judge=None, answers=("--ckpt", checkpoint, "--backend", "transformers", "--max-new-tokens", 6)):
        argv = [*answers, "--data", files / "question.jsonl", "--output-dir", files / "out", *options]
        if judge is not None:
            argv += ["--judge-model", "stub", "--judge-url", judge if isinstance(judge, str) else judge.url]
            argv += ["--judge-prompts", files / "prompts.jsonl", "--references", files / "references.jsonl"]
        mt_bench.main([str(word) for word in argv])
        items = read_jsonl(files / "out" / "mt_bench.jsonl")
        return items, json.loads((files / "out" / "mt_bench.json").read_text())

    return run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Rating: [[7]]", 7),
        ("Rating: [[7.5]] of 10", 7.5),
        ("[[3]] ... [[9]]", 3),
        ("Scale [1] to [10]. Rating: [[6]]", 6),
        ("arr[0] ... [8]", 0),  # FastChat's rule: the first one
        ("Rating: [8]", 8),
        ("see [1]. Rating: [[8]]", 8),
        ("Rating: 8", None),
        ("Rating: [[11]]", None),
        ("Rating: [[0]]", 0),
        ("Rating: [[ten]]", None),
        ("", None),
        (None, None),
    ],
)
def test_ratings(text, expected):
    assert mt_bench.rating(text) == expected


def test_the_real_files_fill_every_prompt(shared_data):
    """80 questions, 30 of them with a reference answer; every judge prompt is filled, with both texts in it."""
    args = mt_bench.Arguments(
        judge_model="m",
        judge_url="http://localhost/v1",
        judge_prompts=str(shared_data / "mt_bench_judge_prompts.jsonl"),
        references=str(shared_data / "mt_bench_reference.jsonl"),
    )
    rows = read_jsonl(shared_data / "mt_bench_question.jsonl")
    questions = mt_bench.check_questions(rows, "question.jsonl")
    judge = mt_bench.Judge.of(args, questions)
    assert len(questions) == 80
    with_reference = 0
    for question in questions:
        for turn in (0, 1):
            system, user = judge.messages(question, ["FIRST {x}", "SECOND"], turn)
            assert (system["role"], user["role"]) == ("system", "user")
            assert question["turns"][turn] in user["content"]
            assert "FIRST {x}" in user["content"]
            assert ("SECOND" in user["content"]) == (turn == 1)
            assert "strictly following this format" in system["content"] + user["content"]
        with_reference += judge.references.get(question["question_id"], ["\0"])[0] in user["content"]
    assert with_reference == 30


def test_answers_without_a_judge_then_the_printed_command(run, stub, capsys, files):
    """The second run has no model; the second prompt holds the first answer."""
    items, summary = run("--limit", 2)
    assert summary["first_turn"]["value"] is None
    assert summary["missing"] == 4
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:3] == ["OPENAI_API_KEY=...", "python", "eval/mt_bench.py"]
    assert [(item["index"], item["turn"]) for item in items] == [(i, turn) for i in range(2) for turn in (0, 1)]
    for first, second in zip(items[::2], items[1::2], strict=True):
        assert second["prompt"].startswith(first["prompt"] + " " + first["completion"])
    judged, summary = run(judge=stub, answers=command[3:])
    assert [item["completion"] for item in judged] == [item["completion"] for item in items]
    assert summary["first_turn"]["value"] == summary["second_turn"]["value"] == 7
    assert summary["missing"] == 0
    assert len(stub.asked) == 4
    assert all((body["temperature"], body["max_tokens"]) == (0.0, 2048) for body in stub.asked)
    assert stub.headers_seen[0] is None  # no key for a judge on this machine


def test_skip_done_judges_answers_that_no_judge_has_seen(run, stub, files, monkeypatch, capsys):
    """No model is loaded; judged once, they are done; answers of other settings are refused."""
    answers, _ = run("--limit", 2)
    monkeypatch.setattr("eval.benchmark.load_backend", None)
    judged, summary = run("--limit", 2, "--skip-done", judge=stub)
    assert [item["completion"] for item in judged] == [item["completion"] for item in answers]
    assert (summary["judge"], summary["first_turn"]["value"], len(stub.asked)) == ("stub", 7, 4)
    with pytest.raises(SystemExit) as ended:
        run("--limit", 2, "--skip-done", judge=stub)
    assert ended.value.code == 0
    assert "mt_bench is done" in capsys.readouterr().out
    (files / "out" / "mt_bench.json").write_text(json.dumps(summary | {"judge": None}))
    with pytest.raises(UserError, match="was made with limit = 2, not 1"):
        run("--limit", 1, "--skip-done", judge=stub)
    assert len(stub.asked) == 4


def test_questions_come_from_the_hub_by_default(run, files, monkeypatch):
    """As the hub has them: the only split is called train, and each has a reference, empty for most."""
    rows = datasets.Dataset.from_list([question | {"reference": []} for question in QUESTIONS])
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, *a, split, **k: asked.append((name, split)) or rows)
    items, summary = run("--data", mt_bench.HUB_DATA)
    assert asked == [("lighteval/mt-bench", "train")]
    assert mt_bench.Arguments().data == summary["data"] == mt_bench.HUB_DATA
    assert [item["question_id"] for item in items] == [1, 1, 2, 2, 3, 3]
    assert [item["instruction"] for item in items[:2]] == QUESTIONS[0]["turns"]


def test_scores_are_means_over_questions(run, stub):
    def reply(body, count):
        text = body["messages"][1]["content"]
        return "[[4]]" if "R It is 2." in text else "[[10]]" if "Again." in text else "[[1]]"

    stub.reply = reply
    _, summary = run(judge=stub)
    assert summary["first_turn"]["value"] == pytest.approx((1 + 4 + 1) / 3)
    assert summary["second_turn"]["value"] == pytest.approx((10 + 4 + 1) / 3)
    assert summary["both_turns"]["value"] == pytest.approx((5.5 + 4 + 1) / 3)
    assert summary["by_category"]["writing"]["second_turn"]["value"] == 10
    # Of 27 draws of three questions, 8 have the mean 1 and one has the mean 4: both more than 2.5 %.
    assert summary["first_turn"]["interval_95"] == [1, 4]


def test_each_category_has_fastchats_temperature(run, files, monkeypatch):
    """fastchat/llm_judge/common.py, temperature_config."""
    expected = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
    expected |= {"stem": 0.1, "humanities": 0.1}
    rows = [{"question_id": i, "category": name, "turns": [f"<{name}>", "And?"]} for i, name in enumerate(expected)]
    write_jsonl(files / "question.jsonl", rows)
    generate, asked = mt_bench.Run.generate, []

    def spied(self, prompts, sampling):
        texts = map(self.tokenizer.decode, prompts)
        asked.extend((name, sampling.temperature) for text in texts for name in expected if f"<{name}>" in text)
        return generate(self, prompts, sampling)

    monkeypatch.setattr(mt_bench.Run, "generate", spied)
    run()
    assert sorted(asked) == sorted(2 * [*expected.items()])


@pytest.mark.parametrize(
    "fault",
    [
        (429, b"slow down"),
        (500, b"<html>"),
        (200, b"not json"),
        (200, b"[]"),
        (200, b"null"),
        (200, b'{"choices": []}'),
        (200, b'{"choices": [{"message": {"content": null}}]}'),
        "I like it.",
        "Rating: [[42]]",
    ],
    ids=str,
)
def test_a_fault_is_retried_then_missing_and_never_a_score(fault, run, stub):
    """Twice for every answer, which the third attempt heals; always for one, which stays missing."""

    def reply(body, count):
        return fault if count < 2 or "Q Write. A" in body["messages"][1]["content"] else "[[5]]"

    stub.reply = reply
    items, summary = run("--judge-retries", 2, judge=stub)
    assert [item["score"] for item in items] == [None, None, 5, 5, 5, 5]
    assert all("3 attempts" in item["problem"] for item in items[:2])
    assert summary["missing"] == 2
    assert summary["first_turn"] | {"interval_95": None} == {"value": 5, "of": 2, "interval_95": None}


def test_missing_judgments_are_asked_for_again_and_the_others_are_not(run, stub, files):
    stub.reply = lambda body, count: "?" if "Why" in body["messages"][1]["content"] else "[[5]]"
    run("--judge-retries", 0, judge=stub)
    stub.asked.clear()
    stub.reply = lambda body, count: "[[9]]"
    items, summary = run("--overwrite", judge=stub, answers=("--rescore", files / "out" / "mt_bench.jsonl"))
    assert len(stub.asked) == 2
    assert [item["score"] for item in items] == [5, 5, 5, 5, 9, 9]
    assert summary["missing"] == 0


def test_a_run_killed_while_judging_asks_only_for_the_rest(run, stub, files, checkpoint):
    """Killed three times with a second judgment to write: the results of a run that was not, and no judgment is asked
    for that had been written."""
    argv = ["--ckpt", checkpoint, *judged_by(stub.url, files), "--judge-requests", 1, "--output-dir", files / "killed"]
    stub.reply = lambda body, count: f"[[{len(body['messages'][1]['content']) % 10 + 1}]]"
    for _ in range(3):
        code, text = run_apart("eval.mt_bench", argv, files, ends=(signal.SIGKILL, "mt_bench.judgments.jsonl", 3))
        assert code == -signal.SIGKILL, text
    code, text = run_apart("eval.mt_bench", argv, files)
    assert code == 0, text
    assert len(stub.asked) == 6 + 3
    items, summary = run("--judge-requests", 1, judge=stub)
    assert read_jsonl(files / "killed" / "mt_bench.jsonl") == items
    assert json.loads((files / "killed" / "mt_bench.json").read_text())["both_turns"] == summary["both_turns"]


@pytest.fixture
def mt_bench_error(files, checkpoint, monkeypatch, capsys):
    """The error line of the script, which must keep the answers that it made."""

    def error(*options, url="http://127.0.0.1:9/v1"):
        capsys.readouterr()
        argv = ["--ckpt", checkpoint, *judged_by(url, files), "--output-dir", files / "out"]
        return error_of(mt_bench, [*argv, *options], monkeypatch, capsys)

    return error


def test_a_judge_that_refuses_the_key_or_is_not_there(mt_bench_error, run, stub, files, monkeypatch):
    assert "cannot be reached" in mt_bench_error()
    stub.reply = lambda body, count: (401, b"wrong key")
    monkeypatch.setenv("MY_KEY", "secret")
    line = mt_bench_error("--judge-key-env", "MY_KEY", url=stub.url)
    assert "refuses the key in MY_KEY" in line
    assert "secret" not in line
    assert "Bearer secret" in stub.headers_seen
    completions = (files / "out" / "mt_bench.completions.jsonl").read_text()
    stub.reply = lambda body, count: (404, b"the model `stub` does not exist")
    assert "does not take stub" in mt_bench_error(url=stub.url)
    stub.reply = lambda body, count: "[[6]]"
    _, summary = run(judge=stub)
    assert summary["both_turns"]["value"] == 6
    assert (files / "out" / "mt_bench.completions.jsonl").read_text() == completions


def test_half_a_character_is_written_and_read_again(run, stub, files):
    """A lone surrogate in a judgment, and in the answers of a results file."""
    said = "Half a smile \ud83d. Rating: [[6]]"
    stub.reply = lambda body, count: said
    items, summary = run(judge=stub)
    assert [item["judgment"] for item in items] == [said] * 6
    assert summary["both_turns"]["value"] == 6
    rows = [item | {"completion": "\ud83d"} for item in items]
    write_jsonl(files / "again.jsonl", rows)
    again, _ = run("--overwrite", judge=stub, answers=("--rescore", files / "again.jsonl"))
    assert [item["completion"] for item in again] == ["\ud83d"] * 6


def test_an_answer_too_long_for_the_judge_is_missing_and_the_others_are_judged(run, stub):
    """The complaint has the word "model" in it."""
    too_long = (400, b"This model's maximum context length is 4096 tokens")
    stub.reply = lambda body, count: too_long if "Q Write. A" in body["messages"][1]["content"] else "[[5]]"
    items, _ = run("--judge-retries", 1, judge=stub)
    assert [item["score"] for item in items] == [None, None, 5, 5, 5, 5]
    assert "HTTP 400" in items[0]["problem"]
    assert len(stub.asked) == 6  # a request that is wrong is not repeated


@pytest.mark.parametrize("code", [400, 403, 404, 422, 500])
def test_a_judge_that_rates_nothing_ends_the_run_with_its_own_words(code, mt_bench_error, run, stub, files):
    """No score is written, so the next start with --skip-done judges the answers."""
    body = b'{"error": {"message": "Unsupported parameter: \'max_tokens\'. Use \'max_completion_tokens\' instead."}}'
    stub.reply = lambda *_: (code, body)
    line = mt_bench_error("--judge-retries", 2, url=stub.url)
    assert f"HTTP {code}" in line
    assert ("refuses the key" if code == 403 else "Use 'max_completion_tokens' instead") in line
    assert max(map(stub.asked.count, stub.asked)) == (3 if code == 500 else 1)
    assert not (files / "out" / "mt_bench.json").exists()
    stub.reply = lambda *_: "[[6]]"
    _, summary = run("--skip-done", judge=stub)
    assert summary["missing"] == 0


def test_skip_done_asks_for_the_missing_judgments_alone(run, stub, files, monkeypatch, capsys):
    """After a fault that has passed; by the same judge, and without a model."""
    stub.reply = lambda body, count: (500, b"") if "Why" in body["messages"][1]["content"] else "[[5]]"
    _, summary = run("--judge-retries", 0, judge=stub)
    assert summary["missing"] == 2
    monkeypatch.setattr("eval.benchmark.load_backend", None)
    stub.asked.clear()
    stub.reply = lambda *_: "[[9]]"
    with pytest.raises(UserError, match="was made with judge_url"):
        run("--skip-done", judge=f"{stub.url}/another")
    items, summary = run("--skip-done", judge=stub)
    assert (len(stub.asked), summary["missing"]) == (2, 0)
    assert [item["score"] for item in items] == [5, 5, 5, 5, 9, 9]
    with pytest.raises(SystemExit):
        run("--skip-done", judge=stub)
    assert len(stub.asked) == 2


def test_the_key_follows_no_redirect(stub, run, monkeypatch):
    """Another port is another server."""
    elsewhere = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    elsewhere.timeout = 0.5
    asked = []
    elsewhere.process_request = lambda request, address: (asked.append(address), elsewhere.shutdown_request(request))
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    location = f"http://localhost:{elsewhere.server_port}/v1/chat/completions"
    stub.reply = lambda body, count: (302, b"", location)
    with pytest.raises(UserError, match="HTTP 302"):
        run("--judge-retries", 0, "--limit", 1, judge=stub)
    elsewhere.handle_request()
    assert not asked


def test_bad_input(mt_bench_error, files, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "no key for the judge" in mt_bench_error(url="https://judge.example/v1")
    assert "is no http address" in mt_bench_error(url="judge.example")
    assert "cannot be set: MT-Bench's protocol" in mt_bench_error("--temperature", "1")
    assert "--judge-requests is 0" in mt_bench_error("--judge-requests", "0")
    assert "cannot read the judge prompts" in mt_bench_error("--judge-prompts", files / "nowhere")
    assert "has no prompt 'single-v1'" in mt_bench_error("--judge-prompts", files / "question.jsonl")
    (files / "empty.jsonl").write_text("")
    assert "lacks question 2" in mt_bench_error("--references", files / "empty.jsonl")
    (files / "odd.jsonl").write_text(json.dumps(QUESTIONS[0] | {"category": "poetry"}) + "\n")
    assert "'poetry'" in mt_bench_error("--data", files / "odd.jsonl")
    (files / "long.jsonl").write_text(json.dumps(QUESTIONS[0] | {"turns": ["a"]}) + "\n")
    assert "1 turns, not 2" in mt_bench_error("--data", files / "long.jsonl")
    (files / "fields.jsonl").write_text(json.dumps({"question": "a"}) + "\n")
    assert "no field 'question_id'" in mt_bench_error("--data", files / "fields.jsonl")
    assert not (files / "out").exists()
