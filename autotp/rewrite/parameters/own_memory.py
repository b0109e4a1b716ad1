"""Gives gradients memory of their own, and refuses sparse ones where a rank could not keep them."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from autotp.errors import AutoTPError


def own_memory(local: Tensor, given: Tensor, whole: bool) -> Tensor:
    """Returns the gradient `local`, see `own_gradient`, in memory of its own."""
    if local.layout is not torch.strided:
        if not whole:
            refuse_sparse()
        return local.clone() if local is given else local
    if local.untyped_storage()._cdata == given.untyped_storage()._cdata:
        return local.clone(memory_format=torch.contiguous_format)
    return local


def refuse_sparse() -> NoReturn:
    """Refuse a sparse gradient of a parameter that is cut, or one of other rows on other ranks.

    Raises:
        AutoTPError: always.
    """
    raise AutoTPError(
        "a sparse gradient reached a parameter that is cut over the ranks, or has other rows on other ranks: call the lookup with "
        "sparse=False (gather with sparse_grad=False)"
    )
