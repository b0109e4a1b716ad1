"""nn.Module → Graph: runs every path that a user runs, on fake tensors."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from autotp.errors import TraceError
from autotp.trace.alike import alike_blocks
from autotp.trace.choices import Untraceable, small
from autotp.trace.fills import of_every_block
from autotp.trace.graph import Graph, Node, Origin, Pseudo, Value
from autotp.trace.inputs import Example
from autotp.trace.prepare import Undo, fake_weights, in_mode, keep_state, run_undo, same_numbers, tag_ints
from autotp.trace.recorder import Recorder
from autotp.trace.watch import Question, Refused, has_backward_hooks


class _NotAlike(BaseException):
    """A block is called in another way than its template (its own argument values): all blocks of that kind must run."""

    def __init__(self, template: str) -> None:
        super().__init__(template)
        self.template = template


class _BlockRecorder(Recorder):
    """A recorder that runs a block alike to an earlier one only once for each form of its arguments."""

    repeats: dict[str, str]
    done: dict[Any, tuple[tuple[Value, ...], Any, Any]]

    def module_call(self, module: nn.Module, path: str, inner: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Answer the call of a repeated block from its template's result."""
        if path not in self.templates:
            return super().module_call(module, path, inner, args, kwargs)
        here = self._tensors((args, kwargs))
        key = (self.templates[path], self.round, _form((args, kwargs), self), tuple(map(here.index, here)))
        if path not in self.repeats:
            result = super().module_call(module, path, inner, args, kwargs)
            self.done[key] = (here, args, result)  # the arguments are kept alive: values are told by identity
            return result
        if key not in self.done:
            raise _NotAlike(self.templates[path])
        there, _, result = self.done[key]
        # What a block returns stands for what every block alike to it returns, so only new arguments tell something new.
        if here != there and (key, here) not in self.seen:
            self.seen.add((key, here))
            self.add(Pseudo.REPEAT, (here, there), {}, (), slot=(path, (self.templates[path],)))
        return copy.copy(result) if isinstance(result, (list, dict)) else result

    def left_read(self, path: str) -> None:
        """Someone reads a parameter of a block that is not run: it is not like its template to everyone, so it must run."""
        raise _NotAlike(next(t for b, t in self.repeats.items() if (path + ".").startswith(b + ".")))

    seen: set[Any]
    templates: dict[str, str]
    round: int

    def _tensors(self, tree: Any) -> tuple[Value, ...]:
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        _map_result(tree, note)
        return tuple(map(self.value, found))


def _map_result(tree: Any, on_tensor: Callable[[Tensor], Tensor]) -> Any:
    from autotp.trace.boundary import flatten_result

    return flatten_result(tree, lambda _, t: on_tensor(t))


def _form(tree: Any, recorder: Recorder) -> Any:
    """The form of a call's arguments: shapes and dtypes of tensors, other plain values as they are, objects by identity."""
    if isinstance(tree, Tensor):
        value = recorder.value(tree)  # reading the tensor's own shape would go through the recorder's modes
        return (value.shape, value.dtype)
    if isinstance(tree, (tuple, list)):
        return tuple([_form(x, recorder) for x in tree])
    if isinstance(tree, dict):
        return tuple([(k, _form(v, recorder)) for k, v in tree.items()])
    if isinstance(tree, (int, float, str, bool, type(None))):
        return tree
    return id(tree)


def to_fake(fake: FakeTensorMode, tree: Any, recorder: Recorder, name: str = "") -> Any:
    """`tree` with real tensors as fake inputs of the graph; small ones stay known."""

    def convert(tensor: Tensor) -> Tensor:
        with fake:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", requires_grad=tensor.requires_grad)
        value = recorder.bind(new, Origin.INPUT, name)
        if small(tensor) and tensor.device.type != "meta" and not tensor.dtype.is_floating_point:
            recorder.concrete[value.id] = tensor.detach().cpu()
        return new

    return tree_map_only(Tensor, convert, tree)


def trace(
    model: nn.Module,
    examples: Sequence[Example],
    keep: Callable[[Any], bool],
    *,
    tag: bool = True,
    hidden: Callable[[str], bool] = lambda file: False,
    before: Callable[[FakeTensorMode], Callable[[], None]] | None = None,
    repeats: Mapping[str, str] | None = None,
) -> Graph:
    """Record every example of `examples`.

    `keep`: see Recorder. `before` is called when the weights are fake, may change the model, and returns how to go back.
    Raises TraceError when a path cannot be run; the model is left as it was.
    """
    found = alike_blocks(model) if repeats is None else dict(repeats)
    while True:
        try:
            return _trace(model, examples, keep, found, tag, hidden, before)
        except _NotAlike as error:
            found = {block: template for block, template in found.items() if template != error.template}


