"""The options to train, each with its memory and its time.

    gradients   one sum over the groups for each unit: an all-reduce (replicas), or a reduce-scatter and two all-gathers of the
                parameters (FSDP). They run beside operators; what is longer than these, and one unit's, is waited for
    optimizer   reads and writes its state, the parameters and the gradients once, fused
    pipeline    stages of equal work, one sequence at a time (1F1B): (m + n − 1) / m of the ideal time for m sequences on n stages.
                The first stage holds n sequences of 1/n of the blocks. What stages hand over is left out

Sequences that do not fit at a time go in several passes, whose gradients are added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from autotp.advise.machine import Machine
from autotp.advise.measured import Trained, Weights
from autotp.advise.option import Kind, Memory, Option, Step
from autotp.advise.search import Curve, largest
from autotp.advise.subject import Subject
from autotp.advise.timing import seconds
from autotp.advise.workload import Optimizer, Train


def train_options(subject: Subject, work: Train, machine: Machine) -> tuple[Option, ...]:
    """All options, by tp; a pipeline last, where there is more than one GPU."""
    return tuple(_options(subject, work, machine))


def _options(subject: Subject, work: Train, machine: Machine) -> Iterator[Option]:
    for tp in machine.sizes:
        groups = machine.gpus // tp
        curve = Curve(partial(_alive, subject, work, tp))
        kinds = (Kind.FSDP, Kind.REPLICAS) if groups > 1 else (Kind.REPLICAS,)  # the one with more room first: see `Curve`
        found = [_option(subject, work, machine, tp, kind, curve) for kind in kinds]
        yield from reversed(found)
    if machine.gpus > 1 and subject.calls is not None:
        yield _pipeline(subject, work, machine)


def _alive(subject: Subject, work: Train, tp: int, batch: int) -> float:
    """Bytes that depend on the number of sequences."""
    trained = subject.trained(work, tp, batch)
    return trained.activations + trained.temporary


def _option(subject: Subject, work: Train, machine: Machine, tp: int, kind: Kind, curve: Curve) -> Option:
    groups, sized = machine.gpus // tp, subject.calls is not None

    def memory(n: int) -> Memory:
        return _memory(subject.trained(work, tp, n), work, machine, tp, kind)

    most = None
    if sized:
        one = memory(1)
        most = largest(curve, machine.room - (one.total - one.activations - one.temporary), 1)
    each = -(-work.sequences // groups) if sized else 1
    passes = -(-each // min(each, most)) if most else 1 if most is None else each
    batch = -(-each // passes)
    step, share = _step(subject.trained(work, tp, batch), work, machine, tp, kind, passes)
    return Option(
        tp=tp,
        groups=groups,
        kind=kind,
        memory=memory(batch),
        fits=memory(batch).total <= machine.room,
        batch=batch,
        passes=passes,
        largest_batch=most,
        steps=(step,),
        throughput=(work.tokens if sized else groups) / step.seconds,
        share=share,
    )


def _memory(trained: Trained, work: Train, machine: Machine, tp: int, kind: Kind) -> Memory:
    w, groups = trained.weights, machine.gpus // tp
    over = groups if kind is Kind.FSDP else 1
    elements, itemsize = w.trained // work.torch_dtype.itemsize, work.torch_dtype.itemsize
    buffers = machine.link.buffers if tp > 1 else 0
    if groups > 1:
        buffers += machine.between(tp).buffers
    return Memory(
        weights=-(-w.parameters // over) + w.buffers,
        gradients=-(-w.trained // over),
        optimizer=Optimizer(work.optimizer).bytes(-(-elements // over), itemsize),
        activations=trained.activations,
        temporary=trained.temporary,
        communication=buffers + (_gathered(w) if over > 1 else 0),
    )


def _gathered(w: Weights) -> int:
    """Bytes that FSDP has gathered at a time: the root's parameters, a block and the next one, and the gradients of a block."""
    root, *blocks = w.units
    return root + 3 * max(blocks, default=0)


def _step(trained: Trained, work: Train, machine: Machine, tp: int, kind: Kind, passes: int) -> tuple[Step, float]:
    forward, backward = (seconds(p, machine.gpu, machine.link, tp, eager=machine.eager) for p in (trained.forward, trained.backward))
    exposed = _exposed(trained.weights, machine, tp, kind, passes, forward.compute, backward.compute)
    both = trained.forward + trained.backward
    moved = _updated(trained.weights, work) // (machine.gpus // tp if kind is Kind.FSDP else 1)
    compute = passes * (forward.compute + backward.compute) + moved / (machine.gpu.bandwidth * machine.gpu.stream)
    communication = passes * (forward.communication + backward.communication) + exposed
    step = Step(
        "step",
        passes * both.flops,
        passes * both.bytes + moved,
        passes * both.operators,
        passes * both.collectives,
        passes * both.message_bytes,
        compute,
        communication,
    )
    return step, communication / step.seconds


def _updated(w: Weights, work: Train) -> int:
    """Bytes that a step of the optimizer moves."""
    itemsize = work.torch_dtype.itemsize
    return Optimizer(work.optimizer).moved(w.trained // itemsize, itemsize)


def _exposed(w: Weights, machine: Machine, tp: int, kind: Kind, passes: int, forward: float, backward: float) -> float:
    """Seconds that collectives between groups are waited for, a step."""
    groups, link = machine.gpus // tp, machine.between(tp)
    if groups == 1:
        return 0.0
    trained = w.trained / w.parameters if w.parameters else 0.0
    units = [n for n in w.units if n]
    if kind is Kind.REPLICAS:  # once a step, behind the last backward
        sums = [link.seconds(2, n * trained, groups) for n in units]
        return max(sum(sums) - backward, min(sums, default=0.0))
    gathers = [link.seconds(1, n, groups) for n in units]
    scatters = [link.seconds(1, n * trained, groups) for n in units]
    total = 2 * sum(gathers) + sum(scatters)
    return passes * max(total - forward - backward, min(gathers, default=0.0) + min(scatters, default=0.0))


def _pipeline(subject: Subject, work: Train, machine: Machine) -> Option:
    trained, n, m = subject.trained(work, 1, 1), machine.gpus, work.sequences
    whole = _memory(trained, work, replace(machine, gpus=1), 1, Kind.REPLICAS)
    memory = replace(
        whole,
        weights=-(-whole.weights // n),
        gradients=-(-whole.gradients // n),
        optimizer=-(-whole.optimizer // n),
        communication=machine.link.buffers,
    )
    alone, _ = _step(trained, work, replace(machine, gpus=1), 1, Kind.REPLICAS, 1)
    update = _updated(trained.weights, work) / (machine.gpu.bandwidth * machine.gpu.stream)
    step = replace(alone, compute=(alone.compute - update) * (m + n - 1) / n + update / n)
    return Option(1, n, Kind.PIPELINE, memory, memory.total <= machine.room, 1, m, None, (step,), work.tokens / step.seconds, 0.0)
