"""`autotp advise`: how to place a model on GPUs. `autotp calibrate`: what this machine can do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from autotp.cli.options import InputsOption, RecipeOption, TargetArgument, examples, status
from autotp.cli.output import check_folder, print_json, write_file
from autotp.errors import InputError

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def advise(
    target: TargetArgument,
    gpus: Annotated[int, typer.Option(min=1, help="number of GPUs; every option uses all of them")],
    gpu: Annotated[str, typer.Option(metavar="NAME|FILE", help="h100, a100, … or a file of `autotp calibrate`")],
    serve: Annotated[bool, typer.Option("--serve", help="answer requests (--batch --prompt --new-tokens --kv-dtype)")] = False,
    train: Annotated[bool, typer.Option("--train", help="train (--tokens --seq --optimizer --checkpointing …)")] = False,
    link: Annotated[str | None, typer.Option(metavar="NAME|FILE", help="between GPUs of a node: nvlink4, pcie5, …")] = None,
    network: Annotated[str, typer.Option(metavar="NAME|FILE", help="between nodes")] = "ib-ndr",
    memory: Annotated[str | None, typer.Option(metavar="BYTES", help="of a GPU, such as 80GB or 40GiB")] = None,
    eager: Annotated[bool, typer.Option("--eager", help="the host launches each operator: neither compiled nor CUDA graphs")] = False,
    dtype: Annotated[str, typer.Option(help="of weights and activations")] = "bf16",
    batch: Annotated[int | None, typer.Option(help="requests at a time, over all replicas")] = None,
    prompt: Annotated[int | None, typer.Option(help="tokens of a prompt")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="tokens to generate for each")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="of the cache in memory, such as fp8")] = None,
    tokens: Annotated[int | None, typer.Option(help="tokens a step, over all GPUs")] = None,
    seq: Annotated[int | None, typer.Option(help="tokens of a sequence")] = None,
    optimizer: Annotated[str | None, typer.Option(help="sgd, momentum, adamw or adamw-fp32")] = None,
    checkpointing: Annotated[str | None, typer.Option(help="none, selective or full")] = None,
    loss_parallel: Annotated[bool, typer.Option("--loss-parallel", help="leave logits in parts over the ranks")] = False,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="leave hidden states in parts over the ranks")] = False,
    inputs: InputsOption = None,
    recipe: RecipeOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of text")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="also write a page, without network or scripts")] = None,
) -> None:
    """Say how to place TARGET on GPUs: tensor parallelism, replicas, FSDP or a pipeline, and why. Needs no GPU."""
    import autotp
    from autotp.advise.page import page
    from autotp.advise.workload import Serve, Train

    if html is not None:
        check_folder(html)
    if serve == train:
        raise InputError("advise: pass one of --serve and --train")
    serving = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens, "kv_dtype": kv_dtype}
    training = {
        "tokens": tokens,
        "seq": seq,
        "optimizer": optimizer,
        "checkpointing": checkpointing,
        "loss_parallel": loss_parallel or None,
        "sequence_parallel": sequence_parallel or None,
    }
    wanted, other = (serving, training) if serve else (training, serving)
    if foreign := [f"--{name.replace('_', '-')}" for name, value in other.items() if value is not None]:
        raise InputError(f"advise: {', '.join(foreign)} does not go with --{'serve' if serve else 'train'}")
    given: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    work = Serve(dtype=dtype, **given) if serve else Train(dtype=dtype, **given)
    with status("building the model") as update:
        advice = autotp.advise(
            target,
            work,
            gpus=gpus,
            gpu=gpu,
            link=link,
            network=network,
            memory=None if memory is None else bytes_of(memory),
            eager=eager,
            recipe=recipe,
            example_inputs=examples(inputs),
            on_event=update,
        )
    if html is not None:
        write_file(html, page(advice))
    if as_json:
        print_json(advice.to_dict())
        return
    typer.echo(str(advice))


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="where to write the file")],
    ranks: Annotated[int, typer.Option(min=2, help="processes of this machine, one for each GPU with nccl")] = 2,
    backend: Annotated[str, typer.Option(help="gloo for CPUs, nccl for GPUs")] = "gloo",
    dtype: Annotated[str, typer.Option(help="of products")] = "fp32",
    timeout: Annotated[float, typer.Option(help="seconds for all ranks together")] = 300.0,
) -> None:
    """Measure this machine's products, memory and all-reduces; write a file that `advise --gpu` and `--link` take."""
    from autotp.advise.calibrate import calibrate as measure

    check_folder(output)
    with status("measuring"):
        table = measure(ranks=ranks, backend=backend, dtype=dtype, timeout=timeout)
    write_file(output, table)
    typer.echo(table, nl=False)


def bytes_of(text: str) -> float:
    """`80GB` → 8e10.

    Raises:
        InputError: it is no number of bytes.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise InputError(f"memory is {text!r}, wanted bytes such as 80GB or 40GiB")
    return float(found[1]) * _UNITS[found[2].upper()]
