"""LoRAs for diffusion: the same one in PEFT's, diffusers' and kohya's hands is the same LoRA.

On tiny random models from real classes; the files are written by diffusers' and PEFT's own writers.
"""

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lamella import LamellaError
from lamella.adapters import Factors, LoraSource, map_to, read_lora

UNET = LoraConfig(
    r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in"],
    rank_pattern={"to_v": 2}, alpha_pattern={"to_k": 5}, init_lora_weights=False,
)  # fmt: skip
TEXT = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "out_proj", "fc1"], init_lora_weights=False)


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def text_config(width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=50, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, projection_dim=6,
    )  # fmt: skip


def text_encoder(width: int = 8) -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(text_config(width))


def adapted(model: nn.Module, config: LoraConfig) -> nn.Module:
    torch.manual_seed(3)
    model.add_adapter(config)
    return model


def scalings(model: nn.Module) -> dict[str, float]:
    return {name: m.scaling["default"] for name, m in model.named_modules() if hasattr(m, "scaling")}


class Written:
    """One LoRA for a UNet and a text encoder, as three programs write it."""

    def __init__(self, folder: Path) -> None:
        unet_, text = adapted(unet(), UNET), adapted(text_encoder(), TEXT)
        self.scalings = {"unet": scalings(unet_), "text_encoder": scalings(text)}
        states = {"unet": get_peft_model_state_dict(unet_), "text_encoder": get_peft_model_state_dict(text)}
        self.states = states
        self.diffusers = folder / "diffusers"
        StableDiffusionPipeline.save_lora_weights(
            self.diffusers,
            unet_lora_layers=states["unet"],
            text_encoder_lora_layers=states["text_encoder"],
            unet_lora_adapter_metadata=UNET.to_dict(),
            text_encoder_lora_adapter_metadata=TEXT.to_dict(),
        )
        self.kohya = folder / "style.safetensors"
        save_file(self.in_kohyas_names(), self.kohya, metadata={"ss_base_model_version": "sd_v1"})
        self.peft = folder / "peft"
        wrapped = get_peft_model(unet(), UNET)
        set_peft_model_state_dict(wrapped, {f"base_model.model.{n}": t for n, t in states["unet"].items()})
        wrapped.save_pretrained(self.peft)

    def in_kohyas_names(self) -> dict[str, Tensor]:
        """diffusers' converter, whose alphas (always the rank) are put right."""
        joined = {f"{part}.{name}": t.clone() for part, state in self.states.items() for name, t in state.items()}
        # kohya trains text encoders of transformers 4, which lie one level deeper
        joined = {name.replace("text_encoder.", "text_encoder.text_model."): t for name, t in joined.items()}
        converted = convert_state_dict_to_kohya(joined)
        for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te1_text_model_")):
            for name, scaling in self.scalings[part].items():
                alpha = converted[f"{prefix}{name.replace('.', '_')}.alpha"]
                alpha_now = float(alpha) * scaling
                converted[f"{prefix}{name.replace('.', '_')}.alpha"] = torch.tensor(alpha_now)
        return converted


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("loras"))


def assert_same(actual: dict[str, Factors], expected: dict[str, Factors]) -> None:
    assert actual.keys() == expected.keys()
    assert actual, "nothing to compare"
    for name, factors in expected.items():
        assert torch.equal(actual[name].A, factors.A), name
        assert torch.equal(actual[name].B, factors.B), name
        assert actual[name].scaling == pytest.approx(factors.scaling), name


def on_unet(path: Path) -> dict[str, Factors]:
    return map_to(unet(), read_lora(path)).modules


def test_peft_diffusers_and_kohya_files_of_one_lora_are_the_same_on_the_unet(written: Written) -> None:
    expected = on_unet(written.peft)
    assert {f.scaling for f in expected.values()} == {6 / 3, 6 / 2, 5 / 3}
    for name, factors in expected.items():
        assert factors.scaling == pytest.approx(written.scalings["unet"][name])
    assert_same(on_unet(written.diffusers), expected)
    assert_same(on_unet(written.kohya), expected)


def test_diffusers_and_kohya_files_are_the_same_on_the_text_encoder(written: Written) -> None:
    from_diffusers = map_to(text_encoder(), read_lora(written.diffusers))
    from_kohya = map_to(text_encoder(), read_lora(written.kohya))
    assert len(from_diffusers.modules) == 6
    assert_same(from_kohya.modules, from_diffusers.modules)
    assert {f.scaling for f in from_kohya.modules.values()} == {1.5}
    assert from_kohya.renamed == "text_model. taken off each name"
    assert ("unet", "for another component of the pipeline") in from_diffusers.skipped


