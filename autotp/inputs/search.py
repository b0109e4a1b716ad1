"""Finds a call that a model takes, where the first guess is none: the plain one, or one with images, sound or what else it is named after.

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

#: How many plain calls are tried, and for how many seconds of CPU time: a large model takes long for each.
MOST_TRIES, MOST_SECONDS = 48, 60.0
#: How many forms of the values of one call are tried.
_MOST_FORMS = 24
#: How many placeholders a text may have.
_MOST_MARKS = 8192
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


@dataclass(frozen=True, slots=True)
class Limits:
    """How many calls are tried, and for how many seconds of CPU time."""

    tries: int
    seconds: float


@dataclass(slots=True)
class Stops:
    """What stopped the calls of searches that found none: another search that comes to the same place does not go on from there."""

    known: set[object] = field(default_factory=set)

    def have(self, error: TraceError) -> bool:
        """Whether calls of a search that found none stopped so."""
        return _stop(error) in self.known


def search(
    model: nn.Module,
    error: TraceError,
    run: Run,
    start: Guess | None = None,
    name: str = "",
    limits: Limits | None = None,
    stops: Stops | None = None,
) -> Guess:
    """The guess of a call that `run` runs to its end; `error` stopped that of `start`. `name`: of an example; the plain one if "".

    `stops` of searches before; what stops this one is added where it finds none.

    Raises:
        TraceError: none was found; says how far the best call came, what it was made of and which keyword is to be given.
    """
    queue: list[_Stopped] = []
    seen: set[object] = set()
    unmade: dict[str, str] = {}
    tried = 0
    start = Guess() if start is None else start
    limits = Limits(MOST_TRIES, MOST_SECONDS) if limits is None else limits
    stops = Stops() if stops is None else stops
    met = {_stop(error)}

    def stopped(guess: Guess, failure: TraceError, inputs: Mapping[str, object]) -> None:
        given = len(guess.more) - ("use_cache" in guess.more)  # an argument that code missed brings it on, even to the same operator
        rank = -_progress(failure), -given, len(guess.made), tried
        heapq.heappush(queue, _Stopped(rank, guess, failure, _moves(Facts(model, method, guess), failure, inputs, unmade), inputs))

    example = named(model, start, name)
    method = example.method or "forward"
    first = example.make()
    seen.add(_key(first))
    stopped(start, error, first)
    nearest = queue[0]
    until = time.thread_time() + limits.seconds
    while queue and tried < limits.tries and time.thread_time() < until:
        nearest = min(nearest, queue[0])
        guess = next(queue[0].moves, None)
        if guess is None:
            heapq.heappop(queue)
            continue
        try:
            example = named(model, guess, name)
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
        if _further(failure, queue[0].error) and not stops.have(failure):
            met.add(_stop(failure))
            stopped(guess, failure, inputs)
    if tried:
        stops.known |= met
    raise _none_found(nearest, error, unmade, tried) from nearest.error.__cause__


def named(model: nn.Module, guess: Guess, name: str) -> Example:
    """The example of this name, or the plain one if "", made with `guess`."""
    calls = calls_with(model, guess)
    return next(e for e in calls if e.name == name) if name else calls[0]


def _key(inputs: Mapping[str, object]) -> object:
    return tuple((name, form_of(value)) for name, value in sorted(inputs.items()))


def _progress(error: TraceError) -> int:
    """How many operators that the model's code called had run."""
    nodes: Any = getattr(error.partial, "nodes", ())
    return sum(node.place is not None for node in nodes)


def _stop(error: TraceError) -> object:
    """Where and why a call stopped, whatever the sizes."""
    cause = error.__cause__
    return error.module, type(cause), re.sub(r"\d+", "", str(cause))


def _further(error: TraceError, other: TraceError) -> bool:
    """Whether `error` came at a later operator than `other`, or at the same one for another reason than other sizes."""
    ran = _progress(error) - _progress(other)
    return ran > 0 or (ran == 0 and re.sub(r"\d+", "", str(error)) != re.sub(r"\d+", "", str(other)))


def _moves(facts: Facts, error: TraceError, inputs: Mapping[str, object], unmade: dict[str, str]) -> Iterator[Guess]:
    """Further guesses, from the call of the guess of `facts` that stopped with `error`."""
    guess = facts.guess
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
    yield from (replace(guess, marks=n) for n in _other_marks(facts, inputs, str(cause)))
    for number, (name, made) in enumerate(other_forms(facts, inputs, str(cause))):
        if number == _MOST_FORMS:
            return
        yield replace(guess, made={**guess.made, name: made})


def _other_marks(facts: Facts, inputs: Mapping[str, object], error: str) -> Iterator[int]:
    """Other numbers that an error names beside that of the placeholders in the text."""
    ids = inputs.get("input_ids")
    numbers = list(dict.fromkeys(map(int, re.findall(r"(?<![\w.])\d+(?![\w.]\d)", error))))
    for token in (facts.image_token, facts.audio_token):
        count = int((ids == token).sum()) if isinstance(ids, Tensor) and token is not None else 0
        if count in numbers[:8]:
            yield from (n for n in numbers if n != count and 0 < n <= _MOST_MARKS)


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
