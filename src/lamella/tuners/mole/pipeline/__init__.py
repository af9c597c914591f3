"""MOLE inside a diffusers pipeline: routers in its denoiser and text encoders, without a PeftModel."""

from lamella.tuners.mole.pipeline.composing import compose_pipeline, load_pipeline
from lamella.tuners.mole.pipeline.composition import PipelineComposition

__all__ = ["PipelineComposition", "compose_pipeline", "load_pipeline"]
