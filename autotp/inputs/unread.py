"""Looks for calls that read the parameters which no traced call reads.

    calls_for_unread(model, guess, examples, graph, run)  ->  calls to trace beside `examples`

A tower for images or sound stays whole on every rank where no traced call runs it. So a call with images or sound that the model
turned down is looked for in other forms, and an optional keyword that no call was given (`encoder_hidden_states`) is tried. A call
counts if it reads parameters that none before it has read. Nobody gave these calls, so those that stay unfit are not reported.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from autotp.errors import InputError, TraceError
from autotp.hugging_face import is_hugging_face
from autotp.inputs.by_name import why_not
from autotp.inputs.facts import Facts, Guess
from autotp.inputs.paths import internals
from autotp.inputs.search import Limits, Stops, named, search
from autotp.trace.example import Example
from autotp.trace.graph import Graph

#: For how many seconds of CPU time calls are looked for, in all, and how many are tried for each kind.
MOST_SECONDS, MOST_TRIES = 10.0, 32
#: Parameters that are less than this share of all are not worth a search.
_WORTH = 0.02
#: Keywords that bring no parameters with them.
_BESIDE = re.compile(
    r"labels?$|mask|position|inputs_embeds$|type_ids|past_|cache|scores|return_|output_|indices|_scale|logits_to_keep|lengths?$|_pos$"
)

Run = Callable[[Example], Graph]


def calls_for_unread(model: nn.Module, guess: Guess, examples: Sequence[Example], graph: Graph, run: Run) -> Iterator[Example]:
    """The calls that read what `graph`, the trace of `examples` made with `guess`, does not. `run` traces one.

    A call that was looked for has the name of the example that it stands for.
    """
    unread = _unread(graph)
    if not is_hugging_face(model) or not _worth(unread, graph):
        return
    until = time.thread_time() + MOST_SECONDS
    ran = {result.name for result in graph.results}
    names = [e.name for e in examples if e.sought and e.name not in ran and not e.training]
    facts = Facts(model, guess=guess)
    given = {name for e in examples if e.name in ran and not e.method for name in e.make()}
    keywords = [k for k in facts.keywords if k not in given and _may_read(facts, k)]
    stops = Stops()
    along: tuple[str, ...] = ()  # what the model takes, and reads nothing more with: it may need another one beside
    for name, keyword in (*((name, "") for name in names), *(("", k) for k in keywords)):
        masks = tuple(m for m in facts.keywords if m not in given and "mask" in m and m.split("_")[0] == keyword.split("_")[0])
        ways = dict.fromkeys(((*along, keyword, *masks), (keyword, *masks), (keyword,))) if keyword else ((),)
        for number, more in enumerate(ways, start=1):
            left = until - time.thread_time()
            if left <= 0 or not _worth(unread, graph):
                return
            limits = Limits(MOST_TRIES if number == len(ways) else 0, left)
            found = _found(model, replace(guess, more=(*guess.more, *more)), name, run, limits, stops)
            if found is None:
                continue
            if reads := unread - _unread(found[1]):
                unread -= reads
                call = found[0] if name else replace(found[0], name=f"with {keyword}", decode=None, optional=True, quiet=True)
                yield call
                if not call.method:  # layers that no other call runs show their states too
                    yield from _shown(facts, call)
            elif keyword:
                along = (*along, keyword, *masks)
            break


def _found(model: nn.Module, start: Guess, name: str, run: Run, limits: Limits, stops: Stops) -> tuple[Example, Graph] | None:
    """A call of this name that runs, and its trace; the search for it begins with `start`, and goes not where others stopped."""
    graphs: list[Graph] = []

    def stopped(example: Example) -> TraceError | None:
        try:
            graphs.append(run(replace(example, optional=False, decode=None)))
        except TraceError as error:
            return error
        return None

    try:
        example = named(model, start, name)
        failure = stopped(example)
        if failure is not None and stops.have(failure):
            return None
        if failure is not None:
            example = named(model, search(model, failure, stopped, start, name, limits, stops), name)
    except (TraceError, InputError):
        return None
    except Exception:  # values that do not go together, whatever their makers say
        return None
    return example, graphs[-1]


def _shown(facts: Facts, call: Example) -> Iterator[Example]:
    """The call, asked for hidden states and attention weights."""
    for more in internals(facts, lambda **options: lambda: {**call.make(), **options}):
        yield replace(more, name=f"{call.name} with {more.name}", quiet=True)


def _may_read(facts: Facts, name: str) -> bool:
    """Whether an optional keyword may be read by parameters, and can be made."""
    keyword = facts.keywords[name]
    return "Tensor" in keyword.annotation and _BESIDE.search(name) is None and why_not(facts, name) is None


def _unread(graph: Graph) -> frozenset[str]:
    """The parameters that no operator reads."""
    read = {value.id for node in graph.nodes for value in node.inputs()}
    return frozenset(name for name, value in graph.params.items() if value.id not in read)


def _worth(unread: frozenset[str], graph: Graph) -> bool:
    """Whether these parameters are a share of the model that is worth a search."""
    sizes = {name: math.prod(value.shape) for name, value in graph.params.items()}
    return sum(sizes.get(name, 0) for name in unread) > _WORTH * sum(sizes.values())
