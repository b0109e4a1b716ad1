"""Traces a model into a graph: runs every path that a user runs, on fake tensors."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from autotp.errors import AutoTPError, TraceError, sentence
from autotp.hugging_face import is_hugging_face
from autotp.trace.blocks import BlockRecorder, NotAlike
from autotp.trace.boundary import flatten_result
from autotp.trace.caches import uncached
from autotp.trace.example import Example
from autotp.trace.fills import of_every_block
from autotp.trace.graph import Graph, Node, Origin, Value
from autotp.trace.keep import undisturbed, undone
from autotp.trace.memo import Fakes, Known
from autotp.trace.model_state import fake_weights, in_mode, moved_nowhere, same_numbers, tag_ints
from autotp.trace.module_calls import Untraceable
from autotp.trace.recorder import Recorder
from autotp.trace.repeats import alike_blocks, counted
from autotp.trace.stash import left_elsewhere, left_in, left_on_modules
from autotp.trace.tags import Tagger
from autotp.trace.values import small
from autotp.trace.watch import Question, Refused, has_backward_hooks, is_model


def to_fake(fake: Fakes, tree: Any, recorder: Recorder, name: str = "", made: dict[int, Tensor] | None = None) -> Any:
    """Returns `tree` with real tensors as fake inputs of the graph; small ones stay known. `made`: id of a tensor → its fake one."""
    once = {} if made is None else made

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) not in once:
            once[id(tensor)] = converted(tensor)
        return once[id(tensor)]

    def converted(tensor: Tensor) -> Tensor:
        with fake:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)
        value = recorder.values.bind(new, Origin.INPUT, name)
        if small(tensor) and tensor.device.type != "meta" and not tensor.dtype.is_floating_point:
            recorder.values.know(value, tensor)
        return new

    found = tree_map_only(Tensor, convert, tree)
    return flatten_result(found, lambda _, t: t if isinstance(t, FakeTensor) else convert(t))  # in dataclasses too


#: How many answers to conditions are reversed because the code raises after the usual one.
_MOST_REVERSED = 8
#: How often a trace starts again because blocks turn out to be used in different ways, before all of them run.
RESTARTS = 4
#: What torch says where code wants the memory of a fake tensor: numpy, dlpack, a pointer, a storage.
_WANTS_MEMORY = (
    ".numpy() is not supported for tensor subclasses",
    "on an invalid python storage",
    "Cannot access data pointer of Tensor",
    "Not available for 'meta' device type",
)
_DISTRIBUTIONS = torch.distributions.__file__.rsplit("__init__", 1)[0]
_HERE = __file__.rsplit("trace", 1)[0]


def trace(
    model: nn.Module,
    examples: Sequence[Example],
    keep: Callable[[Any], bool],
    *,
    tag: bool = True,
    hidden: Callable[[str], bool] = lambda file: False,
    before: Callable[[Fakes], Callable[[], None]] | None = None,
    repeats: Mapping[str, str] | None = None,
    fixed: bool = False,
    known: Known | None = None,
    once: bool = False,
    enough: Callable[[Graph], bool] | None = None,
) -> Graph:
    """Record every example of `examples`.

    Args:
        keep: see Recorder.
        before: called when the weights are fake; may change the model, and returns how to go back.
        repeats: blocks that are answered from their templates where they are used alike; `graph.repeats` says which were.
        fixed: exactly the blocks of `repeats` are.
        known: results of operators that earlier traces have seen; this one adds to them.
        once: a call that cannot be run with repeated blocks answered from templates is not run again with all blocks.
        enough: called with the graph of the first of several examples; True where the others need not be recorded.

    Raises:
        TraceError: a path cannot be run. The model is left as it was.
    """
    found = alike_blocks(model) if repeats is None else dict(repeats)
    known = {} if known is None else known
    for _ in range(RESTARTS):
        try:
            return _trace(model, examples, keep, found, tag, hidden, before, known, enough)
        except NotAlike as error:
            if fixed:
                raise TraceError(f"blocks alike to one that is traced are used in another way: {error}") from error
            found = {block: template for block, template in found.items() if block not in error.blocks}
        except TraceError:
            if fixed or once or not found:
                raise
            break  # it may be that a block which did not run is missing something
    return _trace(model, examples, keep, {}, tag, hidden, before, known, enough)


def _trace(
    model: nn.Module,
    examples: Sequence[Example],
    keep: Callable[[Any], bool],
    repeats: dict[str, str],
    tag: bool,
    hidden: Callable[[str], bool],
    before: Callable[[Fakes], Callable[[], None]] | None,
    known: Known,
    enough: Callable[[Graph], bool] | None,
) -> Graph:
    fake = Fakes(known)
    skipped = tuple(block + "." for block in repeats)

    def skip(path: str) -> bool:
        return bool(skipped) and (path + ".").startswith(skipped)

    recorder = BlockRecorder(fake, keep, dict(model.named_modules()), hidden)
    recorder.calls.start = _call.__code__
    recorder.questions.data_vary = not is_hugging_face(model)  # for those there are examples of either kind
    evaluating = in_mode(model, training=False)
    try:
        with undisturbed(model), undone() as undo, evaluating, same_numbers(), moved_nowhere(recorder), uncached(model):
            recorder.held = dict(model.named_buffers(remove_duplicate=False))
            recorder.accesses.weights = fake_weights(model, fake, skip, undo)
            if tag:
                counters = {key: partial(recorder.counted, key[0]) for key in counted(model, repeats)}
                tag_ints(model, skip, undo, Tagger(recorder.life, counters, undo))
            if before is not None:
                undo.append(before(fake))
            params = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not skip(n)}
            buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if not skip(n)}
            for table, found, origin in ((recorder.values.params, params, Origin.PARAM), (recorder.values.buffers, buffers, Origin.BUFFER)):
                values: dict[int, Value] = {}
                for name, tensor in found.items():
                    if id(tensor) not in values:
                        values[id(tensor)] = recorder.values.bind(tensor, origin, name)
                    table[name] = values[id(tensor)]
            for shown, name in recorder.accesses.weights.attributes.values():
                recorder.values.shows(shown, name)
            recorder.watch(model, repeats)
            hooked = has_backward_hooks(model)
            for example in examples:
                recorder.questions.asked = {Question.GRAD} if hooked else set()
                _run(model, recorder, fake, example)
                if enough is not None and len(examples) > 1 and example is examples[0]:
                    first = of_every_block(recorder.graph(dict(repeats)))
                    if enough(first):
                        return first
            recorder.check()
            recorder.calls.note_swaps()
    except Refused as error:
        raise TraceError(f"{type(model).__name__}: {error}") from None
    finally:
        recorder.life.over = True
    return of_every_block(recorder.graph(dict(repeats)))


@dataclass(frozen=True, slots=True)
class _Mode:
    """How a call is made: with gradients, as if in inference mode, or with answers about unknown data contrary to the usual ones."""

    grad: bool
    inference: bool = False
    contrary: bool = False

    def others(self, asked: set[Question]) -> tuple[_Mode, ...]:
        """Returns the modes in which code that asked may take another path."""
        grad = (_Mode(not self.grad),) if Question.GRAD in asked else ()
        inference = (_Mode(grad=False, inference=True),) if Question.INFERENCE in asked else ()
        contrary = (replace(self, contrary=True),) if Question.CONDITION in asked and not self.inference else ()
        return (*grad, *inference, *contrary)

    def name(self, example: Example) -> str:
        """Returns the name of an example's path in this mode."""
        usual = self.grad is example.training
        gradients = "-inference" if self.inference else "" if usual else "-grad" if self.grad else "-no-grad"
        return example.name + gradients + ("-contrary" if self.contrary else "")


