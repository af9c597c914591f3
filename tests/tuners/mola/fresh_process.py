"""Run in a new process: loads what was saved and writes the logits it gives."""

import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lamella  # noqa: F401  registers the methods with PEFT

torch.set_num_threads(1)
folder = Path(sys.argv[1])
given = load_file(folder / "given.safetensors")


def run(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**given).logits


base = AutoModelForCausalLM.from_pretrained(folder / "llama")
save_file(
    {
        "config": torch.tensor(PeftConfig.from_pretrained(folder / "adapter").num_experts),
        "base": run(base),
        "peft": run(PeftModel.from_pretrained(base, folder / "adapter")),
        "auto": run(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")),
        "classifier": run(AutoPeftModelForSequenceClassification.from_pretrained(folder / "head", num_labels=3)),
        "transformers": run(AutoModelForCausalLM.from_pretrained(folder / "adapter")),
    },
    folder / "found.safetensors",
)
