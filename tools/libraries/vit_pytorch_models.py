"""vit-pytorch: vision transformers of many papers."""

from __future__ import annotations

import torch
from vit_pytorch import (
    ViT,
    cct,
    cross_vit,
    deepvit,
    levit,
    max_vit,
    nest,
    parallel_vit,
    rvt,
    simple_vit,
    t2t,
    vit_1d,
    vit_3d,
    vit_for_small_dataset,
    vivit,
)

from tools.libraries import Table, images

VIT = {"image_size": 32, "patch_size": 8, "num_classes": 10, "dim": 64, "depth": 2, "heads": 4, "mlp_dim": 128}
HEAD = {"dim_head": 16}

MODELS: Table = {
    "vit": lambda: (ViT(**VIT, **HEAD), images()),
    "simple_vit": lambda: (simple_vit.SimpleViT(**VIT, **HEAD), images()),
    "deepvit": lambda: (deepvit.DeepViT(**VIT, **HEAD), images()),
    "parallel_vit": lambda: (parallel_vit.ViT(**VIT, **HEAD), images()),
    "rvt": lambda: (rvt.RvT(**VIT, **HEAD), images()),
    "small_dataset": lambda: (vit_for_small_dataset.ViT(**VIT, **HEAD), images()),
    "t2t": lambda: (
        t2t.T2TViT(image_size=32, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=128, dim_head=16, t2t_layers=((4, 2), (3, 2))),
        images(),
    ),
    "cct": lambda: (cct.CCT(img_size=32, embedding_dim=64, num_layers=2, num_heads=4, mlp_ratio=2.0, num_classes=10), images()),
    "cross_vit": lambda: (
        cross_vit.CrossViT(
            image_size=32,
            num_classes=10,
            sm_dim=32,
            lg_dim=64,
            sm_patch_size=8,
            sm_enc_depth=1,
            sm_enc_heads=4,
            sm_enc_mlp_dim=64,
            sm_enc_dim_head=8,
            lg_patch_size=16,
            lg_enc_depth=1,
            lg_enc_heads=4,
            lg_enc_mlp_dim=64,
            lg_enc_dim_head=8,
            cross_attn_depth=1,
            cross_attn_heads=4,
            cross_attn_dim_head=8,
            depth=1,
        ),
        images(),
    ),
    "levit": lambda: (
        levit.LeViT(image_size=64, num_classes=10, dim=(32, 64), depth=1, heads=(2, 4), mlp_mult=2, stages=2, dim_key=8, dim_value=16),
        images(64),
    ),
    "max_vit": lambda: (max_vit.MaxViT(num_classes=10, dim=32, depth=(1, 1), dim_head=8, window_size=4, dim_conv_stem=16), images(32)),
    "nest": lambda: (
        nest.NesT(image_size=32, patch_size=4, dim=32, heads=4, num_hierarchies=2, block_repeats=(1, 1), num_classes=10),
        images(),
    ),
    "vit_1d": lambda: (
        vit_1d.ViT(seq_len=32, patch_size=4, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=128, dim_head=16),
        (torch.randn(2, 3, 32),),
    ),
    "vit_3d": lambda: (
        vit_3d.ViT(
            image_size=16,
            image_patch_size=8,
            frames=4,
            frame_patch_size=2,
            num_classes=10,
            dim=64,
            depth=2,
            heads=4,
            mlp_dim=128,
            dim_head=16,
        ),
        (torch.randn(2, 3, 4, 16, 16),),
    ),
    "vivit": lambda: (
        vivit.ViViT(
            image_size=16,
            image_patch_size=8,
            frames=4,
            frame_patch_size=2,
            num_classes=10,
            dim=64,
            spatial_depth=1,
            temporal_depth=1,
            heads=4,
            mlp_dim=128,
            dim_head=16,
        ),
        (torch.randn(2, 3, 4, 16, 16),),
    ),
}
