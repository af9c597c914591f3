"""What cannot be done is refused by name, and the model given stays as it was."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import Tensor, nn

from lamella import LamellaError, MolaConfig


def state(model: nn.Module) -> dict[str, tuple[int, bool]]:
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["qury"]}, r"'qury' \(did you mean 'query'\?\).*BertForSequenceClassification"),
        ({"target_modules": ["query", "vale"]}, r"'vale' \(did you mean 'value'\?\)"),
        ({"target_modules": "nothing.*"}, r"nothing\.\*"),
        ({"target_modules": []}, "target_modules"),
        (
            {"target_modules": ["classifier"], "num_experts": [2, 2]},
            r"only modules outside the blocks of bert\.encoder\.layer",
        ),
        ({"target_modules": ["word_embeddings"]}, r"word_embeddings is a Embedding, which is not a linear layer"),
        ({"target_modules": ["query", "LayerNorm"]}, r"LayerNorm.*not a linear layer.*exclude_modules"),
        ({"num_experts": [2, 2, 2]}, r"3 entries.*2 blocks"),
        ({"num_experts": "2-4-6-8"}, r"4 groups.*2 layers"),
        ({"num_experts": [2, 4], "top_k": 3}, r"top_k=3.*2 experts of block 0"),
        ({"top_k": [1, 1, 1]}, r"top_k has 3 entries.*2 blocks"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    model = tiny.bert()
    before = state(model)
    with pytest.raises(LamellaError, match=message):
        get_peft_model(model, MolaConfig(r=2, **options))
    assert state(model) == before
    assert not [module for module in model.modules() if isinstance(module, tiny.MolaLinear)]


def test_experts_by_block_need_blocks() -> None:
    with pytest.raises(LamellaError, match="only modules outside any block"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), MolaConfig(target_modules=["0"], num_experts="2-4"))


def test_a_model_of_no_known_family_is_adapted_by_structure() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    base = Plain()
    x = torch.randn(5, 6)
    expected = base(x)
    model = get_peft_model(base, MolaConfig(r=2, num_experts=[2, 3], target_modules=["up", "down"]))
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    assert "structure" in str(model.base_model.summary())
    assert model.base_model.summary().experts == {"blocks": [2, 3]}


Change = Callable[[Path], None]


def rewrite_tensors(change: Callable[[dict[str, Tensor]], None]) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


def rewrite_config(**values: object) -> Change:
    def apply(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return apply


def drop_first(tensors: dict[str, Tensor]) -> None:
    del tensors[sorted(tensors)[0]]


def rename_first(tensors: dict[str, Tensor]) -> None:
    key = sorted(tensors)[0]
    tensors[key.replace("layers.0", "layers.7")] = tensors[key].clone()


CHANGES = {
    "another number of experts": (rewrite_config(num_experts=4), r"of another shape.*\(3, .*\(4, "),
    "fewer experts": (rewrite_config(num_experts=2), r"of another shape"),
    "one expert, so no routers": (rewrite_config(num_experts=1, top_k=1), r"without a place.*lamella_mola_router"),
    "another rank": (rewrite_config(r=3), r"of another shape"),
    "another router": (rewrite_config(router="cosine"), r"missing.*log_scale"),
    "more targets": (rewrite_config(target_modules=["q_proj", "v_proj", "o_proj"]), r"missing.*o_proj"),
    "fewer targets": (rewrite_config(target_modules=["q_proj"]), r"without a place.*v_proj"),
    "a tensor missing": (rewrite_tensors(drop_first), r"1 missing, first .*layers\.0"),
    "a tensor too many": (rewrite_tensors(rename_first), r"1 without a place.*layers\.7"),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.adapted(tiny.llama(), target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("change", "low_cpu_mem_usage"), [(change, at % 2 == 0) for at, change in enumerate(CHANGES)])
def test_an_adapter_that_does_not_fit_is_refused(change: str, low_cpu_mem_usage: bool, saved: Path) -> None:
    apply, message = CHANGES[change]
    apply(saved)
    with pytest.raises(LamellaError, match=message):
        PeftModel.from_pretrained(tiny.llama(), saved, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize("change", ["another number of experts", "a tensor missing", "a tensor too many"])
def test_transformers_own_loader_refuses_it_or_says_so(change: str, saved: Path, caplog) -> None:
    """transformers' load_adapter reads the file by itself and leaves PEFT, and with it our check, no say."""
    apply, _ = CHANGES[change]
    apply(saved)
    if "another number" in change:
        with pytest.raises(RuntimeError):
            tiny.llama().load_adapter(str(saved))
        return
    logger = logging.getLogger("transformers.integrations.peft")
    logger.addHandler(caplog.handler)  # transformers keeps its log to itself, and how loud it is depends on its user
    caplog.set_level(logging.WARNING, logger=logger.name)
    try:
        tiny.llama().load_adapter(str(saved))
    finally:
        logger.removeHandler(caplog.handler)
    assert ("MISSING" if "missing" in change else "UNEXPECTED") in caplog.text
    assert "lamella_mola" in caplog.text


def test_an_adapter_of_another_base_is_refused(saved: Path) -> None:
    deeper = tiny.llama(layers=3)
    with pytest.raises(LamellaError, match=r"missing.*layers\.2.*another base model"):
        PeftModel.from_pretrained(deeper, saved)
    with pytest.raises(LamellaError, match="q_proj"):
        PeftModel.from_pretrained(tiny.bert(), saved)


@pytest.mark.parametrize("change", ["another number of experts", "a tensor missing"])
def test_after_a_failed_load_the_adapters_already_there_work_as_before(change: str, saved: Path) -> None:
    model = tiny.adapted(tiny.llama())
    given = tiny.inputs(model.get_base_model())
    with torch.no_grad():
        expected = model(**given).logits
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    CHANGES[change][0](saved)
    with pytest.raises(LamellaError):
        model.load_adapter(saved, "broken")
    for name, parameter in before.items():
        assert torch.equal(model.get_parameter(name), parameter)
    assert model.active_adapters == ["default"]
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)


def test_training_a_block_outside_its_models_forward_is_refused() -> None:
    model = tiny.adapted(tiny.llama(), router_aux_loss_coef=0.5).train()
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    with pytest.raises(LamellaError, match=r"model\.layers\.0\.mlp\.down_proj trains outside.*router_aux_loss_coef=0"):
        layer(torch.randn(2, layer.in_features))
    model.eval()
    layer(torch.randn(2, layer.in_features))