def _run(model: nn.Module, recorder: BlockRecorder, fake: Fakes, example: Example) -> None:
    """Record the path of an example, and those that its code may take with and without gradients where it asks for them.

    The path in training mode runs with gradients, whether its code asks or not.
    """

    def path(mode: _Mode, optional: bool) -> _LeftOut | None:
        return _path(model, recorder, fake, replace(example, name=mode.name(example), optional=optional), mode)

    questions = recorder.questions
    modes = [_Mode(grad=example.training)]
    with in_mode(model, example.training):
        failed = path(modes[0], optional=example.optional or example.training)
        if failed is not None and example.training:
            with_gradients, failed = failed, _path(model, recorder, fake, example, _Mode(grad=False))
            if failed is None and Question.GRAD in questions.asked:
                raise TraceError(f"{with_gradients.why} The code asks {Question.GRAD.value}, so the path without them says nothing of it.")
            modes.append(_Mode(grad=False))
        if failed is not None and not example.quiet:
            recorder.notes.append(f"the {failed.name} path was not traced: {failed.why}")
        if failed is not None and not failed.decoding:
            recorder.untrained = failed.why if example.training else recorder.untrained
            return
        if failed is not None:
            example = replace(example, decode=None)
        for mode in modes:
            for other in mode.others(questions.asked):
                if other not in modes:
                    left_out = path(other, optional=other.contrary)
                    while left_out is not None and not left_out.why and questions.turned:  # the answer that the code refuses is left alone
                        questions.settle(*left_out.raised)
                        left_out = path(other, optional=True)
                    if left_out is not None and left_out.why:
                        recorder.notes.append(f"the {left_out.name} path was not traced: {left_out.why}")
                    modes.append(other)


