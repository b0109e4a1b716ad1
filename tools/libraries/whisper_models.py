"""openai-whisper: speech to text."""

from __future__ import annotations

import torch
from whisper.model import ModelDimensions, Whisper

from tools.libraries import Table, filled, tokens

SIZES = ModelDimensions(
    n_mels=16,
    n_audio_ctx=16,
    n_audio_state=64,
    n_audio_head=4,
    n_audio_layer=2,
    n_vocab=128,
    n_text_ctx=16,
    n_text_state=64,
    n_text_head=4,
    n_text_layer=2,
)

MODELS: Table = {"whisper": lambda: (filled(Whisper(SIZES)), (torch.randn(2, 16, 32), *tokens()))}
