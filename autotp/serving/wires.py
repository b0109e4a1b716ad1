"""Makes process groups of the tensor-parallel ranks for a server alone: one for its messages, and one for the model's tensors.

A message goes from rank 0 to all, and each rank's report goes to all. Both run over gloo on CPU tensors, whatever carries the model's.

A rank that failed cannot reach the others in the group where they wait for it. It lets go of its end of that group instead: what the
others wait for then fails at once, all come together over the messages, and make the group anew. Only gloo groups can be given up
so. A group of another backend stays, and a failure of some of the ranks is the end of the server.
"""

from __future__ import annotations

import itertools
import pickle
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from autotp.agree import Report
from autotp.rewrite.collectives.comm import GroupComm

_GLOO = dist.ProcessGroup.BackendType.GLOO


class Groups:
    """Makes gloo groups of the ranks of `comm`. Collective, and so is each method. `timeout`: seconds.

    Raises:
        RuntimeError: another rank does not come within the timeout.
    """

    def __init__(self, comm: GroupComm, timeout: float) -> None:
        self._comm, self._timeout = comm, timedelta(seconds=timeout)
        ranks = "_".join(map(str, dist.get_process_group_ranks(comm.group)))
        store = PrefixStore(f"autotp_serve/{comm.name}/{ranks}", dist.distributed_c10d._get_default_store())
        self._store = PrefixStore(f"server/{self._meet(store)}", store)
        self._made = 0

    def _meet(self, store: Store) -> int:
        """Returns a number that the ranks have in common, and that no server before had: the addresses of its groups are not found.

        A rank may have come before and have left again, because the others did not come. Only its last arrival counts, for which rank 0
        waits.
        """
        if self._comm.rank:
            arrival = f"{self._comm.rank}/{store.add(f'arrivals/{self._comm.rank}', 1)}"
            store.set(f"arrived/{arrival}", "")
            try:
                store.wait([f"meets/{arrival}"], self._timeout)
            except RuntimeError:
                store.set(f"left/{arrival}", "")
                raise
            return int(store.get(f"meets/{arrival}").decode())
        number: int = store.add("servers", 1)
        last: dict[int, int] = {}
        for rank in range(1, self._comm.size):
            seen = store.add(f"seen/{rank}", 0)
            for n in itertools.count(seen + 1):
                store.wait([f"arrived/{rank}/{n}"], self._timeout)
                if not store.check([f"left/{rank}/{n}"]) and not store.check([f"arrived/{rank}/{n + 1}"]):
                    break
            last[rank] = n
            store.add(f"seen/{rank}", last[rank] - seen)
        for rank, n in last.items():
            store.set(f"meets/{rank}/{n}", str(number))
        return number

    def make(self) -> dist.ProcessGroup:
        """Returns a new group."""
        self._made += 1
        store = PrefixStore(str(self._made), self._store)
        group = dist.ProcessGroup(store, self._comm.rank, self._comm.size)
        ends = dist.ProcessGroupGloo(store, self._comm.rank, self._comm.size, self._timeout)
        for device in self._comm.group._device_types if self.carries_model else (torch.device("cpu"),):
            group._register_backend(device, _GLOO, ends)
        return group

    @property
    def carries_model(self) -> bool:
        """Whether the model's own group is one of gloo, so that these can stand in for it."""
        return dist.get_backend(self._comm.group) == "gloo"


class Messages:
    """Carries the messages and reports of a server's ranks; every call is made on all of them, or ends at the timeout.

    Raises:
        RuntimeError: in each method; another rank does not come, or is gone.
    """

    def __init__(self, groups: Groups) -> None:
        self._group = groups.make()

    def let_go(self) -> None:
        """End this rank's connections. No other method may be called afterwards."""
        vars(self).pop("_group", None)

    def send(self, data: bytes) -> None:
        """Send from rank 0."""
        self._share(torch.tensor([len(data)]))
        if data:
            self._share(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def receive(self) -> bytes:
        """Wait for what rank 0 sends."""
        size = int(self._share(torch.zeros(1, dtype=torch.int64)))
        return bytes(self._share(torch.empty(size, dtype=torch.uint8)).numpy()) if size else b""

    def flag(self, value: bool) -> bool:
        """Returns rank 0's `value`."""
        return bool(self._share(torch.tensor([int(value)])))

    def reports(self, own: Report | None) -> list[Report | None]:
        """Returns what every rank says, in rank order; a list of None where all is well."""
        data = b"" if own is None else pickle.dumps(own)
        sizes = self._gather(torch.tensor([len(data)]))
        longest = max(int(n) for n in sizes)
        if not longest:
            return [None] * len(sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
        texts = self._gather(padded)
        return [pickle.loads(bytes(t[: int(n)].numpy())) if int(n) else None for t, n in zip(texts, sizes, strict=True)]

    def _share(self, tensor: Tensor) -> Tensor:
        self._group.broadcast(tensor, 0).wait()
        return tensor

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self._group.size())]
        self._group.allgather([found], [tensor]).wait()
        return found


class Wire:
    """Carries the model's tensors while it is served, in place of the group that it was made parallel over."""

    def __init__(self, comm: GroupComm, groups: Groups) -> None:
        self._comm, self._groups, self._replaced = comm, groups, groups.carries_model
        self.given_up = False

    def renew(self) -> None:
        """Put a new group into the model. Collective."""
        self.given_up = False
        if self._replaced:
            self._comm.wire = self._groups.make()

    def give_up(self) -> None:
        """Let go of this rank's end: whatever other ranks wait for in the model fails."""
        self.given_up = True
        self.restore()

    def restore(self) -> None:
        """Put the model's own group back."""
        self._comm.wire = self._comm.group
