"""Hands tokens out as they are made, and stops all ranks at the same token where the one who reads them goes away."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from autotp.serving.side import Side

T = TypeVar("T")


class Stream(Generic[T]):
    """An iterator over the tokens of one request, as they are made. `with` closes it, and so does letting go of it.

    Raises:
        AutoTPError and others: from the iterator, what the request raised, after the tokens that were made before.
    """

    def __init__(self) -> None:
        self._pipe = Pipe[T]()

    @property
    def pipe(self) -> Pipe[T]:
        """Returns the end into which the tokens go."""
        return self._pipe

    def __iter__(self) -> Stream[T]:
        return self

    def __next__(self) -> T:
        return self._pipe.get()

    def close(self) -> None:
        """Cancel the request, if it has not ended: no further token is made after the one that is being made. Tokens so far stay."""
        self._pipe.cancel()

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self._pipe.cancel()


class Pipe(Generic[T]):
    """Carries tokens from the thread that makes them to the one that reads them; what makes them keeps the pipe, never the stream."""

    def __init__(self) -> None:
        self._items: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._end: BaseException | None = None
        self._ended = False
        self.on_cancel: Callable[[], None] = lambda: None

    def put(self, token: T) -> None:
        """Add a token."""
        self._items.put((token,))

    def end(self, error: BaseException | None = None) -> None:
        """Say that no token follows, and why if that is an error."""
        self._items.put(error)

    def get(self) -> T:
        """Wait for the next token."""
        item = None if self._ended else self._items.get()
        if isinstance(item, tuple):
            return item[0]
        self._ended = True
        if item is not None:
            raise item
        raise StopIteration

    def cancel(self) -> None:
        """Ask the one who makes tokens to stop."""
        if not self._cancelled.is_set():
            self._cancelled.set()
            self.on_cancel()

    def cancelled(self) -> bool:
        """Returns whether nobody wants more."""
        return self._cancelled.is_set()

    def fill(self, work: Callable[[], Any], name: str) -> None:
        """Run `work`, which puts tokens in, in a thread, and end with it."""

        def run() -> None:
            try:
                if not self._cancelled.is_set():
                    work()
            except BaseException as error:  # whatever it is, the reader has to hear of it
                self.end(error)
            else:
                self.end()

        threading.Thread(target=run, daemon=True, name=name).start()


@dataclass(frozen=True, slots=True)
class Generate:
    """Calls `model.generate`. `streams`: rank 0 has a streamer. `stops`: it may cancel."""

    streams: bool
    stops: bool

    def __call__(self, model: nn.Module, *args: Any, side: Side, **kwargs: Any) -> Any:
        if self.streams:
            kwargs["streamer"] = Streamer(side.streamer)
        if self.stops:
            kwargs["stopping_criteria"] = [*(kwargs.get("stopping_criteria") or ()), Stopping(side)]
        return model.generate(*args, **kwargs)  # type: ignore[operator]


class Streamer:
    """A streamer on every rank, so that the ranks' arguments are alike; it passes tokens on to rank 0's."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        """Pass on what `generate` gives."""
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        """Pass on the end."""
        if self._streamer is not None:
            self._streamer.end()


class AfterPrompt:
    """A streamer that puts each step's tokens, one a row, into a pipe; the prompt, which comes first, is left out."""

    def __init__(self, pipe: Pipe[Tensor]) -> None:
        self._pipe, self._begun = pipe, False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then tokens."""
        if self._begun:
            self._pipe.put(value.reshape(-1).cpu())
        self._begun = True

    def end(self) -> None:
        """The pipe ends with the request, which may still fail."""


class Stopping:
    """A stopping criterion: stops every row once rank 0 cancelled. The ranks agree on it at every token. Collective."""

    def __init__(self, side: Side) -> None:
        self._side = side

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stop = self._side.flag(self._side.cancelled())
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)


def token_ids(prompt: Iterable[int]) -> list[int]:
    """Returns a prompt (a list, a tensor of one dim) as plain ints."""
    return [int(i) for i in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
