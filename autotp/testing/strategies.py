"""These Hypothesis strategies draw everything that autotp handles: ranks, layouts, tensors, meshes, configs and models.

    from hypothesis import given
    from autotp.testing import assert_equivalent, strategies as tps

    @given(tps.architectures(), tps.degrees())
    def test_any_model(architecture, tp):
        assert_equivalent(architecture.build, inputs=architecture.inputs(), tp=tp, steps=3)

    @given(tps.configs("llama"))
    def test_any_llama(config):
        assert_equivalent(config, tp=2)

| strategy        | draws                                                                                                      |
|-----------------|------------------------------------------------------------------------------------------------------------|
| `degrees`       | a number of ranks                                                                                          |
| `geometries`    | numbers of heads and key/value heads, their size, a width, a vocabulary: nothing need divide anything      |
| `exprs`         | one dim in the layout notation, as objects                                                                 |
| `layouts`       | a `Layout`: dims, shape, ranks                                                                             |
| `notations`     | the text of a layout, as recipes write it                                                                  |
| `tensors`       | float64 tensors of a shape; with edge values on request                                                    |
| `meshes`        | the shape and dim names of a DeviceMesh with a dim "tp"                                                    |
| `configs`       | a tiny config of a transformers model type, with odd corners                                               |
| `architectures` | a whole model as an `Architecture`; a share of them with a trap that must not be sharded                   |
| `idioms`        | a small model as `Idioms`, in the idioms of other people's code: equal or refused                          |

Examples shrink towards one layer, small numbers, the plainest variants and no trap.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from autotp.arguments import whole_number
from autotp.errors import InputError
from autotp.plan.expressions import Concat, Expr, Factor, Product, size
from autotp.plan.layout import Layout
from autotp.plan.notation import spelled
from autotp.testing.architectures.architecture import Architecture
from autotp.testing.architectures.spec import (
    ACTIVATIONS,
    ROTARY,
    Experts,
    Extra,
    Mlp,
    Norms,
    Position,
    Projection,
    QKNorm,
    Sizes,
    Trap,
    Turning,
)
from autotp.testing.architectures.spec import Product as AttentionProduct
from autotp.testing.geometry import Geometry
from autotp.testing.idioms.idioms import Idioms
from autotp.testing.idioms.lines import KINDS, STATISTICS
from autotp.testing.idioms.spec import Around, Call, Differ, Repeat, Up, Weights

__all__ = [
    "Geometry",
    "architectures",
    "configs",
    "degrees",
    "exprs",
    "geometries",
    "idioms",
    "layouts",
    "meshes",
    "notations",
    "tensors",
]


def degrees(*, most: int = 8) -> st.SearchStrategy[int]:
    """Draws a number of ranks from 2 up; the common ones come first.

    Raises:
        InputError: `most` is no whole number of at least 2.
    """
    whole_number("degrees: most", most, least=2)
    return st.sampled_from([n for n in (2, 4, 3, 8, 5, 6, 7) if n <= most])


@st.composite
def geometries(draw: st.DrawFn, *, heads: int = 12, even_size: bool = False) -> Geometry:
    """Draws the sizes of an attention block and an mlp, with at most `heads` query heads.

    Multi-head (group 1), grouped and multi-query (kv 1) are all likely. So are head counts that no usual tp divides.

    Raises:
        InputError: `heads` is no whole number of at least 1.
    """
    whole_number("geometries: heads", heads)
    kv = draw(st.integers(1, min(6, heads)))
    group = draw(st.integers(1, max(1, min(7, heads // kv))))
    sizes = (2, 4, 6) if even_size else (1, 2, 3, 4)
    return Geometry(kv, group, draw(st.sampled_from(sizes)), draw(st.integers(2, 21)), draw(st.integers(4, 40)))


#: The longest dim that is drawn.
_LONGEST = 2048


@st.composite
def exprs(draw: st.DrawFn, *, depth: int = 2, sharded: bool = True) -> Expr:
    """Draws one dim of a layout: at most one sharded factor on each index path, of any size (padded where tp does not divide it).

    Some have the form that attention with few key/value heads gives: a factor cut together with a minor one, in pieces. None is longer
    than 2,048: products of products would be a million long now and then.

    Raises:
        InputError: `depth` is no whole number of at least 0.
    """
    whole_number("exprs: depth", depth, least=0)
    return draw(_nested(depth, sharded, _LONGEST) | _in_pieces() if sharded else _nested(depth, False, _LONGEST))


@st.composite
def _nested(draw: st.DrawFn, depth: int, sharded: bool, most: int) -> Expr:
    kind = draw(st.sampled_from(["factor", "product", "concat"] if depth else ["factor"]))
    if kind == "factor":
        return Factor("f", draw(st.integers(1, min(7, most))), sharded and draw(st.booleans()))
    number = draw(st.integers(1, min(3, most)))
    if kind == "concat":
        return Concat(tuple(draw(_nested(depth - 1, sharded, most // number)) for _ in range(number)))
    at = draw(st.integers(0, number - 1))
    return Product(tuple(draw(_nested(depth - 1, sharded and i == at, int(most ** (1 / number)))) for i in range(number)))


@st.composite
def _in_pieces(draw: st.DrawFn) -> Expr:
    pieces = draw(st.integers(2, 4))
    kv = Factor("kv", draw(st.integers(1, 4)), True, pieces)
    group = Factor("group", draw(st.integers(1, 5)), True, pieces, "kv")
    width = Factor("d", draw(st.integers(1, 3)))
    forms: list[Expr] = [
        kv,
        Product((kv, width)),
        Product((kv, group, width)),
        Product((kv, Concat((Product((group, width)), width, width)))),
        Product((width, kv, Factor("2", 2), group)),
    ]
    parts = draw(st.lists(st.sampled_from([*forms, width]), min_size=1, max_size=3))
    expr = parts[0] if len(parts) == 1 else Concat(tuple(parts))
    return Product((expr, Factor("e", 2))) if draw(st.booleans()) else expr


@st.composite
def layouts(draw: st.DrawFn, *, tp: int | None = None) -> Layout:
    """Draws a layout over `tp` ranks (drawn: 1 to 4): one dim of `exprs` among up to two whole ones.

    Raises:
        InputError: `tp` is no whole number of at least 1.
    """
    if tp is not None:
        whole_number("layouts: tp", tp)
    ranks = draw(st.sampled_from([1, 2, 3, 4])) if tp is None else tp
    expr = draw(exprs())
    others = draw(st.lists(st.integers(1, 3), max_size=2))
    at = draw(st.integers(0, len(others)))
    dims: list[Expr] = [Factor("n", n) for n in others]
    dims.insert(at, expr)
    return Layout(tuple(size(d) for d in dims), tuple(dims), ranks)


@st.composite
def notations(draw: st.DrawFn) -> str:
    """Draws the text of a layout in full: `autotp.plan.notation.parse` reads it back."""
    return " ".join(spelled(dim) for dim in draw(layouts()).dims)


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] | None = None, *, edges: bool = False) -> Tensor:
    """Draws a float64 tensor: normal numbers of a drawn seed. `edges` puts zeros, infinities and NaN in some places.

    Raises:
        InputError: `shape` is no sequence of sizes.
    """
    if shape is not None and (not isinstance(shape, list | tuple) or not all(isinstance(n, int) and n >= 0 for n in shape)):
        raise InputError(f"tensors: shape is {shape!r}, wanted a tuple of sizes")
    form = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))) if shape is None else shape
    made = torch.randn(form, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))), dtype=torch.float64)
    if edges and made.numel():
        flat = made.view(-1)
        for value in draw(st.lists(st.sampled_from([0.0, float("inf"), float("-inf"), float("nan")]), max_size=3)):
            flat[draw(st.integers(0, prod(form) - 1))] = value
    return made


@st.composite
def meshes(draw: st.DrawFn, *, ranks: int = 8) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Draws (shape, dim names) for `init_device_mesh` of at most `ranks` ranks: a dim "tp", up to two others around it.

    Raises:
        InputError: `ranks` is no whole number of at least 1.
    """
    whole_number("meshes: ranks", ranks)
    tp = draw(st.integers(1, ranks))
    others = draw(st.lists(st.sampled_from(["dp", "pp", "cp"]), max_size=2, unique=True))
    sizes: list[tuple[str, int]] = []
    left = ranks // tp
    for name in others:
        number = draw(st.integers(1, max(1, left)))
        left //= number
        sizes.append((name, number))
    sizes.insert(draw(st.integers(0, len(sizes))), ("tp", tp))
    return tuple(n for _, n in sizes), tuple(name for name, _ in sizes)


