"""`shard` cuts a checkpoint ahead for a number of ranks, and `unshard` puts it together again: on one machine, a piece at a time."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autotp.api import plan as make_plan
from autotp.checkpoint import pretrained
from autotp.checkpoint.directory import written_beside
from autotp.checkpoint.files import DTYPES, INDEX, FileTensor, Reader, checkpoint_files, open_file, tensors_of
from autotp.checkpoint.manifest import NAME, REST, Manifest, rank_file, read_manifest
from autotp.checkpoint.nodes import Box, Node, Read, sizes, sources, uncast
from autotp.checkpoint.progress import bar
from autotp.checkpoint.pullback import moves_only, value
from autotp.checkpoint.quantized import method_of, refuse_any
from autotp.checkpoint.rank_files import AllRanks, CutTensor
from autotp.checkpoint.read_shard import read_shard
from autotp.checkpoint.safetensors_writer import OutputFile, lay_out, pieces
from autotp.checkpoint.skeleton import Skeleton, build, find_class, known_class, load_config
from autotp.errors import CheckpointError, InputError
from autotp.plan.layout import Layout, replicated
from autotp.plan.plan import Plan
from autotp.planning import RecipeLike

#: Files of a checkpoint that hold weights, by the ends of their names; all others are copied.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")


def shard(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tp: int,
    recipe: RecipeLike | None = None,
    model_class: Any = None,
    **config_overrides: Any,
) -> Plan:
    """Cut a checkpoint for `tp` ranks: one safetensors file a rank, and the plan beside them. Needs no process group.

    `from_pretrained(out, mesh)` then loads it without planning and without slicing, and `unshard` turns it back. Weights stay in
    the checkpoint's dtype; padding is zeros. Tensors that the model does not use go to a file of their own, so that `unshard`
    restores them too. The cut needs memory for one rank's part of one tensor.

    Args:
        path: a directory with a `config.json` and safetensors files. out: a new directory.
        tp: number of ranks.
        recipe, model_class, config_overrides: as for `from_pretrained`.

    Returns:
        The plan.

    Raises:
        AutoTPError: CheckpointError: files that are missing or cannot be read, weights that the checkpoint lacks, `out` cannot be
            written. InputError: wrong arguments. PlanError, RecipeError, TraceError: as for `autotp.plan`.
    """
    directory, target = _existing(path), _new(out)
    try:
        json.dumps(config_overrides)
    except TypeError as error:
        raise InputError(f"config_overrides: they are kept beside the plan, and JSON has no word for one: {error}") from error
    if read_manifest(directory) is not None:
        raise CheckpointError(f"{directory}: cut already; autotp unshard turns it back into a checkpoint that can be cut")
    read = Reader()
    config, options = load_config(directory, config_overrides, model_class)
    refuse_any(method_of(config), str(directory))
    cls = find_class(config, directory, model_class, bool(options.get("trust_remote_code")))
    files = {file: tensors_of(file) for file in checkpoint_files(directory, getattr(config, "transformers_weights", None))}
    tensors = {key: tensor for found in files.values() for key, tensor in found.items()}
    skeleton = build(directory, tensors, read, config=config, cls=cls, dtype=None, options=options, report=True)
    made = make_plan(skeleton.model, tp=tp, recipe=recipe)
    parts = _parts(skeleton, made, directory)
    back = _way_back(skeleton.model, parts, tensors, read)
    manifest = Manifest(
        plan=made,
        model=f"{type(skeleton.model).__module__}.{type(skeleton.model).__name__}",
        overrides=config_overrides,
        sources={k: (_name(t.dtype), t.shape) for k, t in tensors.items() if k in back.used},
        direct=back.direct,
        files={
            os.fspath(file.relative_to(directory)): (tuple(found), dict(open_file(file).metadata() or {})) for file, found in files.items()
        },
        index=_text(directory / INDEX),
        rest=tuple(key for key in tensors if key in back.rest),
    )
    with written_beside(target, None) as new:
        _copy_others(directory, new)
        _write_ranks(new, parts, tp, read)
        if manifest.rest:
            _write(new / REST, {key: tensors[key] for key in manifest.rest}, {"format": "pt"}, read, "Keeping what is left")
        manifest.write(new)
    return made


def unshard(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Turn a directory that `shard` made back into the checkpoint: the same files, keys and bits.

    This needs no process group, and memory for a few pieces.

    Args:
        path: a directory that `shard` made. out: a new directory.

    Raises:
        AutoTPError: CheckpointError: `path` is no such directory, a file of it is missing or was changed, `out` cannot be written.
    """
    directory, target = _existing(path), _new(out)
    manifest = read_manifest(directory)
    if manifest is None:
        raise CheckpointError(f"{directory}: no {NAME} in it, so it is not what autotp shard writes")
    read = AllRanks(directory, manifest.plan.tp)
    nodes = _restored(directory, manifest, read)
    if manifest.rest:
        nodes |= tensors_of(directory / REST)
    with written_beside(target, None) as new:
        _copy_others(directory, new)
        for file, (keys, metadata) in manifest.files.items():
            lost = [key for key in keys if key not in nodes]
            if lost:
                raise CheckpointError(f"{directory}: {lost[0]} of the checkpoint cannot be made of what is there; cut the checkpoint again")
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            _write(new / file, {key: nodes[key] for key in keys}, metadata, read, f"Writing {file}")
        if manifest.index is not None:
            (new / INDEX).write_text(manifest.index, encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _WayBack:
    """Leads from the model's tensors back to the checkpoint's.

    `direct`: key → name. `rest`: keys of those that do not follow from the model. `used`: keys in the model.
    """

    direct: Mapping[str, str]
    rest: frozenset[str]
    used: frozenset[str]


def _parts(skeleton: Skeleton, made: Plan, directory: Path) -> dict[str, tuple[Node, Layout]]:
    """Returns name → stored node and layout, for every parameter (tied ones once) and every buffer that files hold."""
    left = {name: p for name, p in skeleton.model.named_parameters() if id(p) not in skeleton.nodes}
    computed = getattr(skeleton.model, "_keys_to_ignore_on_load_missing", None) or ()  # patterns of what no checkpoint holds
    lost = [name for name in left if not any(re.search(pattern, name) for pattern in computed)]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CheckpointError(f"{directory}: the checkpoint lacks {lost[0]}{more}; cut a checkpoint that has all weights of the model")
    found: dict[str, tuple[Node, Layout]] = {}
    for name, p in skeleton.model.named_parameters():
        if name not in left:
            found[name] = _stored(skeleton.nodes[id(p)]), made.params[name].layout
    for name, node in skeleton.buffers.items():
        found[name] = _stored(node), replicated(node.shape, made.tp)
    return found


def _stored(node: Node) -> Node:
    """Returns `node` in the checkpoint's own dtype, where that changes nothing else."""
    return uncast(node) if moves_only(node) and len({source.dtype for source in sources(node)}) == 1 else node


def _way_back(model: nn.Module, parts: Mapping[str, tuple[Node, Layout]], tensors: Mapping[str, FileTensor], read: Read) -> _WayBack:
    direct = {node.key: name for name, (node, _) in parts.items() if isinstance(node, FileTensor)}
    used = frozenset(source.key for node, _ in parts.values() for source in sources(node) if isinstance(source, FileTensor))
    rest = set(tensors) - used
    undone = used - set(direct)
    if undone:
        saved = pretrained.as_saved(model, *_state(model, {name: node for name, (node, _) in parts.items()}))
        rest |= {key for key in undone if not _returns(saved.get(key), tensors[key], read)}
    return _WayBack(direct, frozenset(rest), used)


def _returns(made: Node | None, was: FileTensor, read: Read) -> bool:
    """True where `made` equals `was`, bit by bit."""
    if made is None or made.shape != was.shape or made.dtype != was.dtype:
        return False
    for piece in pieces(was.key, was, 0):
        a, b = value(made, piece.box, read), value(was, piece.box, read)
        if not torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)):
            return False
    return True