@dataclass(frozen=True, slots=True)
class _LeftOut:
    """A path that could not be run. `why` is "" where the code itself refuses. `decoding`: the call ran, what it decodes to did not.

    `raised`: the file and the function that raised.
    """

    name: str
    why: str
    decoding: bool
    raised: tuple[str, str] = "", ""


def _path(model: nn.Module, recorder: BlockRecorder, fake: Fakes, example: Example, mode: _Mode) -> _LeftOut | None:
    """Record one path and the one that it decodes to; return what could not be run and was left out, None where all of it ran.

    Raises:
        TraceError: the example is not optional.
    """
    name, start, done = example.name, len(recorder.tape.nodes), len(recorder.results.closed)
    mark, ran = start, False
    data, questions = recorder.data, recorder.questions
    data.guessed = data.chose = False
    try:
        with _failures(model, recorder):
            recorder.next_round()
            result, left = _call(model, recorder, fake, example, example.make(), mode)
            recorder.results.close(name, example.training, result, left, drawn=data.along)
            mark, ran = len(recorder.tape.nodes), True
            more = example.decode(result) if example.decode is not None else None
            if more is not None:
                name += "+decode"
                recorder.next_round()
                result, left = _call(model, recorder, fake, example, more, mode)
                recorder.results.close(name, example.training, result, left, drawn=data.along)
    except Untraceable as error:
        again = partial(_path, model, recorder, fake, example, mode)
        if data.ends and isinstance(error.error, IndexError):
            recorder.rewind(start, done)
            data.ends = False
            try:
                return again()
            finally:
                data.ends = True
        if data.guessed and not data.number and isinstance(error.error, (ArithmeticError, ValueError)):
            recorder.rewind(start, done)
            data.number = 1
            try:
                return again()
            finally:
                data.number = 0
        if not mode.contrary and questions.conditions and len(questions.reversed) < _MOST_REVERSED and _own(error.error):
            last = questions.conditions[-1]
            if questions.check(last) not in questions.reversed:  # `if not x.isfinite().all(): raise` of data that is not known
                recorder.rewind(start, done)
                questions.reversed.add(questions.check(last))
                questions.settled.add(last)
                return again()
        if (data.guessed or data.chose) and not data.along:
            recorder.rewind(start, done)
            with recorder.along():
                return again()
        if not example.optional:
            failure = TraceError(_explain(name, error, data.guessed))
            failure.partial, failure.module, failure.calls = recorder.graph(dict(recorder.repeats)), error.module, error.__traceback__
            raise failure from error.error
        recorder.rewind(mark, len(recorder.results.closed))
        why = "" if mode.contrary and (_own(error.error) or questions.swapped) else _explain(name, error, data.guessed)
        return _LeftOut(example.name + "+decode" * ran, why, ran, _raised(error.error))
    return None


