"""The GPUs that a model is to be placed on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from autotp.advise.hardware import Gpu, Link


@dataclass(frozen=True, slots=True)
class Machine:
    """`gpus` GPUs of one kind. link: inside of a node; network: between nodes, where the link does not join all GPUs.

    eager: the host launches each operator; otherwise code is compiled, or launched as CUDA graphs.
    """

    gpus: int
    gpu: Gpu
    link: Link
    network: Link
    eager: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of GPUs that one model can be computed on together: divisors that the link joins."""
        most = self.link.most or self.gpus
        return tuple(n for n in range(1, self.gpus + 1) if self.gpus % n == 0 and n <= most)

    def notes(self, dtype: torch.dtype) -> tuple[str, ...]:
        """Remarks for the reader: numbers of GPUs that are left out, and rates that stand for others."""
        found = []
        left = [n for n in range(2, self.gpus + 1) if self.gpus % n == 0 and n not in self.sizes]
        if left:
            found.append(f"tp={', '.join(map(str, left))} is left out: the link {self.link.name} joins {self.link.most} GPUs")
        name = str(dtype).removeprefix("torch.")
        if name not in self.gpu.flops:
            found.append(f"{self.gpu.name} has no rate for products in {name}: another of its rates stands for it")
        return tuple(found)

    def between(self, tp: int) -> Link:
        """The link between groups of `tp` GPUs."""
        return self.link if self.gpus <= (self.link.most or self.gpus) else self.network

    @property
    def room(self) -> float:
        """Bytes that tensors can have on a GPU."""
        return self.gpu.memory - self.gpu.reserved