def _state(model: nn.Module, nodes: Mapping[str, Node]) -> tuple[dict[str, Node], dict[str, int]]:
    """Returns the model's `state_dict` of `nodes` (tied parameters under one of their names), and a number for each name that tied
    ones share.
    """
    identity = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    by_id = {identity[name]: node for name, node in nodes.items() if name in identity}
    return {name: by_id[i] for name, i in identity.items() if i in by_id}, {n: i for n, i in identity.items() if i in by_id}


def _restored(directory: Path, manifest: Manifest, read: AllRanks) -> dict[str, Node]:
    """Returns key of the checkpoint → how it is made of the ranks' files."""
    skeleton = hollow_skeleton(directory, manifest, {}, None)
    layouts: dict[str, Layout | None] = {name: p.layout for name, p in manifest.plan.params.items()}
    nodes: dict[str, Node] = {}
    for name, shape in [
        *((n, tuple(p.shape)) for n, p in skeleton.model.named_parameters() if id(p) in skeleton.nodes),
        *((n, node.shape) for n, node in skeleton.buffers.items()),
    ]:
        layout = layouts.get(name)
        nodes[name] = CutTensor(shape, read.dtype_of(name, layout, shape), name, layout)
    found: dict[str, Node] = {key: nodes[name] for key, name in manifest.direct.items() if name in nodes}
    if set(manifest.sources) - set(found):
        found |= {k: n for k, n in pretrained.as_saved(skeleton.model, *_state(skeleton.model, nodes)).items() if k not in found}
    return found


