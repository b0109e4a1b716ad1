"""Writes a directory beside its place, and puts it there when it is whole.

The directory that was there before stays whole and in its place, whatever ends the writing. The new directory takes the place in
one step of the file system (an exchange of two names). Only then is the old one removed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autotp.agree import agree
from autotp.errors import CheckpointError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def written_beside(
    path: str | os.PathLike[str], group: dist.ProcessGroup | None, *, replaces: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """Makes a new directory beside `path`, the same for all ranks of `group`, which takes its place when the block ends. Collective.

    An error of the block on any rank is raised on all, and nothing has changed then. None for `group`: this process alone.

    Args:
        replaces: names of an old directory at `path` that are not taken over. Its other files stay (are linked into the new one).

    Raises:
        CheckpointError: `path` is a file, or cannot be written to.
    """
    target = Path(path).resolve()
    first = group is None or dist.get_rank(group) == 0
    parcel: list[Any] = [agree(group, lambda: _start(target) if first else None)]
    if group is not None:
        dist.broadcast_object_list(parcel, group=group, group_src=0)
    new: Path = parcel[0]
    failure: Exception | None = None
    try:
        try:
            yield new
        except Exception as error:
            failure = error
        agree(group, lambda: _end(failure))
        agree(group, lambda: _put(new, target, replaces) if first else None)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)  # every rank tries: the one that made it may be gone
        raise


def _end(failure: Exception | None) -> None:
    if isinstance(failure, OSError):
        raise CheckpointError(f"writing failed: {failure}; what was there before is as it was") from failure
    if failure is not None:
        raise failure


def _start(target: Path) -> Path:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: a file; a checkpoint is a directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        new = target.parent / f".{target.name}.writing-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        new.mkdir()
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from error
    return new


def _sweep(target: Path) -> None:
    """Remove the files of processes of this machine that were killed while they wrote to `target`."""
    prefix = f".{target.name}.writing-{socket.gethostname()}-"
    for left in target.parent.glob(f"{prefix}*"):
        pid = left.name.removeprefix(prefix).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def _put(new: Path, target: Path, replaces: Callable[[str], bool]) -> None:
    if not target.exists():
        new.rename(target)
        return
    for old in target.iterdir():
        if not replaces(old.name) and not (new / old.name).exists():
            _take_over(old, new / old.name)
    new.chmod(target.stat().st_mode & 0o7777)
    _flush(new)  # the old one is removed below: from then on the new one must outlive a loss of power
    _exchange(new, target)
    shutil.rmtree(new, ignore_errors=True)  # the old one, by its new name


def _take_over(old: Path, new: Path) -> None:
    if old.is_dir() and not old.is_symlink():
        shutil.copytree(old, new, symlinks=True, copy_function=_link)
    else:
        _link(os.fspath(old), os.fspath(new))


def _link(old: str, new: str) -> None:
    try:
        os.link(old, new, follow_symlinks=False)
    except OSError:
        shutil.copy2(old, new, follow_symlinks=False)


def _flush(directory: Path) -> None:
    for path in (*directory.rglob("*"), directory):
        if path.is_symlink():
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _exchange(new: Path, target: Path) -> None:
    """Swap the two names in one step; where the file system has no such step, in two."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        if renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise CheckpointError(f"{target}: cannot be replaced: {os.strerror(code)}")
    aside = new.with_name(f"{new.name}-old")
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise
    aside.rename(new)
