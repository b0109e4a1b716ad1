"""What is wrong with a checkpoint's files is said in one line that names the file; nothing outside of its directory is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autotp.checkpoint.files import Reader, checkpoint_files, checkpoint_tensors, tensors_of
from autotp.errors import CheckpointError


def checkpoint(path: Path, weight_map: object = None) -> Path:
    """Two files and an index."""
    save_file({"a": torch.arange(12.0).view(3, 4)}, path / "one.safetensors")
    save_file({"b": torch.tensor(2.5), "c": torch.zeros(0, 3)}, path / "two.safetensors")
    names = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"} if weight_map is None else weight_map
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return path


def test_boxes_of_several_files(tmp_path):
    found = checkpoint_tensors(checkpoint(tmp_path))
    assert {k: (t.shape, t.dtype) for k, t in found.items()} == {
        "a": ((3, 4), torch.float32),
        "b": ((), torch.float32),
        "c": ((0, 3), torch.float32),
    }
    read = Reader()
    assert read(found["a"], ((1, 3), (2, 3))).tolist() == [[6.0], [10.0]]
    assert read(found["b"], ()).item() == 2.5
    assert read.bytes == 3 * 4


def test_one_file_goes_before_an_index(tmp_path):
    checkpoint(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert [*checkpoint_tensors(tmp_path)] == ["x"]


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd.safetensors",
        "sub/../../outside.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "",
    ],
)
def test_an_index_cannot_lead_out_of_its_directory(tmp_path, name):
    inner = tmp_path / "model"
    inner.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    checkpoint(inner, {"a": name})
    with pytest.raises(CheckpointError, match="which is not inside of its directory"):
        checkpoint_files(inner)
    with pytest.raises(CheckpointError, match="which is not inside of its directory"):
        checkpoint_files(inner, name)


def test_directories_below_are_inside(tmp_path):
    checkpoint(tmp_path, {"a": "sub/one.safetensors"})
    (tmp_path / "sub").mkdir()
    (tmp_path / "one.safetensors").rename(tmp_path / "sub" / "one.safetensors")
    assert [*checkpoint_tensors(tmp_path)] == ["a"]


def test_missing_files_are_named(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 files of model\.safetensors\.index\.json are missing: two\.safetensors"):
        checkpoint_files(tmp_path)
    with pytest.raises(CheckpointError, match=r"two\.safetensors: no such file"):
        tensors_of(tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        checkpoint_files(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors or model\.safetensors\.index\.json; it holds nothing"):
        checkpoint_files(tmp_path / "empty")


def test_pickles_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle: .*save_pretrained"):
        checkpoint_files(tmp_path)
    checkpoint(tmp_path, {"a": "pytorch_model.bin"})
    with pytest.raises(CheckpointError, match="which is no safetensors file"):
        checkpoint_files(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: (not a readable index|weight_map)"):
        checkpoint_files(tmp_path)


def test_tensors_that_only_the_index_knows(tmp_path):
    checkpoint(tmp_path, {"a": "one.safetensors", "lost": "one.safetensors"})
    with pytest.raises(CheckpointError, match="1 tensors that it lists are in none of its files, the first is lost"):
        checkpoint_tensors(tmp_path)


def test_a_file_that_was_cut_off_or_overwritten(tmp_path):
    checkpoint(tmp_path)
    file = tmp_path / "one.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-4], whole[:20], b"", b"\0" * len(whole), whole[:8] + b"{" * 40 + whole[48:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"one\.safetensors: not a whole safetensors file"):
            checkpoint_tensors(tmp_path)
