"""PEFT's files as they come: names of wrapped models and earlier versions, eight bits, folders and layers missing."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lamella import LamellaError, MoleConfig, compose, doctor, fixed_weights
from lamella.adapters import map_to, read_lora

WEIGHTS = "adapter_model.safetensors"
IDS = torch.tensor([[3, 4, 5, 6]])


def trained(make: Callable[[], PreTrainedModel], folder: Path, seed: int = 0, **config: object) -> Path:
    base = make()
    torch.manual_seed(seed)
    given = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **config}
    get_peft_model(base, LoraConfig(**given)).save_pretrained(folder)
    return folder


def renamed(folder: Path, copy: Path, change: Callable[[str], str]) -> Path:
    """The same LoRA under other names."""
    shutil.copytree(folder, copy)
    save_file({change(name): t for name, t in load_file(folder / WEIGHTS).items()}, copy / WEIGHTS)
    return copy


NAMES: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "DDP": lambda name: f"module.{name}",
    "DDP inside": lambda name: name.replace("base_model.model.", "base_model.model.module."),
    "FSDP": lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "torch.compile": lambda name: name.replace("base_model.model.", "_orig_mod.base_model.model."),
    "checkpointing": lambda name: name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "wrapped twice": lambda name: f"base_model.model.{name}",
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "the bare model": lambda name: name.replace("base_model.model.model.", "base_model.model."),
}


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {name: trained(tiny.llama, folder / name, seed) for seed, name in enumerate("ab")}


@pytest.mark.parametrize("wrapper", NAMES)
def test_names_of_wrapped_models_are_the_same_lora(wrapper: str, loras: dict[str, Path], tmp_path: Path) -> None:
    model = tiny.llama()
    expected = map_to(model, read_lora(loras["a"])).modules
    actual = map_to(model, read_lora(renamed(loras["a"], tmp_path / "other", NAMES[wrapper]))).modules
    assert actual.keys() == expected.keys()
    for name, (A, B, scaling) in expected.items():
        assert torch.equal(actual[name].A, A)
        assert torch.equal(actual[name].B, B)
        assert actual[name].scaling == scaling


def test_tensors_of_two_adapters_are_refused(loras: dict[str, Path], tmp_path: Path) -> None:
    names = iter("ab" * 8)
    mixed = renamed(loras["a"], tmp_path / "two", lambda name: name.replace(".weight", f".{next(names)}.weight"))
    with pytest.raises(LamellaError, match=r"several adapters, [ab] and [ab]"):
        read_lora(mixed)


def text_config() -> dict[str, object]:
    return {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16}  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **text_config()})
    return LlavaForConditionalGeneration(config).eval()


def qwen_vl() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = {**text_config(), "rope_parameters": rope}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, bos_token_id=1, eos_token_id=2)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


FORMER: dict[str, tuple[Callable[[], PreTrainedModel], tuple[str, str]]] = {
    "llava": (llava, ("model.language_model.layers", "language_model.model.layers")),
    "qwen-vl": (qwen_vl, ("model.language_model.layers", "model.layers")),
}


@pytest.mark.parametrize("family", FORMER)
def test_names_of_an_earlier_transformers_are_found(family: str, tmp_path: Path) -> None:
    make, (now, then) = FORMER[family]
    loras = {}
    for seed, name in enumerate("ab"):
        plain = trained(make, tmp_path / name, seed, target_modules=r".*language_model.*\.(q_proj|v_proj)")
        loras[name] = renamed(plain, tmp_path / f"former-{name}", lambda key: key.replace(now, then))
        assert read_lora(loras[name]).components["model"].keys() != read_lora(plain).components["model"].keys()
    model = compose(make(), loras)
    with torch.no_grad(), fixed_weights(model, {"b": 1}):
        actual = model(input_ids=IDS).logits
        expected = PeftModel.from_pretrained(make(), tmp_path / "b").eval()(input_ids=IDS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**text_config(), num_local_experts=2, max_position_embeddings=32)).eval()


def test_loras_of_single_experts_are_refused_with_a_way_out(tmp_path: Path) -> None:
    loras = {}
    for seed, name in enumerate("ab"):
        loras[name] = trained(mixtral, tmp_path / name, seed, target_modules=["q_proj"])
        tensors = load_file(loras[name] / WEIGHTS)
        for expert in range(2):
            stem = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.w1"
            tensors |= {f"{stem}.lora_A.weight": torch.ones(2, 16), f"{stem}.lora_B.weight": torch.ones(24, 2)}
        save_file(tensors, loras[name] / WEIGHTS)
    with pytest.raises(LamellaError, match=r"adapts single experts .*experts\.0\.w1.*exclude_modules") as error:
        compose(mixtral(), loras)
    assert "one parameter for all of them" in str(error.value)
    model = compose(mixtral(), loras, MoleConfig(exclude_modules=r".*experts.*"))
    skipped = dict(model.base_model.summaries["default"].skipped)
    assert skipped["a: model.layers.0.block_sparse_moe.experts.0.w1"] == "left out by the config"


def test_eight_bits_are_read_as_the_numbers_they_are(tmp_path: Path) -> None:
    """PEFT casts them too."""
    loras = {}
    for name, kind in (("a", torch.float8_e4m3fn), ("b", torch.float8_e5m2)):
        loras[name] = trained(tiny.llama, tmp_path / name)
        tensors = {key: tensor.to(kind) for key, tensor in load_file(loras[name] / WEIGHTS).items()}
        save_file(tensors, loras[name] / WEIGHTS)
    model = compose(tiny.llama(), loras)
    for name, path in loras.items():
        with torch.no_grad(), fixed_weights(model, {name: 1}):
            expected = PeftModel.from_pretrained(tiny.llama(), path).eval()(input_ids=IDS).logits
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_codes_of_a_quantised_lora_are_refused_by_name(tmp_path: Path) -> None:
    folder = trained(tiny.llama, tmp_path)
    save_file({name: t.to(torch.int8) for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    with pytest.raises(LamellaError, match=r"q_proj.lora_A.weight as int8, the codes of a quantised LoRA"):
        read_lora(folder)


def test_the_folder_above_names_those_that_hold_a_lora(tmp_path: Path) -> None:
    trained(tiny.llama, tmp_path / "run/style")
    with pytest.raises(LamellaError, match=r"That is style: give .*run/style, or subfolder='style'"):
        read_lora(tmp_path / "run")
    trained(tiny.llama, tmp_path / "run/other")
    with pytest.raises(LamellaError, match=r"Name one of other, style"):
        read_lora(tmp_path / "run")
    assert read_lora(tmp_path / "run", subfolder="style").name == "style"


def test_a_layer_that_the_file_lacks_is_named(tmp_path: Path) -> None:
    folder = trained(tiny.llama, tmp_path)
    whole = load_file(folder / WEIGHTS)
    save_file({name: t for name, t in whole.items() if "layers.1.self_attn.v_proj" not in name}, folder / WEIGHTS)
    with pytest.warns(UserWarning, match=r"has nothing for 1 modules .* first model.layers.1.self_attn.v_proj"):
        map_to(tiny.llama(), read_lora(folder))


def test_a_lora_that_adds_nothing_is_said(tmp_path: Path) -> None:
    folder = trained(tiny.llama, tmp_path / "a", init_lora_weights=True)
    tiny.llama().save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="'a' .* adds nothing"):
        read_lora(folder)
    assert "adds-nothing" in {finding.code for finding in doctor(folder, base=tiny.llama()).findings}
    whole = {name: torch.ones_like(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(whole, folder / WEIGHTS)
    assert "adds-nothing" not in {finding.code for finding in doctor(folder, base=tiny.llama()).findings}


WRONG: dict[str, Callable[[nn.Module, dict[str, Path]], object]] = {
    "is a PeftModel with the adapter": lambda model, loras: compose(
        PeftModel.from_pretrained(model, loras["a"]), loras
    ),
    "The base is a str": lambda model, loras: compose("somebody/llama", loras),
    "use lamella.compose_pipeline": lambda model, loras: compose(type("Pipe", (), {"components": {}})(), loras),
    "adapters is a PosixPath": lambda model, loras: compose(model, loras["a"]),
    "adapters is one LoRA's tensors": lambda model, loras: compose(model, load_file(loras["a"] / WEIGHTS)),
    "here a dict is given": lambda model, loras: compose(model, {"a": load_file(loras["a"] / WEIGHTS), "b": {}}),
    "here a LlamaForCausalLM is given": lambda model, loras: compose(model, {"a": model, "b": loras["b"]}),
    "The config is a dict": lambda model, loras: compose(model, loras, {"granularity": "block"}),
    "cannot be called 'v1.0'": lambda model, loras: compose(model, loras, adapter_name="v1.0"),
    "cannot be called 'pop'": lambda model, loras: compose(model, loras, adapter_name="pop"),
    "is not a file or folder": lambda model, loras: compose(model, {"a": "x" * 5000, "b": loras["b"]}),
}


@pytest.mark.parametrize("said", WRONG)
def test_arguments_of_a_wrong_kind_are_named(said: str, loras: dict[str, Path]) -> None:
    model = tiny.llama()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(LamellaError, match=said):
        WRONG[said](model, loras)
    if "PeftModel" not in said:
        assert [name for name, _ in model.named_modules()] == before


def test_numbers_in_order_are_weights(loras: dict[str, Path]) -> None:
    model = compose(tiny.llama(), loras)

    def logits(weights: object) -> Tensor:
        with torch.no_grad(), fixed_weights(model, weights):  # type: ignore[arg-type]
            return model(input_ids=IDS).logits

    expected = logits({"a": 0.25, "b": 1})
    tensor = torch.tensor([0.25, 1.0])
    for weights in ([0.25, 1], (0.25, 1.0), tensor.numpy(), [[0.25, 1]], tensor.double(), [tensor[0], tensor[1]]):
        assert torch.equal(logits(weights), expected)
    for wrong in ("a", ["a", "b"], {"a": "much"}, [None, 1], object()):
        with pytest.raises(LamellaError, match=r"number|one name"):
            logits(wrong)
