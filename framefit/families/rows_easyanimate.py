"""EasyAnimate V5.1 and V5 (InP): facts. Parameter counts are of the module's parameters, tied weights once.

Sources: [ea] aigc-apps/EasyAnimate: README, predict_i2v.py, config/easyanimate_video_v5_magvit_multi_text_encoder.yaml;
[hy] Tencent/HunyuanDiT, whose bilingual BERT and mT5-xl V5 took over; [quoted] the hub's files as others quote them.
"""

from __future__ import annotations

from typing import Any

from framefit.families.checkpoint import Checkpoint, Component, Frames, Sizes

__all__ = ["ROWS"]

NEGATIVE_PROMPT = "扭曲的身体，肢体残缺，文本字幕，漫画，静止，丑陋，错误，乱码。"
"""[ea] predict_i2v.py."""

LAYERS_7B = {"num_layers": 36, "mmdit_layers": 18}
LAYERS_12B = {"num_layers": 48, "mmdit_layers": 48}

VAE = Component(
    name="vae", package="diffusers", class_name="AutoencoderKLMagvit",
    config={
        "in_channels": 3, "latent_channels": 16, "out_channels": 3, "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["SpatialDownBlock3D"] + ["SpatialTemporalDownBlock3D"] * 3,
        "up_block_types": ["SpatialUpBlock3D"] + ["SpatialTemporalUpBlock3D"] * 3,
        "layers_per_block": 2, "scaling_factor": 0.7125, "spatial_group_norm": True,
    },
    params=244_375_507,
    source="[quoted] vae/config.json of V5.1 and V5; count by construction",
)  # fmt: skip

QWEN2_VL_7B = Component(
    name="text_encoder", package="transformers", class_name="Qwen2VLForConditionalGeneration",
    config={
        "text_config": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "hidden_size": 3584, "patch_size": 14,
        },
        "tie_word_embeddings": False,
    },
    params=8_291_375_616,
    source="Qwen/Qwen2-VL-7B-Instruct config.json; published count",
)  # fmt: skip

QWEN_TOKENIZER = Component(
    name="tokenizer", package="transformers", class_name="Qwen2TokenizerFast", source="Qwen/Qwen2-VL-7B-Instruct"
)

FLOW = Component(
    name="scheduler", package="diffusers", class_name="FlowMatchEulerDiscreteScheduler",
    config={"shift": 3.0, "use_dynamic_shifting": True},
    source="[quoted] scheduler_config.json; the reference passes mu=1, which makes `shift` idle",
)  # fmt: skip

BERT = Component(
    name="text_encoder", package="transformers", class_name="BertModel",
    config={
        "vocab_size": 47020, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "max_position_embeddings": 512,
    },
    params=352_035_840,
    source="[hy] bilingual CLIP text encoder; its 350M published",
)  # fmt: skip

MT5_XL = Component(
    name="text_encoder_2", package="transformers", class_name="T5EncoderModel",
    config={
        "vocab_size": 250112, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32,
        "feed_forward_proj": "gated-gelu",
    },
    params=1_669_958_656,
    source="[hy] mT5-xl encoder; its 1.6B published",
)  # fmt: skip

DDIM = Component(
    name="scheduler", package="diffusers", class_name="DDIMScheduler",
    config={
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
    },
    source="[quoted] scheduler_config.json; clip_sample inferred (true would clamp the latents)",
)  # fmt: skip


def _transformer(params: int, source: str, **config: Any) -> Component:
    base = {
        "num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 33, "out_channels": 16, "patch_size": 2,
        "sample_width": 90, "sample_height": 60, "time_embed_dim": 512, "time_position_encoding_type": "3d_rope",
        "resize_inpaint_mask_directly": True, "add_noise_in_inpaint_model": True,
    }  # fmt: skip
    return Component(
        name="transformer", package="diffusers", class_name="EasyAnimateTransformer3DModel",
        config=base | config, params=params, source=source,
    )  # fmt: skip


def _row(
    id: str, title: str, repo: str, download_bytes: int, components: tuple[Component, ...], **facts: Any
) -> Checkpoint:
    return Checkpoint(
        id=id,
        family="easyanimate",
        title=title,
        repo=repo,
        licence="Apache-2.0",
        download_bytes=download_bytes,
        components=components,
        sizes=Sizes(
            multiple=16, default=(672, 384), named=((672, 384), (1008, 576), (1344, 768), (512, 512), (1024, 1024)),
            max_area=1024 * 1024, min_side=64,
        ),
        frames=Frames(stride=4, default=49, trained=49, most=1025),
        fps=8,
        steps=50,
        guidance=(6.0,),
        negative_prompt=NEGATIVE_PROMPT,
        max_tokens=256,
        last_image=True,
        presets={
            "draft": {"width": 672, "height": 384, "num_frames": 25, "steps": 25},
            "standard": {"width": 672, "height": 384, "num_frames": 49, "steps": 50},
            "quality": {"width": 1008, "height": 576, "num_frames": 49, "steps": 50},
        },
        **facts,
    )  # fmt: skip


def _v51(size: str, layers: dict[str, int], params: int, download_bytes: int) -> Checkpoint:
    transformer = _transformer(
        params, "[quoted] transformer/config.json; published count",
        add_norm_text_encoder=True, text_embed_dim=3584, **layers,
    )  # fmt: skip
    return _row(
        f"easyanimate-v5.1-{size}-inp",
        f"EasyAnimate V5.1 {size} InP",
        f"alibaba-pai/EasyAnimateV5.1-{size}-zh-InP-diffusers",
        download_bytes,
        (transformer, VAE, QWEN2_VL_7B, QWEN_TOKENIZER, FLOW),
    )


def _v5(size: str, layers: dict[str, int], params: int, download_bytes: int) -> Checkpoint:
    transformer = _transformer(
        params, "[ea] README; text widths pinned by the published count",
        text_embed_dim=1024, text_embed_dim_t5=2048, enable_text_attention_mask=False, **layers,
    )  # fmt: skip
    tokenizers = (
        Component(
            name="tokenizer", package="transformers", class_name="BertTokenizerFast", source="[ea] predict_i2v.py"
        ),
        Component(
            name="tokenizer_2", package="transformers", class_name="T5TokenizerFast", source="[ea] predict_i2v.py"
        ),
    )
    return _row(
        f"easyanimate-v5-{size}-zh-inp",
        f"EasyAnimate V5 {size} InP (two text encoders)",
        f"alibaba-pai/EasyAnimateV5-{size}-zh-InP",
        download_bytes,
        (transformer, VAE, BERT, MT5_XL, *tokenizers, DDIM),
        layout="easyanimate-v5",
    )


ROWS = (
    _v51("7b", LAYERS_7B, 6_814_670_912, 30_000_000_000),
    _v51("12b", LAYERS_12B, 11_799_265_856, 39_000_000_000),
    _v5("7b", LAYERS_7B, 6_813_097_536, 22_000_000_000),
)
