"""`recipe=`: what it covers is followed, the rest is planned; what cannot be proven is an error, or is said in the plan."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.errors import InputError, RecipeError, TraceError
from autotp.plan.expressions import notation
from autotp.testing import NotEquivalent
from tests.support.families import transformer
from tests.support.pooled import PLAIN, equivalent
from tests.support.ranks import Pool

WHOLE_MLP = {"whole": {"mlp.gate_proj.weight": "i e", "mlp.up_proj.weight": "i e", "mlp.down_proj.weight": "e i"}}


class Unseen(nn.Module):
    """An MLP behind code that no tracer can follow."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.width = width
        self.rise = nn.Linear(width, hidden)
        self.fall = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.from_numpy(np.sign(x.detach().numpy()))
        return self.fall(torch.tanh(self.rise(x * kept))) * self.scale + x


UNSEEN = {
    "shard": ["i"],
    "column": {"rise.weight": "i e", "rise.bias": "i"},
    "row": {"fall.weight": "e i", "fall.bias": "e"},
    "whole": {"scale": "e"},
}


class Summing(Unseen):
    """The same without a residual: its result is a sum over the hidden width."""

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.from_numpy(np.sign(x.detach().numpy()))
        return self.fall(torch.tanh(self.rise(x * kept * self.scale)))


def summing() -> nn.Module:
    torch.manual_seed(3)
    return Summing()


def unseen() -> nn.Module:
    torch.manual_seed(3)
    return Unseen()


def unseen_inputs(_: nn.Module) -> dict[str, Any]:
    return {"x": torch.randn(4, 12, generator=torch.Generator().manual_seed(0))}


def test_covers_a_part_and_the_rest_is_planned():
    model = transformer("llama")
    free, plan = autotp.plan(model, tp=2), autotp.plan(model, tp=2, recipe=WHOLE_MLP)
    for name, param in plan.params.items():
        if ".mlp." in name:
            assert param.layout.dim is None
            assert param.reason == "the recipe keeps it whole"
        else:
            assert param == free.params[name]
    assert free.params["model.layers.0.mlp.up_proj.weight"].layout.dim == 0


def test_one_block_only():
    """Blocks that the recipe treats differently are not traced as one."""
    plan = autotp.plan(transformer("llama"), tp=2, recipe={"whole": {"layers.1.mlp.*.weight": "a b"}})
    dims = {n.partition("layers.")[2]: p.layout.dim for n, p in plan.params.items() if "up_proj" in n}
    assert dims == {"0.mlp.up_proj.weight": 0, "1.mlp.up_proj.weight": None}


@pytest.mark.sweep
def test_pieces_other_than_the_planners():
    """6 heads on 3 key-value heads over 4 ranks: the planner cuts groups in two; a recipe may pad the key-value heads instead."""
    model = transformer("llama", num_attention_heads=6, num_key_value_heads=3, hidden_size=48, head_dim=8)
    padded = autotp.Recipe.load({"extends": "llama", "shard": ["kv", "i", "v"]})
    ours, theirs = autotp.plan(model, tp=4, recipe="llama"), autotp.plan(model, tp=4, recipe=padded)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert ours.params[name].layout.local_shape == (16, 48)
    assert notation(theirs.params[name].layout.dims[0]) == "(kv* group d)"
    assert theirs.params[name].layout.local_shape == (16, 48)
    assert autotp.plan(model, tp=4).params[name].layout.runs(0) == ours.params[name].layout.runs(0)


def test_part_is_right_on_real_ranks(pool: Pool):
    found = equivalent(pool, partial(transformer, "llama"), recipe=WHOLE_MLP, needs=(*PLAIN, "loss", "generation"))
    assert not any(".mlp." in name for name in found.sharded)
    assert any("q_proj" in name for name in found.sharded)


def test_no_trace_is_needed_where_all_is_covered(pool: Pool):
    with pytest.raises(TraceError):
        autotp.plan(unseen(), tp=2, example_inputs=unseen_inputs(unseen()))
    plan = autotp.plan(unseen(), tp=2, recipe=UNSEEN)
    assert plan.params["rise.weight"].layout.local_shape == (10, 12)
    assert [n.partition(":")[0] for n in plan.notes] == ["not proven"]
    found = equivalent(pool, unseen, unseen_inputs, told=False, recipe=UNSEEN, needs=PLAIN)
    assert found.sharded == {"rise.weight", "rise.bias", "fall.weight"}


def test_untraced_and_wrong_is_seen_by_the_numbers(pool: Pool):
    """The control of the test above: a gradient that is summed although it is whole."""
    wrong = {**UNSEEN, "whole": {}, "inside": {"scale": "e"}}
    with pytest.raises(NotEquivalent) as caught:
        equivalent(pool, unseen, unseen_inputs, told=False, recipe=wrong)
    assert caught.value.found.aspects["gradients"].wrong == ("scale",)


