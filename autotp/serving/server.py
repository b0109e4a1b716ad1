"""Lets rank 0 call a parallel model for all ranks.

    with autotp.serve(model) as server:
        if server.leads:  # rank 0; the others follow inside of `with`, until it leaves
            tokens = server.generate(ids, max_new_tokens=20)

A request goes through four steps on every rank, and each step ends on all of them or is the end of the server:

    1. rank 0 packs the request; what cannot be packed is an error there, and nobody else hears of it
    2. it is sent and unpacked; the ranks report
    3. all carry it out; a rank that fails lets go of its end of the wire, so that nobody waits for it (`autotp.serving.wires`)
    4. the ranks report; if one failed, all put a new wire in, and rank 0 raises the first error

Between requests rank 0 gives a sign of life three times in each timeout, so that followers may wait for days.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from autotp.adapters import setting_of
from autotp.arguments import seconds
from autotp.errors import AutoTPError, InputError
from autotp.parallel_state import state_of
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.rng import device_of
from autotp.serving.batching import Batch, Batching, GenerateBatch, batched, refuse_unbatched, refuse_unsized
from autotp.serving.parcels import Kept, pack, unpack
from autotp.serving.side import Side
from autotp.serving.streams import AfterPrompt, Generate, Stream
from autotp.serving.together import END, Failed, Together


def serve(model: nn.Module, *, timeout: float = 120.0) -> Server:
    """Returns a server of `model`, by which rank 0 of its mesh calls the model for all ranks. Every rank enters it with `with`.

        with autotp.serve(model) as server:
            if server.leads:
                print(server.generate(ids, max_new_tokens=20))

    On rank 0 the block runs, with `server.leads` True. On the other ranks `with` carries out rank 0's requests until rank 0 leaves the
    block; then their block runs, with `server.leads` False. A model on one rank needs no others and is served alike.

    Args:
        model: a parallel model.
        timeout: seconds that a rank waits for another: in a collective of the model (over gloo), for a report, for a sign of life.
            Requests may take longer.

    Raises:
        InputError: `timeout` is no number of seconds, or `model` is no module. PlanError: it is not parallel.
    """
    seconds("serve: timeout", timeout)
    return Server(model, timeout)


@dataclass(frozen=True, slots=True)
class _Request:
    """Says what all ranks do: `function(model, *args, **kwargs)`, with `side=` where it is `sided`, in the mode that rank 0's model has.

    generation: rank 0's `generation_config`. setting: that of rank 0's adapters. parameters: how many its model has. begun, dropped: how
    rank 0's `Kept` goes on.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sided: bool
    training: bool
    generation: Any
    setting: str
    parameters: int
    begun: int
    dropped: list[int]


