"""Checks the numbers of a plan, besides its proof.

    checked_plan(model, tp, …, check=Check.NUMBERS)

A small model is run as it is (`autotp.numeric`). A large transformers model, or one without weights, has a twin (`autotp.twin`),
which is planned by the same rules and run. Where the numbers differ, the model is planned again without the axes that meet at the
first module that differs. `Plan.checked` names the check that was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from torch import nn

from autotp.errors import AutoTPError, InputError
from autotp.hugging_face import is_hugging_face
from autotp.numeric.check import Verdict, judge, too_large
from autotp.plan.layout import Layout
from autotp.plan.names import folded
from autotp.plan.plan import Plan
from autotp.planner.bans import Accused
from autotp.planner.local_ints import Hints
from autotp.planner.make_plan import Examine, Examined, make_plan
from autotp.trace.example import Example, Given
from autotp.twin.build import NoTwin, twin_of

#: Parameter elements from which a transformers model is judged by a twin.
TWIN_FROM = 4_000_000
#: After so many plans whose numbers differ everything stays whole.
MOST_WRONG_PLANS = 6
NUMBERS, TWIN = "numbers", "numbers of a smaller twin"


class Check(Enum):
    """The check that a plan has to pass besides the symbolic replay."""

    NUMBERS = "numbers"
    GRAPH = "graph"

    @staticmethod
    def of(text: object) -> Check:
        """The check called `text`.

        Raises:
            InputError: there is none.
        """
        for check in Check:
            if check.value == text:
                return check
        raise InputError(f"check is {text!r}, wanted one of {', '.join(repr(c.value) for c in Check)}")


def checked_plan(
    model: nn.Module,
    tp: int,
    inputs: Given | None = None,
    wanted: Mapping[str, Layout] | None = None,
    hints: Hints | None = None,
    *,
    check: Check = Check.NUMBERS,
    apart: frozenset[str] = frozenset(),
) -> Plan:
    """As `make_plan`, with numbers compared where that is affordable. The model is left as it was.

    Raises:
        AutoTPError: as for `make_plan`.
    """
    examine = _examine(model, tp, check, apart, plain=not wanted)
    return make_plan(model, tp, inputs, wanted, hints, examine, runs=isinstance(examine, _ByNumbers), apart=apart)


def _examine(model: nn.Module, tp: int, check: Check, apart: frozenset[str], *, plain: bool) -> Examine:
    """Returns the examination of plans of a model. `plain`: no layouts are requested."""
    if check is Check.GRAPH:
        return _Not("numbers were not asked for")
    large = too_large(model, tp)
    bare = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    elements = sum(p.numel() for p in model.parameters())
    try:
        if is_hugging_face(model) and (large or elements > TWIN_FROM):
            if not plain:
                raise NoTwin("layouts that are asked for are not those of a smaller twin")
            return _ByTwin(model, twin_of(model, tp, smaller=True), tp, apart)
        if is_hugging_face(model) and bare:
            return _ByNumbers(twin_of(model, tp, smaller=False))
    except NoTwin as error:
        return _Not(f"{large}, and {error}") if large else _ByNumbers(model)
    return _Not(f"{large}, and only a transformers model has a smaller twin") if large else _ByNumbers(model)


@dataclass(frozen=True, slots=True)
class _Not:
    """Looks at nothing, and says why."""

    reason: str

    def __call__(self, plan: Plan, examples: tuple[Example, ...]) -> Examined:
        """See `Examine`."""
        return Examined(f"graph only: {self.reason}")


class _ByNumbers:
    """Runs the model itself, or one of the same config with weights. `accused`: all that was found wrong."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.accused: list[Accused] = []
        self.verdict = Verdict("no plan was run")  # on the last plan

    def __call__(self, plan: Plan, examples: tuple[Example, ...]) -> Examined:
        """See `Examine`."""
        verdict = self.verdict = judge(self.model, examples, plan)
        if verdict.unknown:
            return Examined(f"graph only: {verdict.unknown}")
        text = NUMBERS + (f" ({len(examples) - verdict.left} of {len(examples)} calls)" if verdict.left else "")
        if verdict.module is None:
            return Examined(text, run=verdict.all)
        more = len(self.accused) < MOST_WRONG_PLANS
        self.accused.append(Accused(verdict.module if more else None, verdict.reason, verdict.backward))
        return Examined(text, (self.accused[-1],), run=verdict.all)


class _ByTwin:
    """Plans and runs a smaller twin of the model, once; what is wrong with it is taken for wrong with the model."""

    def __init__(self, model: nn.Module, twin: nn.Module, tp: int, apart: frozenset[str]) -> None:
        self.model, self.twin, self.tp, self.apart = model, twin, tp, apart
        self.planned: Plan | None = None
        self.verdict = Verdict()  # on the plan of the twin

    def __call__(self, plan: Plan, examples: tuple[Example, ...]) -> Examined:
        """See `Examine`."""
        accused: list[Accused] = []
        if self.planned is None:
            examine = _ByNumbers(self.twin)
            try:
                self.planned = make_plan(self.twin, self.tp, examine=examine, replayed=False, apart=self.apart)
            except AutoTPError as error:
                return Examined(f"graph only: the model is too large to be run, and a smaller twin cannot be planned ({error})")
            here, self.verdict = _same_places(self.model), examine.verdict
            for a in examine.accused:
                accused += [replace(a, module=path) for path in ([None] if a.module is None else here(a.module))]
        if self.verdict.unknown:
            return Examined(f"{self.planned.checked} (a smaller twin)")
        text = TWIN + self.planned.checked.removeprefix(NUMBERS)
        return Examined(text + _but_for(plan, self.planned), tuple(accused), run=self.verdict.all)


def _but_for(plan: Plan, twin: Plan) -> str:
    """The parameters that are sharded and whose likes in the twin are not: its numbers say nothing of them."""
    there = {folded(name) for name, p in twin.params.items() if p.layout.dim is not None}
    here = dict.fromkeys(folded(name) for name, p in plan.params.items() if p.layout.dim is not None)
    missing = [name for name in here if name not in there]
    return f", but for {', '.join(missing)}: whole in the twin" if missing else ""


def _same_places(model: nn.Module) -> Callable[[str], list[str]]:
    """Module path of the twin → the paths of the model that are alike but for the numbers of blocks."""
    paths: dict[str, list[str]] = {}
    for path, _ in model.named_modules():
        paths.setdefault(folded(path), []).append(path)
    return lambda path: paths.get(folded(path), [])
