from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import transformers
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.processes import run_fresh
from tests.tuners.mole import trained
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from lamella import MoleConfig, compose


def load_all(root: Path) -> None:
    """Loads the adapters that were saved, in every way there is, and writes what they give."""
    torch.set_num_threads(1)
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


def test_a_new_process_loads_the_very_same_models(fresh: ForkServerContext, folder: Path, tmp_path: Path) -> None:
    """Adapters of each method, in every way in which PEFT and transformers load one."""

    def on_disk(case: str, model: PreTrainedModel) -> PreTrainedModel:
        model.save_pretrained(tmp_path / case / "base")
        return type(model).from_pretrained(tmp_path / case / "base")

    models: dict[str, PeftModel] = {
        f"molex-{name}": tiny.molex(on_disk(f"molex-{name}", tiny.build(name)), top_k=2) for name in tiny.PATHS
    }
    models["mola"] = tiny.adapted(on_disk("mola", tiny.llama()), num_experts=[2, 5])
    head = on_disk("mola-head", tiny.llama_classifier())
    models["mola-head"] = tiny.adapted(head, router="cosine", task_type="SEQ_CLS")
    with torch.no_grad():
        models["mola-head"].get_base_model().score.modules_to_save["default"].weight.mul_(2)
    for case, embed in (("mole", False), ("mole-embedded", True)):
        base = on_disk(case, tiny.llama())
        models[case] = compose(base, trained.loras("llama", folder), MoleConfig(embed_adapters=embed))
        trained.sharpen(models[case])

    expected: dict[str, torch.Tensor] = {}
    for case, model in models.items():
        model.eval().save_pretrained(tmp_path / case / "adapter")
        given = tiny.inputs(model.get_base_model())
        save_file(given, tmp_path / case / "given.safetensors")
        with torch.no_grad():
            expected[case] = model(**given).logits
        if model.get_base_model().can_generate():
            start = {name: tensor for name, tensor in given.items() if not name.startswith("decoder_")}
            expected[f"{case} says"] = model.generate(**start, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    run_fresh(fresh, load_all, tmp_path)
    actual = load_file(tmp_path / "found.safetensors")
    assert {f"{case} {way}" for case in ("mola", "mole", "molex-llama") for way in ("auto", "transformers")} < set(
        actual
    )
    assert "mola-head auto" in actual
    assert sum("says" in name for name in actual) == 7
    for name, tensor in actual.items():
        wanted = expected[name if "says" in name else name.split(" ")[0]]
        assert torch.equal(tensor, wanted), name
