"""reformer-pytorch: attention inside buckets of hashes, in reversible blocks."""

from __future__ import annotations

from reformer_pytorch import ReformerLM

from tools.libraries import Table, tokens

MODELS: Table = {
    "full": lambda: (
        ReformerLM(num_tokens=128, dim=64, depth=2, max_seq_len=32, heads=4, bucket_size=8, causal=True, use_full_attn=True),
        tokens(16),
    ),
}
