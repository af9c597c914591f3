"""What cannot be done is refused by name before anything runs, and the model given stays as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import nn
from transformers import DynamicCache

from lamella import LamellaError, MolexConfig
from lamella.tuners.molex import MolexBlock, best_fixed_layer
from lamella.tuners.molex.guests import refuse_sharded

LORA = LoraConfig(r=2, target_modules="all-linear")


def state(model: nn.Module) -> dict[str, tuple[int, bool]]:
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gemma2", {"candidates": [0, 1]}, r"block 1 of model\.layers \(.*full_attention.*unlike block 0.*sliding"),
        ("gemma2", {"candidates": [1]}, r"unlike block 0.*candidates='all'"),
        ("bert", {"candidates": [0, 4]}, r"block 4, but bert\.encoder\.layer has 4 blocks"),
        ("t5", {"candidates": [7]}, r"block 7, but encoder\.block has 4"),
        ("bert", {"candidates": [2]}, r"router cannot receive a gradient.*\[2\].*one candidate.*policy='fixed'"),
        ("bert", {"candidates": "later", "top_k": 4}, r"top_k=4.*no block has more candidates of its kind than 3"),
        ("bert", {"policy": "fixed"}, r"fixed_layer.*best_fixed_layer"),
        ("bert", {"policy": "fixed", "fixed_layer": 9}, r"fixed_layer=9 names block 9"),
        ("bert", {"layers_to_transform": [3, 4]}, r"layers_to_transform=\[3, 4\].*4 blocks"),
        ("bert", {"layers_to_transform": []}, r"layers_to_transform=\[\]"),
        (
            "bert",
            {"layers_to_transform": [1], "layers_pattern": "blocks"},
            r"'blocks' names none.*bert\.encoder\.layer",
        ),
        ("bert", {"exclude_modules": r".*layer\.\d"}, r"leaves no block"),
        ("bert", {"policy": "uniform", "candidates": [1], "layers_to_transform": 1}, r"No block has a guest"),
        ("bert", {"lora": LoraConfig(target_modules=["qury"])}, r"'qury' \(did you mean 'query'\?\)"),
        ("bert", {"lora": LoraConfig(target_modules=["classifier"])}, r"only modules outside the blocks"),
        ("bert", {"lora": LoraConfig(target_modules=["LayerNorm"])}, r"not a linear layer"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_and_changes_nothing(
    name: str, options: dict[str, Any], message: str
) -> None:
    model = tiny.build(name)
    before = state(model)
    with pytest.raises(LamellaError, match=message):
        get_peft_model(model, MolexConfig(**{"lora": LORA, **options}))
    assert state(model) == before
    assert not [module for module in model.modules() if isinstance(module, MolexBlock)]


def test_a_model_whose_blocks_are_all_unlike_has_nothing_to_mix() -> None:
    for policy in ("learned", "random", "uniform"):
        with pytest.raises(LamellaError, match=r"No block has a guest.*no candidate but itself.*policy='self'"):
            get_peft_model(tiny.build("gemma2", layers=2), MolexConfig(lora=None, policy=policy))
    get_peft_model(tiny.build("gemma2", layers=2), MolexConfig(lora=LORA, policy="self"))


def test_lora_for_an_unknown_model_must_name_its_targets() -> None:
    with pytest.raises(LamellaError, match=r"knows none for model_type='mpnet'.*target_modules"):
        get_peft_model(tiny.mpnet(), MolexConfig())


def test_a_model_without_a_width_or_a_stack_is_refused() -> None:
    with pytest.raises(LamellaError, match="No stack of blocks"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), MolexConfig(lora=None))
    plain = nn.ModuleDict({"blocks": nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))})
    with pytest.raises(LamellaError, match="how wide"):
        get_peft_model(plain, MolexConfig(lora=None))


@pytest.mark.parametrize("options", [{"router_aux_loss_coef": 0.0}, {"router_aux_loss_coef": 0.5}])
def test_a_router_that_nothing_reaches_is_frozen_and_setting_it_to_train_is_an_error(options: dict[str, Any]) -> None:
    model = tiny.molex(tiny.bert(layers=4), router_gradient="none", **options).train()
    routers = [p for name, p in model.named_parameters() if "molex_router" in name]
    reached = options["router_aux_loss_coef"] > 0
    assert {p.requires_grad for p in routers} == {reached}
    assert ("the router is frozen" in str(model.base_model.summary())) != reached
    batch = tiny.batch(model.get_base_model())
    model(**batch).loss.backward()
    assert bool(tiny.gradients(model, "molex_router")) == reached
    model.set_adapter("default")
    model.base_model.set_requires_grad("default")
    assert {p.requires_grad for p in routers} == {reached}, "PEFT's own switches must leave it frozen"
    for p in routers:
        p.requires_grad_(True)
    if not reached:
        with pytest.raises(LamellaError, match=r"set to train, but cannot receive a gradient.*router_gradient='scale'"):
            model(**batch)


def test_with_no_gradient_from_the_task_the_balance_loss_alone_moves_the_router() -> None:
    results = []
    for scale in (1.0, 2.0):
        model = (
            tiny.molex(tiny.bert(layers=4).double(), router_gradient="none", router_aux_loss_coef=scale)
            .double()
            .train()
        )
        model(**tiny.batch(model.get_base_model())).loss.backward()
        results.append(tiny.gradients(model, "molex_router"))
    tiny.assert_same(results[1], {name: 2 * gradient for name, gradient in results[0].items()})


def test_training_a_block_outside_its_models_forward_is_refused() -> None:
    block = tiny.blocks(tiny.molex(tiny.gpt2(layers=4), router_aux_loss_coef=0.5).train())[1]
    with pytest.raises(LamellaError, match=r"transformer\.h\.1 trains outside.*router_aux_loss_coef=0"):
        block(torch.randn(1, 3, tiny.HIDDEN))
    random = tiny.blocks(tiny.molex(tiny.gpt2(layers=4), policy="random"))[1]
    with pytest.raises(LamellaError, match=r"policy='random'.*transformer\.h\.1"):
        random(torch.randn(1, 3, tiny.HIDDEN))


def test_sharded_blocks_are_refused_by_name() -> None:
    class FSDPModule:
        pass

    class FSDPBlock(FSDPModule, nn.Linear):
        pass

    plain = nn.Linear(2, 2)
    refuse_sharded(plain, plain)
    with pytest.raises(LamellaError, match=r"FSDP.*DDP"):
        refuse_sharded(FSDPBlock(2, 2), plain)
    with pytest.raises(LamellaError, match=r"FSDP.*DDP"):
        refuse_sharded(plain, FSDPBlock(2, 2))
    plain.weight.ds_id = 0
    with pytest.raises(LamellaError, match=r"ZeRO-3.*DDP"):
        refuse_sharded(plain, plain)


def test_a_cache_that_cannot_be_extended_is_not_gone_on_with() -> None:
    class Own(DynamicCache):
        pass

    model = tiny.molex(tiny.llama(layers=4))
    given, cache = tiny.inputs(model.get_base_model()), Own()
    with torch.no_grad():  # one forward needs nothing of the cache
        torch.testing.assert_close(model(**given, past_key_values=cache).logits, model(**given, use_cache=False).logits)
    with pytest.raises(LamellaError, match=r"Own.*use_cache=False"):
        model(given["input_ids"][:, :1], past_key_values=cache)
    with pytest.raises(LamellaError, match=r"Own.*use_cache=False"):
        model.generate(**given, past_key_values=Own(), max_new_tokens=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_scope": "per-layer"}, r"missing.*layers\.1.*lamella_molex_router"),
        ({"router": "cosine"}, r"missing.*log_scale"),
        ({"alpha_mode": "learned"}, r"missing.*lamella_molex_alpha"),
        ({"policy": "uniform"}, r"without a place.*lamella_molex_router"),
        ({"lora": None}, r"without a place.*lora_A"),
        ({"layers_to_transform": [0]}, r"missing.*lora"),
        ({"lora": {"r": 3, "target_modules": "all-linear"}}, r"of another shape"),
        ({"lora": {"r": 2, "target_modules": ["q_proj"]}}, r"without a place.*lora"),
        ({"lora": {"rank": 2}}, r"lora does not know 'rank'"),
        ({"alfa": 1}, r"MolexConfig does not know 'alfa' \(did you mean 'alpha'\?\)"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny.molex(tiny.llama(layers=4)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    lora = (
        {**saved["lora"], **change["lora"]}
        if isinstance(change.get("lora"), dict)
        else change.get("lora", saved["lora"])
    )
    path.write_text(json.dumps({**saved, **change, "lora": lora}))
    with pytest.raises(LamellaError, match=message):
        PeftModel.from_pretrained(tiny.llama(layers=4), tmp_path)


def test_after_a_failed_load_the_adapters_already_there_work_as_before(tmp_path: Path) -> None:
    tiny.molex(tiny.llama(layers=4)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors[next(name for name in sorted(tensors) if "lora_B" in name)]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    model = tiny.molex(tiny.llama(layers=4))
    given = tiny.inputs(model.get_base_model())
    with torch.no_grad():
        expected = model(**given).logits
    names = {name for name, _ in model.named_parameters()}
    with pytest.raises(LamellaError, match=r"1 missing, first .*lora_B"):
        model.load_adapter(tmp_path, "broken")
    assert {name for name, _ in model.named_parameters()} == names
    assert model.active_adapters == ["default"]
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)


def test_the_best_fixed_layer_is_the_one_with_the_lowest_loss_and_leaves_the_model_alone() -> None:
    base = tiny.llama(layers=4)
    batches = [tiny.batch(base, seed=seed) for seed in range(2)]
    config = MolexConfig(alpha=0.2, lora=LORA)
    losses = []
    for layer in range(4):
        model = get_peft_model(
            tiny.llama(layers=4), MolexConfig(alpha=0.2, lora=None, policy="fixed", fixed_layer=layer)
        )
        with torch.no_grad():
            losses.append(sum(float(model.eval()(**batch).loss) for batch in batches))
    base.train()
    before = state(base)
    assert best_fixed_layer(base, batches, config) == losses.index(min(losses))
    assert len(set(losses)) == 4
    assert state(base) == before
    assert base.training
    assert not hasattr(base, "peft_config")
    with pytest.raises(LamellaError, match="at least one batch"):
        best_fixed_layer(base, [])
    with pytest.raises(LamellaError, match="returned no loss"):
        best_fixed_layer(base, [tiny.inputs(base)])
    with pytest.raises(LamellaError, match="before get_peft_model"):
        best_fixed_layer(tiny.molex(base), batches)