def test_no_trace_and_not_all_covered():
    part = {**UNSEEN, "whole": {}}
    with pytest.raises(TraceError, match=r"does not cover 1 parameters \(scale\), and no trace can plan them"):
        autotp.plan(unseen(), tp=2, recipe=part)


def test_an_attribute_that_looks_cut_has_to_be_named_without_a_trace():
    class Careful(Unseen):
        def forward(self, x: Tensor) -> Tensor:
            kept = torch.from_numpy(np.sign(x.detach().numpy()))
            h = torch.tanh(self.rise(x * kept)).reshape(len(x), self.hidden)
            return self.fall(h) * self.scale + x

    model = Careful()
    model.hidden = 20
    with pytest.raises(RecipeError, match="hidden: 20 is also the size of something that is cut, and the code of Careful reads it"):
        autotp.plan(model, tp=2, recipe=UNSEEN)
    plan = autotp.plan(model, tp=2, recipe={**UNSEEN, "attributes": {"hidden": "i"}})
    assert plan.attributes == {"hidden": (20, 10)}


def test_norm_over_what_is_cut_wants_a_trace():
    class Normed(Unseen):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(20)

    with pytest.raises(RecipeError, match="part of a RMSNorm, which may compute across what is cut"):
        autotp.plan(Normed(), tp=2, recipe={**UNSEEN, "part": {"norm.weight": "i"}})


def test_a_bias_of_a_partial_sum_is_added_once(pool: Pool):
    """A sum that leaves as the result of the module around it: each rank's summand would have the bias."""
    region = {
        "shard": ["i"],
        "part": {"rise.weight": "i e", "rise.bias": "i", "fall.weight": "e i"},
        "arguments": {"": {"x": "enter"}},
        "results": {"": {"": "leave"}},
    }
    wrong = {**region, "inside": {"fall.bias": "e", "scale": "e"}}
    with pytest.raises(RecipeError, match=r"fall\.bias: is inside, and its weight is part .* under row: it is added once"):
        autotp.plan(summing(), tp=2, recipe=wrong)
    right = {**region, "row": {"fall.bias": "e"}, "inside": {"scale": "e"}}
    equivalent(pool, summing, unseen_inputs, told=False, recipe=right, needs=PLAIN)


def test_unsafe_is_the_only_way_past_the_proof(pool: Pool):
    """Cutting the residual stream's width of a head is not what the axes give; cutting head widths is wrong, and unsafe lets it through."""
    recipe = autotp.Recipe.load("gpt_neox").to_dict()
    recipe |= {"shard": ["d", "i", "v"], "results": {}, "attributes": {"attention.head_size": "d"}}
    model = transformer("gpt_neox")
    with pytest.raises(RecipeError, match="is not proven"):
        autotp.plan(model, tp=2, recipe=recipe)
    unsafe = {**recipe, "unsafe": True, "reason": "a test of mistakes"}
    plan = autotp.plan(model, tp=2, recipe=unsafe)
    assert plan.notes == ("UNSAFE: the recipe gpt_neox is not proven: a test of mistakes",)
    assert "UNSAFE" in str(plan)
    with pytest.raises(NotEquivalent) as caught:
        equivalent(pool, partial(transformer, "gpt_neox"), recipe=unsafe)
    assert "outputs" in caught.value.found.failed  # and the numbers show why there is a proof


def test_one_rank_checks_too():
    with pytest.raises(RecipeError, match="no parameter"):
        autotp.plan(transformer("llama"), tp=1, recipe="gpt2")
    assert autotp.plan(transformer("llama"), tp=1, recipe="llama").tp == 1


def test_ranks_raise_the_same_error(pool: Pool):
    with pytest.raises(RecipeError, match=r"gpt2\.yaml:16:3: no parameter of LlamaForCausalLM is called wte\.weight"):
        equivalent(pool, partial(transformer, "llama"), recipe="gpt2")


def test_bad_recipes():
    model = transformer("llama")
    with pytest.raises(RecipeError, match=r"no recipe 'lama': near it: llama(?!, llama)"):
        autotp.plan(model, tp=2, recipe="lama")
    with pytest.raises(RecipeError, match="no such recipe file"):
        autotp.plan(model, tp=2, recipe="lama.yaml")
    with pytest.raises(RecipeError, match="got int"):
        autotp.plan(model, tp=2, recipe=3)
    with pytest.raises(InputError, match="tp must be"):
        autotp.plan(model, tp=0, recipe="llama")


def test_strict_and_recipe():
    """`strict` refuses what the recipe keeps whole, as what the planner does."""
    plan = autotp.plan(transformer("llama"), tp=2, recipe=WHOLE_MLP)
    assert "model.layers.0.mlp.down_proj.weight" in plan.replicated_products
