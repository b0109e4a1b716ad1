"""Writes a plan as JSON-able values."""

from __future__ import annotations

from typing import Any

from autotp.plan.cost import busiest_work, padded_axes, padding_waste, repeated_share
from autotp.plan.spec import ModulePlan, PlanSpec


def to_dict(plan: PlanSpec) -> dict[str, Any]:
    """Returns JSON-able form: every field of the plan by name."""
    return {
        "model": plan.model,
        "tp": plan.tp,
        "local_share": plan.local_share,
        "padding_waste": padding_waste(plan),
        "repeated_share": repeated_share(plan),
        "busiest_work": busiest_work(plan),
        "padded_axes": [{"pattern": a.pattern, "size": a.size, "padded": a.padded} for a in padded_axes(plan)],
        "params": {
            n: {
                "shape": list(p.layout.shape),
                "layout": str(p.layout),
                "dim": p.layout.dim,
                "local_shape": list(p.layout.local_shape),
                "axis": p.axis,
                "reason": p.reason,
            }
            for n, p in plan.params.items()
        },
        "tied": dict(plan.aliases),
        "axes": [{"name": a.name, "pattern": a.pattern, "size": a.size, "module": a.module, "params": list(a.params)} for a in plan.axes],
        "collectives": [
            {"module": t.module, "kind": t.kind, "when": t.when, "elements_per_token": t.width, "elements": t.elements}
            for t in plan.traffic
        ],
        "attributes": {n: {"value": a, "local": b} for n, (a, b) in plan.attributes.items()},
        "modules": [_module(m) for m in plan.modules],
        "replicated": dict(plan.replicated),
        "notes": list(plan.notes),
        "checked": plan.checked,
    }


def _module(plan: ModulePlan) -> dict[str, Any]:
    pairs = {} if plan.pairs is None else {"tokens": plan.pairs.tokens, "experts": plan.pairs.index, "weights": plan.pairs.weights}
    return {
        "path": plan.path,
        "inputs": {".".join(map(str, s.path)): [c.op.value for c in s.conversions] for s in plan.inputs},
        "outputs": {".".join(map(str, s.path)): [c.op.value for c in s.conversions] for s in plan.outputs},
        "joint": [list(group) for group in plan.joint],
        "sites": [f"{s.file.rsplit('site-packages/', 1)[-1]}:{s.function}" for s in plan.sites],
        **({"pairs": pairs} if pairs else {}),
    }