def test_the_two_text_encoders_of_sdxl_are_told_apart_by_their_shapes(tmp_path: Path) -> None:
    def factors(prefix: str, width: int) -> dict[str, Tensor]:
        stem = f"{prefix}_text_model_encoder_layers_1_self_attn_q_proj"
        return {
            f"{stem}.lora_down.weight": torch.randn(2, width),
            f"{stem}.lora_up.weight": torch.randn(width, 2),
            f"{stem}.alpha": torch.tensor(4.0),
        }

    save_file({**factors("lora_te1", 8), **factors("lora_te2", 12)}, tmp_path / "xl.safetensors")
    source = read_lora(tmp_path / "xl.safetensors")
    assert set(source.components) == {"text_encoder", "text_encoder_2"}
    for width in (8, 12):
        ((name, own),) = map_to(text_encoder(width), source).modules.items()
        assert name == "encoder.layers.1.self_attn.q_proj"
        assert (own.A.shape, own.scaling) == ((2, width), 2.0)
    for component in source.components.values():
        assert set(component) == {"text_model.encoder.layers.1.self_attn.q_proj"}


def test_the_projection_of_a_text_encoder_is_found_beside_its_layers(tmp_path: Path) -> None:
    tensors = {}
    for stem in ("text_projection", "text_model_encoder_layers_0_mlp_fc1"):
        width = 6 if stem == "text_projection" else 16
        tensors[f"lora_te2_{stem}.lora_down.weight"] = torch.randn(2, 8)
        tensors[f"lora_te2_{stem}.lora_up.weight"] = torch.randn(width, 2)
    save_file(tensors, tmp_path / "xl.safetensors")
    model = CLIPTextModelWithProjection(text_config(8))
    mapped = map_to(model, read_lora(tmp_path / "xl.safetensors")).modules
    assert set(mapped) == {"text_projection", "text_model.encoder.layers.0.mlp.fc1"}


def test_1x1_convolutions_are_read_as_linear_maps_of_their_channels(written: Written) -> None:
    model = unet()
    name = "down_blocks.1.attentions.0.proj_in"
    assert isinstance(model.get_submodule(name), nn.Conv2d)
    A, B, _ = on_unet(written.kohya)[name]
    assert (A.shape, B.shape) == ((3, 16), (16, 3))


def test_what_was_read_is_said(written: Written) -> None:
    from_kohya, from_diffusers = read_lora(written.kohya), read_lora(written.diffusers)
    assert (from_kohya.format, from_kohya.base, from_kohya.name) == ("kohya", "sd_v1", "style")
    assert (from_diffusers.format, from_diffusers.base) == ("diffusers", None)
    assert list(from_diffusers.components) == ["text_encoder", "unet"]
    assert "unet: " in str(from_kohya)
    assert "ranks 2, 3" in str(from_kohya)


def test_a_kohya_file_without_alphas_has_scaling_one(written: Written, tmp_path: Path) -> None:
    tensors = {name: t for name, t in written.in_kohyas_names().items() if not name.endswith(".alpha")}
    save_file(tensors, tmp_path / "a.safetensors")
    source = read_lora(tmp_path / "a.safetensors")
    assert {f.scaling for f in source.components["unet"].values()} == {1.0}


def test_a_diffusers_file_without_header_has_scaling_one(written: Written, tmp_path: Path) -> None:
    save_file(load_file(written.diffusers / "pytorch_lora_weights.safetensors"), tmp_path / "a.safetensors")
    source = read_lora(tmp_path / "a.safetensors")
    assert {f.scaling for part in source.components.values() for f in part.values()} == {1.0}


def test_diffusers_older_names_are_the_same_lora(written: Written, tmp_path: Path) -> None:
    """Attention processors and lora_linear_layer, as diffusers wrote before it used PEFT."""
    old = {}
    for name, tensor in written.states["unet"].items():
        module, _, side = name.removesuffix(".weight").rpartition(".lora_")
        step = {"A": "down", "B": "up"}[side]
        parent, _, leaf = module.rpartition(".")
        if leaf in ("to_q", "to_k", "to_v"):
            old[f"unet.{parent}.processor.{leaf}_lora.{step}.weight"] = tensor
        elif module.endswith("to_out.0"):
            old[f"unet.{module.removesuffix('.to_out.0')}.processor.to_out_lora.{step}.weight"] = tensor
        else:
            old[f"unet.{module}.lora.{step}.weight"] = tensor
    text = convert_state_dict_to_diffusers(written.states["text_encoder"])
    assert any("lora_linear_layer" in name for name in text)
    save_file({**old, **{f"text_encoder.{n}": t for n, t in text.items()}}, tmp_path / "old.safetensors")
    source = read_lora(tmp_path / "old.safetensors")
    new = read_lora(written.diffusers)
    for component in ("unet", "text_encoder"):
        actual, expected = source.components[component], new.components[component]
        assert actual.keys() == expected.keys()
        for name in expected:
            assert torch.equal(actual[name].A, expected[name].A)
            assert torch.equal(actual[name].B, expected[name].B)


