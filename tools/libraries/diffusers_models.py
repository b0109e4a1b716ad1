"""diffusers: denoising networks and autoencoders of images, video and sound."""

from __future__ import annotations

import diffusers
import torch

from tools.libraries import Table

HEADS = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
STEP = torch.tensor([3, 7])
TEXT = (2, 5, 32)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def unet(**options: object) -> dict[str, object]:
    return {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4} | options


CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
AUTOENCODER = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}

MODELS: Table = {
    "unet_2d": lambda: (
        diffusers.UNet2DModel(
            **unet(attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
        ),
        {"sample": rand(2, 3, 16, 16), "timestep": STEP, "return_dict": False},
    ),
    "unet_2d_condition": lambda: (
        diffusers.UNet2DConditionModel(**unet(**CROSS, cross_attention_dim=32, attention_head_dim=4)),
        {"sample": rand(2, 4, 16, 16), "timestep": STEP, "encoder_hidden_states": rand(*TEXT), "return_dict": False},
    ),
    "unet_1d": lambda: (
        diffusers.UNet1DModel(sample_size=64, block_out_channels=(32, 32, 64), extra_in_channels=64),
        {"sample": rand(2, 2, 64), "timestep": STEP[:1], "return_dict": False},
    ),
    "dit": lambda: (
        diffusers.DiTTransformer2DModel(**HEADS, in_channels=4, sample_size=8, num_embeds_ada_norm=10),
        {"hidden_states": rand(2, 4, 8, 8), "timestep": STEP, "class_labels": torch.tensor([1, 2]), "return_dict": False},
    ),
    "pixart": lambda: (
        diffusers.PixArtTransformer2DModel(
            **HEADS,
            in_channels=4,
            out_channels=8,
            sample_size=8,
            cross_attention_dim=32,
            caption_channels=32,
            use_additional_conditions=False,
        ),
        {"hidden_states": rand(2, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": rand(*TEXT), "return_dict": False},
    ),
    "sd3": lambda: (
        diffusers.SD3Transformer2DModel(
            **HEADS,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        {
            "hidden_states": rand(2, 4, 8, 8),
            "timestep": STEP,
            "encoder_hidden_states": rand(*TEXT),
            "pooled_projections": rand(2, 32),
            "return_dict": False,
        },
    ),
    "flux": lambda: (
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(2, 2, 4),
        ),
        {
            "hidden_states": rand(2, 16, 8),
            "encoder_hidden_states": rand(*TEXT),
            "pooled_projections": rand(2, 32),
            "timestep": torch.tensor([0.3, 0.7]),
            "img_ids": rand(16, 3),
            "txt_ids": rand(5, 3),
            "return_dict": False,
        },
    ),
    "sana": lambda: (
        diffusers.SanaTransformer2DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
        ),
        {"hidden_states": rand(2, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": rand(*TEXT), "return_dict": False},
    ),
    "hunyuan_dit": lambda: (
        diffusers.HunyuanDiT2DModel(
            **HEADS,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=32,
            cross_attention_dim=32,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
            text_len=5,
            text_len_t5=5,
            use_style_cond_and_image_meta_size=False,
            activation_fn="gelu-approximate",
        ),
        {
            "hidden_states": rand(2, 4, 8, 8),
            "timestep": STEP / 10,
            "encoder_hidden_states": rand(*TEXT),
            "text_embedding_mask": torch.ones(2, 5),
            "encoder_hidden_states_t5": rand(*TEXT),
            "text_embedding_mask_t5": torch.ones(2, 5),
            "image_rotary_emb": (rand(16, 8), rand(16, 8)),
            "return_dict": False,
        },
    ),
    "cogvideox": lambda: (
        diffusers.CogVideoXTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=32,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=5,
        ),
        {"hidden_states": rand(2, 2, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": rand(*TEXT), "return_dict": False},
    ),
    "ltx_video": lambda: (
        diffusers.LTXVideoTransformer3DModel(**HEADS, in_channels=8, out_channels=8, cross_attention_dim=32, caption_channels=32),
        {
            "hidden_states": rand(2, 2 * 4 * 4, 8),
            "timestep": STEP,
            "encoder_hidden_states": rand(*TEXT),
            "encoder_attention_mask": torch.ones(2, 5),
            "num_frames": 2,
            "height": 4,
            "width": 4,
            "return_dict": False,
        },
    ),
    "wan": lambda: (
        diffusers.WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        {"hidden_states": rand(1, 4, 2, 8, 8), "timestep": STEP[:1], "encoder_hidden_states": rand(1, 5, 32), "return_dict": False},
    ),
    "stable_audio": lambda: (
        diffusers.StableAudioDiTModel(
            sample_size=16,
            in_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=8,
            cross_attention_dim=16,
            time_proj_dim=16,
            global_states_input_dim=16,
            cross_attention_input_dim=16,
        ),
        {
            "hidden_states": rand(2, 8, 16),
            "timestep": STEP / 10,
            "encoder_hidden_states": rand(2, 5, 16),
            "global_hidden_states": rand(2, 1, 16),
            "rotary_embedding": (rand(17, 4), rand(17, 4)),
            "return_dict": False,
        },
    ),
    "autoencoder_kl": lambda: (diffusers.AutoencoderKL(**AUTOENCODER), {"sample": rand(2, 3, 16, 16), "return_dict": False}),
    "autoencoder_tiny": lambda: (
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
        ),
        {"sample": rand(2, 3, 16, 16), "return_dict": False},
    ),
    "autoencoder_dc": lambda: (
        diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(16, 32),
            decoder_block_out_channels=(16, 32),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
        ),
        {"sample": rand(2, 3, 16, 16), "return_dict": False},
    ),
}
