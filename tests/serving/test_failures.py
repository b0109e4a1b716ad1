"""A request that fails is one error on rank 0, and the next one works; where the ranks stay apart, the server says that it is dead."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.serving.together import Together
from autotp.serving.wires import Wire
from tests.serving.served import OnlyOnRank0, apart, caught, fails, ids, models, ranks_value


def failures() -> Any:
    one, model = models()
    prompt = ids()
    wanted = one(prompt)
    found: dict[str, tuple[str, str]] = {}
    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return None
        requests = {
            "a local function": lambda: server.run(lambda m: m),
            "a module": lambda: server.run(ranks_value, nn.Linear(1, 1)),
            "a parameter": lambda: server.run(ranks_value, model.model.norm.weight),
            "a parameter in an object": lambda: server.run(ranks_value, Holds(model.model.norm.weight)),
            "received by rank 0 alone": lambda: server.run(ranks_value, OnlyOnRank0()),
            "a token that is none": lambda: server(ids(99)),
            "no argument": lambda: server(),
            "no method": lambda: server.call("nothing"),
            "on rank 0, at once": lambda: server.run(fails, prompt, 0),
            "on rank 1, at once": lambda: server.run(fails, prompt, 1),
            "on rank 0, later": lambda: server.run(fails, prompt, 0, after=2),
            "on rank 1, later": lambda: server.run(fails, prompt, 1, after=2),
            "on the last rank": lambda: server.run(fails, prompt, dist.get_world_size() - 1, after=1),
            "interrupted": lambda: server.run(fails, prompt, 0, after=1, error=KeyboardInterrupt),
            "refused on rank 1": lambda: server.run(refuses_on_1, prompt),
        }
        with torch.autocast("cpu"):
            found["autocast"] = caught(lambda: server(prompt))
        for name, request in requests.items():
            found[name] = caught(request)
            assert apart(server(prompt), wanted) < 1e-9, name
    return found


class Holds:
    def __init__(self, value: Any) -> None:
        self.value = value


def refuses_on_1(model: Any, prompt: Any) -> Any:
    """A refusal of autotp on one rank: its config says something else than when the plan was made."""
    own = model.config._attn_implementation
    if dist.get_rank() == 1:
        model.config._attn_implementation = "eager"
    try:
        return model(prompt).logits
    finally:
        model.config._attn_implementation = own


#: request → the error on rank 0, and a part of its text.
WANTED = {
    "autocast": ("InputError", "torch.autocast holds on rank 0 alone"),
    "a local function": ("InputError", "cannot be sent to the other ranks"),
    "a module": ("InputError", "argument 0 is a module (Linear)"),
    "a parameter": ("InputError", "argument 0 is a DTensor"),
    "a parameter in an object": ("InputError", "an object in it is a DTensor"),
    "received by rank 0 alone": ("AutoTPError", "rank 1 failed with ValueError: this process cannot make it"),
    "a token that is none": ("IndexError", "index out of range"),
    "no argument": ("ValueError", "input_ids"),
    "no method": ("AttributeError", "nothing"),
    "on rank 0, at once": ("ValueError", "on purpose on rank 0"),
    "on rank 1, at once": ("AutoTPError", "rank 1 failed with ValueError: on purpose on rank 1"),
    "on rank 0, later": ("ValueError", "on purpose on rank 0"),
    "on rank 1, later": ("AutoTPError", "rank 1 failed with ValueError: on purpose on rank 1"),
    "on the last rank": ("AutoTPError", "failed with ValueError: on purpose on rank"),
    "interrupted": ("KeyboardInterrupt", "on purpose on rank 0"),
    "refused on rank 1": ("ChangedError", "_attn_implementation"),
}


@pytest.mark.parametrize("world", [2, 3])
def test_a_failed_request_is_one_error_and_the_next_one_works(pool, world):
    found = pool.run(failures, world=world)[0]
    assert found.keys() == WANTED.keys()
    for name, (kind, text) in WANTED.items():
        assert found[name][0] == kind and text in found[name][1], (name, found[name])


def waits_in_vain(timeout: float) -> Any:
    """A control: a rank that fails keeps its end of the wire, so that the others wait for it until the timeout."""
    _, model = models()
    dist.barrier()
    give_up, Wire.give_up = Wire.give_up, lambda self: setattr(self, "given_up", True)
    began = time.monotonic()
    try:
        with autotp.serve(model, timeout=timeout) as server:
            first = caught(lambda: server.run(fails, ids(), 1, after=1))
            return first, time.monotonic() - began
    except autotp.AutoTPError as error:
        return type(error).__name__, str(error)
    finally:
        Wire.give_up = give_up


def test_without_giving_up_the_others_wait_until_the_timeout(pool):
    (first, took), _ = pool.run(waits_in_vain, 3.0, world=2)
    assert first[0] in ("LostRankError", "AutoTPError") and took >= 3.0


def leaves(model: Any) -> None:
    if dist.get_rank() == 1:
        raise SystemExit("rank 1 ends")


def without_rank_1() -> Any:
    _, model = models()
    server = autotp.serve(model, timeout=20)
    began = time.monotonic()

    def block() -> Any:
        with server:
            return [caught(lambda: server.run(leaves)), caught(lambda: server(ids())), caught(lambda: server.generate(ids()))]

    found = block() if dist.get_rank() == 0 else caught(block)
    return found, time.monotonic() - began


def test_a_server_without_one_of_its_ranks_is_dead_and_says_so(pool):
    (found, took), (other, _) = pool.run(without_rank_1, world=2)
    assert other == ("SystemExit", "rank 1 ends") and took < 15
    assert [kind for kind, _ in found] == ["LostRankError"] * 3
    assert all(text.startswith("the server is dead: rank 0 waited for a rank") for _, text in found)


def silent(timeout: float, *, signs: bool) -> Any:
    """Rank 0 does nothing for longer than the timeout."""
    one, model = models()
    dist.barrier()
    give, Together._give_signs = Together._give_signs, (Together._give_signs if signs else lambda self: None)

    def block() -> Any:
        with autotp.serve(model, timeout=timeout) as server:
            if server.leads:
                time.sleep(2.5 * timeout)
                return apart(server(ids()), one(ids()))
        return None

    try:
        found = caught(block)
        return block() if found[0] == "nothing" else found
    finally:
        Together._give_signs = give


def test_followers_wait_as_long_as_rank_0_gives_signs_of_life(pool):
    assert pool.run(silent, 2.0, signs=True, world=2)[0] < 1e-9
    first, other = pool.run(silent, 2.0, signs=False, world=2)  # a control
    assert first[0] == other[0] == "LostRankError"
    assert "rank 1 waited for rank 0, which gave no sign of life within 2 s" in other[1]


def one_by_one() -> Any:
    """Each rank comes in vain once; then they meet."""
    one, model = models()
    dist.barrier()
    found = []
    for rank in (0, 1):
        if dist.get_rank() == rank:
            found.append(caught(lambda: autotp.serve(model, timeout=2).__enter__()))
        dist.barrier()
    with autotp.serve(model, timeout=20) as server:
        return found[0], apart(server(ids()), one(ids())) if server.leads else 0.0


def test_a_server_that_not_every_rank_enters(pool):
    (found, after), (other, _) = pool.run(one_by_one, world=2)
    assert found[0] == other[0] == "LostRankError" and after < 1e-9
    assert "the server is dead: rank 0 waited for a rank" in found[1] and "rank 1 waited for rank 0" in other[1]
