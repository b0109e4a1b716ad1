"""monai: segmentation and classification of volumes."""

from __future__ import annotations

import torch
from monai.networks.nets import (
    UNETR,
    AttentionUnet,
    BasicUNet,
    DenseNet,
    DiffusionModelUNet,
    SegResNet,
    SwinUNETR,
    UNet,
    ViT,
    ViTAutoEnc,
)

from tools.libraries import Table

VOLUME = (16, 16, 16)


def volumes(*size: int) -> tuple[torch.Tensor]:
    return (torch.randn(1, 1, *size),)


MODELS: Table = {
    "vit": lambda: (
        ViT(
            in_channels=1,
            img_size=VOLUME,
            patch_size=(8, 8, 8),
            hidden_size=64,
            mlp_dim=128,
            num_layers=2,
            num_heads=4,
            classification=True,
            num_classes=4,
        ),
        volumes(*VOLUME),
    ),
    "vit_autoencoder": lambda: (
        ViTAutoEnc(
            in_channels=1, img_size=(32, 32), patch_size=(4, 4), hidden_size=64, mlp_dim=128, num_layers=2, num_heads=4, spatial_dims=2
        ),
        volumes(32, 32),
    ),
    "unetr": lambda: (
        UNETR(in_channels=1, out_channels=2, img_size=(32, 32), feature_size=16, hidden_size=64, mlp_dim=128, num_heads=4, spatial_dims=2),
        volumes(32, 32),
    ),
    "swin_unetr": lambda: (
        SwinUNETR(
            in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(2, 4, 4, 4), window_size=4, spatial_dims=2
        ),
        volumes(64, 64),
    ),
    "unet": lambda: (
        UNet(spatial_dims=2, in_channels=1, out_channels=2, channels=(16, 32, 64), strides=(2, 2), num_res_units=1),
        volumes(32, 32),
    ),
    "basic_unet": lambda: (BasicUNet(spatial_dims=2, in_channels=1, out_channels=2, features=(16, 16, 32, 32, 64, 16)), volumes(32, 32)),
    "attention_unet": lambda: (
        AttentionUnet(spatial_dims=2, in_channels=1, out_channels=2, channels=(16, 32, 64), strides=(2, 2)),
        volumes(32, 32),
    ),
    "seg_resnet": lambda: (
        SegResNet(spatial_dims=2, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 1), blocks_up=(1,)),
        volumes(32, 32),
    ),
    "densenet": lambda: (
        DenseNet(spatial_dims=2, in_channels=1, out_channels=4, init_features=16, growth_rate=8, block_config=(2, 2)),
        volumes(32, 32),
    ),
    "diffusion_unet": lambda: (
        DiffusionModelUNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=1,
            channels=(16, 32),
            attention_levels=(False, True),
            num_res_blocks=1,
            norm_num_groups=4,
            num_head_channels=8,
        ),
        (torch.randn(2, 1, 16, 16), torch.tensor([3, 7])),
    ),
}
