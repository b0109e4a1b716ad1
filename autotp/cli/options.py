"""The arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="directory or config.json, model type of transformers, or package.module:callable")
]
TpOption = Annotated[int, typer.Option("--tp", min=1, help="number of ranks")]
InputsOption = Annotated[
    str | None, typer.Option("--inputs", metavar="MODULE:CALLABLE", help="returns the keyword arguments of a call, or a list of several")
]
RecipeOption = Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="recipe to follow: YAML file or bundled name")]

CheckOption = Annotated[
    str, typer.Option("--check", metavar="numbers|graph", help="run the model and its ranks and compare, or trust the trace alone")
]


LossParallelOption = Annotated[
    bool, typer.Option("--loss-parallel", help="leave the logits in parts over the ranks, for losses that need no more")
]

ExpertsOption = Annotated[
    str, typer.Option("--experts", metavar="width|whole|auto", help="cut the width inside each expert, or give each rank whole experts")
]


SequenceParallelOption = Annotated[
    str,
    typer.Option(
        "--sequence-parallel", metavar="on|off|auto", help="leave hidden states between regions in parts over the tokens while training"
    ),
]


def placements(loss_parallel: bool, sequence_parallel: str, experts: str) -> Mapping[str, Any]:
    """Returns the choices of placement as `autotp.plan` takes them."""
    asked = {"on": True, "true": True, "off": False, "false": False}.get(sequence_parallel, sequence_parallel)
    return {"loss_parallel": loss_parallel, "sequence_parallel": asked, "experts": experts}


def examples(inputs: str | None) -> Any:
    """Returns the keyword arguments that the callable named by `--inputs` makes, or a list of them; None without one."""
    from autotp import targets

    return None if inputs is None else targets.inputs_of(inputs)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows the current step on stderr, and only where a person watches."""
    with Console(stderr=True).status(text) as shown:
        yield lambda now: shown.update(now)


def make_plan(target: str, tp: int, inputs: str | None, recipe: str | None, check: str, placed: Mapping[str, Any]) -> Any:
    """Plans TARGET as the options say; shows progress."""
    import autotp
    from autotp import targets

    given: dict[str, Any] = {"recipe": recipe, "example_inputs": examples(inputs), "check": check, **placed}
    with status("building the model") as update:
        model = targets.resolve(target)
        update(f"planning over {tp} ranks")
        return autotp.plan(model, tp=tp, **{name: value for name, value in given.items() if value is not None})
