"""The answer as a value: it can be printed, and handed to programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, final

from autotp.advise.option import Option
from autotp.advise.spec import AdviceSpec
from autotp.advise.text import render
from autotp.advise.workload import Serve


@final
@dataclass(frozen=True, slots=True)
class Advice(AdviceSpec):
    """How to place a model on GPUs: the fields of `autotp.advise.spec.AdviceSpec`, as text and as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the advice in JSON-able form; docs/advise.md lists the keys."""
        m = self.machine
        return {
            "model": self.model,
            "elements": self.elements,
            "workload": {"kind": "serve" if isinstance(self.workload, Serve) else "train", **asdict(self.workload)},
            "machine": {
                "gpus": m.gpus,
                "gpu": m.gpu.name,
                "link": m.link.name,
                "network": m.network.name,
                "memory": m.gpu.memory,
                "room": m.room,
                "eager": m.eager,
            },
            "sentence": self.sentence,
            "best": None if self.best is None else self.options.index(self.best),
            "unit": self.unit,
            "options": [_option(o) for o in self.options],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return render(self)


def _option(o: Option) -> dict[str, Any]:
    return {
        "tp": o.tp,
        "groups": o.groups,
        "kind": o.kind.value,
        "fits": o.fits,
        "memory": {**asdict(o.memory), "total": o.memory.total},
        "batch": o.batch,
        "passes": o.passes,
        "largest_batch": o.largest_batch,
        "steps": [{**asdict(s), "seconds": s.seconds} for s in o.steps],
        "throughput": o.throughput,
        "communication_share": o.share,
    }
