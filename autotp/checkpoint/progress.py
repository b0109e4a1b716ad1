"""Shows a bar on stderr for work that takes long: on one rank, and not where transformers' own bars are switched off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(text: str, total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the bytes done since the last call. Where stderr is no terminal, one line is written at the end."""
    if not shown or not _wanted():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(text, total=total)
        yield lambda done: progress.advance(task, done)


@contextmanager
def without_theirs() -> Iterator[None]:
    """Hides transformers' own bars: it works on tensors that are not there, and its bars would say nothing."""
    logging = sys.modules["transformers"].utils.logging
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _wanted() -> bool:
    transformers = sys.modules.get("transformers")
    return transformers is None or bool(transformers.utils.logging.is_progress_bar_enabled())
