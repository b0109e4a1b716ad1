"""Measures one rank of a plan: its work, its collectives and its memory, from a run of the rewritten model on fake tensors.

    measured_serving(rank …)   prefill of the prompts, and a decode step when the cache is at its longest
    measured_training(rank …)  forward and backward of some sequences

What is counted is what the parallel model runs, so a change of plan, of attention or of checkpointing changes the figures by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from autotp.advise.calls import TextCalls
from autotp.advise.measured import Pass, Served, Trained, Weights
from autotp.advise.meter import Meter
from autotp.advise.operators import products
from autotp.advise.rank import Rank, local
from autotp.advise.workload import Checkpointing
from autotp.errors import AutoTPError, TraceError
from autotp.trace.keep import Undo, undone
from autotp.trace.model_state import in_mode, set_item


def weights(rank: Rank, units: list[str]) -> Weights:
    """Bytes of the rank's weights; `units`: paths of the modules that FSDP gathers apart from the rest."""
    own = rank.parameters
    whole = {id(p) for p in rank.model.parameters()}
    sizes = []
    for path in units:
        inside = list(rank.model.get_submodule(path).parameters())
        sizes.append(sum(local(p).nbytes for p in inside))
        whole -= {id(p) for p in inside}
    rest = sum(local(p).nbytes for p in rank.model.parameters() if id(p) in whole)
    trained = sum(local(p).nbytes for p in rank.model.parameters() if p.requires_grad)
    return Weights(sum(t.nbytes for t in own), trained, sum(t.nbytes for t in rank.buffers), (rest, *sizes))


def measured_serving(rank: Rank, units: list[str], calls: TextCalls, batch: int, prompt: int, new_tokens: int) -> Served:
    """Serves `batch` requests.

    Raises:
        TraceError: the model cannot be run on fake tensors at this size.
    """
    first = calls.prefill(batch, prompt)
    with _running(rank, training=False, given=first) as meter:
        out = rank.model(**first)
        del out
        prefill, most = _taken(rank, meter), meter.peak()
        if not calls.decodes or new_tokens == 1:
            return Served(weights(rank, units), prefill, Pass(), 0, most)
    length = (prompt, new_tokens - 1) if calls.facts.is_encoder_decoder else (prompt + new_tokens - 2, 1)
    full = calls.prefill(batch, *length)
    with _running(rank, training=False, given=full) as meter:
        out = rank.model(**full)
        kept = calls.kept(out)
        del out
        _taken(rank, meter)
        call, start = calls.decode(kept, batch), meter.mark()
        del kept
        out = rank.model(**call)
        decode, later = _taken(rank, meter), meter.peak(start)
        last = calls.kept(out)
        del out, call
        cache = meter.alive()
        del last
    return Served(weights(rank, units), prefill, decode, cache, max(most, later) - cache)


def measured_call(rank: Rank, units: list[str], call: Mapping[str, Any]) -> Served:
    """Makes one call, without gradients.

    Raises:
        TraceError: as for `measured_serving`.
    """
    given = _fake(rank, call)
    with _running(rank, training=False, given=given) as meter:
        out = rank.model(**given)
        del out
        return Served(weights(rank, units), _taken(rank, meter), Pass(), 0, meter.peak())


def measured_training(rank: Rank, units: list[str], call: Mapping[str, Any], checkpointing: Checkpointing) -> Trained:
    """Runs a forward and a backward. The loss is the model's, or the sum of its floating-point results where it has none.

    Raises:
        TraceError: as for `measured_serving`.
    """
    given = _fake(rank, call)
    with undone() as undo:
        recomputing(rank.model, units, checkpointing, undo)
        with _running(rank, training=True, given=given) as meter:
            loss = _loss(rank.model(**given))
            rank.comm.running.end()
            forward, activations = _taken(rank, meter), meter.alive()
            loss.backward()  # type: ignore[no-untyped-call]
            backward, most = _taken(rank, meter), meter.peak(0, rank.gradients)
        for p in rank.model.parameters():
            p.grad = None
    return Trained(weights(rank, units), forward, backward, activations, max(most - activations, 0))


@contextmanager
def _running(rank: Rank, *, training: bool, given: Mapping[str, Any]) -> Iterator[Meter]:
    own = [t for t in tree_leaves(dict(given)) if isinstance(t, Tensor)]
    meter = Meter(rank.memo, [*rank.parameters, *rank.buffers, *own])
    name = type(rank.model).__name__
    running = rank.comm.running
    try:
        with running.opened(), in_mode(rank.model, training), rank.fake, meter, torch.set_grad_enabled(training):
            running.records = training
            yield meter
    except AutoTPError:
        raise
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        text = f"{name} cannot be measured: {error.func} depends on data, which fake tensors do not have"
        raise TraceError(f"{text}: use an implementation without (experts_implementation='grouped_mm' for experts)") from error
    except Exception as error:
        raise TraceError(f"{name} cannot be run on fake tensors at this size: {type(error).__name__}: {error}") from error


def _taken(rank: Rank, meter: Meter) -> Pass:
    return Pass(dict(meter.take_work()), dict(rank.comm.take_messages()))


def _fake(rank: Rank, call: Mapping[str, Any]) -> dict[str, Any]:
    """Floating-point arguments have no numbers, and those on the meta device have none to begin with; the others keep theirs."""
    dtype = next((p.dtype for p in rank.parameters if p.is_floating_point()), torch.float32)

    def fake(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() and not tensor.is_meta:
            return tensor
        with rank.fake:
            return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)

    found: dict[str, Any] = tree_map_only(Tensor, fake, dict(call))
    return found


def _loss(out: Any) -> Tensor:
    found = getattr(out, "loss", None)
    if isinstance(found, Tensor):
        return found
    parts = [t.sum() for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    if not parts:
        raise TraceError("the model returns nothing that has a gradient")
    return torch.stack([p.float() for p in parts]).sum()


def recomputing(model: nn.Module, units: list[str], kind: Checkpointing, undo: Undo) -> None:
    """Has each repeated block of `model` compute again what it does not keep, until `undo` is played back."""
    if kind is Checkpointing.NONE:
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if kind is Checkpointing.SELECTIVE:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, products())
    for path in units:
        block = model.get_submodule(path)
        set_item(block.__dict__, "forward", partial(checkpoint, block.forward, **options), undo)
