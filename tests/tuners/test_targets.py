"""What a config asks for is adapted, or refused or missed by name, for all three methods."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tests import tiny, tiny_moe
from tests.families.models import Family, tiny_model
from tests.tuners.mole import trained
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MambaConfig

from lamella import LamellaError, MolaConfig, MoleConfig, MolexConfig, compose
from lamella.tuners.mola import MolaLinear
from lamella.tuners.mole import MoleLinear
from lamella.tuners.molex import MolexBlock

METHODS = ("mola", "molex", "mole")
LAYERS = (MolaLinear, MoleLinear, MolexBlock)


def build(method: str, folder: Path, family: str = "bert", **settings: Any) -> PeftModel:
    model = tiny.build(family, layers=2)
    if method == "mola":
        return get_peft_model(model, MolaConfig(r=2, **settings))
    if method == "molex":
        return get_peft_model(model, MolexConfig(lora=None, **settings))
    return compose(model, trained.loras(family, folder), MoleConfig(**settings))


def adapted(model: nn.Module) -> list[str]:
    return [name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, LAYERS)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", [{}, {"layers_pattern": "layer"}])
def test_only_the_blocks_asked_for_are_adapted(method: str, settings: dict[str, Any], folder: Path) -> None:
    names = adapted(build(method, folder, layers_to_transform=[1], **settings))
    assert names
    assert all(name.startswith("bert.encoder.layer.1") for name in names)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_to_transform": []}, r"layers_to_transform=\[\].*bert\.encoder\.layer has 2 blocks"),
        ({"layers_to_transform": [0, 2]}, r"layers_to_transform=\[0, 2\].*has 2 blocks"),
        ({"layers_to_transform": -1}, "layers_to_transform=-1"),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, r"layers_pattern='layers'.*bert\.encoder\.layer"),
        ({"exclude_modules": ["qury"]}, "exclude_modules names 'qury'"),
        ({"exclude_modules": r".*\.qury"}, r"exclude_modules='.*qury' matches no"),
        ({"exclude_modules": "(query"}, r"exclude_modules='\(query', which is not a regular expression"),
        ({"modules_to_save": ["clasifier"]}, "modules_to_save names 'clasifier'.*did you mean 'classifier'"),
    ],
)
def test_what_names_nothing_is_refused(method: str, settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(LamellaError, match=message):
        build(method, folder, **settings)


def test_a_pattern_that_does_not_compile_is_refused() -> None:
    with pytest.raises(LamellaError, match="target_modules='\\[query', which is not a regular expression"):
        MolaConfig(target_modules="[query")
    with pytest.raises(LamellaError, match="lora has target_modules='\\[query'"):
        MolexConfig(lora=LoraConfig(target_modules="[query"))


def test_no_targets_are_pefts_usual_ones_where_it_knows_them() -> None:
    names = adapted(get_peft_model(tiny.bert(), MolaConfig(r=2, target_modules=None)))
    assert {name.rpartition(".")[2] for name in names} == {"query", "value"}
    with pytest.raises(LamellaError, match=r"No target_modules are given.*'all-linear'"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), MolaConfig(target_modules=None))


def test_an_alpha_by_which_nothing_is_ever_added_is_refused() -> None:
    with pytest.raises(LamellaError, match="lora_alpha=0"):
        MolaConfig(lora_alpha=0)
    with pytest.raises(LamellaError, match="lora_alpha=0"):
        MolexConfig(lora=LoraConfig(lora_alpha=0))
    with pytest.raises(LamellaError, match=r"alpha_pattern\['query'\]=0"):
        MolexConfig(lora=LoraConfig(alpha_pattern={"query": 0}))
    with pytest.raises(LamellaError, match=r"lora_dropout=1\.0"):
        MolexConfig(lora=LoraConfig(lora_dropout=1.0))
    with pytest.raises(LamellaError, match=r"rank_pattern\['query'\]=1000000000"):
        MolexConfig(lora=LoraConfig(rank_pattern={"query": 10**9}))


def test_saved_and_loaded_the_blocks_are_those_that_were_asked_for(tmp_path: Path) -> None:
    model = get_peft_model(tiny.bert(), MolaConfig(r=2, layers_to_transform=[1], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert adapted(PeftModel.from_pretrained(tiny.bert(), tmp_path)) == adapted(model)


def said(record: list[warnings.WarningMessage]) -> str:
    return " ".join(str(one.message) for one in record)


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "down_proj"]])
def test_experts_in_one_tensor_are_named(targets: Any) -> None:
    for config in (MolaConfig(r=2, target_modules=targets), MolexConfig(lora=LoraConfig(target_modules=targets))):
        with pytest.warns(UserWarning, match=r"model\.layers\.\*\.mlp\.experts\.gate_up_proj.*exclude_modules"):
            get_peft_model(tiny_moe.FAMILIES["qwen2_moe"](), config)


def test_experts_in_one_tensor_that_nobody_asked_for_are_not() -> None:
    for settings in ({"target_modules": ["q_proj"]}, {"exclude_modules": ["experts"]}):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            get_peft_model(tiny_moe.FAMILIES["qwen2_moe"](), MolaConfig(r=2, **settings))
        assert "experts" not in said(record)
    with pytest.raises(
        LamellaError, match=r"'gate_proj'.*Several matrices, as of experts, lie in model\.layers\.0\.mlp\.experts"
    ):
        get_peft_model(tiny_moe.FAMILIES["mixtral"](), MolaConfig(target_modules=["gate_proj"]))


def test_a_module_outside_the_blocks_that_is_named_is_adapted_or_missed_loudly() -> None:
    assert "lm_head" in adapted(get_peft_model(tiny.llama(), MolaConfig(r=2, target_modules=["q_proj", "lm_head"])))
    with pytest.warns(UserWarning, match="MoLA does not adapt lm_head .*num_experts"):
        get_peft_model(tiny.llama(), MolaConfig(r=2, target_modules=["q_proj", "lm_head"], num_experts=[2, 2]))
    with pytest.raises(LamellaError, match="embed_tokens is a Embedding"):
        get_peft_model(tiny.llama(), MolaConfig(target_modules=["q_proj", "embed_tokens"]))
    for name in ("lm_head", "embed_tokens"):
        with pytest.warns(UserWarning, match=f"MoLEx does not adapt .*{name} .*modules_to_save"):
            get_peft_model(tiny.llama(), MolexConfig(lora=LoraConfig(target_modules=["q_proj", name])))


class Encoder(nn.Module):
    """Torch's own encoder, whose fast path in evaluation reads weights and calls no module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


