"""Tiny pipelines with random weights, saved as diffusers saves real ones.

python tests/support/tiny_diffusers.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def make_sd(folder: Path) -> Path:
    """Tiny SD: a `StableDiffusionPipeline` of 1.4M parameters, 64 px by itself."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=514, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    parts: dict[str, Any] = {
        "vae": _vae(AutoencoderKL, 32, 8), "text_encoder": CLIPTextModel(text), "tokenizer": clip_tokenizer(folder),
        "unet": unet, "scheduler": scheduler, "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def make_dit(folder: Path) -> Path:
    """Tiny DiT: a `PixArtSigmaPipeline`."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(1)
    tokenizer = t5_tokenizer()
    text = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformer = PixArtTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=2, num_attention_heads=4, attention_head_dim=8, caption_channels=32,
        in_channels=4, out_channels=8, cross_attention_dim=32, norm_type="ada_norm_single",
        use_additional_conditions=False,
    )  # fmt: skip
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=T5EncoderModel(text), vae=_vae(AutoencoderKL, 16, 8),
        transformer=transformer, scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def make_sd3(folder: Path) -> Path:
    """Tiny Stable Diffusion 3: two CLIPs, T5, an MMDiT."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    torch.manual_seed(2)
    tokenizer = t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, max_position_embeddings=77, bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
    )  # fmt: skip
    vae = _vae(AutoencoderKL, 16, 8, scaling_factor=1.5305, shift_factor=0.0609)
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=CLIPTextModelWithProjection(clip), tokenizer=clip_tokenizer(folder),
        text_encoder_2=CLIPTextModelWithProjection(clip), tokenizer_2=clip_tokenizer(folder),
        text_encoder_3=T5EncoderModel(t5), tokenizer_3=tokenizer,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_klein(folder: Path) -> Path:
    """Tiny FLUX.2-klein: the hidden states of a Qwen3, a VAE whose latents are normalized."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(3)
    tokenizer = t5_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(AutoencoderKLFlux2, 16, 8),
        text_encoder=Qwen3ForCausalLM(text), tokenizer=tokenizer, transformer=transformer, is_distilled=True,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def make_sprint(folder: Path) -> Path:
    """Tiny SANA-Sprint: a Gemma 2, linear attention, a VAE that shrinks by 32."""
    import torch
    from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(4)
    tokenizer = t5_tokenizer()
    text = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=32, guidance_embeds=True, qk_norm="rms_norm_across_heads", timestep_scale=1000.0,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8,) * 6,
        decoder_block_out_channels=(8,) * 6, encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6, scaling_factor=0.41407,
    )  # fmt: skip
    SanaSprintPipeline(
        tokenizer=tokenizer, text_encoder=Gemma2Model(text), vae=vae, transformer=transformer,
        scheduler=SCMScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _vae(kind: Any, channels: int, groups: int, **more: Any) -> Any:
    return kind(
        block_out_channels=(channels,) * 4, in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=64, **more,
    )  # fmt: skip


def clip_tokenizer(folder: Path) -> Any:
    """CLIP's byte tokenizer without merges: 256 characters, the same at a word's end, and two special tokens."""
    from transformers import CLIPTokenizer

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(i) for i in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({word: i for i, word in enumerate(words)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(vocabulary), str(merges), model_max_length=77)
    vocabulary.unlink()
    merges.unlink()
    return tokenizer


def t5_tokenizer() -> Any:
    """T5's tokenizer over printable ASCII, letter by letter."""
    from transformers import T5Tokenizer

    letters = ["<pad>", "</s>", "<unk>", "▁", *(chr(i) for i in range(33, 127))]
    return T5Tokenizer(vocab=[(letter, -float(i)) for i, letter in enumerate(letters)], extra_ids=0)


if __name__ == "__main__":
    make_sd(Path(sys.argv[1]) / "tiny-sd")
    make_dit(Path(sys.argv[1]) / "tiny-dit")
