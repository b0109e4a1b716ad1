"""performer-pytorch: attention by random features."""

from __future__ import annotations

from performer_pytorch import PerformerLM

from tools.libraries import Table, tokens

MODELS: Table = {
    "causal": lambda: (
        PerformerLM(num_tokens=128, max_seq_len=32, dim=64, depth=2, heads=4, dim_head=16, causal=True, nb_features=8),
        tokens(),
    ),
    "relu": lambda: (
        PerformerLM(num_tokens=128, max_seq_len=32, dim=64, depth=2, heads=4, dim_head=16, generalized_attention=True, nb_features=8),
        tokens(),
    ),
}
