"""How well images fit texts and other images, by CLIP: cosines of its embeddings.

MOLE reports both for its compositions (arXiv 2404.13628, tables 1 and 2): an image against its prompt, and against
pictures of each concept. Any ``transformers.CLIPModel`` will do; the numbers of two CLIP models are not comparable.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# CLIP's own, which its image processors repeat; see OPENAI_CLIP_MEAN in transformers.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def embed_images(model: Any, images: Tensor) -> Tensor:
    """CLIP's embeddings of images, differentiable.

    Args:
        model: a CLIPModel.
        images: ``(N, 3, H, W)`` from 0 to 1, of any size: they are scaled to the model's, bicubically.

    Returns:
        ``(N, D)`` of length 1, float32 or wider.
    """
    size = model.config.vision_config.image_size
    weight = model.visual_projection.weight
    scaled = functional.interpolate(
        images.to(weight), size=(size, size), mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 1)
    mean, std = (
        torch.tensor(values, device=weight.device, dtype=weight.dtype)[:, None, None] for values in (_MEAN, _STD)
    )
    pooled = model.vision_model(pixel_values=(scaled - mean) / std).pooler_output
    return _unit_length(model.visual_projection(pooled))


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
    pooled = model.text_model(input_ids=input_ids.to(device), attention_mask=mask).pooler_output
    return _unit_length(model.text_projection(pooled))


def text_alignment(images: Tensor, texts: Tensor) -> Tensor:
    """The cosine of each image's embedding ``(N, D)`` and that of its own text ``(N, D)``: ``(N,)``, from -1 to 1."""
    return functional.cosine_similarity(images, texts, dim=-1)


def image_alignment(images: Tensor, concept: Tensor) -> Tensor:
    """Each image's mean cosine with the pictures of a concept: ``(N, D)`` and ``(M, D)`` to ``(N,)``, from -1 to 1."""
    return functional.cosine_similarity(images[:, None], concept[None], dim=-1).mean(dim=1)


def _unit_length(embeddings: Tensor) -> Tensor:
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return functional.normalize(wide, dim=-1)
