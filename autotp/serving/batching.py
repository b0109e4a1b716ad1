"""Serves many requests at once: at every step the finished ones leave the batch and new ones join it.

transformers' continuous batching does this; `autotp.integrations` makes it right for parallel models. Its manager runs on every rank in
a thread of its own, and only rank 0's takes requests.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotp.errors import AutoTPError, InputError
from autotp.hugging_face import is_hugging_face
from autotp.serving.side import Side
from autotp.serving.streams import Pipe, Stream, token_ids


@dataclass(frozen=True, slots=True)
class Batch:
    """Takes part in rank 0's batch, on another rank."""

    def __call__(self, model: nn.Module, generation_config: Any, batching_config: Any, *, side: Side) -> None:
        with _manager(model, generation_config, batching_config, side) as manager:
            for _ in side.listen():
                while manager.get_result(timeout=0.0) is not None:
                    pass  # every rank has the tokens, and only rank 0 has readers
                if _failure(manager) is not None:
                    side.give_up()  # or the others' managers would wait for this one


@dataclass(frozen=True, slots=True)
class GenerateBatch:
    """Calls `model.generate_batch`, which generates in a thread of its own."""

    def __call__(self, model: nn.Module, *args: Any, side: Side, **kwargs: Any) -> Any:
        side.hand_over()
        return model.generate_batch(*args, **kwargs)  # type: ignore[operator]


@contextmanager
def batched(model: nn.Module, generation_config: Any, batching_config: Any, side: Side) -> Iterator[Batching]:
    """Gives rank 0's batch. Collective: on the other ranks a `Batch` is called.

    Raises:
        AutoTPError: the batch ended on this rank before it was left.
    """
    with _manager(model, generation_config, batching_config, side) as manager, side.others_listen():
        batch = Batching(model, manager, side)
        try:
            yield batch
        finally:
            batch.close()


@contextmanager
def _manager(model: nn.Module, generation_config: Any, batching_config: Any, side: Side) -> Iterator[Any]:
    given = {"generation_config": generation_config, "continuous_batching_config": batching_config}
    with ExitStack() as stack:
        try:
            context = model.continuous_batching_context_manager(block=True, timeout=side.timeout, **given)  # type: ignore[operator]
            manager = stack.enter_context(context)
        except BaseException as error:
            side.ready(error)
            raise
        side.ready(None)
        side.hand_over()
        yield manager
    if (failure := _failure(manager)) is not None:
        raise AutoTPError(f"the batch ended with {type(failure).__name__}: {failure}") from failure


def _failure(manager: Any) -> BaseException | None:
    found: BaseException | None = manager.background_thread_status.fatal_error
    return found


def _tokens_of(sizes: Any) -> int | None:
    """Returns how many tokens the cache holds; the config has the numbers once there is one."""
    return None if sizes.num_blocks is None else int(sizes.num_blocks * sizes.page_size)


def refuse_unbatched(model: nn.Module) -> None:
    """Raise where transformers has no continuous batching for a model.

    Raises:
        InputError: it is no model of transformers that generates.
    """
    if not is_hugging_face(model) or not callable(getattr(model, "continuous_batching_context_manager", None)):
        raise InputError(f"{type(model).__name__} is no generating model of transformers: server.batching needs its continuous batching")


def refuse_unsized(device: torch.device, config: Any) -> None:
    """Raise where the cache of a batch would take what memory the host has, once on every rank of it.

    Raises:
        InputError: the model is on CPUs, and `config` gives the cache no size.
    """
    sized = config is not None and config.num_blocks is not None and config.max_batch_tokens is not None
    if device.type == "cpu" and not sized:
        raise InputError(
            "give the paged cache a size, as continuous_batching_config=ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=512): "
            "without one, transformers takes most of the host's memory on every rank"
        )


