"""What a model does, aspect by aspect, in whole tensors: the same program watches the model and its parallel copy.

| aspect     | what is watched                                                                                          |
|------------|----------------------------------------------------------------------------------------------------------|
| state      | the state dict before anything runs                                                                      |
| outputs    | every tensor of a call's output; caches are left out: they may hold this rank's part. Transformers       |
|            | models are called again for all that they can return, and with padding. Embeddings and Linears that no   |
|            | call runs are called by themselves; where the parallel model refuses that, it is left out                |
| gradients  | of every parameter and of floating-point arguments, from a fixed random weighting of all outputs; those  |
|            | of each module called by itself are separate                                                             |
| generation | greedy tokens, and the logits of each step                                                               |
| training   | in training mode: outputs of a call and gradients of it, outputs of a second call, and the buffers       |
|            | afterwards. Models that draw random numbers there (dropout) are not compared                             |
| steps      | the loss and the gradient norm of each optimizer step, and every parameter after the last                |
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.errors import AutoTPError, InputError
from autotp.testing.equivalence.compare import BUFFER, GRADIENT
from autotp.testing.equivalence.subject import Subject, fresh
from autotp.testing.outputs import tensors_of

ASPECTS = ("state", "outputs", "gradients", "generation", "training", "steps")
NEW_TOKENS = 4
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True, slots=True)
class Access:
    """How whole tensors are read off a model."""

    state: Callable[[nn.Module], Mapping[str, Tensor]]
    grads: Callable[[nn.Module], Mapping[str, Tensor]]


PLAIN = Access(lambda m: m.state_dict(), lambda m: {n: p.grad for n, p in m.named_parameters() if p.grad is not None})


@dataclass(frozen=True, slots=True)
class Training:
    """`steps` steps of what `optimizer` makes; gradients are clipped to the norm 1 before each.

    least: as how large a parameter counts at least after a step. AdamW divides a gradient by its own size, so one that is zero but for
        rounding moves its parameter by the whole learning rate; steps in proportion to the gradient need no such floor.
    """

    steps: int
    optimizer: MakeOptimizer
    least: float = 0.01


@dataclass(frozen=True, slots=True)
class Observed:
    """Aspect → path → tensor, and why an aspect is not there."""

    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW whose ε keeps gradients that are rounding errors of zero (a key's bias without positions) from becoming whole steps."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, eps=1e-6)


def by_itself(path: str) -> str:
    """How the entries end that come from calling the module `path` by itself."""
    return f" of {path} by itself"


class Watch:
    """Watches one model; an error in it is the caller's to see.

    `refused`: modules that the parallel model does not let anyone call by themselves, with what it says.
    """

    def __init__(self, model: nn.Module, subject: Subject, access: Access, stepping: Training) -> None:
        self.model, self.subject, self.access, self.stepping = model, subject, access, stepping
        self.refused: dict[str, str] = {}
        self._run: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def state(self) -> dict[str, Tensor]:
        """Whole tensors of the state dict."""
        return {name: t.detach().clone() for name, t in self.access.state(self.model).items() if isinstance(t, Tensor)}

    def outputs(self) -> dict[str, Tensor]:
        """Whole tensors of one call's output, and of the modules called by themselves."""
        found = dict(self._forward()[0])
        for path in self.subject.alone:
            found |= {name + by_itself(path): t for name, t in self._alone(path)[0].items()}
        return {name: _kept(t) for name, t in found.items()}

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of a weighting of all outputs, and of what each module called by itself returns; {} where nothing has one."""
        outputs, leaves = self._forward()
        self._run = None
        found = self._gradients(outputs, leaves)
        for path in self.subject.alone:
            found |= {name + by_itself(path): t for name, t in self._gradients(*self._alone(path)).items()}
        return found

    def answered(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`wanted` without what comes from calls that are refused here."""
        ends = tuple(map(by_itself, self.refused))
        return {path: t for path, t in wanted.items() if not path.endswith(ends)}

    def generation(self) -> dict[str, Tensor]:
        """Greedy tokens and logits."""
        model: Any = self.model
        dropped = ("labels", "use_cache", "return_", "decoder_input", "output_")
        inputs = {n: fresh(v, n, None) for n, v in self.subject.kwargs.items() if not n.startswith(dropped)}  # BLIP writes to its prompt
        if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
            inputs["decoder_start_token_id"] = 0
        ids = inputs.get("input_ids")
        if ids is not None and ids.dim() == 2 and "attention_mask" in inspect.signature(model.forward).parameters:
            inputs.setdefault("attention_mask", torch.ones_like(ids))  # transformers asks for one
        if model.generation_config.pad_token_id is None and not model.config.is_encoder_decoder:
            inputs["pad_token_id"] = 0
        torch.manual_seed(0)
        with torch.no_grad(), self.subject.precision.mode():
            made = model.generate(
                **inputs,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
        return {"tokens": made.sequences} | {f"logits of token {i}": t for i, t in enumerate(made.logits or ())}

    def training(self) -> dict[str, Tensor]:
        """A call in training mode with its gradients, a second call, and the buffers after both.

        The second call shows what the first one left behind. It is made where the caller chose the inputs, or where there are
        buffers that might have been written: most transformers models have none, and are large.
        """
        buffers = self._buffers()
        self._run = None
        self.model.train()
        try:
            outputs, leaves = self._forward(further=False)
            found = {path: _kept(t) for path, t in outputs.items()}
            found |= {f"{GRADIENT}{name}": t for name, t in self._gradients(outputs, leaves).items()}
            if self.subject.given or buffers:
                self._run = None
                with torch.no_grad():
                    found |= {f"{path} of a second call": t.clone() for path, t in self._forward(further=False)[0].items()}
                found |= self._buffers()
        finally:
            self._run = None
            self.model.eval()
        return found

    def steps(self) -> dict[str, Tensor]:
        """Loss and gradient norm of each step, every parameter after the last; the model is changed."""
        found: dict[str, Tensor] = {}
        parameters = list(self.model.parameters())
        optimizer = self.stepping.optimizer(parameters)
        for step in range(self.stepping.steps):
            self._run = None
            loss = loss_of(self._forward(further=False)[0])
            if loss is None:
                return {}
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            found[f"loss of step {step}"] = loss.detach()
            found[f"gradient norm of step {step}"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        names = {n for n, _ in self.model.named_parameters()}
        return found | {n: t for n, t in self.state().items() if n in names}

    def _alone(self, path: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs and leaves of a module called by itself; none where it is refused: it may hold or take a rank's part."""
        leaves: dict[str, Tensor] = {}
        try:
            return tensors_of(self.subject.call_alone(self.model, path, leaves)), leaves
        except AutoTPError as error:
            self.refused[path] = f"refused: {error}"
            return {}, {}

    def _gradients(self, outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        total = weighted(outputs)
        if total is None:
            return {}
        total.backward()  # type: ignore[no-untyped-call]
        found = dict(self.access.grads(self.model))
        found |= {path: t.grad for path, t in leaves.items() if t.grad is not None}
        found = {name: t.detach().clone() for name, t in found.items()}
        self.model.zero_grad(set_to_none=True)
        return found

    def _buffers(self) -> dict[str, Tensor]:
        """Whole buffers of the state dict; {} without asking the other ranks where there are none."""
        names = {n for n, _ in self.model.named_buffers()}
        return {f"{BUFFER}{n}": t for n, t in self.state().items() if n in names} if names else {}

    def _forward(self, further: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self._run is None:
            self.model.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            leaves: dict[str, Tensor] = {}
            outputs = tensors_of(self.subject.call(self.model, leaves))
            for name in self.subject.more if further else ():
                made = tensors_of(self.subject.call(self.model, leaves, name))
                outputs |= {f"{path} {name}": tensor for path, tensor in made.items()}
            self._run = outputs, leaves
        return self._run


def _kept(tensor: Tensor) -> Tensor:
    """A copy, whole where it is in parts over the ranks (logits)."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weighted(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """Σ outputs × fixed random weights: a scalar whose gradient reaches every output entry differently."""
    total: Tensor | None = None
    generator = torch.Generator().manual_seed(0)
    for tensor in outputs.values():
        if tensor.is_floating_point() and tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            term = (torch.where(tensor.isfinite(), tensor, 0) * weights).sum()
            total = term if total is None else total + term
    return total


def loss_of(outputs: Mapping[str, Tensor]) -> Tensor | None:
    """The model's own loss, else the weighting of all outputs per entry."""
    loss = outputs.get("loss")
    if loss is not None and loss.numel() == 1 and loss.requires_grad and bool(loss.isfinite()):
        return loss.sum()
    total = weighted(outputs)
    return None if total is None else total / max(1, sum(t.numel() for t in outputs.values()))


def observe_model(subject: Subject, training: Training) -> Observed:
    """What the model of one device does; aspects that it does not have are skipped with the reason.

    A copy is watched: the model stays as it was, whatever it writes to itself.

    Raises:
        InputError: there are no outputs to compare, or steps were asked for and the model itself cannot take them.
    """
    observed = Observed()
    watch = Watch(subject.again(subject.model), subject, PLAIN, training)
    for aspect in ASPECTS:
        reason = _absent(aspect, subject, training)
        if not reason:
            tensors, reason = _observed(watch, aspect)
            if reason:
                tensors = {}
            if tensors or aspect == "state":
                observed.found[aspect] = tensors
            else:
                reason = reason or "nothing to compare"
        if reason:
            observed.skipped[aspect] = reason
            if aspect == "outputs" or (aspect == "steps" and training.steps):
                raise InputError(f"{type(subject.model).__name__}: no {aspect} to compare: {reason}")
    return observed


def _observed(watch: Watch, aspect: str) -> tuple[dict[str, Tensor], str]:
    """(what is found, why it cannot be compared). Buffers that an aspect wrote which is not compared are put back."""
    kept = {name: t.clone() for name, t in watch.model.named_buffers()} if aspect == "training" else {}
    reason = ""
    tensors: dict[str, Tensor] = {}
    with _drawn() as drawn:
        try:
            tensors = getattr(watch, aspect)()
        except Exception as error:  # the model itself cannot do this
            reason = f"the model itself cannot: {type(error).__name__}: {str(error)[:200]}"
    if aspect == "training" and drawn:
        reason = reason or "the model draws random numbers in training mode (dropout)"
    if reason:
        watch.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in watch.model.named_buffers():
                if name in kept and kept[name].shape == buffer.shape:
                    buffer.copy_(kept[name])
    return tensors, reason


@contextmanager
def _drawn() -> Iterator[list[str]]:
    """The list is not empty afterwards if random numbers were drawn inside (`_forward` seeds torch by itself)."""
    found: list[str] = []
    torch.manual_seed(0)
    before = _random_states()
    yield found
    if _random_states() != before:
        found.append("random numbers")


def _random_states() -> tuple[object, ...]:
    numbers: Any = numpy.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numbers[1].tobytes(), numbers[2]


def _absent(aspect: str, subject: Subject, training: Training) -> str:
    model: Any = subject.model
    if aspect == "generation":
        if not hasattr(model, "generate") or not getattr(model, "can_generate", lambda: False)():
            return "the model does not generate"
        if subject.args or model.main_input_name not in subject.kwargs:
            return f"the inputs have no {model.main_input_name}"
    if aspect == "steps" and not training.steps:
        return "no steps were asked for"
    return ""
