"""Reads models from files and writes them back, a rank's part at a time.

`from_pretrained` and `save_pretrained` read and write checkpoints of Hugging Face form. `shard` and `unshard` cut one ahead for a
number of ranks. `save` and `load` keep the state of a training run.
"""

from autotp.checkpoint.loading import from_pretrained
from autotp.checkpoint.presharded import shard, unshard
from autotp.checkpoint.saving import save_pretrained
from autotp.checkpoint.state import load, save

__all__ = ["from_pretrained", "load", "save", "save_pretrained", "shard", "unshard"]
