"""Is the parallel model the same function as the plain one? Measured in float64, aspect by aspect.

`check(pool, factory, inputs, world=2)` builds the model twice from one seed on every rank, parallelises one of them and
compares. The relative error of a tensor is  max|a − b| / max|a|.  In float64 only the order of sums differs between a right
parallel model and its reference, so an error above 1e-9 is a bug. Each aspect is reported by name; nothing is asserted here,
so that the sweep over all architectures and the tests share one harness: a test calls `report.require()`.

| aspect     | what is compared                                                                                   |
|------------|----------------------------------------------------------------------------------------------------|
| forward    | every tensor in the output (caches left out: those may be local)                                    |
| masked     | the same with the first positions of row 0 masked as padding                                        |
| whole      | the same with `output_hidden_states` and, under eager attention, `output_attentions`                |
| generate   | greedy tokens (equal) and the logits of each step                                                   |
| state_dict | `autotp.full_state_dict`: the same keys, bit-equal values                                           |
| grad       | `autotp.full_grads` after backward from a fixed random weighting of all outputs                     |
| loss       | the loss for labels and its gradients, where the model takes labels                                 |
| step       | gradient norm as clipped by torch, and the parameters after one step of SGD                         |
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.numeric.exact import Float64
from autotp.testing.outputs import tensors_of
from tests.support.ranks import Pool, RankError, mesh

ASPECTS = ("forward", "masked", "whole", "generate", "state_dict", "grad", "loss", "step")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
#: A gradient is measured against its own size, but at least this fraction of the largest gradient of the model.
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-2}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tested: the three functions of the public API, replaceable by stand-ins to test this harness."""

    parallelize: Callable[..., nn.Module]
    full_state_dict: Callable[[nn.Module], Mapping[str, Tensor]]
    full_grads: Callable[[nn.Module], Mapping[str, Tensor]]


def autotp_subject() -> Subject:
    """The real thing."""
    import autotp

    # parallelize's own check of numbers would hide from this one what the rules get wrong
    return Subject(partial(autotp.parallelize, check="graph"), autotp.full_state_dict, autotp.full_grads)


@dataclass(slots=True)
class Report:
    """Errors by aspect, problems (an exception, a wrong key) by aspect, aspects that the model does not have."""

    dtype: torch.dtype = torch.float64
    errors: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    local_share: float = 1.0
    sharded: frozenset[str] = frozenset()

    def failed(self, tolerance: float | None = None) -> dict[str, str]:
        """Aspect → what is wrong with it; empty when the models are equal."""
        limit = TOLERANCE[self.dtype] if tolerance is None else tolerance
        bad = {n: f"relative error {e:.3g} at {self.where.get(n, '?')}" for n, e in self.errors.items() if not e <= limit}
        return {**bad, **self.problems}

    def require(self, *aspects: str, tolerance: float | None = None) -> None:
        """Raise unless equal, and unless each of `aspects` was really compared.

        Raises:
            AssertionError: names every failed aspect.
        """
        failed = self.failed(tolerance)
        missing = [a for a in aspects if a not in self.errors and a not in self.problems]
        lines = [f"{name}: {text}" for name, text in failed.items()]
        lines += [f"{a}: was not compared ({self.skipped.get(a, 'not asked for')})" for a in missing]
        if lines:
            raise AssertionError("\n".join(lines))


def error_of(wanted: Tensor, got: Tensor, floor: float = 0.0) -> float:
    """max|a − b| / max(max|a|, floor); inf for another shape, for other non-finite entries or unequal integers."""
    if isinstance(got, DTensor) or wanted.shape != got.shape or wanted.dtype != got.dtype:
        return float("inf")
    if wanted.numel() == 0:
        return 0.0
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0 if torch.equal(wanted, got) else float("inf")
    same = wanted.isfinite() & got.isfinite()
    if not torch.equal(same, wanted.isfinite()) or not torch.equal(wanted.isnan(), got.isnan()):
        return float("inf")
    if not bool(same.all()) and not torch.equal(wanted[wanted.isinf()], got[got.isinf()]):
        return float("inf")
    a, b = wanted[same], got[same]
    if a.numel() == 0:
        return 0.0
    scale = max(float(a.abs().max()), floor)
    difference = float((a - b).abs().max())
    return 0.0 if difference == 0 else difference / scale if scale else float("inf")


