"""The public function: how to place a model on GPUs, before one is rented."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autotp import targets
from autotp.adapters import base_of
from autotp.advise import hardware
from autotp.advise.advice import Advice
from autotp.advise.choice import advised
from autotp.advise.machine import Machine
from autotp.advise.serving import serve_options
from autotp.advise.subject import Subject
from autotp.advise.training import train_options
from autotp.advise.workload import Serve, Train, Workload
from autotp.arguments import truth, whole_number
from autotp.errors import InputError
from autotp.planning import RecipeLike
from autotp.rewrite.parameters.quantized_form import is_quantized

_LEFT_OUT = (
    "Nothing is rented or run: times follow from the operators and collectives of the parallel model and the rates of the hardware "
    "table (docs/advise.md). Measure before you buy."
)


def advise(
    target: object,
    workload: Workload,
    *,
    gpus: int,
    gpu: str,
    link: str | None = None,
    network: str = "ib-ndr",
    memory: float | None = None,
    eager: bool = False,
    recipe: RecipeLike | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    check: str = "graph",
    on_event: Callable[[str], None] | None = None,
) -> Advice:
    """Says how to place `target` on GPUs: tensor parallelism, replicas, FSDP or a pipeline. This needs no weights and no GPU.

    Each plan is applied to the model on fake tensors, and what one rank then runs is counted: floating-point operations, bytes,
    collectives, and the bytes alive at each moment. Times are those of a roofline, and of rings of latency and bandwidth
    (`autotp.advise.hardware` has the formulas).

    Args:
        target: as for `plan`.
        workload: an `autotp.advise.workload.Serve` or `Train`.
        gpus: how many there are. Each option uses all of them.
        gpu: a name of the bundled table (`h100`), or a file that `autotp calibrate` wrote.
        link: between the GPUs of a node, likewise; None for that of the GPU.
        network: between nodes, where the link does not join all GPUs.
        memory: bytes of each GPU; None for those of the table.
        eager: the host launches each operator; else code is compiled, or launched as CUDA graphs.
        recipe, check: as for `plan`.
        example_inputs: keywords of a call, for models whose calls autotp cannot make at a size. The call is then what is timed, and
            the sizes in `workload` count for nothing.
        on_event: hears of each step as a text.

    Raises:
        InputError: a bad argument, hardware that is not known, a model whose calls cannot be made. TraceError: the model cannot be run
            on fake tensors. RecipeError: as for `plan`.
    """
    if not isinstance(workload, Serve | Train):
        raise InputError(f"workload is {workload!r}, wanted a Serve or a Train of autotp.advise.workload")
    whole_number("gpus", gpus, most=1 << 20)
    truth("eager", eager)
    one, table = hardware.gpu(gpu)
    if memory is not None:
        if not isinstance(memory, int | float) or isinstance(memory, bool) or not one.reserved < memory < float("inf"):
            raise InputError(f"memory is {memory!r}, wanted bytes of a GPU, more than the {one.reserved:.3g} that no tensor can have")
        one = hardware.with_memory(one, float(memory))
    if link is None and not one.link:
        raise InputError(f"gpu {gpu} names no link: pass link=, one of {', '.join({**table.links, **hardware.bundled().links})}")
    machine = Machine(gpus, one, hardware.link(one.link if link is None else link, table), hardware.link(network, table), eager)
    model = base_of(targets.resolve(target))
    if quantized := [n for n, p in model.named_parameters() if is_quantized(p)]:
        raise InputError(f"{quantized[0]} is quantized, and what quantized weights take is not known: advise takes the model without")
    subject = Subject(model, example_inputs, recipe, check, on_event or (lambda text: None))
    options = serve_options(subject, workload, machine) if isinstance(workload, Serve) else train_options(subject, workload, machine)
    unit = "tokens/s" if subject.calls is not None else "calls/s"
    best, sentence = advised(options, machine, unit)
    elements = sum(p.numel() for p in model.parameters())
    notes = (*subject.too_long(workload), *machine.notes(workload.torch_dtype), *subject.notes, _LEFT_OUT)
    return Advice(type(model).__name__, elements, workload, machine, options, best, sentence, notes, unit)
