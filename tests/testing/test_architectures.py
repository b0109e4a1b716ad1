"""Random architectures: equal forward, backward and after three optimizer steps, and no trap is sharded.

`make test` draws a bounded number with a fixed seed; `make fuzz` goes on. `FOUND` keeps what fuzzing found, as it was shrunk.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from hypothesis import HealthCheck, example, given, settings

from autotp.testing import NotEquivalent
from autotp.testing.architectures.architecture import Architecture
from autotp.testing.architectures.spec import Experts, Extra, Mlp, Norms, Position, Product, Projection, QKNorm, Sizes, Trap
from autotp.testing.proving import TrapSprung, features, variants
from autotp.testing.proving import prove as proved
from autotp.testing.strategies import architectures
from tests.support.rules import give_rule
from tests.support.slow import few, swept

prove = partial(proved, certificate="graph")  # the rules, without what would catch their faults

TPS = (2, 3, 4, 8)
#: One for each kind of attention and mlp, in sizes that nothing divides.
NAMED = (
    Architecture(kv=3, group=3, width=10, vocab=37, tied=True, layers=2),
    Architecture(kv=1, group=7, projection=Projection.CONCAT, position=Position.ALIBI_MODEL, product=Product.WRITTEN, parallel=True),
    Architecture(kv=2, group=3, projection=Projection.GROUPED, qk_norm=QKNorm.HEAD, product=Product.EINSUM, mlp=Mlp.HALVES, bias=True),
    Architecture(kv=5, group=1, projection=Projection.INTERLEAVED, position=Position.RELATIVE, mlp=Mlp.PLAIN, layer_norm=True, bias=True),
    Architecture(kv=4, group=1, projection=Projection.LATENT, experts=Experts.SHARED, extras=frozenset({Extra.CHECKPOINT})),
    Architecture(projection=Projection.TRANSPOSED, qk_norm=QKNorm.FULL, norms=Norms.BOTH, mlp=Mlp.PAIRS, sizes=Sizes.SHAPES, bias=True),
    Architecture(kv=3, projection=Projection.EINSUM, product=Product.WRITTEN, extras=frozenset({Extra.SINK, Extra.CONV, Extra.HEAD_GATE})),
    Architecture(experts=Experts.DENSE, inline=True, sizes=Sizes.LITERALS, norms=Norms.POST, extras=frozenset({Extra.AGAIN})),
)
FOUND = (
    # a generator turns sharded queries and whole keys by one line of code: an all-reduce of the keys' gradient there met the queries' too
    (
        Architecture(
            kv=1, size=2, width=2, vocab=4, projection=Projection.EINSUM, mlp=Mlp.PLAIN, norms=Norms.POST, activation="gelu",
            inline=True, tied=True, loss=False, names=1,
        ),
        2,
    ),
    # as many tokens as learned positions that are added, and a view that mixes tokens and width: the tokens were taken for a part of it
    (Architecture(kv=4, group=1, width=10, extras=frozenset({Extra.VIEW}), hidden=7, mlp=Mlp.PLAIN, position=Position.LEARNED_FEW), 2),
)  # fmt: skip


@pytest.mark.parametrize(
    ("number", "tp"),
    [
        pytest.param(n, tp, marks=pytest.mark.slow if tp != TPS[n % len(TPS)] else pytest.mark.sweep if (n // 4 + n) % 2 else ())
        for n in range(len(NAMED))
        for tp in TPS
    ],
)
def test_named(number: int, tp: int) -> None:
    result = prove(NAMED[number], tp)
    assert result.plan.local_share < 1 and set(result.aspects) == {"state", "outputs", "gradients", "training", "steps"}


@pytest.mark.parametrize(("architecture", "tp"), FOUND)
def test_found(architecture: Architecture, tp: int) -> None:
    prove(architecture, tp)


@pytest.mark.sweep
@pytest.mark.timeout(900)  # shrinking a failure takes a while
@pytest.mark.parametrize(("tp", "number"), few([(2, 16), (3, 12), (4, 10), (8, 8)], (3, 12), (8, 8)))
def test_drawn(tp: int, number: int) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @example(Architecture())
    @given(architectures())
    def check(architecture: Architecture) -> None:
        seen.update([*features(prove(architecture, tp).plan), *variants(architecture)])

    check()
    assert seen["sharded"] > number / 2 and seen["padded"] > 3 and len(seen) > 50


TRAPS = [t for t in Trap if t is not Trap.NONE]


@pytest.mark.parametrize("trap", swept(TRAPS, *TRAPS[::2]))
@pytest.mark.parametrize("inline", [pytest.param(False, marks=pytest.mark.slow), True])
def test_traps(trap: Trap, inline: bool) -> None:
    a = Architecture(kv=4, group=1, width=16, trap=trap, inline=inline, hidden=7, mlp=Mlp.PLAIN)
    assert a.kept() and prove(a, 2).plan.params[a.kept()[0][0]].layout.dim != a.kept()[0][1]
    free = prove(Architecture(kv=4, group=1, width=16, inline=inline, hidden=7, mlp=Mlp.PLAIN), 2).plan
    assert any(free.params[name].layout.dim == dim for name, dim in a.kept())  # the control: without the trap it is sharded


@pytest.mark.parametrize(
    ("trap", "operator"),
    [(Trap.WIDTH_FLIP, "flip"), (Trap.WIDTH_CUMSUM, "cumsum"), (Trap.HEAD_ROLL, "roll"), (Trap.WIDTH_SOFTMAX, "softmax")],
)
def test_a_wrong_rule_springs_the_trap(trap: Trap, operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Architecture(kv=4, group=1, width=16, trap=trap, hidden=7, position=Position.NONE)
    prove(a, 2)
    give_rule(monkeypatch, operator)
    with pytest.raises((NotEquivalent, TrapSprung)):
        prove(a, 2)
