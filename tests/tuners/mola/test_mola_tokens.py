"""A token's result depends on what the model lets it see, and on nothing else."""

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.reference import mola
from torch import Tensor

from lamella.routing import collect_losses

SOME = ".*(q|query|q_proj|c_attn|wo|o)"
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
KINDS = {"token": {}, "cosine": {"router": "cosine"}, "many": {"num_experts": 5, "top_k": 3}}


def strong(name: str, **config: object) -> PeftModel:
    """An adapter whose effect is far above rounding."""
    return tiny.adapted(tiny.MODELS[name]().double(), lora_alpha=40, **config).double()


def logits(model: PeftModel, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_batch_mates_change_nothing(name: str, kind: str) -> None:
    model = strong(name, **KINDS[kind])
    given = tiny.inputs(model.get_base_model(), rows=4)
    together = logits(model, given)
    for row in range(4):
        alone = {key: value[row : row + 1] for key, value in given.items()}
        torch.testing.assert_close(logits(model, alone), together[row : row + 1], **CLOSE)
    others = {key: value.clone() for key, value in given.items()}
    others["input_ids"][1:] = torch.randint(3, tiny.VOCAB, others["input_ids"][1:].shape)
    torch.testing.assert_close(logits(model, others)[0], together[0], **CLOSE)


@pytest.mark.parametrize(("name", "amount"), [("bert", 1), ("mpnet", 6), ("llama", 6), ("t5", 1)])
def test_right_padding_of_any_amount_changes_nothing(name: str, amount: int) -> None:
    model = strong(name)
    given = tiny.inputs(model.get_base_model(), pad=0)
    expected = logits(model, given)
    padding = torch.zeros(3, amount, dtype=torch.long)
    padded = {**given, "input_ids": torch.cat([given["input_ids"], padding], 1)}
    padded["attention_mask"] = torch.cat([given["attention_mask"], padding], 1)
    actual = logits(model, padded)
    real = actual[:, : expected.shape[1]] if actual.dim() == 3 else actual
    torch.testing.assert_close(real, expected, **CLOSE)


@pytest.mark.parametrize(("name", "amount"), [("llama", 1), ("gpt2", 6)])
def test_left_padding_of_any_amount_changes_nothing(name: str, amount: int) -> None:
    model = strong(name)
    given = tiny.inputs(model.get_base_model(), pad=0)
    expected = logits(model, given)
    padding = torch.zeros(3, amount, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([padding, given["input_ids"]], 1),
        "attention_mask": torch.cat([padding, given["attention_mask"]], 1),
    }
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    torch.testing.assert_close(logits(model, padded)[:, amount:], expected, **CLOSE)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_what_stands_in_the_padding_changes_nothing(name: str) -> None:
    model = strong(name, router_aux_loss_coef=0.5).train()
    results = []
    for filler in (tiny.PAD, 7):
        given = tiny.batch(model.get_base_model())
        # GPT-2 classifies nothing here; labels at padding are -100 already
        given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, filler)
        output = model(**given)
        output.loss.backward()
        results.append({"loss": output.loss.detach(), **tiny.gradients(model)})
    tiny.assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_later_tokens_change_nothing(name: str, kind: str) -> None:
    model = strong(name, **KINDS[kind])
    given = tiny.inputs(model.get_base_model(), pad=0)
    key = "decoder_input_ids" if name == "t5" else "input_ids"
    expected = logits(model, given)
    changed = {**given, key: given[key].clone()}
    changed[key][:, 4:] = 5
    actual = logits(model, changed)
    torch.testing.assert_close(actual[:, :4], expected[:, :4], **CLOSE)
    assert not torch.allclose(actual[:, 4:], expected[:, 4:])


@pytest.mark.parametrize(("name", "search"), [("llama", {}), ("gpt2", {"num_beams": 3}), ("t5", {"num_beams": 3})])
def test_generation_with_a_cache_writes_the_same_text(name: str, search: dict[str, int]) -> None:
    model = strong(name)
    given = tiny.inputs(model.get_base_model(), rows=2)
    given.pop("decoder_input_ids", None)
    if name != "t5":  # left-padded, as decoders are
        given = {key: value.flip(1) for key, value in given.items()}
    options = {**given, **search, "max_new_tokens": 9, "do_sample": False, "min_new_tokens": 9}
    cached = model.generate(**options, use_cache=True)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    with model.disable_adapter():
        plain = model.generate(**options, use_cache=True)
    assert not torch.equal(cached, plain), "the adapter has no effect, so the comparison says nothing"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_cached_logits_are_the_uncached_ones(name: str) -> None:
    model = strong(name)
    given = tiny.inputs(model.get_base_model(), pad=0)
    key = "decoder_input_ids" if name == "t5" else "input_ids"
    whole, cache, steps = logits(model, given), None, []
    for step in range(given[key].shape[1]):
        now = {**given, key: given[key][:, step : step + 1]}
        if name != "t5":
            now["attention_mask"] = given["attention_mask"][:, : step + 1]
        with torch.no_grad():
            output = model(**now, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **CLOSE)


@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize(
    "settings", [{}, {"num_experts": "1-4", "top_k": 1}, {"target_modules": ".*(q|query|q_proj|c_attn|wo|o)"}]
)
def test_the_balance_loss_is_the_mean_of_a_blocks_routers_summed_over_blocks(name: str, settings: dict) -> None:
    model = tiny.adapted(tiny.MODELS[name]().double(), router_aux_loss_coef=0.25, **settings).double().train()
    with tiny.watch(model) as seen, collect_losses() as collected:
        model(**tiny.batch(model.get_base_model()))
    routers = [
        ((place.stack, place.layer), routing.logits.detach(), routing.indices.shape[1], mask)
        for place, routing, mask in seen
    ]
    assert len({block for block, *_ in routers}) == (2 if name != "t5" else 4) / (2 if "num_experts" in settings else 1)
    expected = 0.25 * mola.balance_of_model(routers)
    torch.testing.assert_close(collected.total().detach(), expected, rtol=1e-9, atol=1e-9)


def test_the_z_loss_is_shared_out_the_same_way() -> None:
    model = tiny.adapted(tiny.llama().double(), router_aux_loss_coef=0.0, router_z_loss_coef=0.5).double().train()
    with tiny.watch(model) as seen, collect_losses() as collected:
        model(**tiny.batch(model.get_base_model()))
    expected = sum(0.5 * mola.z_loss(routing.logits.detach(), mask) / 7 for _, routing, mask in seen)
    torch.testing.assert_close(collected.total().detach(), expected, rtol=1e-9, atol=1e-9)
