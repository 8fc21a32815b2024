"""I2VGen-XL: facts. Sources: ali-vilab/i2vgen-xl on the hub (configs), ali-vilab/VGen (defaults), and for the
component counts vladmandic/sdnext issue 4103, which the classes reproduce.
"""

from __future__ import annotations

from framefit.families.checkpoint import Checkpoint, Component, Frames, Sizes

__all__ = ["ROWS"]

UNET = Component(
    name="unet", package="diffusers", class_name="I2VGenXLUNet",
    config={
        "sample_size": 32, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "norm_num_groups": 32, "cross_attention_dim": 1024, "attention_head_dim": 64,
    },
    params=1_420_469_224,
    source="hub unet/config.json; published count",
)  # fmt: skip

VAE = Component(
    name="vae", package="diffusers", class_name="AutoencoderKL",
    config={
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 768,
        "scaling_factor": 0.18125,
    },
    params=83_653_863,
    source="hub vae/config.json (0.18125 there, 0.18215 in VGen)",
)  # fmt: skip

TEXT_ENCODER = Component(
    name="text_encoder", package="transformers", class_name="CLIPTextModel",
    config={
        "vocab_size": 49408, "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 1024,
        "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_act": "gelu", "bos_token_id": 0,
        "eos_token_id": 2,
    },
    params=352_984_064,
    source="hub text_encoder/config.json",
)  # fmt: skip

IMAGE_ENCODER = Component(
    name="image_encoder", package="transformers", class_name="CLIPVisionModelWithProjection",
    config={
        "hidden_size": 1280, "intermediate_size": 5120, "projection_dim": 1024, "num_hidden_layers": 32,
        "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "hidden_act": "gelu",
    },
    params=632_076_800,
    source="hub image_encoder/config.json",
)  # fmt: skip

SCHEDULER = Component(
    name="scheduler", package="diffusers", class_name="DDIMScheduler",
    config={
        "beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "steps_offset": 1,
        "prediction_type": "v_prediction", "timestep_spacing": "leading", "rescale_betas_zero_snr": True,
    },
    source="hub scheduler/scheduler_config.json",
)  # fmt: skip

ROWS = (
    Checkpoint(
        id="i2vgen-xl",
        family="i2vgen",
        title="I2VGen-XL",
        repo="ali-vilab/i2vgen-xl",
        licence="MIT",
        download_bytes=9_956_735_804,
        components=(
            UNET, VAE, TEXT_ENCODER, IMAGE_ENCODER,
            Component(
                name="tokenizer", package="transformers", class_name="CLIPTokenizerFast", source="hub tokenizer/"
            ),
            Component(
                name="feature_extractor", package="transformers", class_name="CLIPImageProcessorPil",
                config={"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
                source="hub feature_extractor/",
            ),
            SCHEDULER,
        ),
        sizes=Sizes(
            multiple=8, default=(1280, 704), named=((1280, 704), (512, 512), (768, 768), (1024, 1024)),
            max_area=1024 * 1024, min_side=64,
        ),
        frames=Frames(stride=1, default=16, trained=16, most=128),
        fps=16,
        steps=50,
        guidance=(9.0,),
        negative_prompt=(
            "Distorted, discontinuous, Ugly, blurry, low resolution, motionless, static, disfigured, "
            "disconnected limbs, Ugly faces, incomplete arms"
        ),
        max_tokens=77,
        last_image=False,
        presets={
            "draft": {"width": 512, "height": 512, "num_frames": 8, "steps": 30},
            "standard": {"width": 512, "height": 512, "num_frames": 16, "steps": 50},
            "quality": {"width": 768, "height": 768, "num_frames": 24, "steps": 80},
        },
    ),
)  # fmt: skip
