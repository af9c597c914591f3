"""Loads a saved composition into a pipeline built anew and runs it; started by test_mole_pipeline_saving.py."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tests import tiny_pipelines as tiny

from lamella import load_pipeline

if __name__ == "__main__":
    torch.set_num_threads(1)
    saved, out = map(Path, sys.argv[1:3])
    pipe = tiny.stable_diffusion()
    load_pipeline(pipe, saved)
    save_file({"latents": tiny.run(pipe, ["a cat", "a blue dog"])}, out)
