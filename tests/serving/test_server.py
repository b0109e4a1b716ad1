"""A served model gives what one device gives: forwards, tokens, caches that live over several requests, streams, many threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist

import autotp
from autotp.errors import InputError, PlanError
from tests.integrations.subjects import llama
from tests.serving.served import GREEDY, PROMPTS, OnlyOnRank0, apart, caught, ids, masked, models, new_tokens, ranks_value, summed

#: (model, sizes, ranks): even, padded and fused heads, and padded over 3 ranks.
CASES = [("llama", (8, 4), 2), ("llama", (6, 3), 2), ("gpt2", (), 2), ("llama", (8, 4), 3)]


def answers(name: str, sizes: tuple[int, ...]) -> dict[str, Any] | str:
    one, model = models(name, *sizes)
    prompt = ids()
    found: dict[str, Any] = {}
    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return "followed"
        found["forward"] = apart(server(prompt), one(prompt))
        for kind, options in {"greedy": {}, "beams": {"num_beams": 3}, "static": {"cache_implementation": "static"}}.items():
            given = masked(prompt) | GREEDY | options
            found[kind] = torch.equal(server.generate(prompt, **given), one.generate(prompt, **given))
        for kind in ("sampled", "sampled again"):
            given = masked(prompt) | {"do_sample": True, "max_new_tokens": 12, "top_k": 0}
            torch.manual_seed(7)
            drawn = server.generate(prompt, **given)
            torch.manual_seed(7)
            found[kind] = torch.equal(drawn, one.generate(prompt, **given))
        found["streamed"] = [int(t) for t in server.stream(prompt, **masked(prompt), **GREEDY)] == new_tokens(one, PROMPTS[0])
    found["after"] = caught(lambda: server(prompt))
    return found


@pytest.mark.parametrize(("name", "sizes", "world"), CASES)
def test_the_answers_are_those_of_one_device(pool, name, sizes, world):
    found, *others = pool.run(answers, name, sizes, world=world)
    assert others == ["followed"] * (world - 1)
    assert found.pop("forward") < 1e-9
    after = found.pop("after")
    assert after[0] == "InputError" and "it was closed" in after[1]
    assert found == dict.fromkeys(found, True) and len(found) == 6


@torch.no_grad()
def caches() -> dict[str, Any] | None:
    """What a request returns lives on every rank, and so does a cache that a request brings: each rank has its own heads in it."""
    from transformers import StaticCache

    one, model = models("llama", 6, 3)
    prompt = ids(5, 6, 7, 8, 9, 10)
    wanted = one(prompt)
    found: dict[str, Any] = {}
    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return None
        first = server(prompt[:, :4], use_cache=True)
        last = server(prompt[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        found["two requests"] = float((last.logits - wanted.logits[:, 4:]).abs().max())
        static = StaticCache(config=model.config, max_cache_len=32)
        for length in (6, 3, 5):  # a request, and two more in the same memory
            out = server(prompt[:, :length], past_key_values=static, use_cache=True)
            found[f"static {length}"] = float((out.logits - wanted.logits[:, :length]).abs().max())
            server.run(reset, static)
        found["held"] = server.run(held)
        del first, last, static, out
        server.run(ranks_value)
        found["let go of"] = server.run(held)
        value = server.run(ranks_value)
        caught(lambda: server.run(ranks_value, OnlyOnRank0()))  # a request that fails takes no results with it
        found["sum of the ranks' values"] = float(server.run(summed, value))
        found["sum of copies"] = float(server.run(summed, value.clone()))
        found["only here"] = caught(lambda: server.run(summed, server.run(only_on_rank_0)))
        dynamic = server(prompt[:, :4], use_cache=True).past_key_values
        dynamic.crop(-2)  # on rank 0 alone
        found["cropped here"] = caught(lambda: server(prompt[:, 4:], past_key_values=dynamic))
        value += 1
        found["changed here"] = caught(lambda: server.run(summed, value))
        found["filled elsewhere"] = caught(lambda: server(prompt, past_key_values=one(prompt, use_cache=True).past_key_values))
        found["next"] = apart(server(prompt), wanted)
    return found


def reset(model: Any, cache: Any) -> None:
    cache.reset()


def only_on_rank_0(model: Any) -> Any:
    return torch.ones(1) if dist.get_rank() == 0 else (torch.ones(1), torch.ones(2))


def held(model: Any) -> int:
    """How many things rank 1 keeps for rank 0."""
    import gc

    from autotp.serving.parcels import Kept

    number = torch.tensor([sum(len(k._values) for k in gc.get_objects() if type(k) is Kept and not k._leads)])
    dist.all_reduce(number)
    return int(number)


def test_what_a_request_returned_can_be_passed_to_the_next(pool):
    found, other = pool.run(caches, world=2)
    assert other is None
    assert found.pop("sum of the ranks' values") == 1.0
    assert found.pop("sum of copies") == 0.0  # a control: rank 0's number on both ranks
    assert found.pop("let go of") < found.pop("held")
    refused = {name: found.pop(name) for name in ("cropped here", "changed here", "filled elsewhere", "only here")}
    assert {kind for kind, _ in refused.values()} == {"InputError"}
    assert "holds 2 positions on rank 0 and 4 on another rank" in refused["cropped here"][1]
    assert "is not on every rank" in refused["only here"][1]
    assert "changed on rank 0 alone" in refused["changed here"][1] and "already holds rank 0's part" in refused["filled elsewhere"][1]
    assert max(found.values()) < 1e-9 and len(found) == 5


def streams() -> dict[str, Any] | None:
    one, model = models()
    prompt = ids()
    wanted = new_tokens(one, PROMPTS[0])
    given = masked(prompt) | GREEDY
    found: dict[str, Any] = {}
    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return None
        long = server.stream(prompt, **(given | {"max_new_tokens": 50}))
        waiting = server.stream(prompt, **given)
        never = server.stream(prompt, **given)
        never.close()
        begun = [int(next(long)) for _ in range(3)]
        long.close()
        found["cancelled"] = [*begun, *map(int, long)]
        found["waited"] = list(map(int, waiting))
        found["cancelled before its turn"] = list(map(int, never))
        found["rows"] = torch.stack(list(server.stream(torch.tensor([[5, 6, 7], [9, 9, 9]]), **GREEDY))).T.tolist()
        found["refused"] = caught(lambda: list(server.stream(prompt, num_beams=2, **given)))
        found["bad"] = caught(lambda: list(server.stream(ids(99), **given)))
        with server.stream(prompt, **(given | {"max_new_tokens": 40})) as left:
            next(left)
        found["left"] = len(list(left))
        seen = Seen()
        server.generate(prompt, streamer=seen, **given)
        found["streamer"] = seen.tokens
        found["forward"] = apart(server(prompt), one(prompt))
    return found | {"wanted": wanted, "wanted rows": [wanted, new_tokens(one, [9, 9, 9])]}


class Seen:
    """A streamer of a user's."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Any) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streams_end_at_the_same_token_on_all_ranks(pool):
    found, _ = pool.run(streams, world=2)
    wanted = found["wanted"]
    assert found["cancelled"][:3] == wanted[:3] and len(found["cancelled"]) < 8
    assert found["waited"] == wanted and found["cancelled before its turn"] == []
    assert found["rows"] == found["wanted rows"]
    assert found["refused"][0] == "ValueError" and "beam" in found["refused"][1]
    assert found["bad"][0] == "IndexError"
    assert found["left"] < 8
    assert found["streamer"] == [*PROMPTS[0], *wanted, -1]
    assert found["forward"] < 1e-9