class Server:
    """Serves one parallel model; see `serve`. Its methods are rank 0's, and any thread may call them: one request runs at a time."""

    def __init__(self, model: nn.Module, timeout: float) -> None:
        self._model, self._timeout, self._device = model, timeout, device_of(model)
        comm = state_of(model).comm
        self._comm = comm if isinstance(comm, GroupComm) and comm.size > 1 else None
        self.leads = comm.rank == 0
        self._kept = Kept(leads=self.leads)
        self._together: Together | None = None
        self._turn = _Turn()
        self._why: str | None = "it was not entered: write `with autotp.serve(model) as server:` on every rank"

    def __enter__(self) -> Server:
        """Begin to serve; on the other ranks, follow. Collective.

        Raises:
            LostRankError: another rank does not come within the timeout; on the other ranks, rank 0 gives no sign of life.
            InputError: the model is served already.
        """
        if self._comm is not None:
            self._together = Together(self._comm, self._model.parameters(), self._timeout)
        self._why = None
        if self._together is not None and not self.leads:
            try:
                self._follow(self._together)
            finally:
                self._why = "rank 0 has left it: put what rank 0 does under `if server.leads:`"
                self._together.close()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End serving, after the request that runs now; the others leave their `with`. The model is as before `serve`."""
        with self._turn:
            if self._why is None:
                self._why = "it was closed"
                if self._together is not None:
                    self._together.leave()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of `model(*args, **kwargs)`, without gradients. Raises: as `run`."""
        return self._request(_forward, args, kwargs)

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Returns the result of `model.generate(*args, **kwargs)`. `streamer` gets rank 0's tokens. Raises: as `run`."""
        return self._request(Generate(streamer is not None, False), args, kwargs, Side(streamer=streamer))

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of `model.generate_batch(*args, **kwargs)`: continuous batching of prompts that are all there. Raises: as
        `run`.
        """
        refuse_unbatched(self._model)
        self._refuse_unsized(kwargs.get("continuous_batching_config"))
        return self._request(GenerateBatch(), args, kwargs, Side())

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of a method of the model (`"get_image_features"`), or of a module in it. Raises: as `run`."""
        return self._request(_Method(method), args, kwargs)

    def run(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call `function(model, *args, **kwargs)` on every rank, without gradients, and return rank 0's result.

        `function` is importable by name on every rank, and does the same on each. What it returns stays on each rank, and may be an
        argument of a later request: every rank then takes its own.

        Raises:
            InputError: an argument cannot be sent, or the server was closed, or this is not rank 0. AutoTPError: the request failed on
                some rank; where it failed on rank 0, this is the error that it raised there. The next request works. LostRankError: the
                server is dead, as every later request will say.
        """
        return self._request(function, args, kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Stream[Tensor]:
        """Generate as `generate`, and return the tokens as they are made: an iterator of tensors of one token a row, on the CPU.

        The request waits for its turn in a thread. `Stream.close` cancels it: all ranks stop at the same token. Raises: as `run`, from
        the iterator.
        """
        stream: Stream[Tensor] = Stream()
        own = Side(streamer=AfterPrompt(stream.pipe), cancelled=stream.pipe.cancelled)
        stream.pipe.fill(lambda: self._request(Generate(True, True), args, kwargs, own), "autotp.serve stream")
        return stream

    @contextmanager
    def batching(self, generation_config: Any = None, continuous_batching_config: Any = None) -> Iterator[Batching]:
        """Gives a batch that takes requests and drops finished ones at every step (continuous batching of transformers).

        Inside of the context any thread may call `Batching.stream` and `Batching.generate`; other requests of this server wait.

        Args:
            generation_config, continuous_batching_config: those of transformers' `init_continuous_batching`.

        Raises:
            AutoTPError: the model cannot be batched so; as `run`. InputError: on CPUs, the paged cache has no size.
        """
        refuse_unbatched(self._model)
        self._refuse_unsized(continuous_batching_config)
        configs = (generation_config, continuous_batching_config)
        with self._turn, self._begun(Batch(), configs, {}, Side()) as side, batched(self._model, *configs, side) as batch:
            yield batch

    def _refuse_unsized(self, config: Any) -> None:
        if self._comm is not None:
            refuse_unsized(self._device, config)

    def _request(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], own: Side | None = None) -> Any:
        """`own`: what `function` gets as `side=`; None where it takes none."""
        with self._turn:
            if own is not None and own.cancelled():
                return None
            with self._begun(function, args, kwargs, own) as side, torch.inference_mode(False), torch.no_grad():
                result = function(self._model, *args, **kwargs, **({} if own is None else {"side": side}))
            if self._together is not None:
                self._kept.keep(result)
            return result

    @contextmanager
    def _begun(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], own: Side | None) -> Iterator[Side]:
        """Have the others begin a request, and gives rank 0's side of it; waits for them at the end."""
        if self._why is not None:
            raise InputError(f"{type(self._model).__name__}'s server takes no request: {self._why}")
        together = self._together
        if together is None:
            yield own or Side()
            return
        if torch.is_autocast_enabled(self._device.type):
            raise InputError("torch.autocast holds on rank 0 alone: enter it inside of a function that server.run calls")
        begun, dropped = self._kept.begin()
        failed = True
        try:
            request = self._asked(function, args, kwargs, own is not None, begun, dropped)
            with together.request(pack(request, f"the request {_name_of(function)}"), own or Side()) as side:
                yield side
            failed = False
        finally:
            self._kept.end(begun, dropped, failed=failed)

    def _asked(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], sided: bool, begun: int, dropped: list[int]
    ) -> _Request:
        sent = tuple(self._kept.out(a, f"argument {i}") for i, a in enumerate(args))
        named = {name: self._kept.out(a, f"argument {name!r}") for name, a in kwargs.items()}
        own: Any = getattr(self._model, "generation_config", None)
        here = self._model.training, own, setting_of(self._model), _count(self._model)
        return _Request(function, sent, named, sided, *here, begun, dropped)

    def _follow(self, together: Together) -> None:
        while (data := together.next()) != END:
            try:
                with together.receiving():
                    request: _Request = unpack(data, self._device)
                    self._kept.follow(request.begun, request.dropped)
                    if request.setting != setting_of(self._model) or request.parameters != _count(self._model):
                        raise AutoTPError(
                            "rank 0 has switched its adapters, put some on or merged them (set_adapter, disable_adapter, add_adapter, "
                            "merge_adapter), and this rank has not: do so inside of a function that server.run calls on every rank"
                        )
                    if request.generation is not None:
                        self._model.generation_config = request.generation
                    args, kwargs = self._kept.back(request.args), self._kept.back(request.kwargs)
                if self._model.training != request.training:
                    self._model.train(request.training)
                with together.carrying_out(Side()) as side, torch.no_grad():
                    result = request.function(self._model, *args, **kwargs, **({"side": side} if request.sided else {}))
                self._kept.keep(result)
                del request, args, kwargs, result
            except Failed:
                self._kept.skip()  # rank 0 has the error


class _Turn:
    """A lock: one request at a time. A thread that has it already is told so."""

    def __init__(self) -> None:
        self._lock, self._owner = threading.Lock(), 0

    def __enter__(self) -> None:
        if self._owner == threading.get_ident():
            raise InputError("this thread is in a request of the server already: leave `with server.batching()` first, or the streamer")
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._owner = 0
        self._lock.release()


def _count(model: nn.Module) -> int:
    return sum(1 for _ in model.parameters())


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__qualname__)


def _forward(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class _Method:
    """Calls a method of a model, by its dotted name."""

    name: str

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return attrgetter(self.name)(model)(*args, **kwargs)
