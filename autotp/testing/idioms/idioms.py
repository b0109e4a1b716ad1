"""An `Idioms` is a small model in the idioms of other people's code, as a value that is written down, made and called."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from autotp.testing.architectures.build import built
from autotp.testing.equivalence.observe import weighted
from autotp.testing.equivalence.subject import Changes
from autotp.testing.idioms import source
from autotp.testing.idioms.lines import CONDITIONS
from autotp.testing.idioms.spec import Around, IdiomsSpec
from autotp.testing.outputs import tensors_of


@final
@dataclass(frozen=True, slots=True)
class Idioms(IdiomsSpec):
    """One model: the fields of `autotp.testing.idioms.spec.IdiomsSpec`, its text, and the model itself."""

    def source(self) -> str:
        """The model as Python text; its class is `Model`."""
        return source.write(self)

    def build(self) -> nn.Module:
        """The model with random weights of a fixed seed, in float64."""
        return built(self.source())

    def runs(self) -> bool:
        """Does it run on one device, forward and backward, with finite values?"""
        model = self.build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a checkpoint of what has no gradient is odd, and drawn
            try:
                outputs = tensors_of(model(**self.inputs()))
                total = weighted(outputs)
                if total is not None:
                    total.backward()  # type: ignore[no-untyped-call]
            except RuntimeError:
                return False
        found = [*outputs.values(), *(p.grad for p in model.parameters() if p.grad is not None)]
        return all(bool(t.isfinite().all()) for t in found)

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the call that is traced: 2 rows of 6 steps."""
        return {"x": torch.randn(2, 6, self.outer, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}

    def more(self) -> dict[str, Changes]:
        """Further calls: changes to the keyword arguments, by name."""
        gate: dict[str, Changes] = {"with the gate": {"gate": True}} if Around.GATE in self.around else {}
        large: dict[str, Changes] = {"of large data": {"x": 1e6 * self.inputs()["x"]}} if set(self.lines) & set(CONDITIONS) else {}
        return {**gate, **large}
