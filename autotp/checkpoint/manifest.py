"""Reads and writes the manifest of a checkpoint that is cut ahead: the plan, and the facts that restore the uncut checkpoint.

`autotp.json` is plain JSON; reading it runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autotp.checkpoint.files import DTYPES, inside
from autotp.errors import AutoTPError, CheckpointError
from autotp.plan.codec import decode, encode
from autotp.plan.plan import Plan

NAME = "autotp.json"
REST = "rest.safetensors"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """Each directory that `shard` made has one.

    model: module and name of the model's class. overrides: of the config, that it was cut with.
    sources: key of the checkpoint → (dtype, shape), for the tensors that the model is made of. direct: those that are a parameter
    or buffer unchanged → its name. files: file of the checkpoint → (its keys, its metadata). index: the text of its index, if it
    had one.
    rest: keys that `rest.safetensors` holds as they were: those that the model does not use, and those that do not follow from it.
    """

    plan: Plan
    model: str
    overrides: Mapping[str, Any]
    sources: Mapping[str, tuple[str, tuple[int, ...]]]
    direct: Mapping[str, str]
    files: Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]]
    index: str | None
    rest: tuple[str, ...]

    def write(self, directory: Path) -> None:
        """Write `autotp.json`."""
        fields = {name: value for name, value in asdict(replace(self, plan=None)).items() if name != "plan"}  # type: ignore[arg-type]
        content = {"format": FORMAT, "tp": self.plan.tp, **fields, "plan": encode(self.plan)}
        (directory / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> Manifest | None:
    """Returns the manifest in `directory`; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = directory / NAME
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {content['format']}; this autotp reads format {FORMAT}: cut the checkpoint again")
        for file in content["files"]:
            inside(file, str(path))  # unshard writes to these names
        unknown = sorted({dtype for dtype, _ in content["sources"].values()} - set(DTYPES))
        if unknown:
            raise CheckpointError(f"{path}: names the dtype {unknown[0]!r}, which cannot be read here")
        return Manifest(
            plan=decode(content["plan"]),
            model=content["model"],
            overrides=dict(content["overrides"]),
            sources={key: (dtype, tuple(shape)) for key, (dtype, shape) in content["sources"].items()},
            direct=dict(content["direct"]),
            files={file: (tuple(keys), dict(metadata)) for file, (keys, metadata) in content["files"].items()},
            index=content["index"],
            rest=tuple(content["rest"]),
        )
    except CheckpointError:
        raise
    except (AutoTPError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: not what autotp shard writes ({what}); cut the checkpoint again") from error


def rank_file(rank: int, tp: int) -> str:
    """Returns the name of a rank's file."""
    return f"rank-{rank:05d}-of-{tp:05d}.safetensors"