class Batching:
    """A batch that requests join and leave at every step. Any thread may use it."""

    def __init__(self, model: nn.Module, manager: Any, side: Side) -> None:
        self._manager, self._side = manager, side
        config: Any = model.config
        text = config.get_text_config()
        self._vocabulary: int = text.vocab_size
        sizes = manager.continuous_batching_config
        rooms = {"the model's positions": getattr(text, "max_position_embeddings", None), "the paged cache": _tokens_of(sizes)}
        self._rooms = [(room, of) for of, room in rooms.items() if room is not None]
        self._default: int | None = manager.generation_config.max_new_tokens
        self._pipes: dict[str, Pipe[int]] = {}
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._over: BaseException | None = None
        self._reader = threading.Thread(target=self._read, daemon=True, name="autotp.serve batch")
        self._reader.start()

    def stream(self, prompt: Iterable[int] | Tensor, *, max_new_tokens: int | None = None, **options: Any) -> Stream[int]:
        """Add a request and return its tokens as they are made. `Stream.close` cancels it.

        Args:
            prompt: token ids, a list or a tensor of one dim.
            max_new_tokens: the most tokens to make; None: that of the generation config.
            options: of the manager's `add_request` (`eos_token_id`, and what logits processors take for a request).

        Raises:
            InputError: a prompt that the model cannot have; the batch goes on. AutoTPError: the batch is over. From the iterator:
                AutoTPError: the request failed.
        """
        ids = self._checked(prompt, max_new_tokens)
        stream: Stream[int] = Stream()
        name, pipe = f"autotp-{next(self._numbers)}", stream.pipe
        with self._lock:
            if self._over is not None:
                raise AutoTPError(f"the batch is over: {self._over}") from self._over
            self._pipes[name], self._counts[name] = pipe, 0
        pipe.on_cancel = lambda: self._cancel(name)
        if self._manager.add_request(ids, request_id=name, max_new_tokens=max_new_tokens, streaming=True, **options) is None:
            self._end(name, AutoTPError("the batch takes no more requests: it is being closed"))
        return stream

    def generate(self, prompt: Iterable[int] | Tensor, *, max_new_tokens: int | None = None, **options: Any) -> list[int]:
        """Add a request and return all of its new tokens. Raises: as `stream`."""
        return list(self.stream(prompt, max_new_tokens=max_new_tokens, **options))

    def close(self) -> None:
        """End all requests, and the batch."""
        error = AutoTPError("the batch was closed")
        with self._lock:
            self._over = self._over or error
            names = list(self._pipes)
        for name in names:
            self._manager.cancel_request(name)
            self._end(name, error)

    def _checked(self, prompt: Iterable[int] | Tensor, most: int | None) -> list[int]:
        """Returns the prompt as ints. What would fail inside of the batch fails here: there it would take all requests with it."""
        try:
            ids = token_ids(prompt)
        except (TypeError, ValueError) as error:
            raise InputError(f"the prompt is {type(prompt).__name__}, wanted a list of token ids, or a tensor of one dim") from error
        if not ids:
            raise InputError("the prompt is empty: it needs at least one token")
        if (bad := next((i for i in ids if not 0 <= i < self._vocabulary), None)) is not None:
            raise InputError(f"the prompt has the token {bad}, and the vocabulary {self._vocabulary}")
        if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
            raise InputError(f"max_new_tokens is {most!r}, wanted a whole number of at least 1")
        new = most or self._default
        if new is None:
            raise InputError("max_new_tokens is None, and the generation config has none either: say how many tokens to make at most")
        for room, of in self._rooms:
            if len(ids) + new > room:
                raise InputError(f"{len(ids)} tokens and {new} new ones do not fit into {of}, which has {room}")
        return ids

    def _cancel(self, name: str) -> None:
        with self._lock:
            running = name in self._pipes
        if running:
            self._manager.cancel_request(name)
            self._end(name, None)

    def _end(self, name: str, error: BaseException | None) -> None:
        with self._lock:
            pipe = self._pipes.pop(name, None)
            self._counts.pop(name, None)
        if pipe is not None:
            pipe.end(error)

    def _read(self) -> None:
        """Deal the manager's results out to the streams, as long as it runs."""
        while self._manager.is_running() and _failure(self._manager) is None:
            if (result := self._manager.get_result(timeout=0.1)) is not None:
                self._deal(result)
        failure = _failure(self._manager)
        with self._lock:
            self._over = self._over or AutoTPError(f"the batch ended with {type(failure).__name__}: {failure}")
            names, error = list(self._pipes), self._over
        for name in names:
            self._end(name, error)
        if failure is not None:
            self._side.give_up()

    def _deal(self, result: Any) -> None:
        name = result.request_id
        with self._lock:
            pipe, begun = self._pipes.get(name), self._counts.get(name, 0)
            if pipe is not None:
                self._counts[name] = len(result.generated_tokens)
        if pipe is None:
            return
        for token in result.generated_tokens[begun:]:
            pipe.put(int(token))
        if result.is_finished():
            self._end(name, None if result.error is None else AutoTPError(f"the request failed in its batch: {result.error}"))