class _Comparison:
    """One model against another on this rank."""

    def __init__(self, report: Report, plain: nn.Module, parallel: nn.Module, inputs: dict[str, Any], subject: Subject) -> None:
        self.report = report
        self.plain = plain
        self.parallel = parallel
        self.inputs = inputs
        self.subject = subject
        try:
            self.names = set(inspect.signature(plain.forward).parameters)
        except ValueError:
            self.names = set()

    def note(self, aspect: str, path: str, error: float) -> None:
        if error >= self.report.errors.get(aspect, -1.0):
            self.report.errors[aspect] = error
            self.report.where[aspect] = path

    def run(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        torch.manual_seed(7)
        mode = Float64() if self.report.dtype is torch.float64 else contextlib.nullcontext()
        with mode:
            return model(*inputs["args"], **inputs["kwargs"])

    def outputs(self, aspect: str, wanted: Any, got: Any) -> None:
        left, right = tensors_of(wanted), tensors_of(got)
        if list(left) != list(right):
            self.report.problems[aspect] = f"outputs {sorted(left)} became {sorted(right)}"
            return
        if not left:
            self.report.skipped[aspect] = "the output holds no tensor"
        for path, tensor in left.items():
            self.note(aspect, path, error_of(tensor, right[path]))

    def both(self, aspect: str, inputs: dict[str, Any]) -> None:
        with torch.no_grad():
            try:
                wanted = self.run(self.plain, inputs)
            except Exception as error:  # the model itself cannot do this
                self.report.skipped[aspect] = f"{type(error).__name__}: {str(error)[:200]}"
                return
            self.outputs(aspect, wanted, self.run(self.parallel, inputs))

    def with_kwargs(self, **changes: Any) -> dict[str, Any]:
        return {"args": self.inputs["args"], "kwargs": {**self.inputs["kwargs"], **changes}}

    def forward(self) -> None:
        self.both("forward", self.inputs)

    def masked(self) -> None:
        ids = self.inputs["kwargs"].get("input_ids")
        if ids is None or "attention_mask" not in self.names or ids.dim() != 2 or ids.shape[1] < 4:
            self.report.skipped["masked"] = "no attention_mask"
            return
        mask = torch.ones_like(ids)
        mask[0, :2] = 0
        self.both("masked", self.with_kwargs(attention_mask=mask))

    def whole(self) -> None:
        config = getattr(self.plain, "config", None)
        if config is None or ("output_hidden_states" not in self.names and "kwargs" not in self.names):
            self.report.skipped["whole"] = "no output_hidden_states"
            return
        changes = {"output_hidden_states": True}
        if getattr(config, "_attn_implementation", None) == "eager":
            changes["output_attentions"] = True
        self.both("whole", self.with_kwargs(**changes))

    def generate(self) -> None:
        if not getattr(self.plain, "can_generate", lambda: False)() or self.inputs["args"]:
            self.report.skipped["generate"] = "cannot generate"
            return
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        inputs = {n: v for n, v in self.inputs["kwargs"].items() if not n.startswith(("decoder_input", "labels", "return_"))}
        mode = (lambda: Float64()) if self.report.dtype is torch.float64 else contextlib.nullcontext
        with torch.no_grad():
            try:
                with mode():
                    wanted = self.plain.generate(**inputs, **options)
            except Exception as error:  # the model itself cannot do this
                self.report.skipped["generate"] = f"{type(error).__name__}: {str(error)[:200]}"
                return
            with mode():
                got = self.parallel.generate(**inputs, **options)
        self.note("generate", "tokens", error_of(wanted.sequences, got.sequences))
        for step, (left, right) in enumerate(zip(wanted.logits or (), got.logits or (), strict=True)):
            self.note("generate", f"logits of step {step}", error_of(left, right))

    def state_dict(self) -> None:
        wanted, got = self.plain.state_dict(), self.subject.full_state_dict(self.parallel)
        if set(wanted) != set(got):
            self.report.problems["state_dict"] = f"missing {sorted(set(wanted) - set(got))[:5]}, added {sorted(set(got) - set(wanted))[:5]}"
            return
        self.note("state_dict", "all", 0.0)
        for name, tensor in wanted.items():
            if isinstance(tensor, Tensor) and not torch.equal(tensor, torch.as_tensor(got[name])):
                self.note("state_dict", name, max(error_of(tensor, got[name]), 1e-300) if tensor.shape == got[name].shape else float("inf"))
                self.report.problems["state_dict"] = f"{name} is not bit-equal"

    def grad(self) -> None:
        self._gradients("grad", self.inputs, _weighted)

    def loss(self) -> None:
        kwargs = self.inputs["kwargs"]
        ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
        if "labels" not in self.names or ids is None:
            self.report.skipped["loss"] = "takes no labels"
            return
        labels = ids.clone()
        labels[0, :2] = -100
        inputs = self.with_kwargs(labels=labels)
        inputs["kwargs"].pop("decoder_input_ids", None)
        self._gradients("loss", inputs, _loss_of)

    def _gradients(self, aspect: str, inputs: dict[str, Any], scalar: Callable[[Any], Tensor]) -> None:
        self.plain.zero_grad(set_to_none=True)
        self.parallel.zero_grad(set_to_none=True)
        try:
            wanted = scalar(self.run(self.plain, inputs))
            wanted.backward()
        except Exception as error:  # the model itself cannot do this
            self.report.skipped[aspect] = f"{type(error).__name__}: {str(error)[:200]}"
            return
        value = scalar(self.run(self.parallel, inputs))
        value.backward()
        self.note(aspect, "the scalar itself", error_of(wanted.detach(), value.detach(), floor=1.0))
        left = {n: p.grad for n, p in self.plain.named_parameters()}
        right = self.subject.full_grads(self.parallel)
        largest = max((float(g.abs().max()) for g in left.values() if g is not None and g.numel()), default=0.0)
        floor = largest * FLOOR[self.report.dtype]
        for name, gradient in left.items():
            other = right.get(name)
            if gradient is None or not bool(gradient.any()):
                if other is not None and other.numel() and float(other.abs().max()) > floor * 1e-6:
                    self.note(aspect, f"{name} (no gradient wanted)", float("inf"))
            elif other is None:
                self.note(aspect, f"{name} (no gradient got)", float("inf"))
            else:
                self.note(aspect, name, error_of(gradient, other, floor))

    def step(self) -> None:
        parameters = [p for p in self.plain.parameters() if p.grad is not None]
        if not parameters or {"grad", "loss"} <= set(self.report.skipped):  # a backward that failed may have left some
            self.report.skipped["step"] = "no gradients"
            return
        norms = []
        for model in (self.plain, self.parallel):
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
            torch.optim.SGD(model.parameters(), lr=0.1, foreach=False).step()
        self.note("step", "gradient norm", error_of(norms[0].detach(), norms[1].detach()))
        wanted, got = self.plain.state_dict(), self.subject.full_state_dict(self.parallel)
        for name, _ in self.plain.named_parameters():
            self.note("step", name, error_of(wanted[name], got[name]))


def _weighted(output: Any) -> Tensor:
    """Σ outputs × fixed random weights: a scalar whose gradient reaches every output entry differently."""
    total: Tensor | None = None
    for index, tensor in enumerate(tensors_of(output).values()):
        if tensor.is_floating_point() and tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64).to(tensor.dtype)
            term = (torch.where(tensor.isfinite(), tensor, 0) * weights).sum()
            total = term if total is None else total + term
    if total is None:
        raise ValueError("no output has a gradient")
    return total


