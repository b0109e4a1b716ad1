"""`shard` and `unshard`: one machine, no process group, every bit back; and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import autotp
from autotp.checkpoint import files, shard, unshard
from autotp.cli.commands import run
from autotp.errors import CheckpointError, InputError
from tests.checkpoint.test_load import failure
from tests.support.families import transformer
from tests.support.lifecycle import files_differing
from tests.support.ranks import mesh


def checkpoint(path: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    transformer(model_type, **overrides).to(dtype).save_pretrained(path, max_shard_size="100KB")
    return path


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_the_commands(tmp_path, capsys):
    was = checkpoint(tmp_path / "was")
    (was / "tokenizer.json").write_text("{}")
    assert run(["shard", str(was), "--tp", "2", "-o", str(tmp_path / "cut")]) == 0
    assert "LlamaForCausalLM for tp 2, 0.5" in capsys.readouterr().out
    ranks = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    assert names(tmp_path / "cut") == ["autotp.json", "config.json", "generation_config.json", *ranks, "tokenizer.json"]
    assert run(["unshard", str(tmp_path / "cut"), "-o", str(tmp_path / "back")]) == 0
    assert files_differing(was, tmp_path / "back") == []
    assert run(["shard", str(tmp_path / "cut"), "--tp", "2", "-o", str(tmp_path / "x")]) == 2
    assert "cut already; autotp unshard turns it back" in capsys.readouterr().err
    assert run(["unshard", str(was), "-o", str(tmp_path / "x")]) == 2
    assert "no autotp.json in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_type", "tp"),
    [
        ("llama", 1),
        ("phi3", 4),
        ("mixtral", 3),
        pytest.param("bloom", 3, marks=pytest.mark.slow),
        pytest.param("t5", 2, marks=pytest.mark.slow),
    ],
)
def test_every_bit_comes_back(tmp_path, model_type, tp):
    was = checkpoint(tmp_path / "was", model_type, torch.bfloat16)
    shard(was, tmp_path / "cut", tp=tp)
    unshard(tmp_path / "cut", tmp_path / "back")
    assert files_differing(was, tmp_path / "back") == []


def test_what_the_model_has_no_use_for_comes_back_too(tmp_path):
    was = checkpoint(tmp_path / "was")
    save_file({"model.layers.99.self_attn.q_proj.weight": torch.randn(3), "extra": torch.ones(2, 2)}, was / "more.safetensors", {"a": "b"})
    index = json.loads((was / "model.safetensors.index.json").read_text())
    index["weight_map"] |= {"extra": "more.safetensors", "model.layers.99.self_attn.q_proj.weight": "more.safetensors"}
    (was / "model.safetensors.index.json").write_text(json.dumps(index))
    shard(was, tmp_path / "cut", tp=2)
    assert "rest.safetensors" in names(tmp_path / "cut")
    unshard(tmp_path / "cut", tmp_path / "back")
    assert files_differing(was, tmp_path / "back") == []


@pytest.mark.sweep
def test_names_that_are_changed_on_the_way_come_back(tmp_path):
    """A checkpoint of the base model, whose keys get a prefix; and tied weights that are there twice."""
    model = transformer("t5")
    state = {k: v.clone() for k, v in model.state_dict().items()}  # all three names of the embeddings
    model.save_pretrained(tmp_path / "was")
    save_file(state, tmp_path / "was" / "model.safetensors", {"format": "pt"})
    shard(tmp_path / "was", tmp_path / "cut", tp=2)
    unshard(tmp_path / "cut", tmp_path / "back")
    assert files_differing(tmp_path / "was", tmp_path / "back") == []

    llama = transformer("llama")
    llama.model.save_pretrained(tmp_path / "inner")
    weights = load_file(tmp_path / "inner" / "model.safetensors") | {"lm_head.weight": llama.lm_head.weight.detach()}
    save_file(weights, tmp_path / "inner" / "model.safetensors", {"format": "pt"})
    shard(tmp_path / "inner", tmp_path / "inner cut", tp=2, model_class=type(llama), rms_norm_eps=0.5)
    unshard(tmp_path / "inner cut", tmp_path / "inner back")
    assert load_file(tmp_path / "inner back" / "model.safetensors").keys() == weights.keys()
    assert files_differing(tmp_path / "inner", tmp_path / "inner back") == []
    with pytest.raises(InputError, match="JSON has no word for one"):
        shard(tmp_path / "inner", tmp_path / "other", tp=2, rms_norm_eps=object())


def test_mistakes(tmp_path):
    was = checkpoint(tmp_path / "was")
    cut = tmp_path / "cut"
    for call, kind, text in [
        (lambda: shard(was, was, tp=2), InputError, "is there already, and not an empty directory"),
        (lambda: shard(was, cut, tp=0), InputError, "tp must be a positive int"),
        (lambda: shard(7, cut, tp=2), InputError, "path: got int"),
        (lambda: shard(was, None, tp=2), InputError, "out: got NoneType"),
        (lambda: shard(tmp_path / "nowhere", cut, tp=2), CheckpointError, "no such directory"),
        (lambda: shard(was, cut, tp=2, recipe="nonsense"), autotp.AutoTPError, "nonsense"),
        (lambda: unshard(tmp_path / "nowhere", cut), CheckpointError, "no such directory"),
    ]:
        with pytest.raises(kind, match=text):
            call()
    assert not cut.exists()
    lacking = shutil.copytree(was, tmp_path / "lacking")
    index = json.loads((was / "model.safetensors.index.json").read_text())
    file = lacking / index["weight_map"]["model.norm.weight"]
    save_file({k: v for k, v in load_file(file).items() if k != "model.norm.weight"}, file, {"format": "pt"})
    del index["weight_map"]["model.norm.weight"]
    (lacking / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the checkpoint lacks model\.norm\.weight"):
        shard(lacking, cut, tp=2)


def test_changed_files_are_found(tmp_path):
    was = checkpoint(tmp_path / "was")
    cut = tmp_path / "cut"
    shard(was, cut, tp=2)
    manifest, file = cut / "autotp.json", cut / "rank-00001-of-00002.safetensors"
    text, content = manifest.read_text(), file.read_bytes()
    for change, said in [
        (lambda: manifest.write_text("{"), "not what autotp shard writes"),
        (lambda: manifest.write_text(text.replace('"format": 1', '"format": 9', 1)), "format 9; this autotp reads format 1"),
        (lambda: manifest.write_text(text.replace('"plan"', '"plans"', 1)), "not what autotp shard writes"),
        (lambda: manifest.write_text(text.replace('"model-00001-of', '"../model-00001-of', 1)), "which is not inside of its directory"),
        (lambda: manifest.write_text(text.replace('"F32"', '"F33"', 1)), "names the dtype 'F33', which cannot be read here"),
        (file.unlink, "rank-00001-of-00002.safetensors: no such file"),
        (lambda: file.write_bytes(content[:-8]), "not a whole safetensors file"),
        (lambda: save_file({"model.norm.weight": torch.zeros(3)}, file), "cut it again|cut the checkpoint again"),
    ]:
        change()
        with pytest.raises(CheckpointError, match=said):
            unshard(cut, tmp_path / "back")
        manifest.write_text(text)
        file.write_bytes(content)
    unshard(cut, tmp_path / "back")
    assert files_differing(was, tmp_path / "back") == []


def loading_cut(folder: str) -> list[Any]:
    cut = Path(folder) / "cut"
    seen: set[str] = set()
    opened = files.open_file

    def noted(file: Path) -> Any:
        seen.add(file.name)
        return opened(file)

    from autotp import planning

    planned, planning.checked_plan = planning.checked_plan, None  # type: ignore[assignment]
    files.open_file = noted
    try:
        model = autotp.from_pretrained(cut, mesh(), dtype=torch.float64)
    finally:
        files.open_file, planning.checked_plan = opened, planned
    out: list[Any] = [sorted(seen), str(model.dtype), autotp.plan_of(model).tp]
    out.append(failure(lambda: autotp.from_pretrained(cut, mesh(), plan=autotp.plan_of(model))))
    out.append(failure(lambda: autotp.from_pretrained(cut, mesh(), recipe="llama")))
    out.append(failure(lambda: autotp.from_pretrained(cut, mesh(), num_hidden_layers=1)))
    dist.barrier()
    return out


def other_size(folder: str) -> str:
    return failure(lambda: autotp.from_pretrained(Path(folder) / "cut", mesh()))


@pytest.mark.sweep
def test_loading_needs_no_plan_and_reads_its_own_file(pool, tmp_path):
    shard(checkpoint(tmp_path / "was"), tmp_path / "cut", tp=2)
    for rank, got in enumerate(pool.run(loading_cut, str(tmp_path))):
        assert got[:3] == [[f"rank-0000{rank}-of-00002.safetensors"], "torch.float64", 2]
        assert "cut is cut by the plan in it: plan= and recipe= cannot change that" in got[3] and got[4] == got[3]
        assert got[5].startswith(("PlanError", "CheckpointError")), got[5]
    (said,) = pool.run(other_size, str(tmp_path), world=1)
    assert "cut is cut for tp 2, the mesh has 1 ranks along its tp dim: run autotp shard --tp 1" in said