def hollow_skeleton(
    directory: Path, manifest: Manifest, overrides: Mapping[str, Any], dtype: Any, model_class: Any = None, *, report: bool = False
) -> Skeleton:
    """Returns the skeleton of the checkpoint that a cut one was made of, without entries.

    Raises:
        CheckpointError, InputError: as for `build`, `load_config`, `find_class`.
    """
    given = {**manifest.overrides, **overrides}
    model_class = model_class or known_class(manifest.model)
    config, options = load_config(directory, given, model_class)
    refuse_any(method_of(config), str(directory))
    cls = find_class(config, directory, model_class, bool(options.get("trust_remote_code")))
    tensors = {key: Node(shape, DTYPES[dtype]) for key, (dtype, shape) in manifest.sources.items()}
    return build(directory, tensors, _zeros, config=config, cls=cls, dtype=dtype, options=options, report=report)


def _zeros(source: Node, box: Box) -> Tensor:
    """Stands in for a read: code that changes weights while they load ran when they were cut, and its results on zeros are not used."""
    return torch.zeros(sizes(box), dtype=source.dtype)


def _write_ranks(new: Path, parts: Mapping[str, tuple[Node, Layout]], tp: int, read: Read) -> None:
    local = {name: Node(layout.local_shape, node.dtype) for name, (node, layout) in parts.items()}
    plan = lay_out(local, {"format": "pt"})
    with ExitStack() as stack:
        files = [stack.enter_context(OutputFile(new / rank_file(rank, tp))) for rank in range(tp)]
        for file in files:
            file.reserve(plan)
        advance = stack.enter_context(bar(f"Cutting for {tp} ranks", (plan.size - len(plan.header)) * tp, True))
        for name, (node, layout) in parts.items():
            for rank, file in enumerate(files):
                part = read_shard(node, layout, rank, read, "cpu")
                file.put(part, plan.starts[name])
                advance(part.numel() * part.itemsize)


def _write(path: Path, tensors: Mapping[str, Node], metadata: Mapping[str, str], read: Read, text: str) -> None:
    plan = lay_out(tensors, metadata)
    with OutputFile(path) as file, bar(text, plan.size - len(plan.header), True) as advance:
        file.reserve(plan)
        for key, start in plan.starts.items():
            for piece in pieces(key, tensors[key], start):
                part = value(tensors[key], piece.box, read)
                file.put(part, piece.start)
                advance(part.numel() * part.itemsize)


def _copy_others(directory: Path, new: Path) -> None:
    """Copies all files at the top of a checkpoint that hold no weights: configs, tokenizers, code."""
    for path in sorted(directory.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS) and path.name != NAME:
            shutil.copyfile(path, new / path.name)


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def _path(path: object, name: str) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"{name}: got {type(path).__name__}, wanted a directory")
    return Path(path)


def _existing(path: object) -> Path:
    directory = _path(path, "path")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: {'a file, wanted a directory' if directory.is_file() else 'no such directory'}")
    return directory


def _new(out: object) -> Path:
    target = _path(out, "out")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"out: {target} is there already, and not an empty directory; write to another one")
    return target