def _raised(error: BaseException) -> tuple[str, str]:
    frames = traceback.extract_tb(error.__traceback__)
    return (frames[-1].filename, frames[-1].name) if frames else ("", "")


def _own(error: BaseException) -> bool:
    """True for an error that the model's code raises itself, or torch for it (its distributions, `torch._check`): a check that fails for
    such data fails on every rank.
    """
    file, _ = _raised(error)
    return bool(file) and (is_model(file) or file.startswith(_DISTRIBUTIONS) or file == torch.__file__) and not file.startswith(_HERE)


@contextmanager
def _failures(model: nn.Module, recorder: BlockRecorder) -> Iterator[None]:
    """Reports an error that the model's code or torch raises outside of a module call like one inside."""
    try:
        yield
    except (Untraceable, AutoTPError):
        raise
    except Exception as error:
        raise Untraceable("", type(model).__name__, recorder.tape.last(), error) from error


def _call(
    model: nn.Module, recorder: BlockRecorder, fake: Fakes, example: Example, inputs: Mapping[str, Any], mode: _Mode
) -> tuple[Any, list[tuple[str, str, Value]]]:
    """Returns the result of the call, and the tensors that it left on modules and in its arguments."""
    made: dict[int, Tensor] = {}  # one tensor in two arguments stays one
    fresh = {k: v if recorder.values.known(v) is not None else to_fake(fake, v, recorder, k, made) for k, v in inputs.items()}
    with recorder.recording(mode.grad, mode.inference, mode.contrary):
        result = example.call(model, fresh)
    opaque: dict[str, Any] = {}

    def attributes(where: tuple[str | int, ...], tensor: Tensor) -> Tensor:
        opaque[f"attributes of result {'.'.join(map(str, where))}".strip()] = vars(tensor)
        return tensor

    flatten_result(result, attributes, lambda where, item: opaque.setdefault(f"result {'.'.join(map(str, where))}".strip(), item))
    return result, [*left_on_modules(recorder), *left_in(recorder, {**fresh, **opaque}), *left_elsewhere(recorder)]


def _in_higher_order(error: BaseException) -> bool:
    """True for the error that torch raises when it dispatches a higher-order operator: the recorder's mode is not registered with it."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_code is HigherOrderOperator.dispatch.__code__


def _explain(path: str, error: Untraceable, guessed: bool) -> str:
    last: Node | None = error.node
    if _in_higher_order(error.error):
        return (
            f"cannot trace the model's {path} path: module {error.module or '<root>'!r} ({error.cls}) calls a higher-order operator of "
            "torch (flex_attention, cond, scan), of which no trace is made: use another implementation (attn_implementation='sdpa')."
        )
    where = f"module {error.module or '<root>'!r} ({error.cls})"
    near = f", after {last.opname} at {last.place}" if last is not None and last.place is not None else ""
    numbers = " Numbers that the code reads from data (`tolist`, `item`) are not known while tracing; 0 stood for them." if guessed else ""
    said = sentence(f"{type(error.error).__name__}: {error.error}")
    failed = f"cannot trace the model's {path} path: {where} failed{near}: {said}{numbers}"
    if any(text in str(error.error) for text in _WANTS_MEMORY):
        return (
            f"{failed} The code takes numbers out of torch there, or asks where they are in memory, and a model is traced without any: "
            "keep to torch inside of forward and convert its result outside (`model(x).detach().numpy()`), or write a recipe for it."
        )
    return f"{failed} Pass example_inputs= that fit the model, or write a recipe for it."