@torch.no_grad()
def test_torchs_encoder_layers_run_their_adapters_in_evaluation_too() -> None:
    model, x = Encoder().eval(), torch.randn(2, 5, 16)
    base = model(x)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True
    with pytest.warns(UserWarning, match=r"does not adapt encoder\.layers\.0\.self_attn\.out_proj"):
        adapted_model = get_peft_model(model, MolaConfig(r=2, init_lora_weights=False)).eval()
    evaluated, padded = adapted_model(x), adapted_model(x, padding)
    adapted_model.train()
    torch.testing.assert_close(evaluated, adapted_model(x))
    torch.testing.assert_close(padded, adapted_model(x, padding))
    assert float((evaluated - base).abs().max()) > 1e-2


def test_a_module_whose_weight_is_only_read_is_refused() -> None:
    with pytest.raises(LamellaError, match=r"self_attn\.out_proj cannot be adapted: MultiheadAttention reads"):
        get_peft_model(Encoder(), MolaConfig(target_modules=["linear1", "out_proj"]))


class Fused(nn.Module):
    """It may multiply by a weight itself, as kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.fast = nn.Linear(4, 4), False

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.up.weight) if self.fast else self.up(x)


def test_a_forward_that_reads_the_weight_of_an_adapted_module_is_refused() -> None:
    model = get_peft_model(nn.Sequential(Fused()), MolaConfig(r=2, target_modules=["up"]))
    model(torch.randn(2, 4))
    model.base_model.model[0].fast = True
    with pytest.warns(UserWarning, match="Fused has not called its up.* is not trained"):
        model(torch.randn(2, 4))
    model.eval()
    with pytest.raises(LamellaError, match="Fused has not called its up"):
        model(torch.randn(2, 4))
    with model.disable_adapter():
        model(torch.randn(2, 4))


class Beside(nn.Module):
    """It calls a layer, asks its weight for its kind, and may compute with it too."""

    def __init__(self, computes: bool) -> None:
        super().__init__()
        self.up, self.computes = nn.Linear(4, 4), computes

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x.to(self.up.weight.dtype).view(-1, self.up.weight.shape[1]))
        return h + x @ torch.cat([self.up.weight, self.up.weight])[:4].t() if self.computes else h


def test_so_is_one_that_calls_it_too_and_none_that_looks_at_it() -> None:
    x, config = torch.randn(2, 4), MolaConfig(r=2, target_modules=["up"])
    model = get_peft_model(nn.Sequential(Beside(computes=False)), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
        model.eval()(x)
    part = model.base_model.model[0]
    part.forward = lambda x: part.up.weight.dtype  # nor one that asks a layer which does not run
    model(x)
    model = get_peft_model(nn.Sequential(Beside(computes=True)), config)
    with pytest.warns(UserWarning, match="Beside calls its up, .* and also computes with its weight"):
        model(x).sum().backward()
    with pytest.raises(LamellaError, match="Beside calls its up"), torch.inference_mode():
        model.eval()(x)


def test_what_a_first_forward_shows_of_it_is_refused_before() -> None:
    base = tiny.bert()
    part = base.bert.encoder.layer[1].intermediate
    part.forward = lambda h: nn.functional.gelu(part.dense(h) + nn.functional.linear(h, part.dense.weight))
    with pytest.raises(LamellaError, match=r"intermediate\.dense cannot be adapted: the model calls it and computes"):
        get_peft_model(base, MolaConfig(r=2, target_modules=["intermediate.dense"]))
    with pytest.warns(UserWarning, match=r"does not adapt bert\.encoder\.layer\.1\.intermediate\.dense"):
        model = get_peft_model(base, MolaConfig(r=2))
    model(**tiny.batch(base)).loss.backward()


@pytest.mark.parametrize(
    "config",
    [
        MolaConfig(r=2, target_modules=["intermediate.dense"]),
        MolexConfig(lora=LoraConfig(target_modules=["intermediate.dense"])),
    ],
    ids=["mola", "molex"],
)
def test_so_it_is_in_a_block(config: PeftConfig) -> None:
    model, given = tiny.bert(), {"input_ids": torch.arange(3, 9)[None]}
    adapted_model, part = get_peft_model(model, config).eval(), model.bert.encoder.layer[0]
    part = getattr(part, "base_layer", part).intermediate
    adapted_model(**given)
    assert float(part.dense.weight.sum()) != 0  # read outside a forward
    part.forward = lambda h: nn.functional.gelu(nn.functional.linear(h, part.dense.weight))
    with pytest.raises(LamellaError, match="BertIntermediate has not called its dense"):
        adapted_model(**given)


def test_a_kernel_that_is_not_used_is_no_obstacle() -> None:
    base = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))
    with pytest.warns(UserWarning, match=r"does not adapt backbone\.layers\.0\.mixer\.dt_proj"):
        model = get_peft_model(base, MolaConfig(r=2))
    model(input_ids=torch.ones(1, 4, dtype=torch.long))
    assert {name.rpartition(".")[2] for name in adapted(model)} == {"in_proj", "x_proj", "out_proj"}


def test_a_linear_module_that_puts_out_more_than_a_tensor_is_left_out_and_named() -> None:
    base = tiny_model(Family("phimoe", "ForCausalLM"))
    with pytest.raises(LamellaError, match=r"mlp\.router cannot be adapted: it puts out more than a tensor"):
        get_peft_model(base, MolaConfig(r=2, target_modules=["router", "q_proj"]))
    model = get_peft_model(base, MolaConfig(r=2))
    assert "more than a tensor" in dict(model.base_model.summary().skipped)["model.layers.1.mlp.router"]
    model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_blocks_without_a_linear_module_are_no_blocks_for_mola_and_refused_by_molex() -> None:
    base = tiny_model(Family("ibert", "ForSequenceClassification"))  # of linear layers of its own
    with pytest.raises(LamellaError, match=r"The blocks of ibert\.encoder\.layer hold no linear module.*lora=None"):
        get_peft_model(base, MolexConfig(lora=LoraConfig(target_modules="all-linear")))
    assert adapted(get_peft_model(base, MolaConfig(r=2))) == ["classifier.dense", "classifier.out_proj"]


class _Clamping(nn.Module):
    """Calls its layer after it has changed its weight in place, or computes with a view of it."""

    def __init__(self, view: str | None) -> None:
        super().__init__()
        self.up, self.view = nn.Linear(4, 4, bias=False), view

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.view is None:
            self.up.weight.data.clamp_(-1.0, 1.0)
            return self.up(x)
        weight = self.up.weight.T if self.view == "transposed" else self.up.weight.data.T
        return self.up(x) + x @ weight


@pytest.mark.parametrize("view", [None, "transposed", "data"])
def test_a_weight_that_is_changed_in_place_is_not_computed_with_and_a_view_of_it_is(view: str | None) -> None:
    model = get_peft_model(
        _Clamping(view), MolaConfig(target_modules=["up"], num_experts=2, r=2, init_lora_weights=False)
    )
    x = torch.randn(3, 4)
    if view is None:
        assert model.eval()(x).shape == (3, 4)
    else:
        with pytest.raises(LamellaError, match="also computes with its weight"):
            model.eval()(x)
