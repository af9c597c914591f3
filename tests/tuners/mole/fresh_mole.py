"""Run in a new process: loads compositions that were saved and writes the logits they give."""

import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lamella  # noqa: F401  registers the methods with PEFT

torch.set_num_threads(1)
folder = Path(sys.argv[1])
given = load_file(folder / "given.safetensors")
found = {}
for name in ("embed-False", "embed-True"):
    base = AutoModelForCausalLM.from_pretrained(folder / "llama")
    models = {
        "peft": PeftModel.from_pretrained(base, folder / name),
        "auto": AutoPeftModelForCausalLM.from_pretrained(folder / name),
        "transformers": AutoModelForCausalLM.from_pretrained(folder / name),
    }
    for way, model in models.items():
        with torch.no_grad():
            found[f"{name}-{way}"] = model.eval()(**given).logits
save_file(found, folder / "found.safetensors")
