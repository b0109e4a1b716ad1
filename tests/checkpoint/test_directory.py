"""What is at a path is whole at every moment: the old directory until the new one is complete, then the new one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autotp.checkpoint import directory
from autotp.checkpoint.directory import written_beside
from autotp.errors import CheckpointError


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def old(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "runs" / "one").mkdir(parents=True)
    (path / "weights").write_text("old")
    (path / "stale").write_text("old")
    (path / "notes.txt").write_text("mine")
    (path / "runs" / "one" / "log").write_text("mine")
    (path / "link").symlink_to("notes.txt")
    return path


def ours(name: str) -> bool:
    return name in ("weights", "stale")


def test_a_new_directory_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "deep" / "model"
    with written_beside(path, None) as new:
        (new / "weights").write_text("new")
        assert not path.exists() and new.parent == path.parent
    assert names(path) == ["weights"] and names(path.parent) == ["model"]


@pytest.mark.parametrize("exchange", [True, False])
def test_an_old_one_is_replaced_and_what_is_not_ours_stays(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(ctypes, "CDLL", lambda *a, **k: object())
    path = old(tmp_path)
    path.chmod(0o750)
    with written_beside(path, None, replaces=ours) as new:
        (new / "weights").write_text("new")
        assert (path / "weights").read_text() == "old"
    assert names(path) == ["link", "notes.txt", "runs", "weights"]
    assert (path / "weights").read_text() == "new"
    assert (path / "runs" / "one" / "log").read_text() == "mine" and (path / "link").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o750
    assert names(tmp_path) == ["model"]


def test_an_error_leaves_the_old_one(tmp_path):
    path = old(tmp_path)

    def half_written():
        with written_beside(path, None, replaces=ours) as new:
            (new / "weights").write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"writing failed: .*No space"):
        half_written()
    assert (path / "weights").read_text() == "old" and names(tmp_path) == ["model"]


def test_a_file_is_no_place_for_a_directory(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(CheckpointError, match="model: a file; a checkpoint is a directory"), written_beside(tmp_path / "model", None):
        pass
    with pytest.raises(CheckpointError, match="cannot be written"), written_beside(tmp_path / "model" / "inside", None):
        pass


KILLED = """
import os, signal, sys
from autotp.checkpoint.directory import written_beside
with written_beside(sys.argv[1], None) as new:
    (new / "weights").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_by_the_next(tmp_path):
    path = old(tmp_path)
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=100, check=False).returncode == -9
    assert len(names(tmp_path)) == 2 and (path / "weights").read_text() == "old"
    mine = tmp_path / f".model.writing-{directory.socket.gethostname()}-{os.getpid()}-abc"  # of a process that lives
    mine.mkdir()
    with written_beside(path, None, replaces=ours) as new:
        (new / "weights").write_text("new")
    assert names(tmp_path) == [mine.name, "model"] and (path / "weights").read_text() == "new"
