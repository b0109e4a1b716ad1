"""Requests join and leave a batch at every step, and each gets the tokens that it gets alone on one device."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

import autotp
from tests.serving.served import PROMPTS, apart, caught, ids, models, new_tokens
from tests.support.slow import swept


def config(**sizes: int) -> Any:
    """A small cache: by default it takes most of the memory."""
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(**({"num_blocks": 16, "max_batch_tokens": 64} | sizes))


def batches(name: str, sizes: tuple[int, ...]) -> Any:
    one, model = models(name, *sizes)
    wanted = [new_tokens(one, prompt) for prompt in PROMPTS]
    found: list[list[int]] = [[] for _ in PROMPTS]
    refused = {}
    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return None
        with server.batching(continuous_batching_config=config()) as batch:
            long = batch.stream([1, 2, 3], max_new_tokens=50)
            begun = [next(long) for _ in range(2)]

            def work(i: int) -> None:
                found[i] = list(batch.stream(PROMPTS[i], max_new_tokens=8))

            workers = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
            for worker in workers:
                worker.start()
            long.close()
            cancelled = [*begun, *long]
            for prompt, most in (([], 8), ([1, 64], 8), ([-1], 8), ("text", 8), ([1], 0), ([1] * 60, 8), (None, 8)):
                refused[f"{prompt} {most}"] = caught(lambda prompt=prompt, most=most: batch.stream(prompt, max_new_tokens=most))
            for worker in workers:
                worker.join()
            tensor = batch.generate(ids()[0], max_new_tokens=3)
            unread = batch.stream([3, 2, 1], max_new_tokens=50)
        over = caught(lambda: batch.generate([1], max_new_tokens=2))
        left = caught(lambda: list(unread))
        between = apart(server(ids()), one(ids()))
        with server.batching(continuous_batching_config=config()) as batch:
            again = batch.generate(PROMPTS[1], max_new_tokens=8) == wanted[1]
        given = {"max_new_tokens": 8, "continuous_batching_config": config()}
        made = server.generate_batch([list(p) for p in PROMPTS], **given)
        together = [output.generated_tokens for output in made.values()] == wanted
    after = apart(model(ids()), one(ids())) if dist.get_world_size() == 1 else 0.0
    return {
        "equal": found == wanted,
        "cancelled": cancelled == new_tokens(one, [1, 2, 3], max_new_tokens=50)[: len(cancelled)] and len(cancelled) < 50,
        "refused": {kind for kind, _ in refused.values()},
        "tensor": tensor == wanted[0][:3],
        "over": over,
        "left": left,
        "apart": max(between, after),
        "again": again,
        "together": together,
    }


@pytest.mark.parametrize(
    ("name", "sizes", "world"), swept([("llama", (6, 3), 2), ("gpt2", (), 2), ("llama", (8, 4), 3)], ("llama", (8, 4), 3))
)
def test_eight_requests_at_once(pool, name, sizes, world):
    found = pool.run(batches, name, sizes, world=world)[0]
    assert found.pop("apart") < 1e-9
    assert found.pop("refused") == {"InputError"}
    for over in (found.pop("over"), found.pop("left")):
        assert over[0] == "AutoTPError" and "was closed" in over[1]
    assert found == {"equal": True, "cancelled": True, "tensor": True, "again": True, "together": True}


def in_a_small_cache() -> Any:
    """It holds 16 tokens: requests that do not fit together wait, and one that never fits is refused."""
    one, model = models()
    found: list[list[int]] = [[], [], []]
    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return None
        with server.batching(continuous_batching_config=config(num_blocks=4, page_size=4, max_batch_tokens=16)) as batch:
            streams = [batch.stream([1, 2, i], max_new_tokens=8) for i in range(3)]
            found = [list(stream) for stream in streams]
            most = batch.generate([1, 2, 3], max_new_tokens=13)
            refused = [caught(lambda n=n: batch.stream([1, 2, 3], max_new_tokens=n)) for n in (14, None)]
            refused.append(caught(lambda: server(ids())))
    wanted = [new_tokens(one, [1, 2, i]) for i in range(3)]
    return found == wanted, most == new_tokens(one, [1, 2, 3], max_new_tokens=13), refused


def test_requests_that_do_not_fit(pool):
    (found, most, (large, endless, inside)), _ = pool.run(in_a_small_cache, world=2)
    assert found and most
    assert large[0] == endless[0] == inside[0] == "InputError" and "in a request of the server already" in inside[1]
    assert "do not fit into the paged cache, which has 16" in large[1] and "max_new_tokens is None" in endless[1]


def breaks(model: Any) -> None:
    """From now on calls of the model are refused on rank 1."""
    if dist.get_rank() == 1:
        model.config._attn_implementation = "paged|eager"


def mends(model: Any) -> None:
    model.config._attn_implementation = "sdpa"


def broken() -> Any:
    one, model = models("llama", 6, 3)
    found: dict[str, Any] = {}
    with autotp.serve(model, timeout=6) as server:
        if not server.leads:
            return None

        def on_rank_1() -> None:
            with server.batching(continuous_batching_config=config()) as batch:
                found["before"] = batch.generate(PROMPTS[0], max_new_tokens=4) == new_tokens(one, PROMPTS[0])[:4]
                model.config._attn_implementation = "eager"  # on rank 0 alone
                found["request"] = caught(lambda: batch.generate(PROMPTS[0], max_new_tokens=4))
                model.config._attn_implementation = "sdpa"
                found["next request"] = caught(lambda: batch.generate(PROMPTS[0], max_new_tokens=4))

        found["batch"] = caught(on_rank_1)
        found["next"] = apart(server(ids()), one(ids()))
        server.run(breaks)
        found["not begun"] = caught(lambda: server.batching(continuous_batching_config=config()).__enter__())
        server.run(mends)
        found["next batch"] = apart(server(ids()), one(ids()))
    return found


def test_a_batch_that_fails_on_one_rank_fails_once(pool):
    found, _ = pool.run(broken, world=2)
    assert found.pop("before") and max(found.pop("next"), found.pop("next batch")) < 1e-9
    assert {kind for kind, _ in found.values()} <= {"AutoTPError", "ChangedError", "LostRankError"}, found
    assert all("_attn_implementation" in text for name, (_, text) in found.items() if name != "next request"), found
