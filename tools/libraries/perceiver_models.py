"""perceiver-pytorch: latents that attend to long inputs."""

from __future__ import annotations

import torch
from perceiver_pytorch import Perceiver, PerceiverIO, PerceiverLM

from tools.libraries import Table, tokens

LATENTS = {"num_latents": 8, "latent_dim": 64, "cross_heads": 4, "latent_heads": 4, "cross_dim_head": 16, "latent_dim_head": 16, "depth": 2}

MODELS: Table = {
    "perceiver": lambda: (
        Perceiver(**LATENTS, input_channels=3, num_freq_bands=4, max_freq=8.0, num_classes=10),
        (torch.randn(2, 8, 8, 3),),
    ),
    "perceiver_io": lambda: (
        PerceiverIO(**LATENTS, dim=32, queries_dim=32, logits_dim=10),
        {"data": torch.randn(2, 12, 32), "queries": torch.randn(6, 32)},
    ),
    "perceiver_lm": lambda: (
        PerceiverLM(**LATENTS, dim=32, num_tokens=128, max_seq_len=32),
        tokens(),
    ),
}
