"""What stands behind a plan besides its proof: numbers.

    checked_plan(model, tp, …, check=Check.NUMBERS)

A small model is run as it is (`autotp.numeric`). A large transformers model, or one without weights, has a twin (`autotp.twin`) that is
planned by the same rules and run. What computes something else is planned again without the axes that meet at the first module that
differs. `Plan.checked` says what was done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

from torch import nn

from autotp.errors import AutoTPError, InputError
from autotp.numeric.check import judge, too_large
from autotp.plan.folding import folded
from autotp.plan.layout import Layout
from autotp.plan.localise import Hints
from autotp.plan.plan import Plan
from autotp.plan.solve import Accused
from autotp.planner import Examine, Examined, make_plan
from autotp.trace.inputs import Example
from autotp.twin.build import NoTwin, twin_of

#: After so many plans whose numbers differ everything stays whole.
MOST_WRONG_PLANS = 6
NUMBERS, TWIN = "numbers", "numbers of a smaller twin"


class Check(Enum):
    """What a plan has to pass besides the symbolic replay."""

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
    inputs: Mapping[str, object] | None = None,
    wanted: Mapping[str, Layout] | None = None,
    hints: Hints | None = None,
    *,
    check: Check = Check.NUMBERS,
) -> Plan:
    """As `make_plan`, with numbers compared where that is affordable. The model is left as it was.

    Raises:
        AutoTPError: as for `make_plan`.
    """
    examine: Examine
    if check is Check.GRAPH:
        examine = lambda plan, examples: Examined("graph only: numbers were not asked for")  # noqa: E731
    elif (reason := too_large(model, tp)) or any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        examine = _ByTwin(model, tp, reason, plain=not wanted)
    else:
        examine = _ByNumbers(model)
    return make_plan(model, tp, inputs, wanted, hints, examine)


class _ByNumbers:
    """Runs the model itself. `accused`: all that was found wrong."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.accused: list[Accused] = []

    def __call__(self, plan: Plan, examples: tuple[Example, ...]) -> Examined:
        """See `Examine`."""
        verdict = judge(self.model, examples, plan)
        if verdict.unknown:
            return Examined(f"graph only: {verdict.unknown}")
        if verdict.module is None:
            return Examined(NUMBERS)
        more = len(self.accused) < MOST_WRONG_PLANS
        self.accused.append(Accused(verdict.module if more else None, verdict.reason))
        return Examined(NUMBERS, (self.accused[-1],))


class _ByTwin:
    """Runs a twin of the model, once.

    Args:
        large: why the model itself is not run; "" where it only lacks weights.
        plain: the model is planned without layouts that are asked for, so its twin is planned by the same rules.
    """

    def __init__(self, model: nn.Module, tp: int, large: str, *, plain: bool) -> None:
        self.model, self.tp, self.large, self.plain = model, tp, large, plain
        self.found: Examined | None = None

    def __call__(self, plan: Plan, examples: tuple[Example, ...]) -> Examined:
        """See `Examine`."""
        if self.found is not None:
            return Examined(self.found.checked)  # what the twin showed has been acted on
        self.found = self._run()
        return self.found

    def _run(self) -> Examined:
        why = self.large or "the model has no weights"
        if not self.plain:
            return Examined(f"graph only: {why}, and layouts that are asked for are not those of a twin")
        try:
            twin = twin_of(self.model, self.tp, smaller=bool(self.large))
            if reason := too_large(twin, self.tp):
                return Examined(f"graph only: {why}; of its twin, {reason}")
            examine = _ByNumbers(twin)
            checked = make_plan(twin, self.tp, examine=examine).checked
        except NoTwin as error:
            return Examined(f"graph only: {why}, and {error}")
        except AutoTPError as error:
            return Examined(f"graph only: {why}, and its twin cannot be planned ({error})")
        if checked != NUMBERS:
            return Examined(f"{checked} (of a twin; {why})")
        here = _same_places(self.model)
        accused = [Accused(path, a.reason) for a in examine.accused for path in ([None] if a.module is None else here(a.module))]
        return Examined(TWIN if self.large else NUMBERS, tuple(accused))


def _same_places(model: nn.Module) -> Callable[[str], list[str]]:
    """Module path of the twin → the paths of the model that are alike but for the numbers of blocks."""
    paths: dict[str, list[str]] = {}
    for path, _ in model.named_modules():
        paths.setdefault(folded(path), []).append(path)
    return lambda path: paths.get(folded(path), [])
