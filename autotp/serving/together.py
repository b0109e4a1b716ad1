"""Takes the ranks of a server through each request, so that all of them come out of it."""

from __future__ import annotations

import dataclasses
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from autotp.agree import raise_first, report_of
from autotp.errors import LostRankError
from autotp.rewrite.collectives.comm import GroupComm
from autotp.serving.guard import Guard
from autotp.serving.side import Side
from autotp.serving.wires import Groups, Messages, Wire

_SIGN, _GO_ON, END = b"", b"go on", b"end"
T = TypeVar("T")


class Failed(Exception):
    """Raised on the ranks that follow: the request failed on some rank, and the next one can come."""


def _forget_locals(error: BaseException) -> None:
    """Has the frames of an error, and of those that it came from, let go of what they hold: a rank's end of the wire is among it.

    Where an end is held, another rank that waits for this one (and not for the rank that failed first) would wait until its timeout.
    """
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        found = todo.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            todo += [found.__cause__, found.__context__]


class Together:
    """One rank's part in carrying out requests.

    Raises:
        LostRankError: from every method; the ranks are apart for good, as every later call says again.
    """

    def __init__(self, comm: GroupComm, parameters: Iterable[Tensor], timeout: float) -> None:
        self._rank, self._timeout, self._leads = comm.rank, timeout, comm.rank == 0
        self._dead: str | None = None
        self._running = comm.running
        self._left = threading.Event()
        self._sending = threading.Lock()  # held while the others do not wait for a message
        self._guard = Guard(comm, parameters)
        try:
            groups = self._alive(lambda: Groups(comm, timeout))
            self._messages = self._alive(lambda: Messages(groups))
            self._wire = Wire(comm, groups)
            self._alive(self._wire.renew)
        except BaseException:
            comm.wire = comm.group
            self._guard.remove()
            raise
        if self._leads:
            threading.Thread(target=self._give_signs, daemon=True, name="autotp.serve").start()

    @contextmanager
    def request(self, data: bytes, own: Side) -> Iterator[Side]:
        """Has the others begin a request, on rank 0, and waits for them at the end; gives rank 0's side of it.

        Raises:
            AutoTPError: what the request raised on the first rank that failed; rank 0's own error as it is.
        """
        with self._sending:
            self._alive(lambda: self._messages.send(data))
            self._meet(None)
            with self.carrying_out(own) as side:
                yield side

    def next(self) -> bytes:
        """Returns the next request, on the other ranks, or END."""
        while (data := self._alive(self._messages.receive)) == _SIGN:
            pass
        return data

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Unpack a request, on the other ranks, and report whether that worked.

        Raises:
            Failed: it did not on some rank.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self._meet(failure)

    @contextmanager
    def carrying_out(self, own: Side) -> Iterator[Side]:
        """Carry a request out on every rank, and report. A rank that fails does not let the others wait for it in the model.

        Raises:
            Failed: on the other ranks. On rank 0 as `request`.
        """
        failure: BaseException | None = None
        try:
            with self._guard.open():
                yield self._side(own)
        except BaseException as error:
            if not self._leads and not isinstance(error, Exception):
                raise  # this process is to end, and rank 0 will miss it
            failure = error
            _forget_locals(error)
            self._wire.give_up()
        if failure is None and self._wire.given_up:
            failure = LostRankError(f"rank {self._rank} gave the request up")
        self._meet(failure)

    def leave(self) -> None:
        """End it on rank 0: the others get END."""
        try:
            with self._sending:
                if self._dead is None:
                    self._alive(lambda: self._messages.send(END))
        finally:
            self.close()

    def close(self) -> None:
        """End this rank's part; the model is as before."""
        self._left.set()
        if self._dead is not None:
            self._messages.let_go()  # whoever still waits for this rank gets an error
        self._dead = self._dead or "it was closed"
        self._wire.restore()
        self._guard.remove()

    def _side(self, own: Side) -> Side:
        return dataclasses.replace(
            own,
            leads=self._leads,
            flag=lambda value: self._alive(lambda: self._messages.flag(value)),
            ready=self._ready,
            listen=self._listen,
            others_listen=self._others_listen,
            hand_over=self._guard.hand_over,
            give_up=self._wire.give_up,
            timeout=self._timeout,
        )

    def _meet(self, failure: BaseException | None) -> None:
        """Hear from all ranks. If one failed, the wire may have lost an end: all make a new one.

        Raises:
            Failed, AutoTPError: as `carrying_out`.
        """
        reports = self._alive(lambda: self._messages.reports(report_of(failure)))
        if not any(reports):
            return
        self._alive(self._wire.renew)
        self._running.compared = 0  # a rank may have left the request before it made all of its calls
        if not self._leads:
            raise Failed
        if failure is not None and not isinstance(failure, LostRankError):
            raise failure
        raise_first(reports, failure)

    def _ready(self, failure: BaseException | None) -> None:
        if failure is not None:
            self._wire.give_up()
        if any(self._alive(lambda: self._messages.reports(report_of(failure)))) and failure is None:
            raise LostRankError("another rank could not begin")

    def _listen(self) -> Iterator[None]:
        while self._alive(self._messages.receive) == _SIGN:
            yield

    @contextmanager
    def _others_listen(self) -> Iterator[None]:
        self._sending.release()
        try:
            yield
        finally:
            self._sending.acquire()
            self._alive(lambda: self._messages.send(_GO_ON))

    def _give_signs(self) -> None:
        while not self._left.wait(self._timeout / 3):
            with self._sending:
                if self._dead is not None:
                    return
                try:
                    self._alive(lambda: self._messages.send(_SIGN))
                except LostRankError:
                    return

    def _alive(self, talk: Callable[[], T]) -> T:
        """Returns the result of `talk`, which talks to the other ranks."""
        if self._dead is not None:
            raise LostRankError(f"the server is dead: {self._dead}")
        try:
            return talk()
        except RuntimeError as error:
            who = "a rank" if self._leads else "rank 0"
            self._dead = (
                f"rank {self._rank} waited for {who}, which gave no sign of life within {self._timeout:g} s, or is gone "
                f"({' '.join(str(error).split())[:200]}). Leave the `with` on every rank that is left, and start again"
            )
            raise LostRankError(f"the server is dead: {self._dead}") from error
        except BaseException:
            self._dead = f"rank {self._rank} was interrupted while it spoke to the others. Leave the `with` on every rank, and start again"
            raise
