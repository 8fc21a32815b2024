"""Wan 2.1 and 2.2: facts. Parameter counts are of the module's parameters, tied weights once, no buffers.

Sources: [conv] huggingface/diffusers scripts/convert_wan_to_diffusers.py; [2.1] Wan-Video/Wan2.1 and [2.2]
Wan-Video/Wan2.2: README, generate.py, wan/configs.
"""

from __future__ import annotations

from typing import Any

from framefit.families.checkpoint import Checkpoint, Component, Frames, Sizes

__all__ = ["ROWS"]

# fmt: off
MEAN_21 = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
           0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
DEVIATION_21 = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
                3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]
MEAN_22 = [-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
           0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
           -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
           -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667]
DEVIATION_22 = [0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
                0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
                0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
                0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744]
# fmt: on

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""`sample_neg_prompt` of wan/configs/shared_config.py [2.1, 2.2]; 2.1's image-to-video puts a phrase before it."""

AREA_480P = 832 * 480
AREA_720P = 1280 * 720
WIDE_480P = (832, 480)
WIDE_720P = (1280, 720)


def _transformer(name: str, params: int, source: str, **config: Any) -> Component:
    """14B unless `config` says otherwise."""
    base = {
        "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 36,
        "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
    }  # fmt: skip
    return Component(
        name=name, package="diffusers", class_name="WanTransformer3DModel",
        config=base | config, params=params, source=source,
    )  # fmt: skip