@st.composite
def configs(draw: st.DrawFn, /, model_type: str, **fixed: Any) -> Any:
    """Draws a valid tiny config of `model_type` (a key of transformers' `CONFIG_MAPPING`) with odd corners.

    Heads, key/value heads, head size, widths and vocabulary need not divide anything. Ties and biases that the config has are on or
    off. Configs that the model class refuses are not drawn. `fixed` sets fields.

    Raises:
        InputError: transformers has no such model type.
    """
    from hypothesis import assume

    from autotp.testing.tiny.corners import corners, usable

    base, options = corners(model_type)
    chosen = {name: draw(st.sampled_from(values)) for name, values in options.items() if name not in fixed}
    config = base(draw(geometries(even_size=True)), {**chosen, **fixed})
    assume(usable(config))
    return config


@st.composite
def architectures(draw: st.DrawFn, *, traps: float = 0.25, layers: int = 2) -> Architecture:
    """Draws a transformer-like model of any make. `traps` is about the share of those with a part that must not be sharded.

    Raises:
        InputError: `traps` is no share, or `layers` no whole number of at least 1.
    """
    whole_number("architectures: layers", layers)
    if not isinstance(traps, int | float) or not 0 <= traps <= 1:
        raise InputError(f"architectures: traps is {traps!r}, wanted a share from 0 to 1")
    projection = draw(st.sampled_from(Projection))
    one = projection in (Projection.INTERLEAVED, Projection.LATENT)
    positions = [p for p in Position if projection is not Projection.LATENT or p is not Position.ROTARY_PAIRS]
    position = draw(st.sampled_from(positions))
    g = draw(geometries(even_size=position in ROTARY))
    flat = projection in (Projection.SEPARATE, Projection.CONCAT, Projection.TRANSPOSED)
    norms = [n for n in QKNorm if flat or n is not QKNorm.FULL]
    qk_norm = draw(st.sampled_from(norms))
    product = draw(st.sampled_from(AttentionProduct))
    experts = draw(st.sampled_from([Experts.NONE, *Experts]))
    extras = [
        extra
        for extra in Extra
        if not (extra is Extra.ONE_NORM and qk_norm is not QKNorm.HEAD)
        and not (extra is Extra.SINK and product is not AttentionProduct.WRITTEN)
        and not (extra is Extra.CONV and experts is not Experts.NONE)
        and not (extra is Extra.LORA and projection is not Projection.SEPARATE)
    ]
    trap = draw(st.sampled_from(Trap)) if traps and draw(st.floats(0, 1)) > 1 - traps else Trap.NONE
    made = Architecture(
        kv=g.kv,
        group=1 if one else g.group,
        size=g.size,
        width=g.width,
        vocab=g.vocab,
        hidden=draw(st.sampled_from((0, 6, 7))),
        layers=draw(st.integers(1, layers)),
        projection=projection,
        position=position,
        qk_norm=qk_norm,
        product=product,
        mlp=draw(st.sampled_from(Mlp)),
        experts=experts,
        norms=draw(st.sampled_from(Norms)),
        layer_norm=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        bias=draw(st.booleans()),
        parallel=draw(st.booleans()),
        inline=draw(st.booleans()),
        tied=draw(st.booleans()),
        loss=draw(st.booleans()),
        sizes=draw(st.sampled_from(Sizes)),
        trap=trap,
        turning=draw(st.sampled_from(Turning)),
        extras=draw(st.frozensets(st.sampled_from(extras), max_size=6)),
        names=draw(st.integers(0, 99)),
    )
    least = 3 if made.layer_norm else 2
    if made.embedding < least:
        made = replace(made, hidden=6)
    if min(made.normed) < least:
        made = replace(made, qk_norm=QKNorm.NONE, extras=made.extras - {Extra.SUB_NORM, Extra.HEAD_NORM, Extra.ONE_NORM})
    return made


