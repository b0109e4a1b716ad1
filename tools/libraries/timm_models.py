"""timm: transformers for images, their mixtures with convolutions, and convolutional networks."""

from __future__ import annotations

import timm
from timm.models import (
    beit,
    cait,
    coat,
    convit,
    convnext,
    crossvit,
    densenet,
    eva,
    hiera,
    levit,
    metaformer,
    mlp_mixer,
    nest,
    pvt_v2,
    swin_transformer,
    swin_transformer_v2,
    tnt,
    visformer,
    vision_transformer,
    vision_transformer_relpos,
    volo,
    xcit,
)

from tools.libraries import Table, images

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
STAGES = {"num_classes": 10, "depths": (1, 1, 1, 1)}
DIMS = (32, 64, 64, 128)
HEADS = (2, 4, 4, 4)

MODELS: Table = {
    "vit": lambda: (vision_transformer.VisionTransformer(**VIT), images()),
    "vit_qknorm_layerscale": lambda: (
        vision_transformer.VisionTransformer(**VIT, qk_norm=True, init_values=0.1, reg_tokens=2, global_pool="map"),
        images(),
    ),
    "vit_parallel": lambda: (vision_transformer.VisionTransformer(**VIT, block_fn=vision_transformer.ParallelThingsBlock), images()),
    "vit_relpos": lambda: (vision_transformer_relpos.VisionTransformerRelPos(**VIT, rel_pos_type="bias"), images()),
    "deit_distilled": lambda: (timm.create_model("deit_tiny_distilled_patch16_224", **VIT), images()),
    "swin": lambda: (
        swin_transformer.SwinTransformer(
            img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=10
        ),
        images(),
    ),
    "swin_v2": lambda: (
        swin_transformer_v2.SwinTransformerV2(
            img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4), num_classes=10
        ),
        images(),
    ),
    "eva": lambda: (eva.Eva(**VIT, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, init_values=0.1), images()),
    "beit": lambda: (beit.Beit(**VIT, use_rel_pos_bias=True, init_values=0.1), images()),
    "cait": lambda: (cait.Cait(**VIT), images()),
    "xcit": lambda: (xcit.Xcit(**VIT), images()),
    "convit": lambda: (convit.ConVit(**VIT, local_up_to_layer=1), images()),
    "tnt": lambda: (
        tnt.TNT(img_size=32, patch_size=16, embed_dim=64, inner_dim=16, depth=2, num_heads_inner=2, num_heads_outer=4, num_classes=10),
        images(),
    ),
    "crossvit": lambda: (
        crossvit.CrossVit(
            img_size=32,
            patch_size=(8, 16),
            embed_dim=(32, 64),
            depth=((1, 1, 0),),
            num_heads=(4, 4),
            mlp_ratio=(2.0, 2.0, 1.0),
            num_classes=10,
        ),
        images(),
    ),
    "mlp_mixer": lambda: (mlp_mixer.MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=64), images()),
    "gmlp": lambda: (
        mlp_mixer.MlpMixer(
            num_classes=10,
            img_size=32,
            patch_size=8,
            num_blocks=2,
            embed_dim=64,
            mlp_ratio=4,
            block_layer=mlp_mixer.SpatialGatingBlock,
            mlp_layer=mlp_mixer.GatedMlp,
        ),
        images(),
    ),
    "pvt_v2": lambda: (
        pvt_v2.PyramidVisionTransformerV2(
            **STAGES, embed_dims=DIMS, num_heads=HEADS, sr_ratios=(4, 2, 1, 1), mlp_ratios=(2.0, 2.0, 2.0, 2.0)
        ),
        images(64),
    ),
    "hiera": lambda: (
        hiera.Hiera(
            img_size=(64, 64),
            embed_dim=32,
            num_heads=2,
            num_classes=10,
            stages=(1, 1, 1),
            q_pool=1,
            mask_unit_size=(4, 4),
            mask_unit_attn=(True, True, False),
        ),
        images(64),
    ),
    "levit": lambda: (levit.Levit(img_size=64, num_classes=10, embed_dim=(32, 64), key_dim=8, depth=(1, 1), num_heads=(4, 4)), images(64)),
    "caformer": lambda: (
        metaformer.MetaFormer(
            **STAGES,
            dims=DIMS,
            token_mixers=[metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention],
            norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2,
        ),
        images(64),
    ),
    "volo": lambda: (
        volo.VOLO(
            (1, 1),
            img_size=64,
            num_classes=10,
            embed_dims=(32, 64),
            num_heads=(4, 4),
            downsamples=(True, False),
            outlook_attention=(True, False),
            stem_hidden_dim=16,
        ),
        images(64),
    ),
    "nest": lambda: (
        nest.Nest(img_size=32, patch_size=2, num_levels=2, embed_dims=(32, 64), num_heads=(2, 4), depths=(1, 1), num_classes=10),
        images(),
    ),
    "coat": lambda: (
        coat.CoaT(
            img_size=64,
            patch_size=4,
            num_classes=10,
            embed_dims=(64,) * 4,
            serial_depths=(1, 1, 1, 1),
            num_heads=4,
            mlp_ratios=(2, 2, 2, 2),
            crpe_window={3: 2, 5: 1, 7: 1},
        ),
        images(64),
    ),
    "visformer": lambda: (
        visformer.Visformer(img_size=64, num_classes=10, init_channels=16, embed_dim=64, depth=(1, 1, 1), num_heads=4, group=4),
        images(64),
    ),
    "coatnet": lambda: (timm.create_model("test_coatnet", num_classes=10, img_size=64), images(64)),
    "convnext": lambda: (convnext.ConvNeXt(**STAGES, dims=DIMS), images(64)),
    "resnet": lambda: (timm.create_model("test_resnet", num_classes=10), images(64)),
    "efficientnet": lambda: (timm.create_model("test_efficientnet", num_classes=10), images(64)),
    "mambaout": lambda: (timm.create_model("test_mambaout", num_classes=10), images(64)),
    "densenet": lambda: (densenet.DenseNet(growth_rate=8, block_config=(2, 2), num_classes=10), images(64)),
}
