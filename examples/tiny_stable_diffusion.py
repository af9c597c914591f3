"""Stable Diffusion, CLIP and LoRAs in miniature and at random: real classes, built in memory, nothing downloaded."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 8
UNET_LORA = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "time_emb_proj")
TEXT_LORA = ("q_proj", "v_proj", "fc1")


def tokenizer() -> CLIPTokenizer:
    """One token a character."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789 "
    entries = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: at for at, entry in enumerate(entries)}, merges=[], model_max_length=16)


def text_config(width: int = WIDTH) -> CLIPTextConfig:
    """A text encoder's, with that tokenizer's vocabulary."""
    vocab = len(tokenizer())
    return CLIPTextConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=6, bos_token_id=vocab - 2, eos_token_id=vocab - 1,
    )  # fmt: skip


def vae() -> AutoencoderKL:
    """It halves an image's sides."""
    return AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def scheduler(prediction: str = "epsilon") -> DDIMScheduler:
    """Fifty times."""
    return DDIMScheduler(num_train_timesteps=50, steps_offset=1, clip_sample=False, prediction_type=prediction)


def unet(context: int = WIDTH, linear: bool = False, **more: object) -> UNet2DConditionModel:
    """Four transformer blocks; around each a linear module, or else a 1x1 convolution."""
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=context,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=linear, **more,
    )  # fmt: skip


def quiet(pipe: Any) -> Any:
    """Without progress bars."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(prediction: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """As SD 1.x, with 1x1 convolutions around its blocks; with prediction "v_prediction" as SD 2.1."""
    torch.manual_seed(seed)
    denoiser = unet(linear=prediction == "v_prediction")
    return quiet(
        StableDiffusionPipeline(
            vae=vae(), text_encoder=CLIPTextModel(text_config()).eval(), tokenizer=tokenizer(), unet=denoiser.eval(),
            scheduler=scheduler(prediction), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )
    )  # fmt: skip


def clip(seed: int = 0) -> CLIPModel:
    """A CLIP model with that tokenizer's vocabulary, for images of 16 x 16."""
    torch.manual_seed(seed)
    vision = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8, "projection_dim": 6,
    }  # fmt: skip
    config = CLIPConfig(text_config=text_config().to_dict(), vision_config=vision, projection_dim=6)
    return CLIPModel(config).eval()


def lora_of(
    model: nn.Module, targets: tuple[str, ...], seed: int, rank: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A random LoRA of a model, and its config."""
    config = LoraConfig(r=rank, lora_alpha=3 * rank, target_modules=list(targets), init_lora_weights=False)
    torch.manual_seed(seed)
    inject_adapter_in_model(config, model, adapter_name="written")
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model, adapter_name="written").items()}
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    del model.peft_config
    return state, config.to_dict()


def write_lora(pipe: StableDiffusionPipeline, folder: Path, seed: int, rank: int = 2) -> Path:
    """One random LoRA of UNet and text encoder, in a file of diffusers'; the pipeline is left as it was."""
    unet_state, unet_config = lora_of(pipe.unet, UNET_LORA, seed, rank)
    text_state, text_config = lora_of(pipe.text_encoder, TEXT_LORA, seed, rank)
    pipe.save_lora_weights(
        folder,
        unet_lora_layers=unet_state,
        unet_lora_adapter_metadata=unet_config,
        text_encoder_lora_layers=text_state,
        text_encoder_lora_adapter_metadata=text_config,
    )
    return folder
