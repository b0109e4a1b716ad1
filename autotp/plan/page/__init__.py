"""The page of a plan: the model as a column of blocks, what is cut and sent, memory, the table, differences from other plans."""

from __future__ import annotations
