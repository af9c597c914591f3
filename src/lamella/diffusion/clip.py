"""How well images fit texts and other images, by CLIP: cosines of its embeddings.

MOLE reports both for its compositions (arXiv 2404.13628, tables 1 and 2): an image against its prompt, and against
pictures of each concept. Any ``transformers.CLIPModel`` will do; the numbers of two CLIP models are not comparable.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def embed_images(model: Any, images: Tensor) -> Tensor:
    """CLIP's embeddings of images, differentiable (its image processor is not).

    Args:
        model: a CLIPModel.
        images: ``(N, 3, H, W)`` from 0 to 1, of any size: they are scaled to the model's, bicubically.

    Returns:
        ``(N, D)`` of length 1, float32 or wider.
    """
    size = model.config.vision_config.image_size
    scaled = functional.interpolate(
        images.to(model.visual_projection.weight),
        size=(size, size),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    ).clamp(0, 1)
    mean, std = (scaled.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return _unit_length(model.get_image_features(pixel_values=(scaled - mean) / std))


def embed_texts(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """CLIP's embeddings of tokenised texts.

    Args:
        model: a CLIPModel.
        input_ids: ``(N, T)``.
        attention_mask: of the same shape; None where nothing is padding.

    Returns:
        ``(N, D)`` of length 1, float32 or wider.
    """
    device = model.text_projection.weight.device
    mask = None if attention_mask is None else attention_mask.to(device)
    return _unit_length(model.get_text_features(input_ids=input_ids.to(device), attention_mask=mask))


def text_alignment(images: Tensor, texts: Tensor) -> Tensor:
    """The cosine of each image's embedding ``(N, D)`` and that of its own text ``(N, D)``: ``(N,)``, from -1 to 1."""
    return functional.cosine_similarity(images, texts, dim=-1)


def image_alignment(images: Tensor, concept: Tensor) -> Tensor:
    """Each image's mean cosine with the pictures of a concept: ``(N, D)`` and ``(M, D)`` to ``(N,)``, from -1 to 1."""
    return functional.cosine_similarity(images[:, None], concept[None], dim=-1).mean(dim=1)


def _unit_length(features: Any) -> Tensor:
    embeddings: Tensor = features.pooler_output
    return functional.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)
