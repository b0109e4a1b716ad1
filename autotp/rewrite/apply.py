"""Applies a plan's values to a model in place.

Everything that can fail for a reason in the plan comes first (checks, attributes, classes). The parameters are replaced last.
Whatever fails, the model is restored before the error leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from autotp.errors import PlanError
from autotp.plan.conversions import Op
from autotp.plan.layout import Layout, alike
from autotp.plan.spec import GradSum, ModulePlan, ParamPlan, Use
from autotp.rewrite.attributes import localise
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.guards import stash
from autotp.rewrite.guards.uncalled import Uncalled
from autotp.rewrite.modules import embedding, linear, module
from autotp.rewrite.modules.batched_reads import install_batch
from autotp.rewrite.modules.boundaries import InputSlots, OutputSlots
from autotp.rewrite.modules.classes import STATE, subclass, wrap_forward
from autotp.rewrite.modules.embedding import EmbeddingRun, embedding_run
from autotp.rewrite.modules.joint import install_joints, without_parts
from autotp.rewrite.modules.linear import LinearRun, linear_run
from autotp.rewrite.modules.linears import Together
from autotp.rewrite.modules.module import RUN, ModuleRun, run_instance
from autotp.rewrite.modules.pairs import PairsRun
from autotp.rewrite.operators.call_sites import SiteTable
from autotp.rewrite.parameters import fsdp  # noqa: F401  # FSDP keeps the layouts of what is made here
from autotp.rewrite.parameters.compiled_grads import keep_with
from autotp.rewrite.parameters.holders import Pair, give_new, retire
from autotp.rewrite.parameters.layout_dtensor import GradHook, LayoutDTensor
from autotp.rewrite.parameters.make import MakeParam
from autotp.rewrite.parameters.reads import GradFix, Read
from autotp.rewrite.sequence.scatter import Scatter
from autotp.rewrite.undo import Undo
from autotp.trace.reading import has_forward_of

__all__ = ["Undo", "apply"]


def apply(
    model: nn.Module,
    params: Mapping[str, ParamPlan],
    modules: Sequence[ModulePlan],
    *,
    comm: Comm,
    make_param: MakeParam,
    skip: tuple[str, ...] = (),
    scatter: Scatter | None = None,
    by_token: frozenset[str] = frozenset(),
    together: Sequence[Sequence[str]] = (),
) -> Undo:
    """Rewrite `model` in place so that this rank runs its part.

    Args:
        model: The model; `type(model)` stays, submodules become instances of subclasses of their classes.
        params: A plan for every name in `model.named_parameters(remove_duplicate=False)`.
        modules: The changes at each module.
        comm: The group.
        skip: prefixes of module paths that are left as they are, parameters too (they do not run).
        scatter: Scatters sums over tokens where the plan does; all-reduced without it.
        by_token: Modules that run on a rank's tokens, given such.
        together: Groups of Linears that read one tensor.
        make_param: `(fqn, old parameter, layout) → new parameter`, called once for each distinct parameter.

    Returns:
        The journal: `undo()` restores the model exactly. It keeps the full parameters alive until `release()`.

    Raises:
        PlanError: if the plan does not fit the model. The model is then unchanged.
    """
    undo = Undo()
    try:
        _Rewriter(model, params, modules, comm, undo, skip, scatter, by_token).run(make_param, together)
    except BaseException:
        undo.undo()
        raise
    return undo


class _Rewriter:
    def __init__(
        self,
        model: nn.Module,
        params: Mapping[str, ParamPlan],
        modules: Sequence[ModulePlan],
        comm: Comm,
        undo: Undo,
        skip: tuple[str, ...],
        scatter: Scatter | None,
        by_token: frozenset[str],
    ) -> None:
        self.scatter, self.by_token = scatter, by_token
        self.model, self.params, self.comm, self.undo = model, params, comm, undo
        named = dict(model.named_parameters(remove_duplicate=False))
        self.unknown = [n for n in params if n not in named]
        self.named = {n: p for n, p in named.items() if not (skip and n.startswith(skip))}
        self.paths: dict[int, str] = {}
        self.modules: dict[int, nn.Module] = {}
        for path, sub in model.named_modules():
            if not (skip and (path + ".").startswith(skip)):
                self.paths[id(sub)], self.modules[id(sub)] = path, sub
        self.plans = self._plans(modules)
        self.runs: list[ModuleRun | LinearRun | EmbeddingRun] = []
        self.originals = Undo()  # of the parameters, which are freed where the rest may still be taken back
        undo.push(self.originals.undo)
        undo.at_release(self.originals.release)

    def run(self, make_param: MakeParam, together: Sequence[Sequence[str]]) -> None:
        self._check_params()
        for sub in self.modules.values():
            plan = self.plans.get(id(sub))
            self._rewrite(sub, without_parts(plan))
            if plan is not None and plan.stashed:
                stash.guard(self.model, plan.path, plan.stashed, self.undo)
        for group in together:
            self._join(group)
        install_joints(self.model, list(self.plans.values()), self.comm, self.undo, self.scatter)
        runs = [(m, m.__dict__.get(STATE)) for m in self.modules.values()]
        reads = [(m, read) for m, run in runs for read in getattr(run, "reads", ()) if read.owner is not m]
        install_batch(self.model, [(m, r) for m, r in runs if isinstance(r, ModuleRun) and (r.light or r.by_token)], reads, self.undo)
        self._replace_params(make_param)

    def _join(self, group: Sequence[str]) -> None:
        members = [self.model.get_submodule(path) for path in group]
        runs = [m.__dict__.get(STATE) for m in members]
        if all(isinstance(r, LinearRun) and r.copies and not (r.reduces or r.gathers or r.shows or r.once) for r in runs):
            joined = Together(members, self.comm)
            for r in runs:
                r.together = joined  # type: ignore[union-attr]

    def _replace_params(self, make_param: MakeParam) -> None:
        names: dict[int, list[str]] = {}
        for name, old in self.named.items():
            names.setdefault(id(old), []).append(name)
        pairs: list[Pair] = []
        for tied in names.values():
            old = self.named[tied[0]]
            new = make_param(tied[0], old, self.params[tied[0]].layout)
            pairs.append(Pair(tuple(tied), old, new))
            if isinstance(new, LayoutDTensor) and new is not old:
                _keep_hooks(old, new, self.originals)
        del old
        laid_out = [p for p in pairs if isinstance(p.new, LayoutDTensor)]
        real = [p for p in pairs if p.new is not p.old and not isinstance(p.old, FakeTensor)]
        give_new(real, {id(t): t for m in self.modules.values() for t in (m._parameters,)}, [self.named], self.originals)
        owners: dict[int, nn.Module] = {}
        for pair in pairs:
            for name in pair.names:
                owner, leaf = self._owner(name)
                self.originals.set_item(owner._parameters, leaf, pair.new)
                owners[id(owner)] = owner
        for owner in owners.values():
            if any(isinstance(p, LayoutDTensor) for p in owner._parameters.values()):
                keep_with(owner, self.undo)
        for run in self.runs:
            for read in run.reads:
                read.of_parts = read.is_buffer or not isinstance(read.owner._parameters[read.name], LayoutDTensor)
        self.originals.at_release(lambda: retire(laid_out))

    def _plans(self, modules: Sequence[ModulePlan]) -> dict[int, ModulePlan]:
        plans: dict[int, ModulePlan] = {}
        for plan in modules:
            try:
                sub = self.model.get_submodule(plan.path)
            except AttributeError as error:
                raise PlanError(f"the plan names the module {plan.path!r}, which the model does not have") from error
            other = plans.setdefault(id(sub), plan)
            if other is not plan and _without_path(other) != _without_path(plan):
                raise PlanError(f"{other.path!r} and {plan.path!r} are one module but their plans differ")
        return plans

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _check_params(self) -> None:
        problems = []
        if missing := [n for n in self.named if n not in self.params]:
            problems.append(f"parameters without a plan: {missing}")
        if unknown := self.unknown:
            problems.append(f"plans for parameters that the model does not have: {unknown}")
        first: dict[int, str] = {}
        for name, p in self.named.items():
            if name not in self.params:
                continue
            layout = self.params[name].layout
            if tuple(p.shape) != layout.shape or layout.tp != self.comm.size:
                problems.append(f"{name}: shape {tuple(p.shape)} over {self.comm.size} ranks, the plan has {layout.shape} over {layout.tp}")
            tied = first.setdefault(id(p), name)
            if tied in self.params and not alike(self.params[tied].layout, layout):
                problems.append(f"{tied} and {name} are tied but their layouts differ: {self.params[tied].layout}; {layout}")
        if problems:
            raise PlanError("the plan does not fit the model:\n  " + "\n  ".join(problems))

    def _reads(self, sub: nn.Module, uses: Sequence[Use], unread: Sequence[str]) -> tuple[Read, ...]:
        """Returns the reads of every own parameter but `unread`, changed and extended by the plan's uses."""
        path = self.paths[id(sub)]
        own = [n for n, p in sub._parameters.items() if p is not None and n not in unread]
        reads = {(id(sub), n): self._read(sub, Use(path, n)) for n in own}
        for use in uses:
            try:
                owner = self.model.get_submodule(use.owner)
            except AttributeError as error:
                raise PlanError(f"{path}: a use names the module {use.owner!r}, which the model does not have") from error
            reads[id(owner), use.name] = self._read(owner, use)
        return tuple(reads.values())

    def _read(self, owner: nn.Module, use: Use) -> Read:
        if use.name not in owner._parameters and use.name not in owner._buffers:
            raise PlanError(f"{use.owner!r} has no parameter or buffer {use.name!r}")
        full = f"{use.owner}.{use.name}" if use.owner else use.name
        plan = self.params.get(full) if use.name in owner._parameters else None
        layout: Layout | None = None if plan is None else plan.layout
        return Read(owner, use.name, self.comm, layout, use.grad, use.conversions, use.written, held=use.held)

    def _rewrite(self, sub: nn.Module, plan: ModulePlan | None) -> None:
        reads = self._reads(sub, *((plan.uses, plan.unread) if plan is not None else ((), ())))
        if plan is None and not reads:
            return
        where = self.paths[id(sub)] or type(sub).__name__
        if plan is not None and plan.attributes:
            localise(sub, plan.attributes, self.undo, where)
        run, make_forward = self._run(sub, plan, reads, where)
        self.runs.append(run)
        if isinstance(run, ModuleRun) and self._keeps_class(sub):
            run.light = None  # it reads for itself
            self.undo.set_item(sub.__dict__, RUN, run)
            wrap_forward(sub, run_instance, self.undo)
            return
        names = tuple(r.name for r in run.own)
        self.undo.set_item(sub.__dict__, STATE, run)
        self.undo.set_class(sub, subclass(type(sub), names, make_forward))

    def _run(
        self, sub: nn.Module, plan: ModulePlan | None, reads: tuple[Read, ...], where: str
    ) -> tuple[ModuleRun | LinearRun | EmbeddingRun, Callable[..., Callable[..., object]]]:
        if plan is not None and plan.uncalled:
            return Uncalled(sub, reads, where), module.make_forward
        own = all(r.owner is sub and not r.held for r in reads)
        if own and not self._keeps_class(sub):
            if has_forward_of(type(sub), nn.Linear) and (fast := linear_run(plan, reads, self.comm, self.scatter)) is not None:
                if self._is_by_token(sub, plan, reads):
                    fast.by_token = tuple(GradFix(GradSum.ALL, r.layout, self.comm) for r in fast.own)
                return fast, linear.make_forward
            if isinstance(sub, nn.Embedding) and has_forward_of(type(sub), nn.Embedding) and plan is not None:
                found = embedding_run(sub, plan, reads, self.comm, self.scatter)
                if found is not None:
                    return found, embedding.make_forward
        if plan is None:
            return self._given_tokens(ModuleRun(sub, reads), sub, plan), module.make_forward
        taken, given = ([i for i in plan.items if i.result is result] for result in (False, True))
        inputs = InputSlots(plan.inputs, sub.forward, self.comm, where, taken) if plan.inputs or taken else None
        outputs = OutputSlots(plan.outputs, self.comm, where, self.scatter, given) if plan.outputs or given else None
        watched = plan.sites or any(r.held for r in reads)
        sites = SiteTable(plan.sites, self.comm, where) if watched else None
        dispatches = any(c.op is Op.DISPATCH for s in plan.inputs for c in s.conversions)
        pairs = PairsRun(plan.pairs, sub.forward, self.comm, where, dispatches) if plan.pairs is not None else None
        return self._given_tokens(ModuleRun(sub, reads, inputs, outputs, sites, pairs), sub, plan), module.make_forward

    def _given_tokens(self, run: ModuleRun, sub: nn.Module, plan: ModulePlan | None) -> ModuleRun:
        simple = len(run.own) == len(run.reads) and not any(r.convert or r.is_buffer or r.held for r in run.reads)
        if simple and run.inputs is None and run.sites is None and run.pairs is None and self._is_by_token(sub, plan, run.reads):
            run.by_token = tuple((r, GradFix(GradSum.ALL, r.layout, self.comm)) for r in run.own)
        return run

    def _is_by_token(self, sub: nn.Module, plan: ModulePlan | None, reads: tuple[Read, ...]) -> bool:
        """True for a module, whole on every rank, that can run on a rank's tokens."""
        enters = plan is None or (not (plan.uses or plan.attributes or plan.joint or plan.stashed) and _only_enters(plan))
        whole = enters and all(r.fix.grad is GradSum.NONE and r.layout is not None and r.layout.dim is None for r in reads)
        return whole and self.scatter is not None and self.paths[id(sub)] in self.by_token

    def _keeps_class(self, sub: nn.Module) -> bool:
        return sub is self.model or "forward" in sub.__dict__


def _only_enters(plan: ModulePlan) -> bool:
    return all(c.op in (Op.COPY, Op.ENTER) for s in plan.outputs for c in s.conversions)


def _keep_hooks(old: nn.Parameter, new: LayoutDTensor, undo: Undo) -> None:
    """Keeps the hooks on a parameter, and their handles too."""
    hooks = old._backward_hooks
    if hooks:
        before = dict(hooks)
        hooks.update({key: GradHook(hook, new._layout) for key, hook in before.items()})

        def back() -> None:
            hooks.clear()
            hooks.update(before)

        undo.push(back)
        new._backward_hooks = hooks
    if after := old._post_accumulate_grad_hooks:
        new._post_accumulate_grad_hooks = after


def _without_path(plan: ModulePlan) -> tuple[object, ...]:
    changes = plan.inputs, plan.outputs, plan.uses, plan.attributes, plan.sites, plan.joint
    return *changes, plan.uncalled, plan.stashed, plan.pairs, plan.unread, plan.items
