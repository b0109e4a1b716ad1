"""A model with its plans, and what was measured of it: each plan and size once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from autotp.advise.calls import TextCalls, checked, text_calls
from autotp.advise.measure import measured_call, measured_serving, measured_training
from autotp.advise.measured import Served, Trained
from autotp.advise.rank import one_rank
from autotp.advise.workload import Checkpointing, Serve, Train, Workload
from autotp.api import plan
from autotp.data_parallel import units
from autotp.plan.experts import whole_experts
from autotp.plan.plan import Plan


class Subject:
    """Plans of `model` by tp, and measurements of one workload.

    given: the caller's example inputs; None where calls are made at the workload's sizes. `told(text)` hears of each step.
    """

    def __init__(self, model: nn.Module, given: Mapping[str, Any] | None, recipe: Any, check: str, told: Callable[[str], None]) -> None:
        self.model, self.recipe, self.check, self.told = model, recipe, check, told
        self.given = None if given is None else checked(model, given)
        self.calls: TextCalls | None = text_calls(model) if given is None else None
        self._plans: dict[tuple[int, bool, bool], Plan] = {}
        self._served: dict[tuple[Serve, int, int], Served] = {}
        self._trained: dict[tuple[Train, int, int], Trained] = {}

    def plan(self, tp: int, loss_parallel: bool = False, sequence_parallel: bool = False) -> Plan:
        """The plan over `tp` ranks."""
        key = tp, loss_parallel and tp > 1, sequence_parallel and tp > 1
        if key not in self._plans:
            self.told(f"planning tp={tp}")
            placed: dict[str, Any] = {"loss_parallel": key[1], "sequence_parallel": key[2]}
            self._plans[key] = plan(self.model, tp=tp, recipe=self.recipe, example_inputs=self.given, check=self.check, **placed)
        return self._plans[key]

    def served(self, work: Serve, tp: int, batch: int) -> Served:
        """A replica of `tp` ranks that serves `batch` requests; with the caller's inputs, one call."""
        key = work, tp, batch
        if key not in self._served:
            made = self.plan(tp)
            self.told(f"measuring tp={tp}, batch {batch}")
            with one_rank(self.model, made, work.torch_dtype) as rank:
                paths = units(self.model, made)
                if self.calls is None:
                    assert self.given is not None
                    self._served[key] = measured_call(rank, paths, self.given)
                else:
                    self._served[key] = measured_serving(rank, paths, self.calls, batch, work.prompt, work.new_tokens)
        return self._served[key]

    def trained(self, work: Train, tp: int, batch: int) -> Trained:
        """A group of `tp` ranks that trains on `batch` sequences; with the caller's inputs, on one call."""
        key = work, tp, batch
        if key not in self._trained:
            made = self.plan(tp, work.loss_parallel, work.sequence_parallel)
            self.told(f"measuring tp={tp}, {batch} sequences")
            with one_rank(self.model, made, work.torch_dtype) as rank:
                call = self.given if self.calls is None else self.calls.train(batch, work.seq)
                assert call is not None
                self._trained[key] = measured_training(rank, units(self.model, made), call, Checkpointing(work.checkpointing))
        return self._trained[key]

    def too_long(self, work: Workload) -> tuple[str, ...]:
        """A remark where the sequences of a workload are longer than the model was made for."""
        most = None if self.calls is None else self.calls.positions
        if most is None or self.calls is None:
            return ()
        if isinstance(work, Train):
            length, what = work.seq, f"seq {work.seq}"
        elif self.calls.facts.is_encoder_decoder:
            length, what = max(work.prompt, work.new_tokens), f"prompt {work.prompt} or new_tokens {work.new_tokens}"
        else:
            length, what = work.prompt + work.new_tokens, f"prompt {work.prompt} and new_tokens {work.new_tokens} together"
        return (f"{what}: more than the {most} positions of the model's config",) if length > most else ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the reader: whole experts, whose tokens are drawn, and plans that leave operands of products whole."""
        dealt = next((paths for made in self._plans.values() if (paths := whole_experts(made))), ())
        drawn = (f"{dealt[0]} has whole experts: tokens are routed evenly, and the rank with most of them is measured",) if dealt else ()
        whole = sorted({tp for (tp, *_), made in self._plans.items() if tp > 1 and made.replicated_products})
        if not whole:
            return drawn
        names = self._plans[next(key for key in self._plans if key[0] == whole[0])].replicated_products
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        sizes = ", ".join(map(str, whole))
        return (*drawn, f"each rank holds {names[0]}{more} whole where tp is {sizes}: `autotp plan --tp {whole[0]}` says why")
