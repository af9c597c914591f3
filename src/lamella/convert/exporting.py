"""Each expert of a mixture as a plain LoRA by itself."""

from pathlib import Path

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from lamella.errors import LamellaError
from lamella.tuners.mixtures import MolaMixture, find_mixture, modules_to_save


def export_experts(model: PeftModel, folder: str | Path) -> list[Path]:
    """Saves expert e of every block that has one as a plain PEFT LoRA, ``folder/expert_e``.

    The experts' LoRAs act at full weight: their sum weighted by the routers is the mixture. Trained modules outside the
    blocks, such as a classifier, are saved with each.

    Raises:
        LamellaError: no MoLA adapter, a MOLE adapter, or the folder already holds experts.
    """
    mixture = find_mixture(model)
    if not isinstance(mixture, MolaMixture):
        raise LamellaError(
            "The experts of a MOLE adapter are LoRAs that were trained before: they lie where its config's adapters "
            "say. For one LoRA that does what they do together, use lamella.collapse."
        )
    adapter, layers = mixture.adapter, mixture.layers
    folder = Path(folder)
    if any(folder.glob("expert_*")):
        raise LamellaError(f"{folder} already holds exported experts; choose another folder or remove them.")
    config = model.peft_config[adapter]
    saved = modules_to_save(model, adapter)
    paths = []
    for expert in range(max(layer.experts[adapter].num_experts for layer in layers.values())):
        having = {name: layer for name, layer in layers.items() if layer.experts[adapter].num_experts > expert}
        tensors = {
            f"base_model.model.{module}.{key}": value for module, state in saved.items() for key, value in state.items()
        }
        for name, layer in having.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lamella_mola_lora_A[adapter][expert]
            tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lamella_mola_lora_B[adapter][expert]
        lora = LoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora, target_modules=sorted(having),
            task_type=config.task_type, modules_to_save=sorted(saved) or None, inference_mode=True,
            base_model_name_or_path=config.base_model_name_or_path, revision=config.revision,
        )  # fmt: skip
        path = folder / f"expert_{expert}"
        path.mkdir(parents=True)
        contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        save_file(contiguous, path / "adapter_model.safetensors", metadata={"format": "pt"})
        lora.save_pretrained(str(path))
        paths.append(path)
    return paths
