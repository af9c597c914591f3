"""On a decoder a decision reads the prompt alone, and a sequence goes on as it began, with a cache and without."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from tests.reference import mole_model
from tests.tuners.mole import trained
from torch import Tensor
from transformers import DynamicCache

import lamella
from lamella import LamellaError, fixed_weights, masked_experts

DECODERS = ["llama", "gpt2"]


def drawn(rows: int, tokens: int, seed: int = 3) -> Tensor:
    return torch.randint(3, tiny.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits(model: PeftModel, ids: Tensor, **more: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.mark.parametrize(
    ("kind", "granularity", "router_input"),
    [
        ("llama", "matrix", "token"),
        ("llama", "network", "mean"),
        ("gpt2", "sublayer", "mean"),
        ("gpt2", "block", "token"),
    ],
)
def test_where_nothing_tells_the_prompt_no_output_depends_on_a_later_token(
    kind: str, granularity: str, router_input: str, folder: Path
) -> None:
    model = trained.composition(kind, folder, granularity=granularity, router_input=router_input, prompt_tokens=3)
    ids = drawn(2, 8)
    before = logits(model, ids)
    for position in range(1, 8):
        changed = ids.clone()
        changed[:, position:] = drawn(2, 8 - position, seed=position)
        after = logits(model, changed)
        torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-7, atol=1e-9)
        assert not torch.allclose(after[:, position], before[:, position])
    if router_input == "mean":  # the first tokens run with uniform weights
        with fixed_weights(model, dict.fromkeys(trained.NAMES, 1 / 3)):
            uniform = logits(model, ids)
        torch.testing.assert_close(uniform[:, :3], before[:, :3])
        assert not torch.allclose(uniform[:, 3:], before[:, 3:])


def test_no_decoder_reads_its_answer_because_nobody_has_heard_of_it(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(tiny.build("codegen"), lora).save_pretrained(tmp_path / name)
    model = lamella.compose(tiny.build("codegen"), {name: tmp_path / name for name in "ab"}).eval()
    for name, parameter in model.named_parameters():
        if "router" in name:
            torch.nn.init.normal_(parameter, std=3)
    ids, answer = drawn(2, 8), drawn(2, 3, seed=9)
    changed = torch.cat([ids[:, :5], answer], dim=1)
    before, after = (logits(model, x, labels=x.masked_fill(torch.arange(8) < 5, -100)) for x in (ids, changed))
    torch.testing.assert_close(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:])


@pytest.mark.parametrize(
    ("granularity", "router_input"),
    [("matrix", "mean"), ("sublayer", "token"), ("block", "mean"), ("network", "token")],
)
def test_cross_attention_says_nothing_of_a_later_token(granularity: str, router_input: str, folder: Path) -> None:
    """Keys and values of the encoder's states are seen by every token, those that run without the decision too."""
    model = trained.composition("t5", folder, granularity=granularity, router_input=router_input, prompt_tokens=3)
    given = {"input_ids": drawn(2, 5, seed=1), "decoder_input_ids": drawn(2, 6)}
    with torch.no_grad():
        before = model(**given).logits
        for position in range(1, 6):
            changed = given["decoder_input_ids"].clone()
            changed[:, position:] = drawn(2, 6 - position, seed=position)
            after = model(input_ids=given["input_ids"], decoder_input_ids=changed).logits
            torch.testing.assert_close(after[:, :position], before[:, :position], rtol=1e-6, atol=1e-7)
            assert not torch.allclose(after[:, position], before[:, position])


@pytest.mark.parametrize("kind", DECODERS)
def test_with_labels_a_decision_reads_what_stands_before_them(kind: str, folder: Path) -> None:
    model = trained.composition(kind, folder)
    ids = drawn(2, 8)
    labels = ids.clone()
    labels[:, :3] = -100
    before = logits(model, ids, labels=labels)
    with lamella.prompt([3, 3]):
        torch.testing.assert_close(logits(model, ids), before)
    changed = ids.clone()
    changed[:, 5:] = drawn(2, 3, seed=8)
    torch.testing.assert_close(logits(model, changed, labels=labels)[:, :5], before[:, :5], rtol=1e-7, atol=1e-9)
    with lamella.prompt([8, 8]):
        assert not torch.allclose(logits(model, ids), before)


def test_case_three_is_the_sum_by_hand(folder: Path) -> None:
    model = trained.composition("llama", folder, prompt_tokens=2)
    loras = trained.deltas(model, "llama", folder)
    units = []
    for block in ("model.layers.0", "model.layers.1"):
        router = trained.routers_of(model)[block]
        members = [name for name in loras if name.startswith(f"{block}.")]
        readers = trained.names_in(block, ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])
        tau = float(router.temperature().detach())
        e, bias = router.e.detach().double(), router.bias.detach().double()
        units.append(mole_model.Unit(members, readers, e, bias, tau, router.scale))
    ids = drawn(2, 5)
    first = torch.zeros(2, 5, dtype=torch.bool)
    first[:, :2] = True
    base = tiny.llama().double()
    with mole_model.composed(base, loras, units, first, without=first):
        expected = logits(base, ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-6)


def generate(model: PeftModel, given: dict[str, Tensor], **options: object) -> Tensor:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": tiny.PAD}
    return model.generate(**given, **{**settings, **options})


