"""`model.resize_token_embeddings` of a parallel model: the table and the head are made whole, resized, and cut again by the plan's rule.

The plan rests on the number of tokens in three places: the layouts of the table and the head, and the gathering of the head's result.
A plan made of the resized model differs there alone, as long as both are cut along the tokens. Where they are not, or FSDP has the
parameters, the call is refused before anything changes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.hugging_face import is_hugging_face
from autotp.parallel_state import ParallelState, state_of
from autotp.plan.expressions import Expr, Factor
from autotp.plan.layout import Layout
from autotp.plan.plan import Plan
from autotp.plan.spec import ModulePlan
from autotp.preflight import STATE
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.split import Split
from autotp.rewrite.modules import classes
from autotp.rewrite.modules.embedding import EmbeddingRun
from autotp.rewrite.modules.linear import LinearRun
from autotp.rewrite.parameters.compiled_grads import order_gradient
from autotp.rewrite.parameters.data_parallel import is_managed
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.parameters.make import as_dtensor
from autotp.rewrite.parameters.reads import GradFix
from autotp.rewrite.undo import Undo

_ADVICE = "call resize_token_embeddings before parallelize (build the model again), and fully_shard after both"


class Resize:
    """Replaces `model.resize_token_embeddings`, with its arguments and its result. Collective. It survives deepcopy."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        functools.update_wrapper(self, model.resize_token_embeddings, updated=())  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True) -> nn.Module:
        model: Any = self._model
        resize = functools.partial(
            type(model).resize_token_embeddings, model, new_num_tokens, pad_to_multiple_of, mean_resizing=mean_resizing
        )
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        rows = table.weight.shape[0]
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted == rows and (head is None or head.weight.shape[0] == rows):
            return resize()  # type: ignore[no-any-return]
        state = state_of(model)
        paths = {id(m): path for path, m in model.named_modules()}
        ends = [_end(paths.get(id(m)), m, rows, state) for m in (table, head) if m is not None]
        if table.padding_idx is not None and table.padding_idx >= wanted:
            raise AutoTPError(f"the padding token {table.padding_idx} would not be in a table of {wanted} rows: {_ADVICE}")
        made = _made_whole(model, ends, resize)
        for end, parameters in zip(ends, made, strict=True):
            end.take(parameters, wanted, state.comm)
        resized = _resized(state.plan, {e.path: e for e in ends}, rows, wanted)
        model.__dict__[STATE] = replace(state, plan=resized)
        return table  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _End:
    """The table or the head, as the plan has it."""

    path: str
    module: Any
    run: EmbeddingRun | LinearRun

    def take(self, whole: Mapping[str, Any], rows: int, comm: Comm) -> None:
        """Cuts resized parameters. The table's stays the object that it is, as on one device; a tied one is that of the table."""
        own = self.module._parameters
        for read in self.run.own:
            given, p = whole[read.name], own[read.name]
            if type(given) is LayoutDTensor:
                own[read.name] = given
            else:
                layout = _rows(p._layout, rows)
                part = layout.shard(comm.broadcast_(given.detach().contiguous()), comm.rank)
                new = as_dtensor(part.clone(), layout, p._spec.mesh)
                if isinstance(self.run, EmbeddingRun):
                    p.grad = None
                    p._become(new)
                    for hook in (p._backward_hooks or {}).values():
                        hook.layout = layout
                else:
                    own[read.name] = p = nn.Parameter(new, given.requires_grad)
                    if p.requires_grad:
                        order_gradient(p)  # type: ignore[arg-type]
            layout = own[read.name]._layout
            read.layout, read.fix = layout, GradFix(read.fix.grad, layout, comm)
        if isinstance(self.run, EmbeddingRun):
            again = EmbeddingRun(self.run.weight, self.module.padding_idx, comm, reduces=self.run.reduces, scatters=self.run.scatters)
            self.run.rows, self.run.runs, self.run.padding = again.rows, again.runs, again.padding
            self.module.num_embeddings = rows
        else:
            split: Any = self.run.gathers
            self.run.gathers = Split(split.dim, replace(split.expr, size=rows), comm)
            self.module.out_features = rows


