"""`autotp shard` and `autotp unshard` cut a checkpoint ahead for a number of ranks, and turn it back."""

from __future__ import annotations

from typing import Annotated

import typer

from autotp.cli.options import RecipeOption, TpOption

OutOption = Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="directory to write")]


def shard(
    path: Annotated[str, typer.Argument(metavar="PATH", help="directory with a config.json and safetensors files")],
    tp: TpOption,
    out: OutOption,
    recipe: RecipeOption = None,
) -> None:
    """Cut the checkpoint in PATH for TP ranks: one file a rank and the plan, which autotp.from_pretrained(DIR, mesh) loads as they are."""
    from autotp.checkpoint import shard as cut

    made = cut(path, out, tp=tp, recipe=recipe)
    typer.echo(f"{out}: {made.model} for tp {tp}, {made.local_share:.3f} of the parameter elements in each rank's file")


def unshard(
    path: Annotated[str, typer.Argument(metavar="PATH", help="directory that autotp shard wrote")],
    out: OutOption,
) -> None:
    """Turn a directory that autotp shard wrote back into the checkpoint, with the same bits."""
    from autotp.checkpoint import unshard as turn_back

    turn_back(path, out)
    typer.echo(f"{out}: the checkpoint that {path} was cut of")
