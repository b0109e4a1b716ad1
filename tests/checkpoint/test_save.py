"""`save_pretrained`: what it writes beside transformers' models, what stays, and that a failing rank leaves the old checkpoint whole."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_model
from torch import nn

import autotp
from autotp.checkpoint import exchange, safetensors_writer, saving
from tests.checkpoint.test_load import failure
from tests.support.families import transformer
from tests.support.lifecycle import differing, files_differing
from tests.support.ranks import RankError, Ranks, mesh


def names(path: Path) -> list[str]:
    """What is in a directory."""
    return sorted(p.name for p in path.iterdir())


class Tied(nn.Module):
    """A module that is not of transformers, with tied weights and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.up, self.down = nn.Linear(8, 22), nn.Linear(22, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((), 2.0))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))) * self.scale)


def tied() -> nn.Module:
    torch.manual_seed(0)
    return Tied()


def plain_module(folder: str) -> list[str]:
    whole = tied()
    model = autotp.parallelize(tied(), mesh(), example_inputs={"ids": torch.arange(6)[None]})
    path = Path(folder) / "plain"
    autotp.save_pretrained(model, path)
    dist.barrier()
    again = Tied()
    missing, unexpected = load_model(again, path / "model.safetensors")
    return [*missing, *unexpected, *differing(again.state_dict(), whole.state_dict())] + ([] if len(names(path)) == 1 else ["files"])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_module_that_is_not_of_transformers(pool, tmp_path, world):
    assert pool.run(plain_module, str(tmp_path), world=world) == [[]] * world


def parallel(model_type: str = "llama", **overrides: Any) -> Any:
    return autotp.parallelize(transformer(model_type, **overrides), mesh())


def over_an_old_one(folder: str) -> list[str]:
    path = Path(folder) / "model"
    model = parallel()
    autotp.save_pretrained(model, path, max_shard_size="50KB")
    if dist.get_rank() == 0:
        (path / "tokenizer.json").write_text("{}")
        (path / "checkpoint-1").mkdir()
        (path / "checkpoint-1" / "weights").write_text("w")
    dist.barrier()
    many = names(path)
    autotp.save_pretrained(model, str(path))
    dist.barrier()
    return [str(len(many) > 5), *names(path)]


def test_stale_files_go_and_others_stay(pool, tmp_path):
    wanted = ["True", "checkpoint-1", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert pool.run(over_an_old_one, str(tmp_path)) == [wanted, wanted]
    assert (tmp_path / "model" / "checkpoint-1" / "weights").read_text() == "w"
    assert names(tmp_path) == ["model"]


def most_in_flight(folder: str) -> list[float]:
    """Bytes of the largest message and of the largest tensor; pieces are made small, so that the model is large."""
    sizes: list[int] = []
    kept, piece = exchange.round_of, safetensors_writer.PIECE

    def watched(comm: Any, needs: Any) -> Any:
        out = kept(comm, needs)
        sizes.append(sum(t.nbytes for t in out))
        return out

    saving.round_of, safetensors_writer.PIECE, saving.PIECE = watched, 4096, 4096  # type: ignore[attr-defined]
    try:
        model = parallel("mixtral")
        autotp.save_pretrained(model, Path(folder) / "pieces")
    finally:
        saving.round_of, safetensors_writer.PIECE, saving.PIECE = kept, piece, piece  # type: ignore[attr-defined]
    dist.barrier()
    autotp.save_pretrained(model, Path(folder) / "whole")
    dist.barrier()
    return [max(sizes), len(files_differing(Path(folder) / "pieces", Path(folder) / "whole"))]


def test_pieces_are_put_together_one_at_a_time(pool, tmp_path):
    for most, different in pool.run(most_in_flight, str(tmp_path)):
        assert 0 < most <= 2 * 4096  # a row of an expert's weight is more than none
        assert different == 0


def wrong(folder: str) -> list[str]:
    model = parallel()
    file = Path(folder) / "file"
    if dist.get_rank() == 0:
        file.write_text("")
    dist.barrier()
    return [
        failure(lambda: autotp.save_pretrained(transformer("llama"), folder)),
        failure(lambda: autotp.save_pretrained(model, 3)),  # type: ignore[arg-type]
        failure(lambda: autotp.save_pretrained(model, folder + "/x", max_shard_size="much")),
        failure(lambda: autotp.save_pretrained(model, file)),
        failure(lambda: autotp.save_pretrained(autotp.parallelize(transformer("llama").to("meta"), mesh()), folder + "/x")),
    ]


def test_wrong_arguments(pool, tmp_path):
    first, second = pool.run(wrong, str(tmp_path))
    assert first == second
    wanted = [
        "PlanError: LlamaForCausalLM is not parallel",
        "InputError: path: got int, wanted a directory",
        "InputError: max_shard_size='much': wanted bytes, or text such as '5GB'",
        "CheckpointError: ",
        "CheckpointError: model.embed_tokens.weight is on the meta device and has no values",
    ]
    for got, start in zip(first, wanted, strict=True):
        assert got.startswith(start), got
    assert "file: a file; a checkpoint is a directory" in first[3]


def disk_full(folder: str) -> list[Any]:
    """Save, then again with changed weights on a file system that takes 20 kB a file on one rank."""
    path = Path(folder) / "model"
    model = parallel()
    autotp.save_pretrained(model, path)
    dist.barrier()
    was = {p.name: p.read_bytes() for p in path.iterdir()}
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    found: list[Any] = []
    piece = safetensors_writer.PIECE
    for rank in (0, 1):
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        saving.PIECE = safetensors_writer.PIECE = 4096  # type: ignore[attr-defined]
        try:
            found.append(failure(lambda: autotp.save_pretrained(model, path)))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            saving.PIECE = safetensors_writer.PIECE = piece  # type: ignore[attr-defined]
        found.append({p.name: p.read_bytes() for p in path.iterdir()} == was)
    dist.barrier()
    return [*found, names(Path(folder))]


def test_a_full_disk_leaves_the_old_checkpoint_and_is_said_on_every_rank(pool, tmp_path):
    first, second = pool.run(disk_full, str(tmp_path))
    assert first == second
    early, kept, late, kept_too, left = first
    assert early.startswith("CheckpointError: model.safetensors: ") and "cannot be written: [Errno 27] File too large" in early
    assert late.startswith("CheckpointError: model.safetensors: writing failed: [Errno 27] File too large")
    assert kept is True and kept_too is True and left == ["model"]


def killed_while_saving(folder: str, rank: int, after: int) -> str:
    """Save once whole; in the second save `rank` is killed at its write number `after`."""
    path = Path(folder) / "model"
    model = parallel()
    autotp.save_pretrained(model, path, max_shard_size="60KB")
    dist.barrier()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    count, put = 0, safetensors_writer.OutputFile.put

    def deadly(self: Any, data: Any, start: int) -> None:
        nonlocal count
        count += 1
        if dist.get_rank() == rank and count > after:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, data, start)

    safetensors_writer.OutputFile.put = deadly  # type: ignore[method-assign]
    saving.PIECE = safetensors_writer.PIECE = 4096  # type: ignore[attr-defined]
    try:
        autotp.save_pretrained(model, path, max_shard_size="60KB")
    except autotp.AutoTPError as error:
        (Path(folder) / "said").write_text(f"{type(error).__name__}: {error}")
    return "alive"