@st.composite
def idioms(draw: st.DrawFn) -> Idioms:
    """Draws a small model of one or two idioms between its weights, and a few around them; groups × size need not fit any tp.

    Models that do not run on one device (a view of a convolution's result) or are not finite are not drawn.
    """
    from hypothesis import assume

    known = [kind for kind in KINDS if kind != "einops" or find_spec("einops")]
    kinds = draw(st.just(["plain"]) | st.lists(st.sampled_from(known), min_size=1, max_size=2))
    lines = tuple(draw(st.sampled_from(list(KINDS[kind]))) for kind in kinds)
    least = 2 if any(name in STATISTICS for name in lines) else 1
    groups = draw(st.integers(least, 6))
    mixed = draw(st.booleans())  # the other half keep plain weights and calls, with at most one idiom around
    repeat = draw(st.sampled_from(Repeat))
    around = frozenset(draw(st.lists(st.sampled_from(Around), max_size=3 if mixed else 1)))  # shrinks better than sets
    if {Around.WEIGHT_HOOK, Around.MIXING_WEIGHT_HOOK} & around:
        around -= {Around.FROZEN}  # a hook wants a gradient
    made = Idioms(
        groups=groups,
        size=draw(st.integers(max(least, 3 if groups == 1 else 2 if groups < 3 else 1), 4)),
        outer=draw(st.sampled_from((8, 6, 7))),
        up=draw(st.sampled_from(Up)),
        weights=draw(st.sampled_from(Weights)) if mixed else Weights.MODULES,
        lines=lines,
        call=draw(st.sampled_from(Call)) if mixed else Call.PLAIN,
        repeat=repeat,
        differ=Differ.NOT if repeat in (Repeat.ONE, Repeat.SHARED) else draw(st.sampled_from(Differ)),
        around=around,
    )
    assume(made.runs())
    return made
