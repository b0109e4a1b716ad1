"""torchtune: language models from its builders, and the parts of its multimodal ones."""

from __future__ import annotations

import torch
from torchtune.models.clip import clip_text_encoder, clip_vision_encoder
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama2 import llama2, lora_llama2
from torchtune.models.phi3 import phi3
from torchtune.models.t5 import t5_encoder

from tools.libraries import Table, filled, tokens

GROUPED = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 32, "vocab_size": 128}

MODELS: Table = {
    "llama2": lambda: (llama2(**GROUPED), tokens()),
    "lora_llama2": lambda: (lora_llama2(["q_proj", "v_proj"], apply_lora_to_mlp=True, **GROUPED, lora_rank=4, lora_alpha=8), tokens()),
    "gemma2": lambda: (gemma2(**GROUPED, head_dim=16, intermediate_dim=128), tokens()),
    "phi3": lambda: (phi3(**{**GROUPED, "num_kv_heads": 4}, intermediate_dim=128), tokens()),
    "t5_encoder": lambda: (
        t5_encoder(
            embed_dim=64,
            mlp_dim=128,
            num_heads=4,
            head_dim=16,
            num_layers=2,
            rel_pos_num_buckets=8,
            rel_pos_max_dist=16,
            vocab_size=128,
            norm_eps=1e-6,
            max_seq_len=12,
        ),
        tokens(),
    ),
    "clip_text": lambda: (
        filled(clip_text_encoder(embed_dim=64, num_heads=4, num_layers=2, vocab_size=128, max_seq_len=12)),
        tokens(),
    ),
    "clip_vision": lambda: (
        clip_vision_encoder(tile_size=32, patch_size=8, embed_dim=64, num_layers=2, num_heads=4, activation=torch.nn.SiLU),
        (torch.randn(2, 1, 1, 3, 32, 32),),
    ),
}
