"""What a LoRA has beside its linear maps: one-hot weights are that LoRA as PEFT loads it, with all that was trained."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from lamella import LamellaError, MoleConfig, collapse, compose, doctor, fixed_weights

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 3, 4, 5]])
TEXT = {"input_ids": IDS}
PAIR = {"input_ids": IDS, "decoder_input_ids": IDS}
_SEED = torch.Generator().manual_seed(0)
IMAGE = {"pixel_values": torch.randn(2, 3, 8, 8, generator=_SEED)}
LARGE = {"pixel_values": torch.randn(2, 3, 16, 16, generator=_SEED)}
SOUND = {"input_values": torch.randn(2, 80, generator=_SEED)}


def tied_llama() -> PreTrainedModel:
    model = tiny.llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def vit() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    return ViTModel(config).eval()


def convnext() -> ConvNextModel:
    torch.manual_seed(0)
    config = ConvNextConfig(
        hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, image_size=16, patch_size=2, layer_scale_init_value=1.0
    )
    return ConvNextModel(config).eval()


def wav2vec2() -> Wav2Vec2Model:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=[8, 8],
        conv_stride=[2, 2], conv_kernel=[3, 3], num_feat_extract_layers=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, conv_bias=True,
    )  # fmt: skip
    return Wav2Vec2Model(config).eval()


def gpt2_classifier() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tiny.VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, num_labels=3)
    config.pad_token_id = tiny.PAD
    return GPT2ForSequenceClassification(config).eval()


CASES: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Tensor], dict[str, Any]]] = {
    "an embedding": (tiny.llama, TEXT, {"target_modules": ["q_proj", "embed_tokens"], "r": 3, "lora_alpha": 5}),
    "tokens": (tiny.llama, TEXT, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 8]}),
    "tied tokens": (tied_llama, TEXT, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [4]}}),
    "a bias of B": (tiny.bert, TEXT, {"target_modules": ["query", "dense"], "lora_bias": True}),
    "its biases": (tiny.bert, TEXT, {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "all biases": (tiny.bert, TEXT, {"target_modules": ["query"], "bias": "all"}),
    "biases of Conv1D": (gpt2_classifier, TEXT, {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    "tokens in two stacks": (tiny.t5, PAIR, {"target_modules": ["q"], "trainable_token_indices": {"shared": [3, 5]}}),
    "a convolution in groups": (convnext, LARGE, {"target_modules": ["pwconv1", "dwconv"], "r": 16}),
    "biases of convolutions": (wav2vec2, SOUND, {"target_modules": ["q_proj"], "bias": "all"}),
    "a convolution": (vit, IMAGE, {"target_modules": ["q_proj", "projection"], "lora_bias": True}),
}  # fmt: skip


def trained(make: Callable[[], PreTrainedModel], folder: Path, seed: int, **config: Any) -> Path:
    """A LoRA of which every tensor was trained, as PEFT writes it."""
    base = make()
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def two(kind: str, folder: Path) -> dict[str, Path]:
    make, _, config = CASES[kind]
    return {name: trained(make, folder / name, seed, **config) for seed, name in enumerate("ab")}


# One for each way through the code; the others are variations.
EACH_WAY = ("an embedding", "tied tokens", "a bias of B", "all biases", "a convolution", "biases of convolutions")


@pytest.mark.parametrize(
    "kind", [kind if kind in EACH_WAY else pytest.param(kind, marks=pytest.mark.heavy) for kind in CASES]
)
def test_one_hot_weights_are_the_lora_with_everything_that_was_trained(kind: str, tmp_path: Path) -> None:
    make, inputs, _ = CASES[kind]
    loras = two(kind, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = compose(make(), loras, MoleConfig(init_lora_weights=False, temperature=20.0))
    alone = []
    for name, path in loras.items():
        expected = output(PeftModel.from_pretrained(make(), path).eval(), inputs)
        with fixed_weights(model, {name: 1}):
            torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)
        alone.append(expected)
    assert (alone[0] - alone[1]).abs().max() > 1e-2
    with fixed_weights(model, {}):
        torch.testing.assert_close(output(model, inputs), output(make(), inputs))


def test_a_second_composition_has_the_tokens_of_tied_embeddings_too(tmp_path: Path) -> None:
    loras = two("tied tokens", tmp_path)
    model = compose(tied_llama(), loras)
    first = output(model, TEXT)
    model.save_pretrained(tmp_path / "saved")
    model.load_adapter(tmp_path / "saved", "second")
    model.set_adapter("second")
    assert torch.equal(output(model, TEXT), first)


@pytest.mark.parametrize("kind", ["all biases", "a convolution"])
def test_the_parts_train_their_routers_and_are_saved_and_embedded(kind: str, tmp_path: Path) -> None:
    make, inputs, _ = CASES[kind]
    loras = two(kind, tmp_path)
    for embed in (False, True):
        config = MoleConfig(init_lora_weights=False, temperature=20.0, embed_adapters=embed)
        model = compose(make(), loras, config)
        model.train()
        model(**inputs)[0].float().square().mean().backward()
        routers = {name: p for name, p in model.named_parameters() if "router" in name}
        assert all(p.grad is not None for p in routers.values())
        model.eval()
        model.save_pretrained(tmp_path / f"saved-{embed}")
        again = PeftModel.from_pretrained(make(), tmp_path / f"saved-{embed}").eval()
        assert torch.equal(output(again, inputs), output(model, inputs))


def test_whole_blocks_run_with_all_parts_of_one_lora(tmp_path: Path) -> None:
    loras = two("all biases", tmp_path)
    model = compose(tiny.bert(), loras, MoleConfig(form="block-delta"))
    with fixed_weights(model, {"a": 1, "b": 1}):
        both = output(model, TEXT)
    with fixed_weights(model, {"a": 1}):
        one = output(model, TEXT)
    assert (both - one).abs().max() > 1e-2
    expected = output(PeftModel.from_pretrained(tiny.bert(), loras["a"]).eval(), TEXT)
    torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


def test_embeddings_and_convolutions_collapse_into_plain_loras(tmp_path: Path) -> None:
    for kind in ("an embedding", "a convolution"):
        make, inputs, config = CASES[kind]
        config = {**config, "lora_bias": False}
        loras = {name: trained(make, tmp_path / kind / name, seed, **config) for seed, name in enumerate("ab")}
        model = compose(make(), loras, MoleConfig())
        with fixed_weights(model, {"a": 0.5, "b": 0.25}):
            collapsed = collapse(model, [inputs])
            torch.testing.assert_close(output(collapsed.model, inputs), output(model, inputs), rtol=1e-4, atol=1e-5)


def test_constants_are_refused_by_collapse(tmp_path: Path) -> None:
    model = compose(tiny.bert(), two("all biases", tmp_path))
    with pytest.raises(LamellaError, match="biases"):
        collapse(model, [TEXT])


HEAD = {"target_modules": ["query"], "modules_to_save": ["classifier"]}


def test_a_head_that_all_loras_share_is_taken_over(tmp_path: Path) -> None:
    loras = {name: trained(tiny.bert, tmp_path / name, seed, **HEAD) for seed, name in enumerate("ab")}
    file = "adapter_model.safetensors"
    heads = {name: t for name, t in load_file(loras["a"] / file).items() if "classifier" in name}
    save_file({**load_file(loras["b"] / file), **heads}, loras["b"] / file)
    for task_type in (None, "SEQ_CLS"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model = compose(tiny.bert(), loras, MoleConfig(task_type=task_type))
        for name, path in loras.items():
            with fixed_weights(model, {name: 1}):
                expected = output(PeftModel.from_pretrained(tiny.bert(), path).eval(), TEXT)
                torch.testing.assert_close(output(model, TEXT), expected)
    assert "classifier: the one that all LoRAs were trained with" in str(model.base_model.summaries["default"])
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path / "saved").eval()
    assert torch.equal(output(again, TEXT), output(model, TEXT))
    assert "base-mismatch" not in {finding.code for finding in doctor(tmp_path / "saved", base=tiny.bert()).findings}


def test_modules_are_whole_whose_names_end_as_peft_has_it(tmp_path: Path) -> None:
    """``norm`` of LongLoRA is the last norm, and each ``layernorm``."""
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]))
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter += 0.1 * parameter.requires_grad
    lora.save_pretrained(tmp_path / "a")
    model = compose(tiny.llama(), {"a": tmp_path / "a", "b": tmp_path / "a"})
    with fixed_weights(model, {"a": 1}):
        torch.testing.assert_close(output(model, TEXT), output(lora.eval(), TEXT))


def test_heads_that_differ_are_loudly_missed(tmp_path: Path) -> None:
    loras = {name: trained(tiny.bert, tmp_path / name, seed, **HEAD) for seed, name in enumerate("ab")}
    loras["plain"] = trained(tiny.bert, tmp_path / "plain", 3, target_modules=["query"])
    with pytest.warns(UserWarning, match=r"classifier \(trained whole by a, b, not alike") as said:
        compose(tiny.bert(), loras)
    assert "modules_to_save=['classifier']" in str(said[0].message)
    with pytest.warns(UserWarning, match="the composition trains one of its own"):  # PEFT does so for classifiers
        model = compose(tiny.bert(), loras, MoleConfig(task_type="SEQ_CLS"))
    assert ("classifier", "trained whole by a, b, not alike in all LoRAs") in model.base_model.summaries[
        "default"
    ].skipped
    model.save_pretrained(tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PeftModel.from_pretrained(tiny.bert(), tmp_path / "saved")


def test_a_bias_that_a_layer_adds_in_its_own_way_is_missed_by_name(tmp_path: Path) -> None:
    """ConvNext's norms have their channels before the places."""
    loras = {
        name: trained(convnext, tmp_path / name, seed, target_modules=["pwconv1"], bias="all")
        for seed, name in enumerate("ab")
    }
    with pytest.warns(UserWarning, match=r"embeddings\.layernorm \(trained whole by a, b"):
        compose(convnext(), loras)


def test_a_head_of_other_labels_is_named_with_its_shape(tmp_path: Path) -> None:
    path = trained(lambda: tiny.bert(labels=5), tmp_path / "a", 0, **HEAD)
    with pytest.warns(
        UserWarning, match=r"classifier \(trained whole by all LoRAs, but bias \(5,\) does not fit the model"
    ):
        compose(tiny.bert(), {"a": path, "b": path})


def test_layers_to_transform_leaves_the_others_out(tmp_path: Path) -> None:
    loras = {
        name: trained(tiny.llama, tmp_path / name, seed, target_modules=["q_proj"]) for seed, name in enumerate("ab")
    }
    model = compose(tiny.llama(), loras, MoleConfig(layers_to_transform=[1]))
    composed = [
        name for name, module in model.get_base_model().named_modules() if hasattr(module, "lamella_mole_loras")
    ]
    assert composed == ["model.layers.1.self_attn.q_proj"]
    assert ("a: model.layers.0.self_attn.q_proj", "left out by the config") in model.base_model.summaries[
        "default"
    ].skipped
