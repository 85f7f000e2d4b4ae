"""Small networks in the formats of the large ones, written to disk as their makers write them."""

import json

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from support import GOLDEN
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from mgd3.backbones.dit import DiT

LATENT = 8  # side of a latent; the VAE's factor is 8
ORIGINAL = GOLDEN / "dit_mode_guidance.pt"  # in the original repository's format


class SeededNoise:
    """One generator for all draws, as diffusers' pipelines use it."""

    def __init__(self, shape):
        self.shape, self.generator = shape, torch.Generator().manual_seed(3)

    def initial(self):
        return torch.randn(self.shape, generator=self.generator)

    step = initial


def small_vae(folder):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4] * 4,
        norm_num_groups=2,
        latent_channels=4,
    ).eval()
    vae.save_pretrained(folder)
    return vae


def small_tiny_autoencoder(folder):
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()
    tiny.save_pretrained(folder)
    return tiny


def clip_tokenizer(folder):
    """CLIP's byte-level tokenizer without merges: one token per letter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(len(others))]
    vocabulary = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"})
    )
    return CLIPTokenizer.from_pretrained(folder)


def text_config(tokenizer, width):
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1,
        pad_token_id=len(tokenizer) - 1,
    )


UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "sample_size": LATENT,
}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def small_stable_diffusion(folder, prediction_type="epsilon", **unet):
    """A complete pipeline with Stable Diffusion 1.5's scheduler configuration."""
    tokenizer = clip_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=small_vae(folder.parent / f"{folder.name}-vae"),
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**UNET | unet).eval(),
        scheduler=PNDMScheduler(
            **NOISE,
            prediction_type=prediction_type,
            set_alpha_to_one=False,
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def small_stable_diffusion_xl(folder, zeros=True, **unet):
    """A complete pipeline with SDXL's scheduler configuration and its two text encoders."""
    tokenizer = clip_tokenizer(folder.parent / f"{folder.name}-tokenizer")
    second = clip_tokenizer(folder.parent / f"{folder.name}-tokenizer-2")
    second.pad_token = "!"  # as SDXL's own
    torch.manual_seed(1)
    sizes = {
        "cross_attention_dim": 16 + 12,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 12 + 6 * 8,
    }
    pipeline = StableDiffusionXLPipeline(
        vae=small_vae(folder.parent / f"{folder.name}-vae"),
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 12)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=UNet2DConditionModel(**UNET | sizes | unet).eval(),
        scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


class _CompVis:
    """Random tensors under the names of CompVis/latent-diffusion's modules."""

    def __init__(self):
        self.tensors = {}
        self.draw = torch.Generator().manual_seed(0)

    def weights(self, name, *shape):
        fan_in = torch.Size(shape[1:]).numel()
        self.tensors[f"{name}.weight"] = torch.randn(shape, generator=self.draw) / fan_in**0.5
        self.tensors[f"{name}.bias"] = torch.zeros(shape[0])

    def norm(self, name, channels):
        self.tensors |= {
            f"{name}.weight": torch.ones(channels),
            f"{name}.bias": torch.zeros(channels),
        }

    def unet_block(self, name, entering, leaving, embedded):
        self.norm(f"{name}.in_layers.0", entering)
        self.weights(f"{name}.in_layers.2", leaving, entering, 3, 3)
        self.weights(f"{name}.emb_layers.1", leaving, embedded)
        self.norm(f"{name}.out_layers.0", leaving)
        self.weights(f"{name}.out_layers.3", leaving, leaving, 3, 3)
        if entering != leaving:
            self.weights(f"{name}.skip_connection", leaving, entering, 1, 1)

    def transformer(self, name, channels, context):
        self.norm(f"{name}.norm", channels)
        self.weights(f"{name}.proj_in", channels, channels, 1, 1)
        inside = f"{name}.transformer_blocks.0"
        for attention, width in (("attn1", channels), ("attn2", context)):
            for part, size in (("q", channels), ("k", width), ("v", width)):
                self.weights(f"{inside}.{attention}.to_{part}", channels, size)
                del self.tensors[f"{inside}.{attention}.to_{part}.bias"]
            self.weights(f"{inside}.{attention}.to_out.0", channels, channels)
        self.weights(f"{inside}.ff.net.0.proj", 8 * channels, channels)
        self.weights(f"{inside}.ff.net.2", channels, 4 * channels)
        for n in (1, 2, 3):
            self.norm(f"{inside}.norm{n}", channels)
        self.weights(f"{name}.proj_out", channels, channels, 1, 1)

    def unet(self, prefix, wide, context):
        """Two levels, the lower one with cross-attention, one block each."""
        low = 2 * wide
        self.weights(f"{prefix}time_embed.0", 4 * wide, wide)
        self.weights(f"{prefix}time_embed.2", 4 * wide, 4 * wide)
        self.weights(f"{prefix}input_blocks.0.0", wide, 3, 3, 3)
        self.unet_block(f"{prefix}input_blocks.1.0", wide, wide, 4 * wide)
        self.weights(f"{prefix}input_blocks.2.0.op", wide, wide, 3, 3)
        self.unet_block(f"{prefix}input_blocks.3.0", wide, low, 4 * wide)
        self.transformer(f"{prefix}input_blocks.3.1", low, context)
        for n in (0, 2):
            self.unet_block(f"{prefix}middle_block.{n}", low, low, 4 * wide)
        self.transformer(f"{prefix}middle_block.1", low, context)
        for n, (skip, leaving) in enumerate(((low, low), (wide, low), (wide, wide), (wide, wide))):
            entering = skip + (low if n < 3 else wide)
            self.unet_block(f"{prefix}output_blocks.{n}.0", entering, leaving, 4 * wide)
            if n < 2:
                self.transformer(f"{prefix}output_blocks.{n}.1", low, context)
        self.weights(f"{prefix}output_blocks.1.2.conv", low, low, 3, 3)
        self.norm(f"{prefix}out.0", wide)
        self.weights(f"{prefix}out.2", 3, wide, 3, 3)

    def vq_block(self, name, entering, leaving):
        self.norm(f"{name}.norm1", entering)
        self.weights(f"{name}.conv1", leaving, entering, 3, 3)
        self.norm(f"{name}.norm2", leaving)
        self.weights(f"{name}.conv2", leaving, leaving, 3, 3)
        if entering != leaving:
            self.weights(f"{name}.nin_shortcut", leaving, entering, 1, 1)

    def vq_middle(self, name, channels):
        self.vq_block(f"{name}.block_1", channels, channels)
        self.norm(f"{name}.attn_1.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.weights(f"{name}.attn_1.{part}", channels, channels, 1, 1)
        self.vq_block(f"{name}.block_2", channels, channels)

    def vq(self, prefix, wide, codes):
        """Factor 4: three levels of one width."""
        self.weights(f"{prefix}encoder.conv_in", wide, 3, 3, 3)
        self.weights(f"{prefix}decoder.conv_in", wide, 3, 3, 3)
        for n in range(3):
            self.vq_block(f"{prefix}encoder.down.{n}.block.0", wide, wide)
            for block in range(2):
                self.vq_block(f"{prefix}decoder.up.{n}.block.{block}", wide, wide)
        for n in range(2):
            self.weights(f"{prefix}encoder.down.{n}.downsample.conv", wide, wide, 3, 3)
            self.weights(f"{prefix}decoder.up.{n + 1}.upsample.conv", wide, wide, 3, 3)
        for half in ("encoder", "decoder"):
            self.vq_middle(f"{prefix}{half}.mid", wide)
            self.norm(f"{prefix}{half}.norm_out", wide)
            self.weights(f"{prefix}{half}.conv_out", 3, wide, 3, 3)
            self.weights(f"{prefix}{'' if half == 'encoder' else 'post_'}quant_conv", 3, 3, 1, 1)
        self.tensors[f"{prefix}quantize.embedding.weight"] = torch.randn(
            codes, 3, generator=self.draw
        )


def compvis_tensors(num_classes=10):
    """The state dict of a small class-conditional latent diffusion model."""
    made = _CompVis()
    made.unet("model.diffusion_model.", wide=32, context=8)
    made.vq("first_stage_model.", wide=32, codes=16)
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    return made.tensors | {
        "cond_stage_model.embedding.weight": torch.randn(num_classes + 1, 8, generator=made.draw),
        "betas": betas.float(),
        "alphas_cumprod": torch.cumprod(1 - betas, 0).float(),
    }


def golden_dit(weights, tmp_path):
    """The golden files' DiT from weights in any format, with a small VAE in `tmp_path`."""
    if not (tmp_path / "vae").exists():
        small_vae(tmp_path / "vae")
    return DiT(str(weights), vae=str(tmp_path / "vae"), image_size=64, num_heads=4)


def save_as_the_hub(dit, folder):
    """The hub's networks share no part between blocks."""
    port = DiTTransformer2DModel.from_config(dit.bare.network.config)
    port.load_state_dict(dit.bare.network.state_dict())
    port.save_pretrained(folder / "transformer")
