"""Drawn idioms: every one runs on one device, all are drawn, a broken rule is found, a failure is a script, a seed says what is drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings
from torch import Tensor, nn

from autotp.errors import InputError
from autotp.testing import NotEquivalent, fuzz
from autotp.testing import strategies as tps
from autotp.testing.idioms.idioms import Idioms
from autotp.testing.idioms.lines import KINDS, LINES
from autotp.testing.idioms.spec import Around, Call, Differ, Repeat, Up, Weights
from autotp.testing.outcome import Outcome, equal_or_refused
from autotp.testing.proving import traits
from tests.support.rules import give_rule

QUICK = settings(
    max_examples=800, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)
CHOICES = {"up": Up, "weights": Weights, "call": Call, "repeat": Repeat, "differ": Differ}


def outputs(i: Idioms) -> list[Tensor]:
    made = i.build()(**i.inputs())
    return [made] if isinstance(made, Tensor) else [made["y"], *made["inner"]]


@pytest.mark.parametrize(("groups", "size"), [(2, 4), (5, 3), (1, 1)])
def test_every_line_keeps_the_shape_and_is_finite(groups: int, size: int) -> None:
    for name in LINES:
        i = Idioms(groups=groups, size=size, lines=(name,), around=frozenset({Around.INNER}))
        y, h = outputs(i)
        assert h.shape == (2, 6, i.width) and bool(y.isfinite().all()), name
        assert all(torch.equal(a, b) for a, b in zip(outputs(i), (y, h), strict=True)), name


def test_every_choice_runs() -> None:
    plain = Idioms()
    made = [Idioms(**{field: value}) for field, kind in CHOICES.items() for value in kind]
    made += [Idioms(up=up, weights=weights) for up in Up for weights in Weights]
    made += [Idioms(call=call, repeat=repeat, differ=differ) for call in Call for repeat in Repeat for differ in Differ]
    made += [Idioms(around=frozenset({around}), weights=weights) for around in Around for weights in (Weights.MODULES, Weights.TIED)]
    texts = {i.source() for i in made}
    assert len(texts) > 300 and plain.source() in texts
    for i in made:
        assert all(bool(y.isfinite().all()) for y in outputs(i)), i


@pytest.mark.sweep
def test_all_idioms_are_drawn() -> None:
    seen: Counter[str] = Counter()

    @QUICK
    @given(tps.idioms())
    def draw(i: Idioms) -> None:
        seen.update(traits(i))

    draw()
    wanted = [f"{field}={value.value}" for field, kind in CHOICES.items() for value in kind]
    wanted += [*(f"around={around.value}" for around in Around), *(f"line={kind}" for kind in KINDS)]
    assert not [name for name in wanted if not seen[name]]


def test_what_shrinks_is_plain() -> None:
    found = find(tps.idioms(), lambda i: Around.GATE in i.around, settings=settings(QUICK, max_examples=2000, phases=list(Phase)))
    assert (found.up, found.weights, found.call, found.repeat, found.around) == (
        Up.LINEAR,
        Weights.MODULES,
        Call.PLAIN,
        Repeat.ONE,
        frozenset({Around.GATE}),
    )
    assert found.more() == {"with the gate": {"gate": True}} and "gate=False" in found.source()


@pytest.mark.parametrize(
    ("fields", "says"), [({"groups": 0}, "groups is 0"), ({"outer": -1}, "outer is -1"), ({"lines": ("none",)}, "no line is called 'none'")]
)
def test_idioms_that_are_none(fields: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Idioms(**fields)  # type: ignore[arg-type]


def always(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    from hypothesis import strategies as st

    monkeypatch.setattr(fuzz, "degrees", lambda most: st.just(2))
    monkeypatch.setattr(fuzz, "_SETTINGS", settings(fuzz._SETTINGS, max_examples=number))


@pytest.mark.sweep
def test_a_broken_rule_is_found_and_its_script_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: what may not be sharded is, and a few draws of lines with an index show it."""
    from hypothesis import strategies as st

    flips = ("flip", "roll", "sort", "cumsum", "relu_", "mul_")
    monkeypatch.setattr(fuzz, "idioms", lambda: st.builds(lambda n: Idioms(lines=(n,)), st.sampled_from(flips)))
    always(monkeypatch, 30)
    with monkeypatch.context() as fault:
        give_rule(fault, "flip")
        done = fuzz.fuzz(0.5, tmp_path, family="idioms", write=lambda text: None, certificate="graph")
        script = (tmp_path / next(iter(done.failures))).read_text(encoding="utf-8")
        with pytest.raises(NotEquivalent):
            exec(script, {"__name__": "__main__"})
    exec(script, {"__name__": "__main__"})  # without the fault nothing is wrong
    assert "h = h.flip(-1)" in script and "# NotEquivalent" in script and f"{len(done.failures)} failed" in done.report()


def test_a_seed_says_what_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, 5)
    drawn: list[Idioms] = []
    monkeypatch.setattr(fuzz.Fuzzer, "_equal_or_refused", lambda self, i, tp: drawn.append(i))
    seen = []
    for seed in (1, 1, 2):
        drawn.clear()
        fuzzer = fuzz.Fuzzer(tmp_path, float("inf"), lambda text: None)
        fuzzer.idioms(seed)
        seen.append(list(drawn))
    assert seen[0] == seen[1] != seen[2] and len(seen[0]) == 5


def test_refusals_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always(monkeypatch, 4)
    monkeypatch.setattr(fuzz, "equal_or_refused", lambda *args, **options: Outcome(None, "PlanError: no"))
    fuzzer = fuzz.Fuzzer(tmp_path, float("inf"), lambda text: None)
    fuzzer.idioms(0)
    assert "idioms: 0 sharded (0%), 0 whole (0%), 4 refused (100%)" in fuzzer.report()
    assert "refused 4 × PlanError: no" in fuzzer.report() and not fuzzer.failures


class Between(nn.Module):
    """Linear, an operation, Linear."""

    def __init__(self, width: int = 12, flip: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.flip = nn.Linear(8, width), nn.Linear(width, 8), flip

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h.flip(-1) if self.flip else h.tanh())


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


def test_outcomes() -> None:
    good = equal_or_refused(Between, inputs=X, tp=2)
    assert good.sharded and not good.refused and str(good).startswith("equal, 0.5")
    whole = equal_or_refused(lambda: Between(flip=True), inputs=X, tp=2)
    assert whole.equal is not None and not whole.sharded
    with pytest.raises(InputError, match="does not run"):
        equal_or_refused(Between, inputs=X[..., :3], tp=2)