@pytest.mark.parametrize(("rank", "after"), [(0, 4), (1, 0)])
def test_a_rank_that_is_killed_leaves_the_old_checkpoint(tmp_path, rank, after):
    ranks = Ranks(2, timeout=60, grace=30)
    try:
        with pytest.raises(RankError, match=rf"rank {rank}:\nthe process died"):
            ranks.run(killed_while_saving, str(tmp_path), rank, after)
    finally:
        ranks.stop()
    said = (tmp_path / "said").read_text()
    assert said.startswith(("LostRankError: another rank is gone", "CheckpointError: another rank is gone")), said
    model = type(transformer("llama")).from_pretrained(tmp_path / "model")
    assert not differing(model.state_dict(), transformer("llama").state_dict())


def by_transformers(folder: str) -> list[str]:
    """What goes wrong with transformers' own method."""
    wrong = []
    whole = transformer("gpt2")
    model = autotp.parallelize(transformer("gpt2"), mesh(), check="graph")
    ids = torch.arange(8)[None]
    refused = (
        (model, {"state_dict": model.state_dict()}, "call autotp.save_pretrained(model, directory) on every rank"),
        (model.transformer, {}, "call autotp.save_pretrained(model, directory) on every rank"),
        (model, {"variant": "fp16", "max_shard_size": "1GB"}, "save_pretrained(variant=…) is not possible for a parallel model"),
        (model, {"distributed_checkpoint": True}, "save_pretrained(distributed_checkpoint=…) is not possible"),
    )
    for which, arguments, text in refused:
        said = failure(lambda which=which, arguments=arguments: which.save_pretrained(Path(folder) / "parts", **arguments))
        if text not in said:
            wrong.append(f"not refused: {said}")
    model.save_pretrained(Path(folder) / "together", is_main_process=dist.get_rank() == 0)  # all ranks write
    again = type(whole).from_pretrained(Path(folder) / "together")
    wrong += differing(again.state_dict(), whole.state_dict())
    path = Path(folder) / "whole"
    model.save_pretrained(path, state_dict=autotp.full_state_dict(model))  # transformers writes on rank 0
    dist.barrier()
    again = type(whole).from_pretrained(path)
    wrong += differing(again.state_dict(), whole.state_dict())
    if not torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-5):  # and the model goes on
        wrong.append("logits")
    return [*wrong, *(["parts"] if (Path(folder) / "parts").exists() else [])]


def test_transformers_own_method(pool, tmp_path):
    assert pool.run(by_transformers, str(tmp_path)) == [[], []]
