"""open_clip: contrastive models of images and texts."""

from __future__ import annotations

from open_clip import CLIP, CustomTextCLIP
from open_clip.coca_model import CoCa

from tools.libraries import Table, filled, images, tokens

VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 128, "width": 64, "heads": 4, "layers": 2}

MODELS: Table = {
    "clip": lambda: (CLIP(32, VISION, TEXT), (*images(), *tokens())),
    "clip_quick_gelu": lambda: (CLIP(32, VISION, TEXT, quick_gelu=True), (*images(), *tokens())),
    "clip_resnet": lambda: (CLIP(32, {**VISION, "layers": (1, 1, 1, 1), "width": 16, "patch_size": None}, TEXT), (*images(), *tokens())),
    "siglip": lambda: (
        CustomTextCLIP(
            32,
            {**VISION, "pool_type": "avg", "ls_init_value": 0.1},
            {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
            init_logit_bias=-10,
        ),
        (*images(), *tokens()),
    ),
    "coca": lambda: (
        filled(
            CoCa(
                64,
                {"context_length": 12, "vocab_size": 128, "width": 64, "heads": 4, "layers": 2, "mlp_ratio": 2, "attn_pooler_heads": 4},
                {**TEXT, "embed_cls": True, "output_tokens": True},
                {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 8, "output_tokens": True},
            )
        ),
        (*images(), *tokens()),
    ),
}
