"""linformer: attention to projected keys."""

from __future__ import annotations

from linformer import LinformerLM

from tools.libraries import Table, tokens

MODELS: Table = {
    "lm": lambda: (LinformerLM(num_tokens=128, seq_len=12, dim=64, depth=2, heads=4, k=4), tokens()),
    "one_kv_head": lambda: (
        LinformerLM(num_tokens=128, seq_len=12, dim=64, depth=2, heads=4, k=4, one_kv_head=True, share_kv=True),
        tokens(),
    ),
}
