"""Run in a new process: loads the MoLEx adapters that were saved and writes the logits they give."""

import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

import lamella  # noqa: F401  registers the methods with PEFT

torch.set_num_threads(1)
root = Path(sys.argv[1])
found: dict[str, torch.Tensor] = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    architecture = AutoConfig.from_pretrained(folder / "base").architectures[0]
    kind: type[PreTrainedModel] = getattr(transformers, architecture, AutoModel)
    model = PeftModel.from_pretrained(kind.from_pretrained(folder / "base"), folder / "adapter").eval()
    with torch.no_grad():
        found[folder.name] = model(**load_file(folder / "given.safetensors")).logits
    if hasattr(kind, "generate") and "pixel_values" not in load_file(folder / "given.safetensors"):
        given = {k: v for k, v in load_file(folder / "given.safetensors").items() if not k.startswith("decoder_")}
        found[f"{folder.name} says"] = model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
save_file(found, root / "found.safetensors")
