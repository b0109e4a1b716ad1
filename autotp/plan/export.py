"""Exports a plan as transformers' `tp_plan` or as torch's `parallelize_module` dict.

Both name a style for each module and cut weights into even contiguous parts. They cannot express the rest of a plan: fused layouts,
padding, shared rows, attributes that become local, changes inside of forwards. An export without those would compute other numbers.
So the export collects everything that cannot be expressed, and raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from autotp.errors import PlanError
from autotp.plan.conversions import Op
from autotp.plan.expressions import Concat, Factor
from autotp.plan.layout import Layout
from autotp.plan.names import folded
from autotp.plan.spec import DistributedForm, GradSum, ModulePlan, PlanSpec

COLUMN, ROW, GATHERED, LOOKUP, INSIDE = "column", "row", "gathered", "lookup", "inside"

#: Our word → transformers' (`transformers.integrations.tensor_parallel`, 5.17 and later).
_TRANSFORMERS = {
    COLUMN: "colwise",
    ROW: "rowwise",
    GATHERED: "colwise_gather_output",
    LOOKUP: "embedding_rowwise",
    INSIDE: "replicated_with_grad_allreduce",
}


def to_tp_plan(plan: PlanSpec) -> dict[str, str]:
    """Exports the plan: see `Plan.to_tp_plan`."""
    found = _Exporter(plan, "a transformers tp_plan", experts=True)
    styles = {name: _TRANSFORMERS.get(word, word) for name, word in found.words().items()}
    found.check()
    return _folded(styles)


def to_parallelize_module(plan: PlanSpec) -> dict[str, Any]:
    """Exports the plan: see `Plan.to_parallelize_module`."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    make: dict[str, Callable[[], Any]] = {
        COLUMN: ColwiseParallel,
        ROW: RowwiseParallel,
        GATHERED: lambda: ColwiseParallel(output_layouts=Replicate()),
        LOOKUP: lambda: RowwiseParallel(input_layouts=Replicate()),
    }
    found = _Exporter(plan, "a parallelize_module plan", experts=False)
    words = found.words()
    for name in [n for n, word in words.items() if word == INSIDE]:
        found.problems.append(f"{name}: whole, and used on shards: its gradient would not be summed")
    found.check()
    return {name: make[word]() for name, word in _folded(words).items()}


