"""Run in a new process: loads the adapters that were saved, in every way there is, and writes what they give."""

import sys
from pathlib import Path

import torch
import transformers
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import lamella  # noqa: F401  registers the methods with PEFT

torch.set_num_threads(1)
root = Path(sys.argv[1])
actual: dict[str, torch.Tensor] = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir() and (path / "adapter").exists()):
    base, adapter, given = folder / "base", folder / "adapter", load_file(folder / "given.safetensors")
    architecture = AutoConfig.from_pretrained(base).architectures[0]
    kind: type[PreTrainedModel] = getattr(transformers, architecture, AutoModel)
    models = {"peft": PeftModel.from_pretrained(kind.from_pretrained(base), adapter)}
    if architecture == "LlamaForCausalLM":
        models["auto"] = AutoPeftModelForCausalLM.from_pretrained(adapter)
        models["transformers"] = AutoModelForCausalLM.from_pretrained(adapter)
    if architecture == "LlamaForSequenceClassification":
        models["auto"] = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=3)
    for way, model in models.items():
        with torch.no_grad():
            actual[f"{folder.name} {way}"] = model.eval()(**given).logits
    if hasattr(kind, "generate") and kind.can_generate():
        start = {name: tensor for name, tensor in given.items() if not name.startswith("decoder_")}
        actual[f"{folder.name} says"] = models["peft"].generate(
            **start, max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
save_file(actual, root / "found.safetensors")
