"""`tiny-clip`: a CLIP model of the pictures and captions that tiny-diffusion learns from, with its text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, set_seed

from lamella.diffusion.clip import embed_images, embed_texts
from lamella.errors import LamellaError
from models.building import Clock, Made
from models.diffusion.captions import captions
from models.diffusion.text import token_ids
from models.diffusion.training import curve, refuse_others, seeded, train
from models.diffusion.world import COLOURS, EVERYTHING, NOTHING, SIZE, TEXTURES, Scenes, render
from models.settings import TinyClipSettings

_LARGEST_SCALE = 100.0  # of the cosines, as CLIP has it


def make_tiny_clip(settings: TinyClipSettings, stages: Path) -> Made:
    """Teach an image encoder to choose a picture's own caption, also from one with two objects' colours exchanged.

    Args:
        settings: of the image encoder, and where the pipeline is.
        stages: the folder that keeps the training on the way.

    Raises:
        LamellaError: there is no pipeline, or the folder keeps a training with other settings.
    """
    source = Path(settings.pipeline)
    if not (source / "text_encoder").is_dir():
        way_out = "Make one with `python -m models tiny-diffusion`, or give pipeline=FOLDER."
        raise LamellaError(f"{source} holds no pipeline. {way_out}")
    refuse_others(stages, settings.model_dump(mode="json", exclude={"pictures", "promised"}))
    tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(source / "text_encoder", dtype=torch.float32)
    clock, seed = Clock(), settings.seed
    set_seed(seed)
    model = untrained(settings, encoder)
    batch = settings.pace.batch_size
    with clock.part("clip"):
        model, losses = train(
            model,
            lambda generator: _loss(model, tokenizer, EVERYTHING.draw(batch, generator), generator),
            settings.pace,
            stages / "clip.safetensors",
            seed,
        )
    model.half().float()  # figures are those of the weights that are kept
    with clock.part("scores"):
        chosen = share_chosen(model, tokenizer, settings.pictures, seed)
    log = {"chosen": chosen, "parameters": model.num_parameters(), "seconds": clock.seconds, "curve": curve(losses)}
    return Made(model.half(), tokenizer, log, _failed(chosen, settings.promised))


def untrained(settings: TinyClipSettings, encoder: CLIPTextModel) -> CLIPModel:
    """A model with this text encoder, which stays as it is."""
    vision = CLIPVisionConfig(
        hidden_size=settings.hidden,
        intermediate_size=4 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        image_size=SIZE,
        patch_size=settings.patch,
    )
    text = encoder.config
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=text.hidden_size)
    )
    model.text_model.load_state_dict(encoder.state_dict())
    model.text_model.requires_grad_(False)
    return model


def colours_exchanged(scenes: Scenes) -> Scenes:
    """The same objects, where the first two of a picture have each other's colour; a single object stays as it is."""
    stands = scenes.kinds != NOTHING
    order = stands.cumsum(dim=1)  # (pictures, 4)
    first, second = ((stands & (order == at)).double().argmax(dim=1, keepdim=True) for at in (1, 2))
    second = torch.where(order[:, -1:] > 1, second, first)
    places = torch.cat([first, second], dim=1)  # (pictures, 2)
    kinds = scenes.kinds.gather(1, places) - 1
    colours = kinds // len(TEXTURES) % len(COLOURS)
    changed = kinds + (colours.flip(1) - colours) * len(TEXTURES)
    return Scenes(scenes.kinds.scatter(1, places, changed + 1), scenes.backgrounds, scenes.offsets)


def cosines(
    model: CLIPModel, tokenizer: CLIPTokenizer, scenes: Scenes, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Of pictures and their captions ``(pictures, pictures)``, and of pictures and those with colours exchanged.

    A caption in which the exchange changes nothing is no wrong one: minus infinity.
    """
    wrong = colours_exchanged(scenes)
    images = embed_images(model, render(scenes))  # (pictures, D)
    texts = [embed_texts(model, token_ids(tokenizer, captions(part, generator))) for part in (scenes, wrong)]
    right, exchanged = (images @ part.T for part in texts)
    same = (wrong.kinds == scenes.kinds).all(dim=1)
    return right, exchanged.masked_fill(same, -torch.inf)


def _loss(model: CLIPModel, tokenizer: CLIPTokenizer, scenes: Scenes, generator: torch.Generator) -> Tensor:
    """CLIP's, with the captions in which colours were exchanged among those that a picture is not to choose."""
    right, exchanged = cosines(model, tokenizer, scenes, generator)
    scale, own = model.logit_scale.exp().clamp(max=_LARGEST_SCALE), torch.arange(len(scenes))
    of_images = cross_entropy(scale * torch.cat([right, exchanged], dim=1), own)
    return (of_images + cross_entropy(scale * right.T, own)) / 2


@torch.no_grad()
def share_chosen(model: CLIPModel, tokenizer: CLIPTokenizer, count: int, seed: int) -> dict[str, dict[str, float]]:
    """How often a picture with two or three objects that no training saw chooses its own caption.

    Returns:
        For kinds that were trained and kinds that were not: shares of pictures that prefer their caption to the one
        with colours ``exchanged``, and to all of the ``others``.
    """
    shares = {}
    for name, kinds in {"trained": EVERYTHING.trained, "held_out": EVERYTHING.held_out}.items():
        generator = seeded(seed, "choosing", name)
        scenes = EVERYTHING.draw(count, generator, objects=[2, 3], kinds=kinds, kept_out=True)
        right, exchanged = cosines(model, tokenizer, scenes, generator)
        chosen = {
            "exchanged": right.diagonal() > exchanged.diagonal(),
            "others": right.argmax(dim=1) == torch.arange(count),
        }
        shares[name] = {against: values.double().mean().item() for against, values in chosen.items()}
    return shares


def _failed(chosen: dict[str, Any], promised: float) -> list[str]:
    """What the model should be and is not."""
    share = chosen["trained"]["exchanged"]
    if share >= promised:
        return []
    return [f"{share:.1%} of pictures prefer their caption to one with colours exchanged; {promised:.1%} are promised."]
