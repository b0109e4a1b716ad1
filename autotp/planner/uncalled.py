"""Plans modules that no traced call runs, but that own a sharded parameter because it is another module's too.

The input embedding of an encoder-decoder model is the usual one. The encoder and the decoder have tables of their own, tied to it,
and only a user calls it. Without a plan it would compute with this rank's part as if it were all.

Such a module takes the plan of a module of the same class and with the same attributes that owns the same parameters, if calls of
that one are complete in themselves: their arguments and results are whole. Any other is marked, and raises when it is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from autotp.plan.conversions import Op
from autotp.plan.plan import Plan
from autotp.plan.spec import ModulePlan
from autotp.planner.assemble import Draft
from autotp.planner.holding import find_holding
from autotp.planner.repeats import traced
from autotp.trace.graph import Pseudo
from autotp.trace.reading import is_container, is_list

_TABLES = frozenset(nn.Module().__dict__) - {"training"}


def with_uncalled(plan: Plan, draft: Draft, model: nn.Module) -> Plan:
    """Returns `plan` with an entry for each module that owns a sharded parameter and that no traced call ran, with all idle modules, and
    with what the code around them, and around parameters that no traced call read, holds.
    """
    called = _called(draft, model)
    plan = _with_unread(replace(plan, idle=frozenset(_idle(model, called))), draft, model)
    plans = {m.path: m for m in plan.modules}
    leaves = {path: module for path, module in called.items() if not module._modules}
    more: list[ModulePlan] = []
    for path, module in model.named_modules():
        if path in called or not path:
            continue
        if all(p is None or plan.params[_join(path, n)].layout.dim is None for n, p in module._parameters.items()):
            continue
        twin = next((other for other, leaf in leaves.items() if _alike(module, leaf) and _complete(other, draft, plans)), None)
        if twin is None or path in plans:
            more.append(replace(plans.get(path, ModulePlan(path)), uncalled=True))
        else:
            more.append(_moved(plans.get(twin, ModulePlan(twin)), twin, path))
    if not more:
        return plan
    fresh = {m.path for m in more}
    return replace(plan, modules=(*(m for m in plan.modules if m.path not in fresh), *more))


def _idle(model: nn.Module, called: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yields the modules that no traced call ran."""
    return (path for path, module in model.named_modules() if path and path not in called and not is_list(module))


def _with_unread(plan: Plan, draft: Draft, model: nn.Module) -> Plan:
    """Returns `plan` with what code holds, where there are modules that no traced call ran or parameters that none read."""
    graph = draft.space.graph
    values = {name: graph.params.get(traced(name, graph.repeats)) for name, _ in model.named_parameters(remove_duplicate=False)}
    unread = [name for name, value in values.items() if value is not None and value.id not in draft.space.users]
    if (not unread and not plan.idle) or any(n.op is Pseudo.BATCHED for n in graph.nodes):  # what a vmap reads is not recorded
        return plan
    holds = find_holding(draft, plan.boundaries)
    names: dict[str, list[str]] = {}
    for name in unread:
        owner, _, leaf = name.rpartition(".")
        code = owner
        while code and is_container(model.get_submodule(code)):  # a list of parameters, which code of the module around it reads
            code = code.rpartition(".")[0]
        if code in holds:
            names.setdefault(owner, []).append(leaf)
    plans = {m.path: m for m in plan.modules}
    plans |= {path: replace(plans.get(path, ModulePlan(path)), unread=tuple(leaves)) for path, leaves in names.items()}
    return replace(plan, holds=holds, modules=tuple(plans.values()))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _called(draft: Draft, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that some traced call ran, by path; those inside of repeated blocks run as their templates do."""
    graph = draft.space.graph
    ran = {n.module for n in graph.nodes} | {n.slot[0] for n in graph.nodes if n.slot is not None} | {p for p, _ in graph.calls.values()}
    return {path: module for path, module in model.named_modules() if any(p in ran for p in _templates(path, graph.repeats))}


def _templates(path: str, repeats: Mapping[str, str]) -> Iterator[str]:
    """Yields `path`, and the paths that stand for it: with each repeated block that it is inside of replaced by its template."""
    yield path
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        template = repeats.get(".".join(parts[:end]))
        if template is not None:
            yield from _templates(".".join((template, *parts[end:])), repeats)
            return


def _complete(path: str, draft: Draft, plans: Mapping[str, ModulePlan]) -> bool:
    """True where every traced call of the module takes whole values and returns whole ones, gradients included."""
    space, labels, moves = draft.space, draft.choice.labels, draft.moves
    copied = {slot.path for slot in plans.get(path, ModulePlan(path)).inputs if any(c.op is Op.COPY for c in slot.conversions)}
    for node in space.graph.nodes:
        if node.slot is None or node.slot[0] != path:
            continue
        outside = node.args[0] if node.op is Pseudo.ENTER else node.outputs[0]
        if labels.of(outside) or outside.id in moves.partial:
            return False
        if node.op is Pseudo.ENTER and node.outputs[0].id in space.flows and node.slot[1] not in copied:
            return False
    return True


def _alike(module: nn.Module, other: nn.Module) -> bool:
    """True for modules of one class with the same parameters, no buffers, and equal attributes."""
    if type(module) is not type(other) or module._modules or module._buffers or other._buffers:
        return False
    if module._parameters.keys() != other._parameters.keys():
        return False
    if any(module._parameters[n] is not p for n, p in other._parameters.items()):
        return False
    own, others = _attributes(module), _attributes(other)
    return own.keys() == others.keys() and all(_equal(v, others[k]) for k, v in own.items())


def _attributes(module: nn.Module) -> dict[str, object]:
    return {k: v for k, v in module.__dict__.items() if k not in _TABLES}


def _equal(a: object, b: object) -> bool:
    if a is b:
        return True
    return type(a) is type(b) and not isinstance(a, Tensor) and isinstance(a, (int, float, str, tuple)) and a == b


def _moved(plan: ModulePlan, twin: str, path: str) -> ModulePlan:
    return replace(plan, path=path, uses=tuple(replace(u, owner=path if u.owner == twin else u.owner) for u in plan.uses))
