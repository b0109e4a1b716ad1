"""torchscale: transformers and retentive networks."""

from __future__ import annotations

from torch import nn
from torchscale.architecture.config import DecoderConfig, EncoderConfig, RetNetConfig
from torchscale.architecture.decoder import Decoder
from torchscale.architecture.encoder import Encoder
from torchscale.architecture.retnet import RetNetDecoder

from tools.libraries import Table, tokens

MODELS: Table = {
    "encoder": lambda: (
        Encoder(
            EncoderConfig(
                encoder_embed_dim=64,
                encoder_attention_heads=4,
                encoder_ffn_embed_dim=128,
                encoder_layers=2,
                vocab_size=128,
                no_output_layer=True,
            ),
            embed_tokens=nn.Embedding(128, 64),
        ),
        tokens(),
    ),
    "decoder": lambda: (
        Decoder(
            DecoderConfig(decoder_embed_dim=64, decoder_attention_heads=4, decoder_ffn_embed_dim=128, decoder_layers=2, vocab_size=128),
            embed_tokens=nn.Embedding(128, 64),
        ),
        tokens(),
    ),
    "retnet": lambda: (
        RetNetDecoder(
            RetNetConfig(
                decoder_embed_dim=64,
                decoder_value_embed_dim=128,
                decoder_retention_heads=4,
                decoder_ffn_embed_dim=128,
                decoder_layers=2,
                vocab_size=128,
            ),
            embed_tokens=nn.Embedding(128, 64),
        ),
        tokens(),
    ),
}
