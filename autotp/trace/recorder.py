"""Records a run of a model on fake tensors as a `Graph`.

Two modes work together. A `TorchFunctionMode` (`python_mode`) sees each call as the code wrote it: raw Python ints with their provenance,
and the place of the call. A dispatch mode on the PreDispatch key (`aten_mode`) sees the same call as ATen operators that are not
decomposed yet. The `forward` of every module is wrapped (`module_calls`). All of them append to one `Tape` and share one table of `Values`.

Where code depends on data that is unknown (which experts are hit), sizes are chosen: see `unknown_data`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher

from autotp.trace.accesses import Accesses
from autotp.trace.aten_mode import AtenMode
from autotp.trace.gradients import Gradients
from autotp.trace.graph import Graph, Origin, Result
from autotp.trace.ints import Life
from autotp.trace.memo import Fakes
from autotp.trace.module_calls import ModuleCalls
from autotp.trace.python_mode import PythonMode
from autotp.trace.questions import Questions
from autotp.trace.results import Results
from autotp.trace.tape import Tape
from autotp.trace.unknown_data import UnknownData
from autotp.trace.values import Values, small
from autotp.trace.watch import is_code_of_a_model, watching


class Recorder:
    """Collects nodes; used as `with recorder.recording(): model(...)`."""

    def __init__(
        self,
        fake: Fakes,
        keep: Callable[[Any], bool],
        modules: Mapping[str, nn.Module],
        hidden: Callable[[str], bool] = lambda file: False,
    ) -> None:
        """`keep`: operators recorded whole (others are decomposed if they can be). `modules`: path → module, one path each.

        `hidden(file)`: calls made from such a file are run but not recorded.
        """
        self.fake, self.every = fake, modules
        self.held: dict[str, Tensor] = {}  # the buffers of the model as it is
        self.notes: list[str] = []
        self.untrained = ""  # why the path in training mode could not be traced
        self.life = Life(is_code_of_a_model)  # of the tags of this trace
        memo = fake.memo
        self.tape = Tape(hidden)
        self.accesses = Accesses(self.tape)
        self.values = Values(self.tape, self.accesses.note, self.missed)
        self.questions = Questions(self.tape)
        self.data = UnknownData(fake, memo, self.tape, self.values, self.questions)
        self.gradients = Gradients(self.tape, self.values, self.questions)
        self.calls = ModuleCalls(modules, self.tape, self.values, memo, self.questions, self.module_call)
        self.results = Results(self.tape, self.values)
        self._aten = AtenMode(keep, self.tape, self.values, self.accesses, self.data, self.life)
        self._python = PythonMode(self.tape, self.values, self.accesses, self.gradients, self.calls, self.data, self.life, self.met)

    # for recorders that care --------------------------------------------------------------------------------------------------

    def missed(self, tensor: Tensor) -> None:
        """Notes that code uses a tensor that has no value yet."""

    def met(self, func: Any, args: tuple[Any, ...]) -> None:
        """Notes that code calls `func`, a function of tensors or the getter of a property."""

    def module_call(self, module: nn.Module, path: str, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Runs the forward `inner` of a module that code calls."""
        return self.calls.run(module, path, inner, args, kwargs)

    # --------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def recording(self, grad: bool = False, inference: bool = False, contrary: bool = False) -> Iterator[None]:
        """Record everything that runs inside.

        `grad`: with gradients; `inference`: as if in inference mode; `contrary`: see `Questions.condition`.
        """
        self.questions.begin(inference, contrary)
        watched = watching(self.questions.ask, self.gradients.apply, inference)
        with (
            torch.set_grad_enabled(grad),
            self.fake,
            self._python,
            enable_python_dispatcher(),
            self._aten,
            self.calls.wrapped(),
            self._aten.batches.watched(),
            watched,
        ):
            yield

    @contextmanager
    def along(self) -> Iterator[None]:
        """Inside, integers that operators make of unknown floats are drawn, and whole numbers in buffers are those of the model."""
        self.data.along = True
        reversed_before, self.questions.reversed = self.questions.reversed, set()  # those are answers to questions without numbers
        for name, value in self.values.buffers.items():
            held = self.held.get(name)
            if held is not None and small(held) and not held.is_meta and not held.dtype.is_floating_point:
                with self.tape.paused(), torch.no_grad():
                    self.values.drawn[value.id] = held.detach().cpu().clone()
        try:
            yield
        finally:
            self.data.along = False
            self.questions.reversed = reversed_before
            self.values.drawn.clear()

    def rewind(self, mark: int, done: int) -> None:
        """Forget the recording after the first `mark` nodes and `done` results, a path that the model turned down, and the values
        that it made, with the comparisons of their sizes.
        """
        gone = {o.id for node in self.tape.nodes[mark:] for o in node.outputs}
        self.life.forget(gone)
        self.tape.rewind(mark)
        self.calls.rewind(mark)
        self.values.rewind(mark)
        self.results.rewind(done)

    def graph(self, repeats: dict[str, str]) -> Graph:
        """Returns everything recorded so far, without versions of aliases that nothing reads."""
        tape, values, calls = self.tape, self.values, self.calls
        nodes, results = self.results.alive()
        constants = {
            v.id: values.concrete[v.id]
            for n in nodes
            for v in n.inputs()
            if v.id in values.concrete and (v.origin is Origin.CONST or prod(v.shape) <= 16)
        }
        nodes, members = calls.one_slot(nodes)
        numbers = {n.call for n in nodes}
        return Graph(
            nodes=nodes,
            params=dict(values.params),
            buffers=dict(values.buffers),
            results=results,
            repeats=dict(repeats),
            fills=dict(values.fills),
            notes=(*self.notes, *_of_drawn(results)),
            constants=constants,
            calls=dict(tape.frames),
            accesses={key: tuple(found) for key, found in self.accesses.found.items()},
            python={number: call for number, call in tape.python.items() if number in numbers},
            members=members,
            scopes=self.gradients.proven(),
            refilled=frozenset(calls.refilled),
            left={key: tuple(found.values()) for key, found in self.results.left.items()},
            forms=calls.forms(),
            containers=calls.containers(),
            asks_dims=frozenset(calls.asks_dims),
            sized=frozenset(self._python.sized),
            compared=self.life.noted(),
            read=frozenset(self.data.read),
            chosen=frozenset(self.life.chosen),
            swapped=frozenset(calls.swapped),
            untrained="" if any(result.training for result in results) else self.untrained,
        )


def _of_drawn(results: Sequence[Result]) -> tuple[str, ...]:
    names = list(dict.fromkeys(r.name for r in results if r.drawn and "+" not in r.name and not r.name.endswith("-contrary")))
    if not names:
        return ()
    paths = f"the {names[0]} path was" if len(names) == 1 else f"the paths {', '.join(names[:-1])} and {names[-1]} were"
    return (f"{paths} traced along numbers drawn for {'its' if len(names) == 1 else 'their'} data: of other data the trace says nothing",)
