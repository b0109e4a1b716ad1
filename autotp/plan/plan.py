"""`Plan`: what parallelize will do to a model, as a value that people read and programs apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any

import torch

from autotp.errors import InputError
from autotp.plan import cost, export, report
from autotp.plan.spec import AxisInfo, Boundary, Collective, Forms, ModulePlan, PaddedAxis, ParamPlan, Traffic


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a model over `tp` ranks.

    params: fqn → ParamPlan, in the model's order (tied names each). modules: what changes at which module. axes: the sharded
    axes. traffic: the collectives before they are given a size. aliases: tied name → the first name of the same parameter.
    products: names of the parameters that are operands of products (Linear and expert weights). notes: what the
    reader should know (paths that were not traced). checked: what the plan passed besides its replay on fake tensors: `numbers` (the
    model and its ranks were run and compared), `numbers of a smaller twin`, or `graph only: why`.
    boundaries: path of a module → what code outside of it does not see whole there (`autotp.planner.boundaries`). inside: path
    of each module whose own code computes on parts → the forms in which it was called while tracing, empty where none is known. swapped:
    (path, class) of each module that a forward put in place of another while tracing. untrained: why calls in training mode are refused,
    "" where they were traced. copies: path of a module → its results that are gathered or summed for whoever calls it, while code inside
    goes on with the part.
    """

    model: str
    tp: int
    params: Mapping[str, ParamPlan]
    modules: tuple[ModulePlan, ...]
    axes: tuple[AxisInfo, ...]
    traffic: tuple[Traffic, ...]
    aliases: Mapping[str, str]
    products: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    checked: str = ""
    boundaries: Mapping[str, tuple[Boundary, ...]] = field(default_factory=dict)
    inside: Mapping[str, Forms] = field(default_factory=dict)
    swapped: frozenset[tuple[str, str]] = frozenset()
    untrained: str = ""
    copies: Mapping[str, tuple[tuple[str | int, ...], ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))
        object.__setattr__(self, "aliases", MappingProxyType(dict(self.aliases)))
        object.__setattr__(self, "boundaries", MappingProxyType(dict(self.boundaries)))
        object.__setattr__(self, "inside", MappingProxyType(dict(self.inside)))
        object.__setattr__(self, "copies", MappingProxyType(dict(self.copies)))

    def __reduce__(self) -> Any:
        fields = (
            self.model,
            self.tp,
            dict(self.params),
            self.modules,
            self.axes,
            self.traffic,
            dict(self.aliases),
            self.products,
            self.notes,
            self.checked,
            dict(self.boundaries),
            dict(self.inside),
            self.swapped,
            self.untrained,
            dict(self.copies),
        )
        return Plan, fields

    @property
    def local_share(self) -> float:
        """Parameter elements on a rank over all of them; tied parameters count once."""
        own = [p for n, p in self.params.items() if n not in self.aliases]
        whole = sum(prod(p.layout.shape) for p in own)
        return sum(prod(p.layout.local_shape) for p in own) / whole if whole else 1.0

    @property
    def padding_waste(self) -> float:
        """Elements of padding over all ranks ÷ elements of the model: 0.067 means 6.7 %. See `autotp.plan.cost`."""
        return cost.padding_waste(self)

    @property
    def repeated_share(self) -> float:
        """Elements of sharded parameters held beyond the first copy, over all ranks, ÷ elements of the model.

        Key and value rows that several ranks need, parts of a fused weight that are not cut. Replicated parameters are
        not among them: `replicated` lists those.
        """
        return cost.repeated_share(self)

    @property
    def busiest_work(self) -> float:
        """Multiply-adds a token of the busiest rank ÷ (multiply-adds of the model ÷ tp), at best 1.

        Counted as elements of the parameters in `products`, padding included; all experts count.
        """
        return cost.busiest_work(self)

    @property
    def padded_axes(self) -> tuple[PaddedAxis, ...]:
        """The axes that zeros fill up to a multiple of what the ranks need: `size` indices held as `padded` slots."""
        return cost.padded_axes(self)

    @property
    def replicated(self) -> Mapping[str, str]:
        """Parameter → why it stays whole on every rank."""
        return {n: p.reason for n, p in self.params.items() if p.layout.dim is None}

    @property
    def replicated_products(self) -> tuple[str, ...]:
        """Linear and expert parameters that stay replicated: what `strict=True` refuses."""
        return tuple(n for n in self.replicated if n in self.products)

    @property
    def attributes(self) -> Mapping[str, tuple[int, int]]:
        """`module.attribute` → (value, local value) of every attribute made local."""
        return {".".join(filter(None, (m.path, a.path))): (a.value, a.local) for m in self.modules for a in m.attributes}

    def collectives(self, *, tokens: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[Collective, ...]:
        """Every collective of a forward and backward over `tokens` tokens in `dtype`, by module.

        Bytes are those of the collective's result: hidden 16,384, 8 tokens, float16 → 262,144 for an all-reduce.

        Raises:
            InputError: tokens < 1.
        """
        if tokens < 1:
            raise InputError(f"tokens must be at least 1, got {tokens}")
        item = dtype.itemsize
        return tuple(Collective(t.module, t.kind, t.when, (t.width * tokens + t.elements) * item) for t in self.traffic)

    def explain(self, name: str) -> str:
        """Why a parameter, or everything under a module, is laid out as it is.

        Raises:
            InputError: the plan knows no such parameter or module; names the nearest ones.
        """
        return report.explain(self, name)

    def to_tp_plan(self) -> dict[str, str]:
        """The plan as a transformers `tp_plan`: module name → style.

        Raises:
            PlanError: it does what no style does (fused layouts, padding, local attributes, …): lists all of it.
        """
        return export.to_tp_plan(self)

    def to_parallelize_module(self) -> dict[str, Any]:
        """The plan as the `parallelize_plan` of `torch.distributed.tensor.parallel.parallelize_module`: module name → `ParallelStyle`.

        Raises:
            PlanError: as for `to_tp_plan`.
        """
        return export.to_parallelize_module(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan in JSON-able form."""
        return report.to_dict(self)

    def __str__(self) -> str:
        return report.render(self)
