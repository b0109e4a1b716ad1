"""Files written in pieces are those of the safetensors library, byte by byte."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from autotp.checkpoint import safetensors_writer
from autotp.checkpoint.files import DTYPES
from autotp.checkpoint.nodes import Node
from autotp.checkpoint.safetensors_writer import OutputFile, lay_out, pieces
from autotp.errors import CheckpointError


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("abc.é_", min_size=1, max_size=6),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from([*DTYPES.values()])),
        min_size=1,
        max_size=6,
    )
)
def test_pieces_make_the_file_that_the_library_writes(tmp_path_factory, tensors):
    folder = tmp_path_factory.mktemp("files")
    full = {k: torch.randint(0, 2, shape).to(dtype) for k, (shape, dtype) in tensors.items()}
    save_file(full, folder / "theirs", {"format": "pt"})
    nodes = {k: Node(tuple(t.shape), t.dtype) for k, t in full.items()}
    plan = lay_out(nodes, {"format": "pt"})
    with pytest.MonkeyPatch.context() as patch, OutputFile(folder / "ours") as file:
        patch.setattr(safetensors_writer, "PIECE", 8)
        file.reserve(plan)
        for key, start in reversed(plan.starts.items()):
            for piece in pieces(key, nodes[key], start):
                file.put(full[key][tuple(slice(a, b) for a, b in piece.box)], piece.start)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    assert (folder / "ours").stat().st_size == plan.size


def test_what_safetensors_cannot_name_is_refused():
    with pytest.raises(CheckpointError, match="x: safetensors has no dtype"):
        lay_out({"x": Node((2,), torch.quint8)}, {})


def test_a_full_disk_is_an_error_of_ours(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    plan = lay_out({"x": Node((4,), torch.float32)}, {})
    with OutputFile(tmp_path / "f") as file:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(CheckpointError, match=r"f: .* bytes cannot be written: .*No space left"):
                file.reserve(plan)
        file.reserve(plan)
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointError, match="No space left"):
            file.put(torch.zeros(4), plan.starts["x"])


def test_a_file_system_without_fallocate_will_do(tmp_path, monkeypatch):
    def cannot(*args):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    plan = lay_out({"x": Node((4,), torch.float32)}, {})
    with OutputFile(tmp_path / "f") as file:
        file.reserve(plan)
    assert (tmp_path / "f").stat().st_size == plan.size
