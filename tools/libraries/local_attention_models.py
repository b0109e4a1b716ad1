"""local-attention: attention inside windows."""

from __future__ import annotations

from local_attention import LocalTransformer

from tools.libraries import Table, tokens

MODELS: Table = {
    "local": lambda: (
        LocalTransformer(num_tokens=128, dim=64, depth=2, max_seq_len=32, heads=4, dim_head=16, local_attn_window_size=8, causal=True),
        tokens(16),
    ),
}
