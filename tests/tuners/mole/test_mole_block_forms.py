"""Whole blocks run with one LoRA each: the block forms against the model with each LoRA on one block by hand."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor, nn

import lamella
from lamella import LamellaError, fixed_weights, masked_experts
from lamella.backbones import hidden_states_of, with_hidden_states

MODES = {"none": None, "non-reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}


def weights_of(outputs: Sequence[Tensor], read: Tensor, router: nn.Module) -> Tensor:
    """G of each sequence, ``(batch, K)``: mean over what is read, side by side, normalised, times e."""
    rows = []
    for b in range(len(read)):
        together = torch.cat([output[b][read[b]].mean(dim=0) for output in outputs])
        normal = (together - together.mean()) / (together.var(unbiased=False) + 1e-12).sqrt()
        products = normal @ router.e.flatten(1).double().t()
        rows.append(router.scale * products / len(normal) + router.bias.double())
    return torch.softmax(torch.stack(rows) / router.temperature(), dim=-1)


@contextmanager
def plainly(
    model: nn.Module, stack: str, loras: dict[str, list], routers: dict[str, nn.Module], read: Tensor, form: str
) -> Iterator[None]:
    """A plain model whose blocks are run K + 1 times by a hook, with merged weights."""

    def mix(index: int, block: nn.Module):
        name = f"{stack}.{index}"

        def hook(_: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
            own, each = hidden_states_of(output), []
            for i in range(3):
                changed = []
                for module, three in loras.items():
                    if module.startswith(f"{name}.") and three[i] is not None:
                        A, B, scaling = three[i]
                        layer = model.get_submodule(module)
                        changed.append((layer, layer.weight.data))
                        layer.weight.data = layer.weight.data + scaling * B @ A
                each.append(hidden_states_of(block.forward(*args, **{**kwargs, "past_key_values": None})))
                for layer, weight in changed:
                    layer.weight.data = weight
            G = weights_of(each, read, routers[name])[:, None, :, None]
            parts = [one - own if form == "block-delta" else one for one in each]
            return with_hidden_states(output, own + sum(G[:, :, i] * part for i, part in enumerate(parts)))

        return hook

    blocks = model.get_submodule(stack)
    hooks = [block.register_forward_hook(mix(i, block), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("form", ["block-delta", "published"])
@pytest.mark.parametrize(("kind", "stack"), [("bert", "bert.encoder.layer"), ("llama", "model.layers")])
def test_a_block_form_is_what_it_says(kind: str, stack: str, form: str, folder: Path) -> None:
    model = trained.composition(kind, folder, form=form, exclude_modules=["pooler.dense"] if kind == "bert" else None)
    given = tiny.inputs(model.get_base_model())
    base = tiny.build(kind, layers=2).double()
    loras = trained.deltas(model, kind, folder)
    read = given["attention_mask"].bool()
    with torch.no_grad(), plainly(base, stack, loras, trained.routers_of(model), read, form):
        expected = base(**given).logits
    torch.testing.assert_close(trained.run(model, given), expected, rtol=1e-5, atol=1e-6)
    weights = trained.weights_seen(model, given)
    assert all((own.std(dim=0) > 1e-9).any() for own in weights.values())
    assert not torch.allclose(expected, trained.run(base, given))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_one_hot_block_delta_is_that_lora(kind: str, folder: Path) -> None:
    model = trained.composition(kind, folder, sharp=False, form="block-delta")
    given = tiny.inputs(model.get_base_model())
    for index, name in enumerate(trained.NAMES):
        alone = trained.run(trained.alone(kind, trained.lora(kind, folder, index)), given)
        trained.one_hot(model, index)
        torch.testing.assert_close(trained.run(model, given), alone, rtol=1e-5, atol=1e-6)
        with fixed_weights(model, {name: 1}):
            torch.testing.assert_close(trained.run(model, given), alone, rtol=1e-5, atol=1e-6)
    with masked_experts(model, drop=["news", "law"]):
        actual = trained.run(model, given)
    alone = trained.run(trained.alone(kind, trained.lora(kind, folder, 1)), given)
    torch.testing.assert_close(actual, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "mode", "router_input"),
    [
        ("bert", "none", "mean"),
        ("bert", "reentrant", "token"),
        ("llama", "non-reentrant", "mean"),
        ("t5", "none", "token"),
    ],
)
def test_training(kind: str, mode: str, router_input: str, folder: Path) -> None:
    results = []
    for each in ("none", mode):
        model = trained.composition(
            kind, folder, form="block-delta", balance="log", router_input=router_input,
            exclude_modules=["pooler.dense"] if kind == "bert" else None,
        )  # fmt: skip
        if MODES[each] is not None:
            model.gradient_checkpointing_enable(MODES[each])
            model.enable_input_require_grads()
        model.train()(**tiny.batch(model.get_base_model())).loss.backward()
        results.append(tiny.gradients(model))
    assert all("mole_router" in name for name in results[0])
    assert all(gradient.any() for name, gradient in results[0].items() if name.endswith(".e"))
    tiny.assert_same(results[1], results[0])


def test_a_flattened_sequence(folder: Path) -> None:
    model = trained.composition("bert", folder, form="block-delta", router_input="flatten", flatten_length=9)
    given = tiny.inputs(model.get_base_model())
    together = trained.run(model, given)
    for row in range(3):
        real = given["attention_mask"][row].bool()
        alone = {name: value[row : row + 1, real] for name, value in given.items()}
        torch.testing.assert_close(trained.run(model, alone), together[row : row + 1], rtol=1e-6, atol=1e-7)


def test_no_output_depends_on_a_later_token(folder: Path) -> None:
    model = trained.composition("llama", folder, form="block-delta")
    ids = torch.randint(3, tiny.VOCAB, (2, 8), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        changed = ids.clone()
        changed[:, 6:] = 5
        after = model(input_ids=changed).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=1e-7, atol=1e-9)


def test_it_generates_without_a_cache_and_refuses_one(folder: Path) -> None:
    model = trained.composition("llama", folder, form="block-delta")
    given = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    with pytest.raises(LamellaError, match="use_cache=False"):
        model.generate(**given, max_new_tokens=3)
    assert model.generate(**given, max_new_tokens=3, min_new_tokens=3, use_cache=False).shape == (1, 8)
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        with pytest.raises(LamellaError, match="keys of its own"):
            model(input_ids=torch.tensor([[4]]), past_key_values=cache)


def test_saved_loaded_disabled_and_unloaded(folder: Path, tmp_path: Path) -> None:
    model = trained.composition("bert", folder, double=False, form="block-delta")
    given = tiny.inputs(model.get_base_model())
    expected = trained.run(model, given)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.bert(), tmp_path)
    assert torch.equal(trained.run(again, given), expected)
    with again.disable_adapter():
        assert torch.equal(trained.run(again, given), trained.run(tiny.bert(), given))
    bare = again.unload()
    assert torch.equal(trained.run(bare, given), trained.run(tiny.bert(), given))
    assert not [module for module in bare.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_only_blocks_have_block_forms() -> None:
    with pytest.raises(LamellaError, match="needs granularity='block', not 'matrix'"):
        lamella.MoleConfig(form="published", granularity="matrix")
