"""What transformers' `Trainer` leaves out for models that are parallel when it gets them: resuming, and evaluation without duplicates.

    class Tuner(ParallelTrainer, Trainer):  # or trl's SFTTrainer, or a trainer of your own
        pass

Training, logging, clipping and `save_model` need nothing of this. `Trainer` refuses to write the optimizer's state of such a model,
and its `evaluate` counts each row once for every tp rank; both hold for transformers' own tensor parallelism as well.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autotp.checkpoint.state import load, save
from autotp.errors import CheckpointError, InputError, PlanError
from autotp.parallel_state import state_of

STATE = "training_state"

_Base: Any = object  # whatever trainer comes after it


class ParallelTrainer(_Base):  # type: ignore[misc]
    """Comes before a `Trainer` among the bases of a class, which then resumes and evaluates parallel models.

    A checkpoint has `training_state/` (`autotp.checkpoint`: weights and optimizer, for any tp) in place of `optimizer.pt`.
    `resume_from_checkpoint` and `load_best_model_at_end` read it, at any number of ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = inspect.signature(super().__init__).bind(*args, **kwargs).arguments.get("args")
        wanted = getattr(own, "save_only_model", False)
        if own is not None:
            own.save_only_model = True  # the Trainer refuses otherwise: it knows only a state of the optimizer that one rank writes
        try:
            super().__init__(*args, **kwargs)
        finally:
            if own is not None:
                own.save_only_model = wanted
        self.args.save_only_model = wanted

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not _is_parallel(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save(self.model, self.optimizer, Path(output_dir) / STATE)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not _is_parallel(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load(self.model, None, _state_in(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not _is_parallel(self.model):
            if checkpoint is not None and (Path(checkpoint) / STATE).is_dir():
                raise CheckpointError(
                    f"{checkpoint} has the state of a parallel model: call autotp.parallelize first, a mesh of one rank will do"
                )
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load(self.model, self.optimizer, _state_in(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_best_model(self) -> None:
        if not _is_parallel(self.model):
            super()._load_best_model()
            return
        load(self.model, None, _state_in(self.state.best_model_checkpoint))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own, with the rows of each tp group counted once."""
        if getattr(self.model, "_tp_size", None) is not None:
            if self.args.eval_use_gather_object:
                raise InputError("eval_use_gather_object=True is not possible for a parallel model: leave it out")
            self.gather_function = self._gather_once
        return super().evaluation_loop(*args, **kwargs)

    def _gather_once(self, data: Any) -> Any:
        """Returns the rows of all data-parallel ranks, without those that fill up the last batch."""
        from accelerate.utils import recursively_apply

        every = int(self.model._tp_size)
        state = self.accelerator.gradient_state
        rows = state.remainder if state.end_of_dataloader and state.remainder > 0 else None

        def first_of_each(gathered: Tensor) -> Tensor:
            parts = gathered.reshape(dist.get_world_size(), -1, *gathered.shape[1:])
            return parts[::every].flatten(0, 1)[:rows]

        return recursively_apply(first_of_each, self.accelerator.gather(data))


def _is_parallel(model: object) -> bool:
    """Whether `model` went through `parallelize`, be it on one rank."""
    try:
        return isinstance(model, nn.Module) and state_of(model).plan.tp > 0
    except PlanError:
        return False


def _state_in(checkpoint: str | os.PathLike[str]) -> Path:
    path = Path(checkpoint) / STATE
    if not path.is_dir():
        raise CheckpointError(
            f"{checkpoint} has no {STATE}: it was written with save_only_model=True, or by a Trainer that is no ParallelTrainer. "
            "Start from its weights with autotp.from_pretrained"
        )
    return path