def threads() -> list[bool] | None:
    """Eight threads at once: each gets its own tokens."""
    one, model = models()
    found: list[bool] = [False] * len(PROMPTS)

    def work(i: int) -> None:
        prompt = torch.tensor([PROMPTS[i]])
        made = [server.generate(prompt, **masked(prompt), **GREEDY)[0, prompt.shape[1] :].tolist() for _ in range(2)]
        found[i] = made == [wanted[i]] * 2

    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return None
        wanted = [new_tokens(one, prompt) for prompt in PROMPTS]
        workers = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    return found


def test_threads_take_turns(pool):
    found, _ = pool.run(threads, world=2)
    assert found == [True] * 8


def settings_of_rank_0() -> list[bool]:
    """What rank 0 puts into its `generation_config` holds on all ranks, and its clock ends a generation on all of them."""
    one, model = models()
    prompt = ids()
    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return []
        for _ in range(6):  # later calls are not compared between ranks
            server(prompt)
        equal = []
        for name, value in (("repetition_penalty", 1.8), ("max_new_tokens", 5), ("temperature", 0.5)):
            for each in (one, model):
                setattr(each.generation_config, name, value)
            given = masked(prompt) | {"do_sample": name == "temperature"}
            torch.manual_seed(0)
            wanted = one.generate(prompt, **given)
            torch.manual_seed(0)
            equal.append(torch.equal(server.generate(prompt, **given), wanted))
        short = [server.generate(prompt, **masked(prompt), max_new_tokens=40, max_time=0.05).shape[1] for _ in range(6)]
        long = server.generate(prompt, **masked(prompt), max_new_tokens=9, max_time=600.0).shape[1]
        return [*equal, max(short) < prompt.shape[1] + 40, long == prompt.shape[1] + 9]


