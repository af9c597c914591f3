"""Documents packed into a row decide each for itself, as if each had a row of its own."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor
from transformers import DataCollatorWithFlattening

from lamella import LamellaError, prompt, record_routing
from lamella.routing import collect_losses

LENGTHS = (5, 9, 3, 7)
ROWS = ((5, 9), (3, 7, 4))  # several rows of several documents, of the same length


def documents(lengths: tuple[int, ...] = LENGTHS, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny.VOCAB, (1, length), generator=generator) for length in lengths]


def packed(given: list[Tensor]) -> dict[str, Tensor]:
    features = [{"input_ids": one[0].tolist()} for one in given]
    collated = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(features)
    return {name: value for name, value in collated.items() if name != "labels"}


def block_diagonal(lengths: tuple[int, ...] = LENGTHS, causal: bool = True) -> Tensor:
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same = of[:, None] == of[None]
    return (same.tril() if causal else same)[None, None]


def logits(model: PeftModel, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs, **({} if "bert" in model.config.model_type else {"use_cache": False})).logits
    return found


def alone(model: PeftModel, given: list[Tensor], **inputs: Any) -> Tensor:
    return torch.cat([logits(model, input_ids=one, **inputs) for one in given], dim=1)


@pytest.fixture(params=["molex", "molex mode", "molex random", "mole", "mole network", "mole block-delta"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PeftModel:
    method, _, option = request.param.partition(" ")
    if method == "molex":
        settings = {"mode": {"aggregate": "mode", "top_k": 2}, "random": {"policy": "random"}}.get(option, {})
        return tiny.molex(tiny.llama(layers=3), **settings)
    settings = {"network": {"granularity": "network"}, "block-delta": {"granularity": "block", "form": option}}
    return trained.composition("llama", tmp_path, **settings.get(option, {}))


SAID = {
    "position_ids": ("position_ids",),
    "seq_idx": ("seq_idx", "position_ids"),
    "cu_seq_lens": ("cu_seq_lens_q", "cu_seq_lens_k", "position_ids"),
    "4-D mask": ("position_ids",),
}


@pytest.mark.parametrize("said", SAID)
def test_each_document_has_the_logits_it_has_alone(model: PeftModel, said: str) -> None:
    given = documents()
    inputs = packed(given)
    more: dict[str, Any] = {name: inputs[name] for name in SAID[said]}
    if said == "4-D mask":
        more["attention_mask"] = block_diagonal()
    actual = logits(model, input_ids=inputs["input_ids"], **more)
    torch.testing.assert_close(actual, alone(model, given), rtol=1e-4, atol=1e-5)


def test_rows_of_several_documents_each(model: PeftModel) -> None:
    given = [documents(lengths, seed) for seed, lengths in enumerate(((5, 9), (3, 7, 4)))]
    ids = torch.cat([torch.cat(row, dim=1) for row in given])
    positions = torch.stack([torch.cat([torch.arange(one.shape[1]) for one in row]) for row in given])
    expected = torch.cat([alone(model, row) for row in given])
    torch.testing.assert_close(logits(model, input_ids=ids, position_ids=positions), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hides", [-1e4, -1e9, float("-inf")])
def test_masks_that_are_added_hide_by_whatever_large_number(hides: float) -> None:
    model, given, attends = tiny.molex(tiny.llama(layers=3)), documents(), block_diagonal()
    said = {"position_ids": packed(given)["position_ids"]}
    said["attention_mask"] = torch.zeros(attends.shape).masked_fill(~attends, hides)
    actual = logits(model, input_ids=torch.cat(given, dim=1), **said)
    torch.testing.assert_close(actual, alone(model, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_documents_beside_padding(side: str) -> None:
    model = tiny.molex(tiny.llama(layers=3))
    given = documents()
    row, length = torch.cat(given, dim=1), sum(LENGTHS)
    at = slice(3, None) if side == "left" else slice(0, length)
    ids, positions, attends = torch.zeros(1, length + 3).long(), torch.ones(1, length + 3).long(), torch.eye(length + 3)
    ids[:, at], positions[:, at] = row, packed(given)["position_ids"]
    attends = attends.bool()[None, None].clone()
    attends[..., at, at] = block_diagonal()
    expected = alone(model, given)
    actual = logits(model, input_ids=ids, position_ids=positions, attention_mask=attends)[:, at]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    # A mask over tokens alone lets the base itself mix documents, but what decides is still each by itself.
    mask = torch.zeros_like(ids)
    mask[:, at] = 1
    numbers = mask.clone()
    numbers[:, at] = torch.repeat_interleave(torch.arange(1, 5), torch.tensor(LENGTHS))
    for more in ({"attention_mask": mask, "position_ids": positions}, {"attention_mask": numbers}):
        with tiny.watch(model) as seen:
            logits(model, input_ids=ids, **more)
        with tiny.watch(model) as seen_alone:
            alone(model, given)
        first = [routing.logits for place, routing, _ in seen if place.layer == 0]
        first_alone = [routing.logits for place, routing, _ in seen_alone if place.layer == 0]
        torch.testing.assert_close(torch.cat(first), torch.cat(first_alone))


@pytest.mark.parametrize("aggregate", ["mean", "mode"])
def test_in_an_encoder_each_document_is_read_whole(aggregate: str) -> None:
    model = tiny.molex(tiny.bert(layers=3), aggregate=aggregate, granularity="sequence")
    given = documents()
    states = []
    model.get_base_model().bert.encoder.register_forward_hook(lambda *told: states.append(told[2].last_hidden_state))
    logits(
        model,
        input_ids=torch.cat(given, dim=1),
        position_ids=packed(given)["position_ids"],
        attention_mask=block_diagonal(causal=False),
    )
    for one in given:
        logits(model, input_ids=one)
    torch.testing.assert_close(states[0], torch.cat(states[1:], dim=1), rtol=1e-4, atol=1e-5)


def labelled(given: list[Tensor], lengths: tuple[int, ...]) -> list[Tensor]:
    """Labels after a prompt of these lengths; a document without one has labels from the start."""
    return [
        one.masked_fill(torch.arange(one.shape[1]) < length, -100) for one, length in zip(given, lengths, strict=True)
    ]


def padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True, padding_value=value)


@pytest.mark.parametrize("method", ["mola", "molex", "mole", "mole switch"])
@pytest.mark.parametrize("collected", [True, False])
def test_losses_and_gradients_are_those_of_a_padded_batch(method: str, collected: bool, tmp_path: Path) -> None:
    if method == "mola":
        model = tiny.adapted(tiny.llama().double(), router_aux_loss_coef=0.1)
    elif method == "molex":
        model = tiny.molex(tiny.llama(layers=3).double(), router_aux_loss_coef=0.1).double()
    else:
        model = trained.composition("llama", tmp_path, balance="switch" if "switch" in method else "log")
    model.train()
    given = documents()
    labels = labelled(given, (2, 5, 0, 3))
    flat = packed(given)
    firsts = [row.index_fill(1, torch.tensor(0), -100) for row in labels]  # as collators do
    mask = padded([torch.ones_like(one) for one in given], 0)
    together = {**flat, "labels": torch.cat(firsts, dim=1)}
    apart = {"input_ids": padded(given, tiny.PAD), "attention_mask": mask, "labels": padded(labels, -100)}
    results = []
    for inputs in (together, apart):
        if collected:
            with collect_losses() as losses:
                output = model(**inputs, use_cache=False)
            (output.loss + losses.total()).backward()
        else:
            output = model(**inputs, use_cache=False)
            output.loss.backward()
        results.append((output.loss.detach(), tiny.gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    tiny.assert_same(results[0][1], results[1][1])


def test_a_prompt_by_hand_is_one_length_for_each_document(model: PeftModel) -> None:
    given, lengths = documents(), [2, 6, 3, 4]
    inputs = packed(given)
    with prompt(lengths):
        actual = logits(model, **inputs)
    expected = []
    for one, length in zip(given, lengths, strict=True):
        with prompt([length]):
            expected.append(logits(model, input_ids=one))
    torch.testing.assert_close(actual, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)
    with prompt([2]), pytest.raises(LamellaError, match="4 documents in 1 rows; give one per document"):
        logits(model, **inputs)


def test_packed_rows_are_not_generated_from(model: PeftModel) -> None:
    inputs = {name: value for name, value in packed(documents()).items() if name in ("input_ids", "position_ids")}
    if getattr(model.peft_config["default"], "form", "delta") != "delta":
        return  # which keeps no cache and says so first
    with pytest.raises(LamellaError, match="4 documents packed into 1 rows"):
        model.generate(**inputs, max_new_tokens=2)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(LamellaError, match="documents packed into a row"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_trace_counts_each_document_once() -> None:
    model = tiny.molex(tiny.llama(layers=3))
    given = documents()
    with record_routing(model, per_token=True) as together:
        logits(model, **packed(given))
    with record_routing(model) as apart:
        alone(model, given)
    assert all(torch.equal(together.counts[key], count) for key, count in apart.counts.items())
    assert sorted(together.tokens["sequence"].unique()) == [0, 1, 2, 3]


def test_rows_of_another_shape_are_refused_by_name() -> None:
    model = tiny.molex(tiny.llama(layers=3))
    ids = torch.cat(documents(), dim=1)
    with pytest.raises(LamellaError, match="documents packed into rows of 30 tokens"):
        logits(model, input_ids=ids, cu_seq_lens_q=torch.tensor([0, 10, 30]))


@pytest.mark.parametrize("method", ["molex", "mole"])
def test_a_base_that_mixes_documents_is_named_once(method: str, tmp_path: Path) -> None:
    model = tiny.molex(tiny.llama()) if method == "molex" else trained.composition("llama", tmp_path)
    inputs = packed(documents())
    apart = {name: inputs[name] for name in ("input_ids", "position_ids")}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model(**apart, use_cache=False)
        assert not any("see each other" in str(one.message) for one in said)
        for _ in range(2):
            model.train()(**apart, attention_mask=torch.ones_like(inputs["input_ids"]))
    assert sum("attention of LlamaModel (sdpa) lets them see each other" in str(one.message) for one in said) == 1
