"""A `Plan` tells how parallelize will change a model, as a value that people read and programs apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, final

import torch

from autotp.plan import as_dict, brief, cost, explain, export, report
from autotp.plan.page import page
from autotp.plan.spec import Collective, PaddedAxis, PlanSpec


@final
@dataclass(frozen=True, slots=True)
class Plan(PlanSpec):
    """The plan of a model over `tp` ranks: the fields of `autotp.plan.spec.PlanSpec`, and methods that answer questions about them."""

    __hash__ = PlanSpec.__hash__  # the fields of mappings have no hash of their own

    @property
    def padding_waste(self) -> float:
        """Elements of padding over all ranks ÷ elements of the model: 0.067 means 6.7 %. See `autotp.plan.cost`."""
        return cost.padding_waste(self)

    @property
    def repeated_share(self) -> float:
        """Elements of sharded parameters held beyond the first copy, over all ranks, ÷ elements of the model.

        These are key and value rows that several ranks need, and segments of a fused weight that are not sharded. Replicated
        parameters do not count here: `replicated` lists them.
        """
        return cost.repeated_share(self)

    @property
    def busiest_work(self) -> float:
        """Multiply-adds a token of the busiest rank ÷ (multiply-adds of the model ÷ tp), at best 1.

        A multiply-add counts for each element of the parameters in `products`, padding included; all experts count.
        """
        return cost.busiest_work(self)

    @property
    def padded_axes(self) -> tuple[PaddedAxis, ...]:
        """The axes that have padding because tp does not divide them: the ranks hold `size` indices as `padded` slots."""
        return cost.padded_axes(self)

    def collectives(self, *, tokens: int = 1, dtype: torch.dtype = torch.bfloat16) -> tuple[Collective, ...]:
        """Lists every collective of a forward and backward over `tokens` tokens in `dtype`, by module.

        Bytes are those of the collective's result: hidden 16,384, 8 tokens, float16 → 262,144 for an all-reduce.

        Raises:
            InputError: tokens is no whole number of at least 1, or dtype no torch.dtype.
        """
        return cost.collectives(self, tokens, dtype)

    def explain(self, name: str) -> str:
        """Says why a parameter, or everything under a module, has its layout.

        The last parts of a name are enough: `self_attn.q_proj` explains the one of each layer, and those that are alike once.

        Raises:
            InputError: the plan knows no such parameter or module; names the nearest ones. Or `name` is no text.
        """
        return explain.explain(self, name)

    def to_tp_plan(self) -> dict[str, str]:
        """Returns the plan as a transformers `tp_plan`: module name → style.

        Raises:
            PlanError: no style expresses parts of the plan (fused layouts, padding, local attributes, …); the message lists all of them.
        """
        return export.to_tp_plan(self)

    def to_parallelize_module(self) -> dict[str, Any]:
        """Returns the `parallelize_plan` of `torch.distributed.tensor.parallel.parallelize_module`: module name → `ParallelStyle`.

        Raises:
            PlanError: as for `to_tp_plan`.
        """
        return export.to_parallelize_module(self)

    def to_html(self, *, against: Mapping[str, PlanSpec] = MappingProxyType({}), dtype: torch.dtype = torch.bfloat16) -> str:
        """Returns the plan as a page of one HTML file: the model as blocks, what is sent, memory, a table (docs/report.md).

        Args:
            against: Name → another plan of the model, at another tp or by another recipe. The page says what differs.
            dtype: Of the weights and of what is sent.

        Raises:
            InputError: jinja2 is not installed (`pip install 'autotp[report]'`), or an argument is of another type.
        """
        return page.page(self, against, dtype)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan in JSON-able form."""
        return as_dict.to_dict(self)

    def _repr_html_(self) -> str:
        """Returns the short form that notebooks show."""
        return brief.brief(self)

    def __str__(self) -> str:
        return report.render(self)
