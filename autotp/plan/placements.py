"""The choices of placement that a user makes beside layouts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Literal, TypeVar

from autotp.errors import InputError
from autotp.plan.experts import whole_experts
from autotp.plan.loss_parallel import logits_in_parts, with_logits_in_parts
from autotp.plan.sequence_parallel import AUTO_FROM, tokens_asked_for, with_tokens_in_parts
from autotp.plan.spec import PlanSpec

P = TypeVar("P", bound=PlanSpec)


class Experts(Enum):
    """What of a mixture of experts is cut: the width inside each expert, or their number (`autotp.plan.experts`)."""

    WIDTH = "width"
    WHOLE = "whole"
    AUTO = "auto"

    @staticmethod
    def of(text: object, where: str) -> Experts:
        """Returns the choice called `text`.

        Raises:
            InputError: there is none; the message begins with `where`.
        """
        for choice in Experts:
            if choice.value == text:
                return choice
        raise InputError(f"{where}: experts is {text!r}, wanted one of {', '.join(repr(c.value) for c in Experts)}")


@dataclass(frozen=True, slots=True)
class Placements:
    """loss_parallel: logits stay in parts (`autotp.plan.loss_parallel`). sequence_parallel: hidden states between regions do
    (`autotp.plan.sequence_parallel`), always, never, or in calls of many tokens ("auto"). experts: what of them is cut.
    """

    loss_parallel: bool = False
    sequence_parallel: bool | Literal["auto"] = False
    experts: Experts = Experts.WIDTH

    def __or__(self, other: Placements) -> Placements:
        """Returns what either asks for; of two choices that differ, that of `other`."""
        return Placements(
            self.loss_parallel or other.loss_parallel,
            other.sequence_parallel or self.sequence_parallel,
            self.experts if other.experts is Experts.WIDTH else other.experts,
        )


#: What a plan has where nothing is asked for.
AS_PLANNED = Placements()


def placements_of(plan: PlanSpec) -> Placements:
    """Returns the placements that a plan has."""
    experts = Experts.WHOLE if whole_experts(plan) else Experts.WIDTH
    return Placements(bool(logits_in_parts(plan)), tokens_asked_for(plan), experts)


def placed(plan: P, placements: Placements) -> P:
    """Returns `plan` with the placements that are asked for."""
    if placements.sequence_parallel:
        plan = with_tokens_in_parts(plan, AUTO_FROM if placements.sequence_parallel == "auto" else 0)
    return with_logits_in_parts(plan) if placements.loss_parallel else plan
