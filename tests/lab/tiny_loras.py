"""A tiny base with a task head, and LoRAs on it that do something, on disk; and their factors."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tests.lab.tiny_runs import WORDS
from torch import Tensor

from lamella.lab.data import load_backbone, load_task

QUERIES = "bert.encoder.layer.{}.attention.self.query"


def base_with_head(bert: str, task: str, folder: Path) -> str:
    """The tiny encoder saved with a head for the task: to those that load it, the head is part of it."""
    torch.manual_seed(3)
    backbone = load_backbone(bert, load_task(task))
    torch.nn.init.normal_(backbone.model.classifier.weight)  # a fresh one is so small that all texts get one class
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return str(folder)


def save_lora(base: str, task: str, folder: Path, seed: int, r: int = 2, alpha: float = 6, targets: str = "qv") -> str:
    """A LoRA whose B is not zero, large enough to change what the base says."""
    torch.manual_seed(seed)
    names = {"q": "query", "v": "value"}
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=[names[letter] for letter in targets])
    model = get_peft_model(load_backbone(base, load_task(task)).model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(str(folder))
    return str(folder)


def factors(folder: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each module, by the base's module names, as they are in the file."""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    read = {}
    for name, A in tensors.items():
        if "lora_A" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            read[module] = (A, tensors[name.replace("lora_A", "lora_B")])
    return read


def deltas(folder: str, scaling: float = 3.0) -> dict[str, Tensor]:
    """``s B A`` of each module."""
    return {module: scaling * B @ A for module, (A, B) in factors(folder).items()}


def logits_with(base: str, task: str, changes: dict[str, Tensor]) -> Tensor:
    """What the base answers with these added to its weights."""
    model = load_backbone(base, load_task(task)).model.eval()
    with torch.no_grad():
        for module, change in changes.items():
            model.get_submodule(module).weight += change
        return model(**inputs()).logits


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 5 + len(WORDS), (4, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}