def test_settings_of_rank_0_hold_on_all(pool):
    found, _ = pool.run(settings_of_rank_0, world=2)
    assert found == [True] * 5


class Leaves:
    """A client that goes away at its first token."""

    def put(self, value: Any) -> None:
        """Raise."""
        raise OSError("client gone")

    def end(self) -> None:
        """Never called."""


def after_a_client_that_left() -> int:
    """Ranks count the calls whose inputs they compare; a request that ends early on one must not set them apart."""
    one, model = models()
    prompt = ids()
    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return 0
        assert caught(lambda: server.generate(prompt, streamer=Leaves(), **masked(prompt), **GREEDY))[0] == "OSError"
        wanted = one.generate(prompt, **masked(prompt), **GREEDY)
        return sum(torch.equal(server.generate(prompt, **masked(prompt), **GREEDY), wanted) for _ in range(40))


def test_requests_after_a_client_that_left(pool):
    assert pool.run(after_a_client_that_left, world=2) == [40, 0]


def past_the_server() -> Any:
    """A control: a call of the model itself while it is served, between requests, and afterwards."""
    one, model = models()
    prompt = ids()
    with autotp.serve(model, timeout=60) as server:
        if not server.leads:
            return apart(model(prompt), one(prompt))
        cut = next(p for p in model.parameters() if p.to_local().shape != p.shape)
        between = [
            caught(work)
            for work in (
                lambda: model(prompt),
                cut.full_tensor,
                lambda: float(cut.norm()),
                lambda: cut.data.mul_(2),
                lambda: model.load_state_dict(model.state_dict()),
                lambda: autotp.full_state_dict(model),
                lambda: autotp.save_pretrained(model, "nowhere"),
            )
        ]
        batch = caught(lambda: server.generate_batch([[1, 2]], max_new_tokens=2))
        again = caught(lambda: autotp.serve(model).__enter__())
    return between, batch, again, apart(model(prompt), one(prompt))


def test_a_call_past_the_server_is_refused(pool):
    (between, batch, again, after), other = pool.run(past_the_server, world=2)
    for kind, text in between:
        assert kind in ("AutoTPError", "RuntimeError") and "used past its server" in text  # load_state_dict makes one error of several
    assert batch[0] == "InputError" and "give the paged cache a size" in batch[1]
    assert again[0] == "InputError" and "served already" in again[1]
    assert max(after, other) < 1e-9


def ways_out() -> Any:
    """A block that raises on rank 0 lets the others go."""
    one, model = models()
    prompt = ids()

    def block() -> None:
        with autotp.serve(model, timeout=60) as server:
            server(prompt)  # on rank 1 after rank 0 has left
            raise KeyError("in the block")

    raised = caught(block)
    server = autotp.serve(model, timeout=60)
    early = caught(lambda: server(prompt))
    with server:
        served = apart(server(prompt), one(prompt)) if server.leads else 0.0
    return raised, early, served, apart(model(prompt), one(prompt))


def test_every_way_out_of_the_block(pool):
    (raised, early, served, after), (other, _, _, others) = pool.run(ways_out, world=2)
    assert raised == ("KeyError", "'in the block'")
    assert other[0] == "InputError" and "put what rank 0 does under `if server.leads:`" in other[1]
    assert early[0] == "InputError" and "not entered" in early[1]
    assert max(served, after, others) < 1e-9


def test_a_model_on_one_rank_is_served_alike(pool):
    assert pool.run(on_one_rank, world=1) == [(True, True, 8, True)]


def on_one_rank() -> Any:
    from transformers import ContinuousBatchingConfig

    one, model = models()
    prompt = ids()
    with autotp.serve(model) as server:
        tokens = server.generate(prompt, **masked(prompt), **GREEDY)
        streamed = list(server.stream(prompt, **masked(prompt), **GREEDY))
        sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # by default it takes most of the memory
        with server.batching(continuous_batching_config=sizes) as batch:
            batched = batch.generate(PROMPTS[0], max_new_tokens=8)
        return (
            server.leads,
            torch.equal(tokens, one.generate(prompt, **masked(prompt), **GREEDY)),
            len(streamed),
            batched == tokens[0, 3:].tolist(),
        )


def test_what_cannot_be_served():
    with pytest.raises(PlanError, match=r"is not parallel: call autotp\.parallelize"):
        autotp.serve(llama())
    with pytest.raises(InputError, match="serve: timeout"):
        autotp.serve(llama(), timeout=0)
