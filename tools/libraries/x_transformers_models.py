"""x-transformers: one transformer with many switches."""

from __future__ import annotations

from x_transformers import Decoder, Encoder, TransformerWrapper, ViTransformerWrapper, XTransformer

from tools.libraries import Built, Table, images, tokens

SIZES = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": 16}


def decoder(**options: object) -> Built:
    return TransformerWrapper(num_tokens=128, max_seq_len=32, attn_layers=Decoder(**SIZES, **options)), tokens()


MODELS: Table = {
    "decoder": decoder,
    "rotary_glu": lambda: decoder(rotary_pos_emb=True, ff_glu=True, ff_swish=True, use_rmsnorm=True),
    "grouped_kv": lambda: decoder(attn_kv_heads=2, rotary_pos_emb=True),
    "alibi": lambda: decoder(alibi_pos_bias=True),
    "qk_norm": lambda: decoder(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    "talking_heads": lambda: decoder(attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "gated_values": lambda: decoder(attn_gate_values=True, attn_head_scale=True),
    "flash": lambda: decoder(attn_flash=True),
    "encoder": lambda: (TransformerWrapper(num_tokens=128, max_seq_len=32, attn_layers=Encoder(**SIZES)), tokens()),
    "encoder_decoder": lambda: (
        XTransformer(
            dim=64,
            enc_num_tokens=128,
            enc_depth=1,
            enc_heads=4,
            enc_max_seq_len=32,
            dec_num_tokens=128,
            dec_depth=1,
            dec_heads=4,
            dec_max_seq_len=32,
        ),
        (*tokens(), *tokens()),
    ),
    "vit": lambda: (ViTransformerWrapper(image_size=32, patch_size=8, num_classes=10, attn_layers=Encoder(**SIZES)), images()),
}
