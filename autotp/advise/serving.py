"""The options to serve requests, each with its memory and its time. A model that has no cache reads prompts, and makes no token.

A pipeline over all GPUs holds a part of the blocks on each. It works like as many replicas of the whole model, of which each
computes for its own requests: at any time every stage has the requests of one replica. So its time is that of replicas, and its
memory theirs over the number of stages; what stages hand over is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from autotp.advise.machine import Machine
from autotp.advise.measured import Pass, Served
from autotp.advise.option import Kind, Memory, Option, Step
from autotp.advise.search import Curve, largest
from autotp.advise.subject import Subject
from autotp.advise.timing import seconds
from autotp.advise.workload import Serve


def serve_options(subject: Subject, work: Serve, machine: Machine) -> tuple[Option, ...]:
    """All options, by tp; a pipeline last, where there is more than one GPU."""
    return tuple(_options(subject, work, machine))


def _options(subject: Subject, work: Serve, machine: Machine) -> Iterator[Option]:
    found = [_option(subject, work, machine, tp) for tp in machine.sizes]
    yield from found
    if machine.gpus > 1 and subject.calls is not None:
        yield _pipeline(found[0], machine)


def _option(subject: Subject, work: Serve, machine: Machine, tp: int) -> Option:
    groups, sized = machine.gpus // tp, subject.calls is not None
    batch = -(-work.batch // groups) if sized else 1

    def memory(n: int) -> Memory:
        return _memory(subject.served(work, tp, n), work, machine, tp)

    served = subject.served(work, tp, batch)
    decodes = subject.calls is not None and subject.calls.decodes
    steps = [_step("prefill" if decodes else "call", served.prefill, machine, tp)]
    if served.decode.work:
        steps.append(_step("token", served.decode, machine, tp))
    counts = (1, work.new_tokens - 1)
    total = sum(n * s.seconds for n, s in zip(counts, steps, strict=False))
    communication = sum(n * s.communication for n, s in zip(counts, steps, strict=False))
    done = work.batch * (work.new_tokens if decodes else work.prompt) if sized else groups
    return Option(
        tp=tp,
        groups=groups,
        kind=Kind.REPLICAS,
        memory=memory(batch),
        fits=memory(batch).total <= machine.room,
        batch=batch,
        passes=1,
        largest_batch=largest(Curve(lambda n: memory(n).total), machine.room, batch) if sized else None,
        steps=tuple(steps),
        throughput=done / total,
        share=communication / total,
    )


def _memory(served: Served, work: Serve, machine: Machine, tp: int) -> Memory:
    return Memory(
        weights=served.weights.parameters + served.weights.buffers,
        temporary=served.temporary,
        cache=round(served.cache * work.cache_scale),
        communication=machine.link.buffers if tp > 1 else 0,
    )


def _step(name: str, done: Pass, machine: Machine, tp: int) -> Step:
    took = seconds(done, machine.gpu, machine.link, tp, eager=machine.eager)
    return Step(name, done.flops, done.bytes, done.operators, done.collectives, done.message_bytes, took.compute, took.communication)


def _pipeline(one: Option, machine: Machine) -> Option:
    """The pipeline whose stages work on the requests of `one`, a replica on each GPU."""
    n, m = machine.gpus, one.memory
    memory = replace(m, weights=-(-m.weights // n), communication=machine.link.buffers)  # n times the requests, 1/n of the cache of each
    return replace(one, groups=n, kind=Kind.PIPELINE, memory=memory, fits=memory.total <= machine.room, largest_batch=None)
