"""Finds a plain call that a model takes, where the first guess is none.

    guess = search(model, error, run)

`run` runs an example and gives back what stopped it. Each call that stops says what it misses (`autotp.inputs.missing`) or what fits
badly (`autotp.inputs.forms`). The search goes on from the call that came furthest, by the number of operators that ran.
"""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from autotp.errors import TraceError
from autotp.inputs.by_name import why_not
from autotp.inputs.facts import Facts, Guess, Made
from autotp.inputs.forms import form_of, other_forms
from autotp.inputs.missing import missing_keywords
from autotp.inputs.paths import calls_with
from autotp.trace.example import Example

#: How many calls are tried, and for how many seconds of CPU time: a large model takes long for each.
MOST_TRIES, MOST_SECONDS = 48, 60.0
#: How many forms of the values of one call are tried.
_MOST_FORMS = 24
#: Keywords that no plain call is made with.
_NEVER = frozenset(("labels", "past_key_values", "cache_params", "return_dict", "cache_position"))

Run = Callable[[Example], TraceError | None]


@dataclass(order=True)
class _Stopped:
    """A call that stopped, by how far it came; `moves` are what else to try from there."""

    rank: tuple[int, int, int, int]
    guess: Guess = field(compare=False)
    error: TraceError = field(compare=False)
    moves: Iterator[Guess] = field(compare=False)
    inputs: Mapping[str, object] = field(compare=False)


def search(model: nn.Module, error: TraceError, run: Run) -> Guess:
    """The guess of a plain call that `run` runs to its end; `error` stopped the first guess.

    Raises:
        TraceError: none was found; says how far the best call came, what it was made of and which keyword is to be given.
    """
    queue: list[_Stopped] = []
    seen: set[object] = set()
    unmade: dict[str, str] = {}
    tried = 0

    def stopped(guess: Guess, failure: TraceError, inputs: Mapping[str, object]) -> None:
        given = len(guess.more) - ("use_cache" in guess.more)  # an argument that code missed brings it on, even to the same operator
        rank = -_progress(failure), -given, len(guess.made), tried
        heapq.heappush(queue, _Stopped(rank, guess, failure, _moves(model, guess, failure, inputs, unmade), inputs))

    first = calls_with(model, Guess())[0].make()
    seen.add(_key(first))
    stopped(Guess(), error, first)
    nearest = queue[0]
    until = time.thread_time() + MOST_SECONDS
    while queue and tried < MOST_TRIES and time.thread_time() < until:
        nearest = min(nearest, queue[0])
        guess = next(queue[0].moves, None)
        if guess is None:
            heapq.heappop(queue)
            continue
        try:
            example = calls_with(model, guess)[0]
            inputs = example.make()
        except Exception:  # values that do not go together, whatever their makers say
            continue
        if _key(inputs) in seen:
            continue
        seen.add(_key(inputs))
        tried += 1
        failure = run(replace(example, decode=None))
        if failure is None:
            return guess
        if _further(failure, queue[0].error):
            stopped(guess, failure, inputs)
    raise _none_found(nearest, error, unmade, tried) from nearest.error.__cause__


def _key(inputs: Mapping[str, object]) -> object:
    return tuple((name, form_of(value)) for name, value in sorted(inputs.items()))


def _progress(error: TraceError) -> int:
    """How many operators that the model's code called had run."""
    nodes: Any = getattr(error.partial, "nodes", ())
    return sum(node.place is not None for node in nodes)


def _further(error: TraceError, other: TraceError) -> bool:
    """Whether `error` came at a later operator than `other`, or at the same one for another reason than other sizes."""
    ran = _progress(error) - _progress(other)
    return ran > 0 or (ran == 0 and re.sub(r"\d+", "", str(error)) != re.sub(r"\d+", "", str(other)))


def _moves(model: nn.Module, guess: Guess, error: TraceError, inputs: Mapping[str, object], unmade: dict[str, str]) -> Iterator[Guess]:
    """Further guesses, from the call of `guess` that stopped with `error`."""
    facts = Facts(model, guess=guess)
    absent = {name for name in facts.keywords if inputs.get(name) is None and name not in _NEVER}
    cause = error.__cause__
    for name in missing_keywords(error, absent):
        reason = why_not(facts, name)
        if reason is None:
            yield replace(guess, more=(*guess.more, name))
        else:
            unmade[name] = reason
    if (facts.takes("use_cache") or (facts.generates and facts.any_keyword)) and "use_cache" not in guess.more:
        yield replace(guess, more=(*guess.more, "use_cache"), made={**guess.made, "use_cache": Made("plain", value=False)})
    for number, (name, made) in enumerate(other_forms(facts, inputs, str(cause))):
        if number == _MOST_FORMS:
            return
        yield replace(guess, made={**guess.made, name: made})


def _none_found(nearest: _Stopped, first: TraceError, unmade: Mapping[str, str], tried: int) -> TraceError:
    if not tried:
        return first
    given = ", ".join(f"{name}: {_shape(value)}" for name, value in nearest.inputs.items())
    lacks = [f" The keyword {name!r} is missing, and cannot be made up: {reason}." for name, reason in unmade.items()][:1]
    error = TraceError(
        f"{nearest.error} No call that autotp made up from the config runs, of {tried + 1}; this one came furthest: {given}."
        + "".join(lacks)
    )
    error.partial, error.module = nearest.error.partial, nearest.error.module
    return error


def _shape(value: object) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)