def _loss_of(output: Any) -> Tensor:
    loss = output["loss"]
    if loss is None or not bool(loss.isfinite()):
        raise ValueError("the loss is not finite")
    return loss


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _arguments(inputs: Any, model: nn.Module) -> dict[str, Any]:
    made = inputs(model) if callable(inputs) else inputs
    return {"args": (), "kwargs": dict(made)} if isinstance(made, Mapping) else {"args": tuple(made), "kwargs": {}}


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _seeded(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory().eval()


def _exact_dtype(model: nn.Module, arguments: dict[str, Any]) -> torch.dtype:
    """float64 unless the model has an operator without it."""
    try:
        with torch.no_grad(), Float64():
            cast = _cast(arguments, torch.float64)
            model.to(torch.float64)(*cast["args"], **cast["kwargs"])
    except Exception:  # an operator without float64, or a mask made with the largest number of another type
        return torch.float32
    return torch.float64


def compare_on_rank(
    factory: Callable[[], nn.Module],
    inputs: Any,
    *,
    dtype: torch.dtype | None = None,
    aspects: Sequence[str] = ASPECTS,
    subject: Callable[[], Subject] = autotp_subject,
    sabotage: Callable[[nn.Module], None] | None = None,
    pass_inputs: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """The comparison as one rank sees it; every rank must call it. See `check`."""
    plain = _seeded(factory)
    with torch.no_grad():
        made = _arguments(inputs, plain)
    dtype = dtype or _exact_dtype(_seeded(factory), made)
    report = Report(dtype=dtype)
    plain, parallel, arguments = plain.to(dtype), _seeded(factory).to(dtype), _cast(made, dtype)
    tested = subject()
    extra: dict[str, Any] = dict(options or {})
    if pass_inputs:
        names = list(inspect.signature(type(plain).forward).parameters)[1:]
        extra["example_inputs"] = {**dict(zip(names, arguments["args"], strict=False)), **arguments["kwargs"]}
    sizes = {n: p.numel() for n, p in plain.named_parameters()}
    try:
        parallel = tested.parallelize(parallel, mesh(), **extra)
    except Exception:
        report.problems["parallelize"] = traceback.format_exc(limit=-6)
        return report
    local = {n: _local(p.detach()).numel() for n, p in parallel.named_parameters()}
    report.local_share = sum(local.values()) / max(1, sum(sizes.values()))
    report.sharded = frozenset(n for n, size in local.items() if size < sizes.get(n, 0))
    if sabotage is not None:
        sabotage(parallel)
    comparison = _Comparison(report, plain, parallel, arguments, tested)
    for aspect in aspects:
        try:
            getattr(comparison, aspect)()
        except Exception:
            report.problems[aspect] = traceback.format_exc(limit=-6)
        dist.barrier()
    return report


def merge(reports: Sequence[Report]) -> Report:
    """The worst of all ranks."""
    worst = reports[0]
    for rank, report in enumerate(reports[1:], 1):
        for name, error in report.errors.items():
            if not error <= worst.errors.get(name, -1.0):
                worst.errors[name] = error
                worst.where[name] = f"{report.where.get(name, '?')} on rank {rank}"
        for name, text in report.problems.items():
            worst.problems.setdefault(name, f"rank {rank}: {text}")
        worst.local_share = max(worst.local_share, report.local_share)
        worst.sharded |= report.sharded
    return worst


def check(
    pool: Pool, factory: Callable[[], nn.Module], inputs: Any, *, world: int = 2, timeout: float | None = None, **options: Any
) -> Report:
    """Compare `factory()` with its parallel self on `world` ranks.

    Args:
        pool: the session's worker processes.
        factory: builds the model; picklable, and the same model each time from the same torch seed.
        inputs: keyword arguments (a mapping), positional ones (a tuple), or a picklable function of the model that makes them.
        world: how many ranks.
        timeout: seconds until the ranks count as hung.
        options: those of `compare_on_rank`: `dtype`, `aspects`, `subject`, `sabotage`, `pass_inputs`, `options` for parallelize.

    Returns:
        The worst report over all ranks; a rank that died or hung is the problem "ranks".
    """
    try:
        return merge(pool.run(compare_on_rank, factory, inputs, world=world, timeout=timeout, **options))
    except RankError as error:
        return Report(dtype=options.get("dtype") or torch.float64, problems={"ranks": str(error)})
