"""`generate_batch` of a parallel model gives the tokens of one device, whatever share of the key heads a rank has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import autotp
from tests.serving.served import PROMPTS, caught, models, new_tokens
from tests.support.slow import swept


def config(**options: Any) -> Any:
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(**({"num_blocks": 16, "max_batch_tokens": 64} | options))


def tokens(name: str, sizes: tuple[int, ...]) -> Any:
    one, model = models(name, *sizes)
    before = dict(vars(model.config))
    found = []
    for _ in range(2):
        made = model.generate_batch([list(p) for p in PROMPTS], max_new_tokens=8, continuous_batching_config=config())
        found.append([output.generated_tokens for output in made.values()])
    wanted = [new_tokens(one, prompt) for prompt in PROMPTS]
    return found == [wanted] * 2, vars(model.config) == before


#: Heads that are cut evenly, padded, shared by ranks, and those of a model that transformers has no plan for, padded.
@pytest.mark.parametrize(
    ("name", "sizes", "world"),
    [
        pytest.param("llama", (8, 4), 2, marks=pytest.mark.sweep),
        ("llama", (6, 3), 2),
        ("llama", (8, 2), 4),
        pytest.param("gpt2", (), 2, marks=pytest.mark.sweep),
        pytest.param("gpt2", (), 4, marks=pytest.mark.slow),
    ],
)
def test_generate_batch(pool, name, sizes, world):
    assert pool.run(tokens, name, sizes, world=world) == [(True, True)] * world


def heads() -> Any:
    """The key heads that transformers works out by itself, and those that a rank has."""
    from autotp.integrations.continuous import _cached_heads

    _, model = models("llama", 8, 2)
    return model.config.num_key_value_heads, _cached_heads(model.eval())


def test_what_transformers_works_out_is_another_number(pool):
    assert pool.run(heads, world=4) == [(2, 1)] * 4


def refused() -> Any:
    _, model = models("llama", 6, 3)
    twin = copy.deepcopy(model)
    mine = config()
    dist.barrier()  # it makes a group: ranks that come at once connect at once
    twin.init_continuous_batching(continuous_batching_config=mine).destroy()
    kept = mine.auto_switch_to_flash, twin.init_continuous_batching._model is twin
    eager, _ = models("llama", 6, 3)
    eager.set_attn_implementation("eager")
    autotp.parallelize(eager, init_device_mesh("cpu", (dist.get_world_size(),)), check="graph")
    unlike = caught(lambda: model.generate_batch([[1]] * (1 + dist.get_rank()), max_new_tokens=2, continuous_batching_config=config()))
    return kept, caught(lambda: eager.generate_batch([[1, 2]], max_new_tokens=2)), unlike


def test_what_is_refused(pool):
    for kept, eager, unlike in pool.run(refused, world=2):
        assert kept == (True, True)
        assert eager[0] == "AutoTPError" and "attn_implementation='sdpa'" in eager[1]
        assert unlike[0] == "AutoTPError" and "different inputs on different ranks: argument 'num_requests'" in unlike[1]


def statics(name: str, sizes: tuple[int, ...]) -> Any:
    """One static cache over several `generate`, and over several forwards."""
    from transformers import StaticCache

    one, model = models(name, *sizes)
    found = []
    for prompt in PROMPTS:
        given = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(given), "max_new_tokens": 8, "do_sample": False}
        made = model.generate(given, cache_implementation="static", **options)
        found.append(torch.equal(made, one.generate(given, **options)))
    cache = StaticCache(config=model.config, max_cache_len=32)
    for prompt in PROMPTS[:4]:
        given = torch.tensor([prompt])
        cache.reset()
        out = model(given, past_key_values=cache, use_cache=True)
        found.append(float((out.logits - one(given).logits).detach().abs().max()) < 1e-9)
    return found


@pytest.mark.parametrize(("name", "sizes", "world"), swept([("llama", (6, 3), 2), ("llama", (8, 2), 4), ("gpt2", (), 2)], ("gpt2", (), 2)))
def test_a_static_cache_serves_several_requests(pool, name, sizes, world):
    for found in pool.run(statics, name, sizes, world=world):
        assert found == [True] * 12