class _Exporter:
    def __init__(self, plan: PlanSpec, wanted: str, *, experts: bool) -> None:
        self.plan, self.wanted, self.experts = plan, wanted, experts
        self.modules = {m.path: m for m in plan.modules}
        self.problems: list[str] = []
        self.params: dict[str, dict[str, Layout]] = {}
        for name, p in plan.params.items():
            path, _, leaf = name.rpartition(".")
            self.params.setdefault(path, {})[leaf] = p.layout

    def check(self) -> None:
        """Raise everything that was found."""
        if self.problems:
            unique = list(dict.fromkeys(folded(p) for p in self.problems))
            raise PlanError(f"{self.wanted} cannot say what this plan does:\n  " + "\n  ".join(unique))

    def words(self) -> dict[str, str]:
        """Returns module (or parameter of a mixture of experts) → our word."""
        out: dict[str, str] = {}
        for path, layouts in self.params.items():
            out.update(self._module(path, layouts))
        for m in self.plan.modules:
            if self._around_experts(m) and any(c.op is Op.COPY for slot in m.inputs for c in slot.conversions):
                # moe_tp_experts enters at the experts themselves: what stands before them (a router) has whole gradients then
                out = {n: word for n, word in out.items() if word != INSIDE or not n.startswith(m.path + ".")}
            for a in m.attributes:
                self.problems.append(f"{m.path}: the attribute {a.path} becomes local ({a.value} → {a.local})")
            if m.pairs is not None:
                self.problems.append(f"{m.path}: its experts are dealt whole (experts='whole'): no style")
            for s in m.changed:
                if s.kernel is not DistributedForm.LOOKUP:
                    self.problems.append(f"{m.path}: a call in {s.function} is changed")
            if m.path not in self.params or not any(layout.dim is not None for layout in self.params[m.path].values()):
                self.problems += list(self._boundaries(m))
        return out

    def _boundaries(self, m: ModulePlan) -> Iterator[str]:
        """Finds conversions at modules without a sharded parameter: no style does them."""
        for kind, slots in (("argument", m.inputs), ("result", m.outputs)):
            for s in slots:
                ops = {c.op for c in s.conversions}
                if ops == {Op.COPY} and kind == "argument" and self._around_experts(m):
                    continue
                yield f"{m.path or '<root>'}: {kind} {'.'.join(map(str, s.path)) or '(all)'}: {', '.join(sorted(op.value for op in ops))}"

    def _around_experts(self, m: ModulePlan) -> bool:
        """True for a module that holds a mixture of experts and nothing else that is sharded."""
        inside = [
            p for p, own in self.params.items() if p.startswith(m.path + ".") and any(layout.dim is not None for layout in own.values())
        ]
        return self.experts and bool(inside) and all(self._is_experts(p) for p in inside)

    def _is_experts(self, path: str) -> bool:
        heavy = [layout for layout in self.params.get(path, {}).values() if len(layout.shape) == 3 and layout.dim is not None]
        return len(heavy) == 2

    def _module(self, path: str, layouts: Mapping[str, Layout]) -> Iterator[tuple[str, str]]:
        cut = {leaf: layout for leaf, layout in layouts.items() if layout.dim is not None}
        module = self.modules.get(path, ModulePlan(path))
        if cut and self._is_closed(path, module) and all(len(layout.shape) != 2 for leaf, layout in cut.items() if leaf != "bias"):
            return  # a convolution that is cut alone: whole, it gives the same
        for leaf, layout in cut.items():
            if layout.is_padded:
                self.problems.append(f'{path}.{leaf}: "{layout}" is padded: {layout.tp} ranks do not divide it')
            elif layout.is_shared:
                self.problems.append(f'{path}.{leaf}: "{layout}" has rows that several ranks hold')
        if not cut:
            if any(u.grad is GradSum.ALL for u in module.uses):
                yield path, INSIDE
            return
        if self.experts and self._is_experts(path):
            yield from self._expert_words(path, cut)
            return
        heavy = {leaf: layout for leaf, layout in cut.items() if len(layout.shape) == 2}
        if len(heavy) != 1:
            self.problems.append(f"{path}: {', '.join(cut)} cut: no style for a module like this")
            return
        (weight,) = heavy.values()
        word = self._word(module)
        wanted = {COLUMN: 0, GATHERED: 0, LOOKUP: 0, ROW: 1}.get(word)
        if wanted is None or weight.dim != wanted:
            self.problems.append(
                f'{path}: "{weight}" is cut along dim {weight.dim}, which is not how a style cuts it ({word or "no collectives"})'
            )
        elif not weight.is_padded and not weight.is_shared and not _contiguous(weight):
            self.problems.append(f'{path}: the layout "{weight}" is fused: a rank\'s part is not one piece of it')
        else:
            yield path, word

    def _is_closed(self, path: str, module: ModulePlan) -> bool:
        """True for a module that gets and gives whole tensors, and whose parameters nobody else has."""
        entering = {c.op for slot in module.inputs for c in slot.conversions}
        leaving = [[c.op for c in slot.conversions] for slot in module.outputs]
        tied = any(name.rpartition(".")[0] == path for pair in self.plan.aliases.items() for name in pair)
        return entering == {Op.COPY} and leaving == [[Op.GATHER]] and not (module.changed or module.attributes or tied)

    def _word(self, module: ModulePlan) -> str:
        result = [c for s in module.outputs if not s.path for c in s.conversions]
        if any(c.op is Op.SCATTER for c in result):
            self.problems.append(f"{module.path}: its result stays in parts over the tokens (sequence_parallel): no style")
        if any(s.kernel is DistributedForm.LOOKUP for s in module.sites):
            return LOOKUP
        if any(c.row.sums for c in result):
            return ROW
        if any(c.op is Op.LAZY_GATHER for c in result):
            self.problems.append(f"{module.path}: its result stays in parts over the ranks (loss_parallel): no style")
        return GATHERED if any(c.op is Op.GATHER for c in result) else COLUMN

    def _expert_words(self, path: str, cut: Mapping[str, Layout]) -> Iterator[tuple[str, str]]:
        yield path, "moe_tp_experts"
        for leaf, layout in cut.items():
            expr = layout.expr
            packed = isinstance(expr, Concat) and len(expr.parts) == 2 and all(isinstance(p, Factor) and p.sharded for p in expr.parts)
            if layout.dim == 1 and (packed or _contiguous(layout)):
                yield f"{path}.{leaf}", "packed_colwise" if packed else "colwise"
            elif layout.dim == 2 and _contiguous(layout):
                yield f"{path}.{leaf}", "rowwise"
            else:
                self.problems.append(f'{path}.{leaf}: no style cuts "{layout}"')


def _contiguous(layout: Layout) -> bool:
    """True when each rank's part is one piece, in the order of the ranks."""
    assert layout.dim is not None
    n = layout.shape[layout.dim]
    return all(layout.runs(r) == ((r * n // layout.tp, (r + 1) * n // layout.tp),) for r in range(layout.tp))


def _folded(words: Mapping[str, str]) -> dict[str, str]:
    """Numbers in names as `*` where all names that fold to one have the same word."""
    groups: dict[str, set[str]] = {}
    for name, word in words.items():
        groups.setdefault(folded(name), set()).add(word)
    return {(folded(n) if len(groups[folded(n)]) == 1 else n): word for n, word in words.items()}