def test_a_file_of_one_model_that_names_no_component_is_for_that_model(tmp_path: Path) -> None:
    adapted(unet(), UNET).save_lora_adapter(tmp_path)
    source = read_lora(tmp_path)
    assert list(source.components) == ["model"]
    mapped = map_to(unet(), source).modules
    assert {f.scaling for f in mapped.values()} == {6 / 3, 6 / 2, 5 / 3}


def test_kohyas_numbering_of_sdxl_blocks_is_translated(tmp_path: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.lora_down.weight": torch.randn(2, 16),
        f"{stem}.lora_up.weight": torch.randn(16, 2),
        f"{stem}.alpha": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "xl.safetensors")
    actual = on_unet(tmp_path / "xl.safetensors")
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert_same(actual, {name: Factors(tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"], 0.5)})


def test_3x3_convolutions_keep_their_kernel(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["conv1", "to_q"], init_lora_weights=False)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(adapted(unet(), config))
    )
    mapped = on_unet(tmp_path)
    assert mapped["down_blocks.0.resnets.0.conv1"].A.shape == (2, 8, 3, 3)
    assert mapped["down_blocks.0.resnets.0.conv1"].B.shape == (8, 2)


def test_the_digest_of_a_single_file_is_its_own(written: Written) -> None:
    assert read_lora(written.kohya).reference.sha256 == hashlib.sha256(written.kohya.read_bytes()).hexdigest()


def refused(tensors: dict[str, Tensor], folder: Path, *said: str, metadata: dict[str, str] | None = None) -> None:
    save_file(tensors, folder / "a.safetensors", metadata=metadata)
    with pytest.raises(LamellaError) as error:
        read_lora(folder / "a.safetensors")
    assert "\n" not in str(error.value)
    for words in said:
        assert words in str(error.value)


def test_damaged_kohya_files_are_refused_by_name(written: Written, tmp_path: Path) -> None:
    whole = written.in_kohyas_names()
    up = next(name for name in whole if name.endswith("lora_up.weight"))
    down = up.replace("lora_up", "lora_down")
    refused({n: t for n, t in whole.items() if n != up}, tmp_path, up)
    refused({n: t for n, t in whole.items() if n != down}, tmp_path, "alpha without a LoRA")
    refused({**whole, "lora_unet_mid_block.strange": torch.ones(1)}, tmp_path, "lora_unet_mid_block.strange")
    refused({**whole, "diffusion_model.x.lora_A.weight": torch.ones(1)}, tmp_path, "diffusion_model.x.lora_A.weight")


def test_damaged_diffusers_files_are_refused_by_name(written: Written, tmp_path: Path) -> None:
    whole = load_file(written.diffusers / "pytorch_lora_weights.safetensors")
    refused({**whole, "strange.lora_A.weight": torch.ones(1, 1)}, tmp_path, "strange.lora_A.weight", "no component")
    refused({**whole, "unet.mid_block.lora_C": torch.ones(1)}, tmp_path, "mid_block.lora_C")
    refused(whole, tmp_path, "lora_adapter_metadata", metadata={LORA_ADAPTER_METADATA_KEY: "{"})
    dora = '{"unet.use_dora": true, "unet.r": 3}'
    refused(whole, tmp_path, "DoRA", metadata={LORA_ADAPTER_METADATA_KEY: dora})


def test_a_component_that_fits_nothing_or_is_absent_is_named(written: Written) -> None:
    source: LoraSource = read_lora(written.diffusers)
    with pytest.raises(LamellaError, match="holds text_encoder, unet; none fits Linear"):
        map_to(nn.Linear(2, 2), source)
    with pytest.raises(LamellaError, match="has nothing for transformer: it holds text_encoder, unet"):
        map_to(unet(), source, component="transformer")
    assert_same(map_to(unet(), source, component="unet").modules, map_to(unet(), source).modules)


def test_without_diffusers_the_extra_is_named(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(LamellaError, match=r"pip install 'lamella\[diffusion\]'"):
        read_lora(written.kohya)
    assert read_lora(written.diffusers).components["unet"]  # its names need no translation


@pytest.mark.parametrize("ending", ["lora_{}.weight", "lora_{}", "lora_{}.default"])
def test_an_alpha_is_one_number(ending: str, tmp_path: Path) -> None:
    tensors = {f"unet.x.{ending.format('A')}": torch.randn(2, 8), f"unet.x.{ending.format('B')}": torch.randn(8, 2)}
    refused(tensors | {"unet.x.alpha": torch.ones(2)}, tmp_path, "2 numbers as x.alpha")
    save_file(tensors | {"unet.x.alpha": torch.tensor([1.0])}, tmp_path / "one.safetensors")
    (found,) = read_lora(tmp_path / "one.safetensors").components["unet"].values()
    assert found.scaling == 0.5