def _scheduler(shift: float) -> Component:
    return Component(
        name="scheduler", package="diffusers", class_name="UniPCMultistepScheduler",
        config={"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift},
        source="[conv]",
    )  # fmt: skip


TEXT_ENCODER = Component(
    name="text_encoder", package="transformers", class_name="UMT5EncoderModel",
    config={
        "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu", "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    },
    params=5_680_910_336,
    source="google/umt5-xxl config.json; the hub's bf16 shards are 2 bytes a parameter and 30,536 bytes of headers",
)  # fmt: skip

TOKENIZER = Component(name="tokenizer", package="transformers", class_name="T5TokenizerFast", source="google/umt5-xxl")

VAE_21 = Component(
    name="vae", package="diffusers", class_name="AutoencoderKLWan",
    config={
        "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True], "latents_mean": MEAN_21, "latents_std": DEVIATION_21,
    },
    params=126_892_531,
    source="[conv]; the hub's fp32 file is 4 bytes a parameter and 21,768 bytes of header",
    keep_fp32=True,
)  # fmt: skip

VAE_22 = Component(
    name="vae", package="diffusers", class_name="AutoencoderKLWan",
    config={
        "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
        "temperal_downsample": [False, True, True], "latents_mean": MEAN_22, "latents_std": DEVIATION_22,
        "is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16,
    },
    params=704_688_668,
    source="[conv] vae22_diffusers_config; the hub's fp32 file is 2.82 GB",
    keep_fp32=True,
)  # fmt: skip

IMAGE_ENCODER = Component(
    name="image_encoder", package="transformers", class_name="CLIPVisionModel",
    config={
        "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1024, "num_hidden_layers": 32,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    },
    params=630_766_080,
    source="laion/CLIP-ViT-H-14-laion2B-s32B-b79K; 632,076,800 with the projection that is not used here",
)  # fmt: skip

IMAGE_PROCESSOR = Component(
    name="image_processor", package="transformers", class_name="CLIPImageProcessorPil",
    config={"size": {"height": 224, "width": 224}, "do_center_crop": False},
    source="[2.1] wan/modules/clip.py: bicubic to 224x224, no crop",
)  # fmt: skip

A14B = Checkpoint(
    id="wan2.2-i2v-a14b",
    family="wan",
    title="Wan2.2 I2V A14B (two experts)",
    repo="Wan-AI/Wan2.2-I2V-A14B-Diffusers",
    licence="Apache-2.0",
    download_bytes=126_180_600_268,
    components=(
        _transformer("transformer", 14_288_901_184, "[conv] Wan2.2-I2V-14B-720p, high noise; published count"),
        _transformer("transformer_2", 14_288_901_184, "[conv] Wan2.2-I2V-14B-720p, low noise; published count"),
        VAE_21, TEXT_ENCODER, TOKENIZER, _scheduler(3.0),
    ),
    sizes=Sizes(
        multiple=16, default=WIDE_720P, named=(WIDE_720P, (720, 1280), WIDE_480P, (480, 832)),
        max_area=AREA_720P, min_side=64,
    ),
    frames=Frames(stride=4, default=81, trained=81, most=1025),
    fps=16,
    steps=40,
    guidance=(3.5, 3.5),
    negative_prompt=NEGATIVE_PROMPT,
    max_tokens=512,
    last_image=True,
    boundary_ratio=0.9,
    shifts=((AREA_480P, 3.0), (AREA_720P, 5.0)),
    presets={
        "draft": {"width": 832, "height": 480, "num_frames": 41, "steps": 20},
        "standard": {"width": 832, "height": 480, "num_frames": 81, "steps": 40},
        "quality": {"width": 1280, "height": 720, "num_frames": 81, "steps": 40},
    },
    batched_guidance=False,
)  # fmt: skip

TI2V_5B = Checkpoint(
    id="wan2.2-ti2v-5b",
    family="wan",
    title="Wan2.2 TI2V 5B",
    repo="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    licence="Apache-2.0",
    download_bytes=34_179_726_192,
    components=(
        _transformer(
            "transformer", 4_999_787_712, "[conv] Wan2.2-TI2V-5B; published count",
            num_attention_heads=24, in_channels=48, out_channels=48, ffn_dim=14336, num_layers=30,
        ),
        VAE_22, TEXT_ENCODER, TOKENIZER, _scheduler(5.0),
    ),
    sizes=Sizes(
        multiple=32, default=(1280, 704), named=((1280, 704), (704, 1280)), max_area=1280 * 704, min_side=64,
    ),
    frames=Frames(stride=4, default=121, trained=121, most=1025),
    fps=24,
    steps=50,
    guidance=(5.0,),
    negative_prompt=NEGATIVE_PROMPT,
    max_tokens=512,
    last_image=False,
    first_frame_clean=True,
    presets={
        "draft": {"num_frames": 49, "steps": 20},
        "standard": {"num_frames": 121, "steps": 30},
        "quality": {"num_frames": 121, "steps": 50},
    },
    batched_guidance=False,
)  # fmt: skip


def _wan_21(id: str, title: str, repo: str, size: tuple[int, int], shift: float) -> Checkpoint:
    """The two 2.1 models differ in the resolution that they were trained at, and in nothing of their shape."""
    transformer = _transformer(
        "transformer", 16_394_878_784, "[conv] Wan-I2V-14B; the hub's fp32 shards, 65.58 GB in 14 files",
        image_dim=1280, added_kv_proj_dim=5120,
    )  # fmt: skip
    return Checkpoint(
        id=id,
        family="wan",
        title=title,
        repo=repo,
        licence="Apache-2.0",
        download_bytes=90_074_880_204,
        components=(
            transformer, VAE_21, TEXT_ENCODER, TOKENIZER, IMAGE_ENCODER, IMAGE_PROCESSOR, _scheduler(shift),
        ),
        sizes=Sizes(
            multiple=16, default=size, named=(size, size[::-1]), max_area=size[0] * size[1], min_side=64,
        ),
        frames=Frames(stride=4, default=81, trained=81, most=1025),
        fps=16,
        steps=40,
        guidance=(5.0,),
        negative_prompt="镜头晃动，" + NEGATIVE_PROMPT,
        max_tokens=512,
        last_image=False,
        shifts=((AREA_480P, 3.0), (AREA_720P, 5.0)),
        presets={
            "draft": {"num_frames": 41, "steps": 20},
            "standard": {"num_frames": 81, "steps": 30},
            "quality": {"num_frames": 81, "steps": 40},
        },
        batched_guidance=False,
    )  # fmt: skip


ROWS = (
    A14B,
    TI2V_5B,
    _wan_21("wan2.1-i2v-14b-480p", "Wan2.1 I2V 14B 480P", "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers", WIDE_480P, 3.0),
    _wan_21("wan2.1-i2v-14b-720p", "Wan2.1 I2V 14B 720P", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers", WIDE_720P, 5.0),
)
