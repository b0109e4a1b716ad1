"""Compares the ranks of a plan with the model itself.

    judge(model, examples, plan) → Verdict

The model and its `tp` local ranks run every traced call in one process (`autotp.numeric.ranks`), forward and backward. The check
compares results, gradients of arguments, each rank's part of each parameter's gradient, and buffers. In float64 only the order of
sums differs, so a relative error above 1e-9 is a wrong plan. The exception is a model that itself answers a nudge of its weights by
one unit in the last place with changes as large (`nudge`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autotp.numeric.copies import copy_of, nudge
from autotp.numeric.exact import DOUBLE, SINGLE, Precision, largest, relative_error
from autotp.numeric.other_data import other_data
from autotp.numeric.parameters import local_parameters
from autotp.numeric.ranks import LocalComm, TimedOut, run_ranks
from autotp.numeric.subject import CannotRun, Seen, run
from autotp.numeric.untouched import one_thread, untouched
from autotp.numeric.where import Order, first_wrong_module, watched
from autotp.plan.layout import Layout
from autotp.plan.plan import Plan
from autotp.rewrite.apply import apply
from autotp.trace.example import Example
from autotp.trace.model_state import same_numbers

#: Parameter elements that are held at once, by the model and by all ranks of a plan: 16 bytes each, with their gradients.
MOST_ELEMENTS = 60_000_000
#: Ranks that are run.
MOST_RANKS = 16
#: CPU seconds that the model and all ranks may take together, by what one run took; and how long ranks are waited for.
SECONDS, MOST_WAITING = 20.0, 60.0
#: CPU seconds of the model's run after which no further calls are compared, and those for each operator that was traced. A large image
#: takes long in each of six calls or so, which differ in little; where many operators do, a replay of the calls would take as long.
ENOUGH, FOR_EACH = 1.0, 5e-4
_NUDGES = 100.0  # times the model's own answer to a nudge that the ranks may differ by
_LEAST = 1e-12  # values below this are rounding errors of zero
_UNSTABLE = 1e-6


@dataclass(frozen=True, slots=True)
class Verdict:
    """`unknown`: why nothing was compared, "" where something was.

    `module`: path of the first module that differs, None where all are equal; `reason`: what differs there; `backward`: in gradients only.
    `left`: how many of the calls were not run: they take long, or the model itself does not take them.
    """

    unknown: str = ""
    module: str | None = None
    reason: str = ""
    backward: bool = False
    left: int = 0

    @property
    def all(self) -> bool:
        """True where all calls were run."""
        return not self.unknown and not self.left


def too_large(model: nn.Module, tp: int, share: float = 0.0) -> str:
    """Why the numbers of a model are not run, "" where they can be. `share`: of its elements that a rank holds, 1/tp at least."""
    elements = sum(p.numel() for p in model.parameters())
    held = round(elements * (1 + tp * max(share, 1 / tp)))
    if held > MOST_ELEMENTS:
        return f"the model and its ranks would hold {held:,} parameter elements, more than the {MOST_ELEMENTS:,} that are run"
    if tp > MOST_RANKS:
        return f"{tp} ranks are more than the {MOST_RANKS} that are run in one process"
    return ""


def judge(model: nn.Module, examples: Sequence[Example], plan: Plan) -> Verdict:
    """Run the model and the ranks of `plan`, and compare. The model is left as it was, and so are the random states.

    `examples`: the calls that were traced.
    """
    reason = too_large(model, plan.tp, plan.local_share)
    if reason:
        return Verdict(reason)
    with untouched(model), one_thread(), same_numbers(), warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            subject = _subject(model, tuple(examples), plan.tp)
            return replace(_compare(subject, plan), left=subject.left)
        except CannotRun as error:
            return Verdict(str(error))


@dataclass(frozen=True, slots=True)
class _Subject:
    """The model on one device: `make` copies it, `wanted` is the record of a run, in the order in which modules ended.

    `left`: how many calls are not among `examples`.
    """

    make: Callable[[], nn.Module]
    examples: tuple[Example, ...]
    precision: Precision
    wanted: Seen
    order: Order
    left: int


def _subject(model: nn.Module, examples: tuple[Example, ...], tp: int) -> _Subject:
    problem: Exception | None = None
    for precision, calls in _attempts(model, examples):
        make = partial(copy_of, model, precision)
        original = make()
        started = time.thread_time()
        try:
            with watched(original) as order:
                wanted = run(original, calls, precision, max(ENOUGH, FOR_EACH * sum(e.operators for e in calls)))
        except Exception as error:  # the model may refuse in any way
            problem = problem or error
            continue
        took = time.thread_time() - started
        if took * (1 + tp) > SECONDS:
            raise CannotRun(f"one run of the model takes {took:.1f} seconds, too long for {tp} ranks")
        left = len(examples) - len(wanted.calls)
        examples = wanted.calls
        more = tuple(e for e in other_data(examples) if _runs(make(), e, precision))
        if more and took * (1 + len(more) / len(examples)) * (1 + tp) <= SECONDS:
            original, examples = make(), (*examples, *more)
            with watched(original) as order:
                wanted = run(original, examples, precision)
        if nothing := _nothing_finite(wanted):
            raise CannotRun(f"the model's {nothing} are not finite")
        return _Subject(make, examples, precision, wanted, order, left)
    raise CannotRun(
        f"the model itself does not run on the example inputs ({type(problem).__name__}: {' '.join(str(problem).split())[:200]})"
    )


def _attempts(model: nn.Module, examples: tuple[Example, ...]) -> Iterator[tuple[Precision, tuple[Example, ...]]]:
    """Yields ways to run a model. The last is without the calls that it takes with unknown data, but not with the data that was made up."""
    yield DOUBLE, examples
    yield SINGLE, examples
    if taken := tuple(e for e in examples if len(examples) > 1 and _runs(copy_of(model, DOUBLE), e, DOUBLE)):
        yield DOUBLE, taken


def _runs(model: nn.Module, example: Example, precision: Precision) -> bool:
    """Whether a model takes a call of other data, of which nobody says that it does."""
    try:
        return not _nothing_finite(run(model, (example,), precision))
    except Exception:  # the model may refuse in any way
        return False


def _compare(subject: _Subject, plan: Plan) -> Verdict:
    tolerance = subject.precision.tolerance
    layouts = {n: p.layout for n, p in plan.params.items()}

    def rank(comm: LocalComm) -> tuple[Seen, Order]:
        local = _parallel(subject.make(), plan, comm)
        with watched(local) as order:
            return run(local, subject.examples, subject.precision), order

    try:
        ranks = run_ranks(plan.tp, rank, MOST_WAITING)
    except CannotRun:
        raise
    except TimedOut as error:
        raise CannotRun(str(error)) from error
    except Exception as error:
        _refuse_unsteady(subject)
        return Verdict(module="", reason=f"the code fails on a shard ({_short(error)})")
    wrong = [_differences(subject.wanted, seen, layouts, r, tolerance, subject.precision) for r, (seen, _) in enumerate(ranks)]
    if not any(wrong):
        return Verdict()
    _refuse_unsteady(subject)
    moved = _own_change(subject)
    if moved > _UNSTABLE:
        raise CannotRun(f"a change of its weights in the last place changes the model's results by {moved:.0e}")
    if moved * _NUDGES > tolerance:
        tolerance = moved * _NUDGES
        wrong = [_differences(subject.wanted, seen, layouts, r, tolerance, subject.precision) for r, (seen, _) in enumerate(ranks)]
        if not any(wrong):
            return Verdict()
    merged: dict[str, float] = {}
    for found in wrong:
        for path, apart in found.items():
            merged[path] = max(apart, merged.get(path, 0.0))
    worst = max(merged, key=lambda path: merged[path])
    module, backward = first_wrong_module(subject.order, [order for _, order in ranks], merged, tolerance)
    reason = f"numbers differ from one device ({worst}: relative error {merged[worst]:.1e})"
    return Verdict(module=module, reason=reason, backward=backward)


def _refuse_unsteady(subject: _Subject) -> None:
    """Raises where a second run of the model itself gives other numbers. It is made only where the ranks give others.

    Raises:
        CannotRun: it does.
    """
    again = run(subject.make(), subject.examples, subject.precision)
    if _differences(subject.wanted, again, {}, 0, subject.precision.tolerance, subject.precision):
        raise CannotRun("two runs of the model with one seed differ")


def _short(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _parallel(model: nn.Module, plan: Plan, comm: LocalComm) -> nn.Module:
    apply(model, plan.params, plan.modules, comm=comm, make_param=local_parameters(comm)).release()
    return model


def _nothing_finite(seen: Seen) -> str:
    """Names the results or the gradients where they exist and have no finite entry: then nothing would be compared."""
    for name, found in (("results", seen.results), ("gradients", seen.gradients)):
        floats = [t for t in found.values() if t.is_floating_point() and t.numel()]
        if floats and not any(bool(t.isfinite().any()) for t in floats):
            return name
    return ""


def _own_change(subject: _Subject) -> float:
    """The largest relative change of what is compared when the weights move by one unit in the last place."""
    moved = subject.make()
    nudge(moved)
    found = _differences(subject.wanted, run(moved, subject.examples, subject.precision), {}, 0, 0.0, subject.precision)
    return max(found.values(), default=0.0)


def _differences(
    wanted: Seen, got: Seen, layouts: Mapping[str, Layout], rank: int, tolerance: float, precision: Precision
) -> dict[str, float]:
    """Path → relative error of what differs by more than `tolerance`."""
    found: dict[str, float] = {}

    def compare(kind: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor], part: Callable[[str, Tensor], Tensor], least: float) -> None:
        for name in {**a, **b}:
            error = _error(a.get(name), b.get(name), partial(part, name), least)
            if not error <= tolerance:
                found[f"{kind}{name}"] = error

    whole: Any = lambda _, t: t  # noqa: E731
    compare("", wanted.results, got.results, whole, _LEAST)
    compare("buffer ", wanted.buffers, got.buffers, whole, _LEAST)
    floor = max(_LEAST, precision.floor * max(map(largest, (*wanted.gradients.values(), *wanted.arguments.values())), default=0.0))
    compare("gradient of argument ", wanted.arguments, got.arguments, whole, floor)
    shard = lambda n, t: layouts[n].shard(t, rank) if n in layouts else t  # noqa: E731
    compare("gradient of ", wanted.gradients, got.gradients, shard, floor)
    return found


def _error(a: Tensor | None, b: Tensor | None, part: Callable[[Tensor], Tensor], least: float) -> float:
    if a is None or b is None:
        there = b if a is None else a
        return 0.0 if there is None or largest(there) <= least else float("inf")
    scale = max(largest(a), least) if a.is_floating_point() or a.is_complex() else None
    return relative_error(b, part(a), scale=scale)