def _trace(
    model: nn.Module,
    examples: Sequence[Example],
    keep: Callable[[Any], bool],
    repeats: dict[str, str],
    tag: bool,
    hidden: Callable[[str], bool],
    before: Callable[[FakeTensorMode], Callable[[], None]] | None,
) -> Graph:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    skipped = tuple(block + "." for block in repeats)

    def skip(path: str) -> bool:
        return bool(skipped) and (path + ".").startswith(skipped)

    recorder = _BlockRecorder(fake, keep, dict(model.named_modules()), hidden)
    recorder.repeats, recorder.done, recorder.round, recorder.seen = dict(repeats), {}, 0, set()
    recorder.templates = {**repeats, **{t: t for t in repeats.values()}}
    undo: Undo = []
    try:
        keep_state(model, undo)
        with in_mode(model, training=False), same_numbers(), _quiet_fakes():
            recorder.weights = fake_weights(model, fake, skip, undo)
            if tag:
                tag_ints(model, skip, undo)
            if before is not None:
                undo.append(before(fake))
            params = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not skip(n)}
            buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if not skip(n)}
            for table, found, origin in ((recorder.params, params, Origin.PARAM), (recorder.buffers, buffers, Origin.BUFFER)):
                values: dict[int, Value] = {}
                for name, tensor in found.items():
                    if id(tensor) not in values:
                        values[id(tensor)] = recorder.bind(tensor, origin, name)
                    table[name] = values[id(tensor)]
            for shown, name in recorder.weights.attributes.values():
                recorder.stands_for(shown, name)
            for example in examples:
                _run(model, recorder, fake, example)
    except Refused as error:
        raise TraceError(f"{type(model).__name__}: {error}") from None
    finally:
        run_undo(undo)
    return of_every_block(recorder.graph(dict(repeats)))


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    """torch logs every refusal of a fake operator as an error with a traceback; ours name the module."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class _Mode:
    """How a call is made: with gradients, or as if in inference mode."""

    grad: bool
    inference: bool = False

    def others(self, asked: set[Question]) -> tuple[_Mode, ...]:
        """The modes in which code that asked may take another path."""
        grad = (_Mode(not self.grad),) if Question.GRAD in asked else ()
        return (*grad, _Mode(grad=False, inference=True)) if Question.INFERENCE in asked else grad

    def name(self, example: Example) -> str:
        """The name of an example's path in this mode."""
        usual = self.grad is example.training
        return example.name + ("-inference" if self.inference else "" if usual else "-grad" if self.grad else "-no-grad")


def _run(model: nn.Module, recorder: _BlockRecorder, fake: FakeTensorMode, example: Example) -> None:
    """Record the path of an example, and those that its code may take with and without gradients where it asks for them.

    The path in training mode runs with gradients, whether its code asks or not.
    """

    def path(mode: _Mode, optional: bool) -> tuple[str, str] | None:
        return _path(model, recorder, fake, replace(example, name=mode.name(example), optional=optional), mode)

    recorder.asked = {Question.GRAD} if has_backward_hooks(model) else set()
    modes = [_Mode(grad=example.training)]
    with in_mode(model, example.training):
        failed = path(modes[0], optional=example.optional or example.training)
        if failed is not None and example.training:
            with_gradients, failed = failed, _path(model, recorder, fake, example, _Mode(grad=False))
            if failed is None and Question.GRAD in recorder.asked:
                raise TraceError(f"{with_gradients[1]} The code asks {Question.GRAD.value}, so the path without them says nothing of it.")
            modes.append(_Mode(grad=False))
        if failed is not None:
            recorder.notes.append(f"the {failed[0]} path was not traced: {failed[1]}")
        if failed is not None and "+decode" not in failed[0]:
            return
        if failed is not None:
            example = replace(example, decode=None)
        for mode in modes:
            for other in mode.others(recorder.asked):
                if other not in modes:
                    path(other, optional=False)
                    modes.append(other)


def _path(model: nn.Module, recorder: _BlockRecorder, fake: FakeTensorMode, example: Example, mode: _Mode) -> tuple[str, str] | None:
    """Record one path and what it decodes to; (name, why) of what could not be run and was left out.

    Raises:
        TraceError: the example is not optional.
    """
    name, start, done = example.name, len(recorder.nodes), len(recorder.results)
    mark = start
    try:
        recorder.round += 1
        result = _call(model, recorder, fake, example, example.make(), mode)
        recorder.finish(name, result)
        more = example.decode(result) if example.decode is not None else None
        if more is not None:
            name, mark = name + "+decode", len(recorder.nodes)
            recorder.round += 1
            recorder.finish(name, _call(model, recorder, fake, example, more, mode))
    except Untraceable as error:
        if recorder.ends and isinstance(error.error, IndexError):
            recorder.rewind(start)
            del recorder.results[done:]
            recorder.ends = False
            try:
                return _path(model, recorder, fake, example, mode)
            finally:
                recorder.ends = True
        if not example.optional:
            failure = TraceError(_explain(name, error))
            failure.partial, failure.module = recorder.graph(recorder.repeats), error.module
            raise failure from error.error
        recorder.rewind(mark)
        return name, _explain(name, error)
    return None


def _call(
    model: nn.Module, recorder: _BlockRecorder, fake: FakeTensorMode, example: Example, inputs: Mapping[str, Any], mode: _Mode
) -> Any:
    known = recorder._values
    fresh = {k: v if _is_known(v, known) else to_fake(fake, v, recorder, k) for k, v in inputs.items()}
    with recorder.recording(mode.grad, mode.inference), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the model's code, which will warn its user when it runs
        try:
            return example.call(model, fresh)
        except Untraceable:
            raise
        except Exception as error:  # of a hook of the model, or of a method that is called past its forward
            raise Untraceable("", type(model).__name__, recorder.nodes[-1] if recorder.nodes else None, error) from error


def _is_known(item: Any, known: Mapping[int, Value]) -> bool:
    return isinstance(item, Tensor) and id(item) in known


def _explain(path: str, error: Untraceable) -> str:
    last: Node | None = error.node
    where = f"module {error.module or '<root>'!r} ({error.cls})"
    near = f", after {last.opname} at {last.place}" if last is not None and last.place is not None else ""
    return (
        f"cannot trace the model's {path} path: {where} failed{near}: {type(error.error).__name__}: {error.error}. "
        "Pass example_inputs= that fit the model, or write a recipe for it."
    )
