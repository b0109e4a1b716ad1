"""What the strategies draw is valid, varied, and shrinks to the plainest example."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings

from autotp.errors import InputError
from autotp.plan.expressions import Expr, size
from autotp.plan.layout import Layout
from autotp.plan.notation import parse, spelled
from autotp.testing import strategies as tps
from autotp.testing.architectures.architecture import Architecture
from autotp.testing.architectures.spec import Experts, Extra, Mlp, Norms, Position, Product, Projection, QKNorm, Sizes, Trap
from autotp.testing.proving import variants
from autotp.testing.strategies import Geometry
from tests.support.slow import swept

QUICK = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(QUICK, max_examples=400, phases=[Phase.generate])
FIND = settings(QUICK, max_examples=2000)


@QUICK
@given(tps.geometries(heads=10, even_size=True))
def test_geometries(g: Geometry) -> None:
    assert g.kv >= 1 and g.heads == g.kv * g.group <= 10 and g.size % 2 == 0 and g.width > 1 and g.vocab > 3


def test_geometries_divide_nothing_in_particular() -> None:
    for tp in range(2, 9):
        g = find(tps.geometries(), lambda g, tp=tp: g.heads % tp and g.width % tp and g.vocab % tp and g.group > 1, settings=FIND)
        assert g.heads % tp
    assert find(tps.geometries(), lambda g: g.kv == 1 and g.group > 1, settings=FIND).group == 2


@QUICK
@given(tps.exprs(depth=5) | tps.exprs(depth=5, sharded=False))
def test_dims_are_short(expr: Expr) -> None:
    assert 1 <= size(expr) <= 2048  # so a test that goes through every piece takes no minutes


@QUICK
@given(tps.layouts())
def test_layouts(layout: Layout) -> None:
    assert max(layout.shape) <= 2048
    full = torch.arange(prod(layout.shape)).reshape(layout.shape)
    assert torch.equal(layout.unshard([layout.shard(full, rank) for rank in range(layout.tp)]), full)


@QUICK
@given(tps.notations())
def test_notations(text: str) -> None:
    assert " ".join(map(spelled, parse(text))) == text


@QUICK
@given(tps.tensors((2, 3)), tps.tensors(edges=True))
def test_tensors(fixed: torch.Tensor, free: torch.Tensor) -> None:
    assert fixed.shape == (2, 3) and bool(fixed.isfinite().all()) and fixed.dtype is free.dtype is torch.float64


def test_tensors_have_edges() -> None:
    assert find(tps.tensors((2,), edges=True), lambda t: bool(t.isnan().any()), settings=FIND).isnan().any()


@QUICK
@given(tps.meshes(ranks=8))
def test_meshes(mesh: tuple[tuple[int, ...], tuple[str, ...]]) -> None:
    shape, names = mesh
    assert len(shape) == len(names) == len(set(names)) and "tp" in names and 1 <= prod(shape) <= 8


def test_degrees() -> None:
    seen: set[int] = set()

    @MANY
    @given(tps.degrees(most=4))
    def draw(tp: int) -> None:
        seen.add(tp)

    draw()
    assert seen == {2, 3, 4}


@pytest.mark.parametrize("model_type", swept(["llama", "gpt2", "falcon", "t5"], "falcon"))
def test_configs_are_valid_and_odd(model_type: str) -> None:
    from autotp.testing.inputs import tiny_inputs
    from autotp.testing.tiny.models import tiny_model

    heads: set[int] = set()
    switched: set[Any] = set()

    @settings(QUICK, max_examples=16, phases=[Phase.generate])
    @given(tps.configs(model_type))
    def draw(config: Any) -> None:
        assert config.model_type == model_type
        tiny_inputs(tiny_model(config))
        heads.add(config.num_attention_heads)
        switched.add(config.tie_word_embeddings)

    draw()
    assert len(heads) > 3 and any(n % 2 for n in heads)
    assert switched == ({True} if model_type == "t5" else {True, False})  # T5 ties its embeddings whatever its config says


def test_configs_take_fixed_fields() -> None:
    @settings(QUICK, max_examples=5)
    @given(tps.configs("llama", tie_word_embeddings=True, num_hidden_layers=1))
    def draw(config: Any) -> None:
        assert config.tie_word_embeddings and config.num_hidden_layers == 1

    draw()
    with pytest.raises(InputError, match="no model type 'lama'"):
        find(tps.configs("lama"), lambda c: True, settings=FIND)


def test_architectures_cover_every_variant() -> None:
    seen: Counter[str] = Counter()

    @MANY
    @given(tps.architectures())
    def draw(architecture: Architecture) -> None:
        seen.update(variants(architecture))

    draw()
    for kind in (Projection, Position, QKNorm, Product, Mlp, Experts, Norms, Sizes):
        name = {"Projection": "projection", "QKNorm": "qk_norm"}.get(kind.__name__, kind.__name__.lower())
        assert all(seen[f"{name}={value.value}"] > 3 for value in kind), {v: seen[f"{name}={v.value}"] for v in kind}
    assert not [extra for extra in Extra if not seen[f"extra={extra.value}"]]
    assert all(seen[f"heads={h}"] > 10 for h in ("mha", "gqa", "mqa"))
    trapped = sum(seen[f"trap={trap.value}"] for trap in Trap if trap is not Trap.NONE)
    assert 20 < trapped < 200


def test_architectures_shrink_to_the_plainest() -> None:
    smallest = find(tps.architectures(), lambda a: a.bias, settings=FIND)
    assert (smallest.kv, smallest.group, smallest.layers, smallest.trap, smallest.extras) == (1, 1, 1, Trap.NONE, frozenset())
    assert (smallest.projection, smallest.position) == (Projection.SEPARATE, Position.NONE)
    assert find(tps.architectures(traps=0), lambda a: True, settings=FIND).trap is Trap.NONE
    with pytest.raises(InputError, match="traps is 2"):
        find(tps.architectures(traps=2), lambda a: True, settings=FIND)


@settings(QUICK, max_examples=40)
@given(tps.architectures())
def test_architectures_run_and_are_the_same_each_time(architecture: Architecture) -> None:
    one, two = architecture.build().eval(), architecture.build().eval()
    assert architecture.source() == architecture.source()
    with torch.no_grad():
        a, b = (model(**architecture.inputs()) for model in (one, two))
    a, b = (out["logits"] if architecture.loss else out for out in (a, b))
    assert torch.equal(a, b) and a.shape == (2, 5, architecture.vocab) and bool(a.isfinite().all())
    names = dict(one.named_parameters())
    assert all(names[name].dim() > dim for name, dim in architecture.kept())


def test_names_mean_nothing_and_literals_are_literals() -> None:
    a = Architecture(kv=3, group=2, size=4, sizes=Sizes.LITERALS, names=5)
    assert "view(b, t, 6, 4)" in a.source() and "q_proj" not in a.source() and "attn" not in a.source()
    assert replace(a, names=6).source() != a.source()
    assert "view(b, t, -1, self." in replace(a, sizes=Sizes.SHAPES).source()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"kv": 0}, "kv is 0, wanted at least 1"),
        ({"activation": "step"}, "activation is 'step', wanted one of gelu"),
        ({"size": 3}, "rotary positions want an even size, got 3"),
        ({"projection": Projection.LATENT}, "latent projections want group 1, got 2"),
        ({"projection": Projection.GROUPED, "qk_norm": QKNorm.FULL}, "got grouped"),
        ({"extras": frozenset({Extra.SINK})}, "a sink wants written products"),
        ({"extras": frozenset({Extra.LORA}), "projection": Projection.CONCAT}, "lora wants separate projections"),
    ],
)
def test_architectures_that_exclude_themselves(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        Architecture(**fields)
    assert says in str(caught.value)
