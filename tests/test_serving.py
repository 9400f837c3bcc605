"""Served as trained: what scripts/serve.sh starts, asked as a client asks. SLOW=1 runs it: a server takes a minute."""

import importlib.util
import json
import os
import shlex
import socket
import subprocess
import time
import urllib.request

import pytest
import rendered_by_vllm
from conftest import ROOT, forking, make_model, start_script
from test_conversations import FORMS, MISTRAL
from transformers import AutoTokenizer

from common.pretrained import resolve_demo
from common.templates import Template
from eval.backends import TransformersBackend
from eval.generation import Sampling

pytestmark = [
    pytest.mark.slow,  # four real servers
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM"),
]
TALKS = [
    ["What has 3 sides?"],
    ["Add 2 and 2.", "The sum is 4.", "And 3 more?"],
]


def messages_of(talk: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]


@pytest.fixture(scope="module", params=["chat", "alpaca"])
def run_folder(request, tmp_path_factory):
    """A run of SmolLM2, trained for two steps at a rate that changes its answers."""
    folder = tmp_path_factory.mktemp(request.param)
    turns = messages_of(["What is this?", "A triangle, the three of sides."])
    (folder / "data.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    options = ["--template", request.param, "--method", "lora", "--rank", 4, "--learning-rate", 3e-3, "--max-steps", 2]
    options += ["--warmup-ratio", 0, "--batch-size", 1, "--gradient-accumulation", 1, "--save-steps", 0]
    argv = ["--model", "demo", "--data", folder / "data.jsonl", "--output-dir", folder / "run", "--epochs", 9, *options]
    process = start_script("train", argv, folder / "log")
    process.join()
    assert process.exitcode == 0, (folder / "log").read_text()
    return request.param, folder / "run"


def ask(port: int, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read() or "{}")


@pytest.mark.parametrize("what", ["merged", "adapter"])
def test_a_server_gives_the_model_the_prompt_of_training_and_answers_as_eval_does(what, run_folder, tmp_path):
    template, run = run_folder
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"DRY_RUN": "1", "NAME": "mine", "PORT": str(port)}
    environment |= {"ADAPTER": "1"} if what == "adapter" else {}
    words = ["sh", str(ROOT / "scripts/serve.sh"), str(run), "--max-model-len", "512"]
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    command = shlex.split(printed.splitlines()[-1])
    command[0] = str(ROOT / ".venv/bin/python")
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.time() + 500
        while True:
            assert server.poll() is None and time.time() < deadline, (tmp_path / "log").read_text()[-3000:]
            try:
                ask(port, "/health")
                break
            except OSError:
                time.sleep(1)
        made = [
            ask(
                port,
                "/v1/chat/completions",
                {
                    "model": "mine",
                    "messages": messages_of(talk),
                    "temperature": 0,
                    "max_tokens": 16,
                    "return_token_ids": True,
                },
            )
            for talk in TALKS
        ]
    finally:
        server.terminate()
        server.wait(60)
    tokenizer = AutoTokenizer.from_pretrained(resolve_demo("demo", "model"))  # the published one, not the run's
    writer = Template(tokenizer, template)
    prompts = []
    for talk in TALKS:
        pieces = writer.pieces([*messages_of(talk), {"role": "assistant", "content": "x"}], first=len(talk))
        before = [ids for ids, is_trained in pieces if not is_trained]
        prompts.append([token for ids in before for token in ids])
    assert [answer["prompt_token_ids"] for answer in made] == prompts
    merged = AutoTokenizer.from_pretrained(run / "merged")
    backend = TransformersBackend(str(run / "merged"), merged, dtype="float32", batch_size=1)
    for prompt, answer in zip(prompts, made, strict=True):
        (expected,) = backend.generate([prompt], Sampling(16))
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert (answer["choices"][0]["finish_reason"] == "stop") == expected.finished


def test_each_form_of_tokenizer_is_rendered_by_the_server_as_it_is_trained(tmp_path):
    """Each template; the server has no engine here, which does not see the messages."""
    talk = messages_of(["Hello there", "The answer is 4", "Which?", "  this\n"])
    folders, trained = [], []
    for form, make in FORMS.items():
        for name in ("alpaca", "raw", "chat"):
            folder = tmp_path / form / name
            folder.mkdir(parents=True)
            tokenizer = make(folder)
            tokenizer.chat_template = MISTRAL.replace("{{ bos_token }}", "{{ bos_token }}" * bool(tokenizer.bos_token))
            template = Template(tokenizer, name)
            make_model(vocab_size=len(tokenizer), pad_token_id=None, eos_token_id=0).save_pretrained(folder / "merged")
            template.save(folder / "merged")
            folders.append(folder / "merged")
            trained.append([token for ids, _ in template.pieces(talk) for token in ids])
    out = tmp_path / "prompts.json"
    process = forking().Process(target=rendered_by_vllm.main, args=(folders, [talk[:1], talk[:3]], out))
    process.start()
    process.join()
    assert process.exitcode == 0
    for folder, tokens, prompts in zip(folders, trained, json.loads(out.read_text()), strict=True):
        assert [tokens[: len(prompt)] for prompt in prompts] == prompts, folder
        assert len(prompts[0]) < len(prompts[1])
