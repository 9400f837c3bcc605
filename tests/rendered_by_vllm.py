"""The prompts that vLLM's OpenAI server gives to a model. It takes its process over: run it in one of its own."""

import asyncio
import json
import os
from pathlib import Path


def main(folders: list[Path], talks: list[list[dict]], out: Path) -> None:
    """Writes the prompt's tokens for each of `talks` by each folder's model, as /v1/chat/completions/render answers."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    from starlette.testclient import TestClient
    from vllm import AsyncEngineArgs
    from vllm.config import VllmConfig
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.launchers.render.app_state import init_render_app_state
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = []
    for folder in folders:
        words = ["--model", str(folder), "--served-model-name", "mine", "--dtype", "float32"]
        args = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
        app = build_app(args, ("render",))  # the server without an engine: `vllm launch render`
        config = VllmConfig(model_config=AsyncEngineArgs.from_cli_args(args).create_model_config())
        asyncio.run(init_render_app_state(config, app.state, args))
        with TestClient(app) as client:
            bodies = [{"model": "mine", "messages": talk} for talk in talks]
            answers = [client.post("/v1/chat/completions/render", json=body) for body in bodies]
        found.append([answer.json()["token_ids"] for answer in answers])
    out.write_text(json.dumps(found))