@pytest.mark.parametrize(
    ("kind", "config", "options"),
    [
        ("llama", {"granularity": "matrix"}, {}), ("llama", {"granularity": "network"}, {"num_beams": 3}),
        ("gpt2", {"granularity": "block"}, {}),
        ("gpt2", {"granularity": "sublayer"}, {"num_beams": 2, "num_return_sequences": 2}),
        ("t5", {"granularity": "sublayer"}, {}),
        ("t5", {"granularity": "network"}, {"num_beams": 2, "num_return_sequences": 2}),
        ("llama", {"top_k": 1}, {}), ("llama", {"score": "sigmoid"}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_generation_with_a_cache_is_generation_without(
    kind: str, config: dict[str, object], options: dict[str, int], folder: Path
) -> None:
    model = trained.composition(kind, folder, **config)
    given = _left_padded(kind)
    cached = generate(model, given, use_cache=True, **options)
    assert torch.equal(cached, generate(model, given, use_cache=False, **options))
    with fixed_weights(model, {"news": 1}):
        one = generate(model, given, **options)
    assert not torch.equal(one, cached)


@pytest.mark.parametrize(("kind", "router_input"), [("llama", "mean"), ("gpt2", "token"), ("t5", "mean")])
def test_generated_one_by_one_as_in_a_batch(kind: str, router_input: str, folder: Path) -> None:
    model = trained.composition(kind, folder, router_input=router_input)
    given = _left_padded(kind)
    together = generate(model, given)
    for row in range(len(together)):
        alone = generate(model, {name: value[row : row + 1] for name, value in given.items()})
        assert torch.equal(alone[0], together[row])


def test_a_static_cache(folder: Path) -> None:
    model = trained.composition("llama", folder, double=False)
    given = _left_padded("llama")
    dynamic = generate(model, given)
    assert torch.equal(generate(model, given, cache_implementation="static"), dynamic)


def _left_padded(kind: str) -> dict[str, Tensor]:
    ids = drawn(3, 5)
    mask = torch.ones_like(ids)
    if kind == "t5":
        mask[1, 4:] = 0
    else:
        mask[1, :2] = 0
    return {"input_ids": ids.masked_fill(mask == 0, tiny.PAD), "attention_mask": mask}


@pytest.mark.parametrize(("kind", "granularity"), [("llama", "block"), ("gpt2", "network")])
def test_going_on_by_hand_gives_what_one_forward_gives(kind: str, granularity: str, folder: Path) -> None:
    model = trained.composition(kind, folder, granularity=granularity)
    ids = drawn(2, 9)
    whole = logits(model, ids)
    with torch.no_grad():
        first = model(input_ids=ids[:, :5], use_cache=True)
        second = model(input_ids=ids[:, 5:7], past_key_values=first.past_key_values, use_cache=True)
        third = model(input_ids=ids[:, 7:], past_key_values=second.past_key_values)
    parts = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_decisions_go_where_the_rows_of_the_cache_go(folder: Path) -> None:
    model = trained.composition("llama", folder)
    ids = drawn(3, 6)
    with lamella.prompt([5] * 3), torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
    for order in ([2, 0, 1], [1, 1, 2]):
        cache = DynamicCache()
        with lamella.prompt([5] * 3), torch.no_grad():
            model(input_ids=ids[:, :5], past_key_values=cache)
            other = copy.deepcopy(cache)  # as a prompt's cache is used again
            cache.reorder_cache(torch.tensor(order))
            again = model(input_ids=ids[:, 5:], past_key_values=other).logits[:, -1]
            after = model(input_ids=ids[order, 5:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(after, whole[order], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(again, whole, rtol=1e-5, atol=1e-6)
    cache = DynamicCache()
    with lamella.prompt([5] * 3), torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 1]))
        cache.batch_repeat_interleave(2)
        rows = [2, 2, 1, 1]
    with lamella.prompt([5] * 4), torch.no_grad():
        after = model(input_ids=ids[rows, 5:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(after, whole[rows], rtol=1e-5, atol=1e-6)
        cache.reset()
    assert not cache.layers[-1].decisions


def test_what_cannot_be_gone_on_with_is_refused(folder: Path) -> None:
    model = trained.composition("llama", folder, prompt_tokens=4)
    ids = drawn(1, 8)
    with torch.no_grad():
        with model.disable_adapter():
            without = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        with pytest.raises(LamellaError, match="holds 5 tokens for which"):
            model(input_ids=ids[:, 5:], past_key_values=without)
        short = model(input_ids=ids[:, :2], use_cache=True).past_key_values
        with pytest.raises(LamellaError, match="by the first 2 tokens, run without it, and"):
            model(input_ids=ids[:, 2:], past_key_values=short)
        cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
        with pytest.raises(LamellaError, match="decisions for 1 sequences"):
            model(input_ids=ids[:, 5:].repeat(2, 1), past_key_values=cache)


def test_overrides_hold_in_generation(folder: Path) -> None:
    model = trained.composition("llama", folder)
    given = _left_padded("llama")
    for override in (
        masked_experts(model, drop=["news"]),
        fixed_weights(model, [{"news": 1}, {"code": 1}, {"law": 0.5, "news": 0.5}]),
    ):
        with override:
            for options in ({}, {"num_beams": 2}):
                cached = generate(model, given, **options)
                assert torch.equal(cached, generate(model, given, use_cache=False, **options))


def test_a_classifier_on_a_decoder_reads_its_whole_input(folder: Path) -> None:
    model = tiny.llama_classifier().double()
    composed = lamella.compose(model, trained.loras("llama", folder)).eval()
    trained.sharpen(composed)
    given = tiny.inputs(model)
    weights = trained.weights_seen(composed, given)
    given["input_ids"] = given["input_ids"].clone()
    given["input_ids"][:, 4] = (given["input_ids"][:, 4] + 7) % 40 + 3
    changed = trained.weights_seen(composed, given)
    assert all(not torch.allclose(changed[place], own) for place, own in weights.items())
