"""What can be set in the recipe of a model; recipes/NAME.yaml has the values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lamella.lab.schema import Settings

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0.0)]


class Schedule(Settings):
    """How a model is trained; the rate rises for a share of the steps, then falls along a cosine."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Rate
    batch_size: Positive = Field(description="blocks per step")
    epochs: Rate = 1.0
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0)
    weight_decay: float = Field(0.1, ge=0.0)
    bf16: bool = Field(False, description="products in bfloat16: faster for wide models on processors that have them")
    log_every: Positive = 50


class TinyMoeSettings(Settings):
    """A small mixture of experts, trained from scratch on several kinds of prose."""

    kinds: list[str] = Field(min_length=1, description="tasks of prose")
    characters: Positive = Field(description="of each kind for training; as many as there are, if fewer")
    held_out_characters: Positive = Field(description="of each kind for the figures that are reported")
    vocabulary: int = Field(gt=256)
    block: int = Field(gt=1, description="tokens of a block")
    layers: Positive
    hidden: Positive
    heads: Positive
    experts: Positive
    top_k: Positive
    expert_width: Positive = Field(description="inner width of an expert")
    shared_width: Positive = Field(description="inner width of the expert that every token visits")
    router_aux_loss_coef: float = Field(ge=0.0)
    smallest_share: float = Field(ge=0.0, lt=1.0, description="an expert with less of a layer's choices is starved")
    schedule: Schedule
    seed: int = Field(0, ge=0)


class SmolExpertsSettings(Settings):
    """A dense Llama whose last MLPs become experts, two for each kind of prose, trained apart."""

    model: str = Field(description="a Llama")
    kinds: list[str] = Field(min_length=1, description="tasks of prose; each is divided in two halves by document")
    layers: Positive = Field(description="the last so many become mixtures")
    top_k: Positive
    block: int = Field(gt=1, description="tokens of a block")
    blocks: Positive = Field(description="of each half for training")
    held_out_blocks: Positive = Field(description="of each kind for the figures that are reported")
    experts: Schedule = Field(description="how each expert is trained")
    routers: Schedule = Field(description="how the routers are trained on all kinds together, everything else frozen")
    router_aux_loss_coef: float = Field(ge=0.0)
    smallest_share: float = Field(ge=0.0, lt=1.0, description="an expert with less of a layer's choices is starved")
    seed: int = Field(0, ge=0)


class SwitchSettings(Settings):
    """A Switch Transformer, trained from scratch to classify texts."""

    task: str = Field(description="a classification task")
    vocabulary: int = Field(gt=256)
    max_length: Positive = Field(description="tokens of a text; longer ones are cut")
    layers: Positive = Field(description="of the encoder")
    sparse_layers: Positive = Field(description="of these, evenly spread")
    hidden: Positive
    heads: Positive
    experts: Positive
    expert_width: Positive
    dropout: float = Field(ge=0.0, lt=1.0)
    router_aux_loss_coef: float = Field(ge=0.0)
    schedule: Schedule
    seed: int = Field(0, ge=0)


class Pace(Settings):
    """How a part of a pipeline is trained, on scenes drawn anew for each step."""

    steps: Positive
    batch_size: Positive
    lr: Rate
    warmup_steps: Positive = 100
    fall: float = Field(1.0, ge=0.0, le=1.0, description="share of the steps, the last, in which the rate falls to 0")
    weight_decay: float = Field(0.0, ge=0.0)
    average: float = Field(0.0, ge=0.0, lt=1.0, description="what a step leaves of the running mean of the weights")
    keep_every: Positive = Field(200, description="steps after which the training is kept on disk")


class TextSettings(Settings):
    """A CLIP text encoder that names what stands where."""

    layers: Positive
    hidden: Positive
    heads: Positive
    pace: Pace


class AutoencoderSettings(Settings):
    """An AutoencoderKL that is taught linear latents."""

    latents: Positive = Field(description="numbers for each 4 x 4 pixels")
    widths: tuple[Positive, Positive, Positive]
    groups: Positive = Field(description="of group norms")
    noise: Rate = Field(description="deviation of the latents that it draws from, and that it says its own have")
    pace: Pace


class DenoiserSettings(Settings):
    """A UNet2DConditionModel that draws what a caption says."""

    widths: tuple[Positive, Positive]
    groups: Positive = Field(description="of group norms")
    heads: Positive
    untold: float = Field(0.1, ge=0.0, lt=1.0, description="share of the pictures of which nothing is said")
    pace: Pace


class DrawingSettings(Settings):
    """How pictures are drawn, and on how many each rate stands."""

    pictures: Positive
    steps: Positive
    guidance: float = Field(ge=1.0)


class TinyDiffusionSettings(Settings):
    """A Stable Diffusion pipeline of rendered scenes."""

    text: TextSettings
    autoencoder: AutoencoderSettings
    denoiser: DenoiserSettings
    drawing: DrawingSettings
    promised: dict[int, Annotated[float, Field(ge=0.0, le=1.0)]] = Field(
        description="share of pictures that are right in whole, by the number of objects"
    )
    seed: int = Field(0, ge=0)


class TinyClipSettings(Settings):
    """A CLIP model of rendered scenes."""

    pipeline: str = Field(description="folder of tiny-diffusion, whose text encoder it has")
    layers: Positive = Field(description="of the image encoder")
    hidden: Positive
    heads: Positive
    patch: Positive = Field(description="pixels a side")
    pace: Pace
    pictures: Positive = Field(description="on which each share stands")
    promised: float = Field(ge=0.0, le=1.0, description="share that prefer their caption to one with colours exchanged")
    seed: int = Field(0, ge=0)
