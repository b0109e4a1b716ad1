"""`assert_equivalent`: a model on one device and the same model over several ranks do the same.

observe the model → start the ranks → parallelize a copy on each → observe it there → compare, and say what differs first
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import autotp
from autotp import errors
from autotp.api import parallelize_as
from autotp.arguments import seconds, whole_number
from autotp.errors import AutoTPError, InputError
from autotp.launch import RankError
from autotp.plan.plan import Plan
from autotp.planning import RecipeLike
from autotp.recipe.recipe import Recipe
from autotp.targets import check_ranks
from autotp.testing.equivalence.compare import Aspect, compare
from autotp.testing.equivalence.locate import gradient_order, surroundings
from autotp.testing.equivalence.module_calls import Record, first_module, recorded
from autotp.testing.equivalence.mutation import Mutation
from autotp.testing.equivalence.observe import Access, MakeOptimizer, Observed, Training, Watch, adamw, by_itself, observe_model
from autotp.testing.equivalence.subject import Factory, Inputs, Subject, make_subject
from autotp.testing.ranks.run import BACKENDS, Running, run

_PARALLEL = Access(lambda m: autotp.full_state_dict(m), lambda m: autotp.full_grads(m))


class NotEquivalent(AutoTPError, AssertionError):
    """The parallel model is not the model: what differs, where it begins, or the traceback of the rank that failed.

    `found`: the comparison, where every rank came so far.
    """

    def __init__(self, text: str, found: Equivalence | None = None) -> None:
        super().__init__(text)
        self.found = found


@dataclass(frozen=True, slots=True)
class Equivalence:
    """What was compared and how close it is.

    aspects: by name (`autotp.testing.equivalence.observe` lists them), the worst of all ranks. skipped: aspect, or module to be called by
    itself → why it was not compared. plan: what the ranks ran. sharded: the parameters of which every rank holds less than the whole,
    and local_share: elements that the fullest rank holds ÷ elements of the model, both counted on the ranks and not taken from the plan.
    planning: CPU seconds that `parallelize` took on rank 0, which plans for all.
    first: where a difference begins, with the layouts and collectives there.
    """

    model: str
    tp: int
    backend: str
    dtype: torch.dtype
    plan: Plan
    aspects: Mapping[str, Aspect]
    skipped: Mapping[str, str]
    seconds: float
    sharded: frozenset[str]
    local_share: float
    planning: float
    first: str = ""

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the aspects that differ."""
        return tuple(name for name, aspect in self.aspects.items() if aspect.wrong)

    def __str__(self) -> str:
        head = f"{self.model} over tp={self.tp} ({self.backend} ranks, {str(self.dtype).removeprefix('torch.')})"
        lines = [f"{head}: {'differs from' if self.failed else 'equals'} the model on one device"]
        for a in self.aspects.values():
            text = f"{len(a.wrong)} of {a.compared} differ, the most {a.where}:" if a.wrong else f"{a.compared} compared,"
            lines.append(f"  {a.name}: {text} relative error {a.error:.1e}")
        lines += [f"  {name}: not compared, {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, *([self.first] if self.first else [])])


@dataclass(frozen=True, slots=True)
class _Job:
    """What every rank is given."""

    subject: Subject
    wanted: Observed
    training: Training
    recipe: Recipe | None
    mutation: Mutation | None
    plan: Plan | None  # with a mutation: what it changes
    record: str | None = None  # the call that is watched module by module ("": the main one)
    certificate: str = "numbers"


@dataclass(slots=True)
class _Found:
    """What one rank found."""

    plan: Plan | None = None
    planning: float = 0.0
    held: dict[str, int] = field(default_factory=dict)  # parameter → how many of its elements are here
    refused: tuple[str, str] | None = None
    alone: dict[str, str] = field(default_factory=dict)  # modules that are not to be called by themselves, and why
    aspects: dict[str, Aspect] = field(default_factory=dict)
    record: Record = field(default_factory=dict)


def assert_equivalent(
    factory: Factory,
    *,
    tp: int,
    inputs: Inputs | None = None,
    recipe: RecipeLike | None = None,
    steps: int = 0,
    dtype: torch.dtype = torch.float64,
    backend: str = "local",
    timeout: float = 120.0,
    seed: int = 0,
    optimizer: MakeOptimizer = adamw,
    sabotage: Mutation | None = None,
    certificate: str = "numbers",
) -> Equivalence:
    """Check that the model and the model parallelized over `tp` ranks are one function; what was compared is returned.

    Compared are the state dict (bit by bit), every output, the gradients of every parameter and of floating-point arguments, greedy
    generation, and `steps` optimizer steps with clipped gradients. The model runs in eval mode, and in training mode too where it
    draws no random numbers there (dropout): outputs, gradients, a second call, and the buffers after it.

    Args:
        factory: builds the model, called once; or a transformers config, which stands for a model of random weights. Parameters
            that hold a single value get noise, or a zero bias that is added twice would not show.
        tp: number of ranks, at least 1.
        inputs: keyword arguments of one call in a mapping, positional ones in a tuple, one tensor, or a function of the model that
            makes any of these. Guessed for transformers models.
        recipe: as for `autotp.parallelize`.
        steps: optimizer steps to compare.
        dtype: float64, where only the order of sums differs and 1e-9 is the limit; or float32, with 2e-5.
        backend: "local": ranks of this process that take turns from collective to collective, the same in every run, a deadlock is
            known at once. "threads": ranks of this process that run freely. "gloo": a process for each rank (seconds to start; the
            model and functions are sent to them with cloudpickle).
        timeout: seconds for all ranks together.
        seed: of the weights and of guessed inputs.
        optimizer: makes the optimizer of a list of parameters; AdamW.
        sabotage: a mutation of the plan (`autotp.testing.sabotage`), to see that this check notices.
        certificate: `check` of `autotp.parallelize`: "graph" shows what the plan would be without its own check of numbers.

    Raises:
        NotEquivalent: they differ, or a rank raised or did not end in time. Also an AssertionError. Nothing is left running, but
            for a thread that hangs in C code.
        InputError: arguments that make no sense, a model that does not run by itself. TraceError, PlanError, RecipeError: as for
            `autotp.parallelize`. Any other AutoTPError: that with which every rank refuses a call.
    """
    check_arguments("assert_equivalent", tp, backend, timeout, steps, seed)
    if sabotage is not None and not isinstance(sabotage, Mutation):
        raise InputError(f"assert_equivalent: sabotage is {sabotage!r}, wanted a Mutation (autotp.testing.sabotage.mutations)")
    if not callable(optimizer):
        raise InputError(f"assert_equivalent: optimizer is {optimizer!r}, wanted a function of a list of parameters")
    started = time.monotonic()
    with torch.random.fork_rng(devices=()):
        subject = make_subject(factory, inputs, dtype, seed)
        training = Training(steps, optimizer)
        wanted = observe_model(subject, training)
    return check(subject, wanted, training, tp, backend, timeout, recipe, sabotage, started=started, certificate=certificate)


def check(
    subject: Subject,
    wanted: Observed,
    training: Training,
    tp: int,
    backend: str | Running = "local",
    timeout: float = 120.0,
    recipe: RecipeLike | None = None,
    mutation: Mutation | None = None,
    plan: Plan | None = None,
    started: float | None = None,
    certificate: str = "numbers",
) -> Equivalence:
    """`assert_equivalent` for a subject that has been observed already; `plan` is the one that `mutation` changes.

    Raises:
        NotEquivalent, AutoTPError: as for `assert_equivalent`.
    """
    started = time.monotonic() if started is None else started
    loaded = None if recipe is None else Recipe.load(recipe)
    if mutation is not None and plan is None:
        plan = autotp.plan(subject.model, tp=tp, recipe=loaded, example_inputs=subject.example_inputs())
    job = _Job(subject, wanted, training, loaded, mutation, plan, certificate=certificate)
    name = f"{type(subject.model).__name__} over tp={tp} ({backend} ranks)"
    found = _on_ranks(job, tp, backend, timeout, name)
    aspects = {n: _worst([f.aspects[n] for f in found]) for n in found[0].aspects}
    made = found[0].plan
    assert made is not None
    dtype = subject.precision.dtype
    skipped = wanted.skipped | {f"{path} by itself": text for path, text in found[0].alone.items()}
    sizes = {name: p.numel() for name, p in subject.model.named_parameters()}
    result = Equivalence(
        type(subject.model).__name__, tp, str(backend), dtype, made, aspects, skipped, time.monotonic() - started,
        frozenset(name for name, size in sizes.items() if all(f.held.get(name, size) < size for f in found)),
        max(sum(f.held.values()) for f in found) / max(1, sum(sizes.values())),
        found[0].planning,
    )  # fmt: skip
    if result.failed:
        if mutation is None:
            result = replace(result, first=_first(job, result, backend, timeout))
        raise NotEquivalent(str(result), result)
    return result


def check_arguments(caller: str, tp: int, backend: str, timeout: float, steps: int = 0, seed: int = 0) -> None:
    """Refuse what no ranks can be started with.

    Raises:
        InputError: an argument out of its range; names it and the function that was called.
    """
    whole_number(f"{caller}: tp", tp)
    whole_number(f"{caller}: steps", steps, least=0)
    whole_number(f"{caller}: seed", seed, least=0, most=2**64 - 1)
    check_ranks(tp)
    if backend not in BACKENDS:
        raise InputError(f"{caller}: backend is {backend!r}, wanted one of {', '.join(BACKENDS)}")
    seconds(f"{caller}: timeout", timeout)


def _on_ranks(job: _Job, tp: int, backend: str | Running, timeout: float, name: str) -> list[_Found]:
    try:
        found: list[_Found] = run(backend, _rank, job, tp, timeout)
    except RankError as error:
        raise NotEquivalent(f"{name} failed:\n{error}") from error
    refused = [f.refused for f in found]
    if any(refused) and not all(refused):
        rank, (kind, text) = next((i, r) for i, r in enumerate(refused) if r is not None)
        raise NotEquivalent(f"{name} failed: rank {rank} refuses, rank {refused.index(None)} does not: {kind}: {text}")
    if len({frozenset(f.alone) for f in found}) > 1:
        raise NotEquivalent(f"{name} failed: not all ranks refuse the same calls of modules by themselves: {[f.alone for f in found]}")
    if refused[0] is not None:
        kind, text = refused[0]
        raise getattr(errors, kind, AutoTPError)(text)
    return found


def _rank(job: _Job) -> _Found:
    """What one rank does: parallelize a copy, watch it, compare."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    model = job.subject.again(job.subject.model)
    found, started = _Found(), time.process_time()
    try:
        if job.mutation is None or job.plan is None:
            autotp.parallelize(model, mesh, recipe=job.recipe, example_inputs=job.subject.example_inputs(), check=job.certificate)
        else:
            parallelize_as(model, mesh, job.mutation.change(job.plan))
            job.mutation.damage(model, autotp.plan_of(model))
    except AutoTPError as error:  # the same on every rank, by what parallelize promises
        if job.mutation is not None:
            raise
        found.refused = type(error).__name__, str(error)
        return found
    found.plan, found.planning = autotp.plan_of(model), time.process_time() - started
    found.held = {n: (p.to_local() if isinstance(p, DTensor) else p).numel() for n, p in model.named_parameters()}
    if job.record is not None:
        found.record = _record(job.subject, model, job.record)
        return found
    watch = Watch(model, job.subject, _PARALLEL, job.training)
    for name, wanted in job.wanted.found.items():
        try:
            got = getattr(watch, name)()
        except AutoTPError as error:  # a call that the plan is not made for; whether all ranks say so is seen in `_on_ranks`
            if job.mutation is not None:
                raise
            found.refused = type(error).__name__, f"{error}\n(raised when {name} of the parallel model were computed)"
            return found
        found.aspects[name] = compare(name, watch.answered(wanted), got, job.subject.precision, job.training.least)
    found.alone = watch.refused
    return found


def _record(subject: Subject, model: Any, call: str) -> Record:
    """Outputs of all modules of one call, as far as it comes."""
    torch.manual_seed(0)
    with torch.no_grad(), recorded(model) as record:
        subject.call(model, name=call)
    return record


def _worst(aspects: list[Aspect]) -> Aspect:
    worst = aspects[0]
    for aspect in aspects[1:]:
        worst = worst.worse(aspect)
    return worst


def _first(job: _Job, result: Equivalence, backend: str | Running, timeout: float) -> str:
    """Where it begins, from one more run in which every module is watched."""
    outputs = result.aspects["outputs"].wrong
    alone = [path for path in job.subject.alone for name in outputs if name.endswith(by_itself(path))]
    if alone and len(alone) == len(outputs):
        return f"first module that differs, called by itself: {alone[0]}\n{surroundings(result.plan, alone[0])}"
    call = next((n for n in job.subject.more if outputs and all(path.endswith(f" {n}") for path in outputs)), "")
    reference = _record(job.subject, job.subject.model, call)
    if "outputs" in result.failed or not {"gradients", "steps"} & set(result.failed):
        watched = replace(job, mutation=None, plan=None, record=call)
        try:
            found = _on_ranks(watched, result.tp, backend, timeout, "watching")
        except NotEquivalent as error:
            return f"watching every module failed: {error}"
        difference = first_module(reference, [f.record for f in found], job.subject.precision.tolerance)
        if difference is not None:
            where = f" in the call {call}" if call else ""
            return f"first module that differs{where}: {difference[1]}\n{surroundings(result.plan, difference[0])}"
    wrong = result.aspects["gradients"].wrong if "gradients" in result.failed else ()
    name = gradient_order(reference, job.subject.model, wrong)
    if not name:
        return ""
    return f"no module's output differs; first gradient that differs on the way back: {name}\n{surroundings(result.plan, name)}"