def _end(path: str | None, module: Any, rows: int, state: ParallelState) -> _End:
    """Returns the table or the head.

    Raises:
        AutoTPError: it is not cut along `rows` tokens alone, other modules read it, or FSDP manages it.
    """
    run = module.__dict__.get(classes.STATE)
    parameters = [p for p in module._parameters.values() if p is not None]
    why = ""
    if any(map(is_managed, parameters)):
        why = "FSDP has its parameters"
    elif path is None or not isinstance(run, EmbeddingRun | LinearRun) or any(u.owner == path for m in state.plan.modules for u in m.uses):
        why = "other code than its own runs on its part"
    elif not all(type(p) is LayoutDTensor and p.shape[0] == rows and _is_cut(p._layout.dims[0]) for p in parameters):
        why = "it is not cut along the tokens"
    elif isinstance(run, LinearRun) and (run.once or not isinstance(run.gathers, Split) or not _is_cut(run.gathers.expr)):
        why = "its result is not gathered"
    if why:
        where = path or type(module).__name__
        raise AutoTPError(f"resize_token_embeddings: {where} cannot be resized in a parallel model, as {why}: {_ADVICE}")
    return _End(path, module, run)  # type: ignore[arg-type]


def _is_cut(expr: Expr) -> bool:
    return isinstance(expr, Factor) and expr.sharded and (expr.pieces, expr.granule, expr.of) == (1, 1, "")


def _rows(layout: Layout, rows: int) -> Layout:
    tokens: Any = layout.dims[0]  # a factor, see `_is_cut`
    return Layout((rows, *layout.shape[1:]), (replace(tokens, size=rows), *layout.dims[1:]), layout.tp)


def _made_whole(model: Any, ends: Iterable[_End], resize: Any) -> list[dict[str, Any]]:
    """Runs transformers' own code on whole parameters, and returns what it made of each of `ends`; of the model itself it changes sizes
    that it keeps, and nothing where it raises.

    A parameter that the head has in common with the table afterwards is returned as the parallel one.
    """
    ends = list(ends)
    own = [dict(e.module._parameters) for e in ends]
    whole: dict[int, nn.Parameter] = {}
    for p in (p for parameters in own for p in parameters.values() if p is not None):
        whole.setdefault(id(p), nn.Parameter(p._whole().clone(), p.requires_grad))
    sizes = [{n: v for n, v in vars(e.module).items() if isinstance(v, int)} for e in ends]
    config = model.config.get_text_config()
    tokens = config.vocab_size
    done = False
    try:
        for end, parameters in zip(ends, own, strict=True):
            end.module._parameters.update({n: None if p is None else whole[id(p)] for n, p in parameters.items()})
        resize()
        done = True
        heads = [model.get_input_embeddings(), model.get_output_embeddings()][: len(ends)]
        made: list[dict[str, Any]] = [dict(m._parameters) for m in heads]
        table: Tensor = made[0]["weight"]
        for parameters in made[1:]:
            parameters.update({n: own[0]["weight"] for n, p in parameters.items() if p is table})
    finally:
        for end, parameters, numbers in zip(ends, own, sizes, strict=True):
            end.module._parameters.update(parameters)
            vars(end.module).update(numbers)
        model.set_input_embeddings(ends[0].module)
        if len(ends) > 1:
            model.set_output_embeddings(ends[1].module)
        if not done:
            config.vocab_size = tokens
    return made


def _resized(plan: Plan, ends: Mapping[str, _End], before: int, rows: int) -> Plan:
    names = {f"{path}.{name}" for path, end in ends.items() for name in end.module._parameters}
    params = {n: replace(p, layout=_rows(p.layout, rows)) if n in names else p for n, p in plan.params.items()}
    modules = tuple(_gathering(m, rows) if m.path in ends else m for m in plan.modules)
    axes = tuple(replace(a, size=rows) if names & {*a.params} and a.size == before else a for a in plan.axes)
    traffic = tuple(replace(t, width=rows) if t.module in ends and t.width == before else t for t in plan.traffic)
    return replace(plan, params=params, modules=modules, axes=axes, traffic=traffic)


def _gathering(plan: ModulePlan, rows: int) -> ModulePlan:
    def slot(s: Any) -> Any:
        return replace(s, conversions=tuple(c if c.expr is None else replace(c, expr=replace(c.expr, size=rows)) for c in s.conversions))

    return replace(plan, outputs=tuple(map(slot, plan.outputs)))


def install_resizing(model: nn.Module, mesh: Any, undo: Undo) -> None:
    """Have a model of transformers resize its table as a parallel model; journalled in `undo`."""
    if is_hugging_face(model) and callable(getattr(type(model), "resize_token_embeddings", None)):
        undo.set_attribute(model, "resize_token_embeddings", Resize(model))
