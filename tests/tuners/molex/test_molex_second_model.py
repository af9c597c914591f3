"""Guests from a second model: what they compute, whom they depend on, how they are saved, what is refused."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from tests.reference import molex as oracle
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MPNetConfig, MPNetModel, PreTrainedModel, T5EncoderModel

import lamella
from lamella import LamellaError, MolexConfig
from lamella.tracing import record_routing

WIDE = 24


def wide_mpnet(seed: int = 3) -> MPNetModel:
    torch.manual_seed(seed)
    config = MPNetConfig(
        vocab_size=tiny.VOCAB, hidden_size=WIDE, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return MPNetModel(config, add_pooling_layer=False).eval()


def wide_llama(seed: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB, hidden_size=WIDE, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=tiny.PAD,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


SECONDS: dict[str, Callable[[], PreTrainedModel]] = {
    "mpnet": wide_mpnet,
    "llama": wide_llama,
    "copy": lambda: tiny.llama(layers=4, seed=8),
    "bert": lambda: tiny.bert(layers=3, seed=8),
    "t5": tiny.t5,
    "t5-encoder": lambda: T5EncoderModel(tiny.t5().config).eval(),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Where a second model lies, by name."""

    @functools.cache
    def saved(name: str) -> str:
        path = tmp_path_factory.mktemp("second") / name
        SECONDS[name]().save_pretrained(path)
        return str(path)

    return saved


def mixture(host: PreTrainedModel, guests_of: str, **config: Any) -> PeftModel:
    """A MoLEx in float64 whose guests can all be chosen, with aligners that are no longer as they began."""
    model = tiny.molex(host.double(), guests_of=guests_of, **config).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molex_guests" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        actual: Tensor = model(**given).logits
    return actual


def second_of(model: PeftModel) -> Any:
    return tiny.blocks(model)[0].lamella_molex_guests["default"]


def test_loss_and_every_gradient_are_the_oracles(folder: Callable[[str], str]) -> None:
    model = mixture(tiny.bert(layers=2), folder("mpnet"), router_aux_loss_coef=0.0).train()
    batch, wrapped, base = tiny.batch(model.get_base_model()), tiny.blocks(model), model.get_base_model()
    encoder, aligner, router = second_of(model).model.encoder, second_of(model).aligner, wrapped[0].router("default")

    def of_mpnet(block: nn.Module) -> oracle.Block:
        return lambda h: block(h[None], position_bias=encoder.compute_position_bias(h[None]))[0][0]

    maps = aligner.down.weight, aligner.down.bias, aligner.up.weight
    blocks = [lambda h, block=block.base_layer: block(h[None])[0] for block in wrapped]
    blocks += [oracle.of_second_model(of_mpnet(block), *maps) for block in encoder.layer]
    answers, chosen = [], []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        h = base.bert.embeddings(ids[mask.bool()][None])[0]
        for t in range(2):
            h, picked, _ = oracle.layer(
                blocks, t, h, router.weight, router.bias, 0.5, candidates=range(5), top_k=1, score="softmax",
                aggregate="mean", form="scale", per_token=False,
            )  # fmt: skip
            chosen += picked[0]
        answers.append(base.classifier(base.bert.pooler(h[None]))[0])
    assert {guest >= 2 for guest in chosen} == {True, False}
    expected = nn.functional.cross_entropy(torch.stack(answers), batch["labels"])
    expected.backward()
    gradients = tiny.gradients(model)
    actual = model(**batch).loss
    torch.testing.assert_close(actual, expected)
    actual.backward()
    assert sum("molex_guests" in name for name in gradients) == 3
    tiny.assert_same(tiny.gradients(model), gradients)


@pytest.mark.parametrize(("host", "second"), [("bert", "mpnet"), ("llama", "llama"), ("llama", "copy")])
@pytest.mark.parametrize("aligner", ["linear", "identity"])
def test_with_alpha_1_it_is_the_base_bit_for_bit(
    host: str, second: str, aligner: str, folder: Callable[[str], str]
) -> None:
    base = tiny.build(host)
    given = tiny.inputs(base)
    expected = logits(base, given)
    model = tiny.molex(base, guests_of=folder(second), guest_aligner=aligner, alpha=1.0, lora=None)
    assert torch.equal(logits(model, given), expected)


def test_guests_of_the_model_itself_are_its_own_blocks(tmp_path: Path) -> None:
    tiny.llama(layers=4).save_pretrained(tmp_path)
    options: dict[str, Any] = {"policy": "fixed", "lora": None}
    given = tiny.inputs(tiny.llama(layers=4))
    own = tiny.molex(tiny.llama(layers=4), fixed_layer=2, **options)
    other = tiny.molex(
        tiny.llama(layers=4), fixed_layer=6, guests_of=str(tmp_path), guest_aligner="identity", **options
    )
    expected, actual = logits(own, given), logits(other, given)
    real = given["attention_mask"].bool()
    # at its own depth the block is no guest of itself, and as another model's it is; the difference is zero there
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-5, atol=1e-6)
    linear = tiny.molex(tiny.llama(layers=4), fixed_layer=6, guests_of=str(tmp_path), **options)
    torch.testing.assert_close(logits(linear, given)[real], expected[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("host", "second"), [("bert", "mpnet"), ("llama", "llama"), ("bert", "llama")])
@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_neither_batch_mates_nor_padding_change_an_answer(
    host: str, second: str, granularity: str, folder: Callable[[str], str]
) -> None:
    model = mixture(tiny.build(host), folder(second), granularity=granularity)
    rows = [[5, 6, 7, 8, 9, 10, 11], [30, 31, 32, 33, 34], [40, 41, 3, 4, 4, 4]]
    for side in ("right", "left") if host == "llama" else ("right",):
        for row, actual in zip(rows, together(model, rows, side), strict=True):
            torch.testing.assert_close(actual, together(model, [row], "right")[0], rtol=1e-5, atol=1e-6)


def together(model: PeftModel, rows: list[list[int]], side: str) -> list[Tensor]:
    """Each row's answer, at its real tokens where there is one for each."""
    width = max(map(len, rows)) + (len(rows) > 1)
    ids, mask = torch.full((len(rows), width), tiny.PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[at, place], mask[at, place] = torch.tensor(row), 1
    given = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type == "llama":
        given["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    answers = logits(model, given)
    return list(answers) if answers.dim() == 2 else [a[m.bool()] for a, m in zip(answers, mask, strict=True)]


@pytest.mark.parametrize("options", [{}, {"granularity": "token"}, {"policy": "uniform"}])
def test_no_output_of_a_decoder_depends_on_a_later_token(options: dict[str, Any], folder: Callable[[str], str]) -> None:
    model = mixture(tiny.llama(layers=4), folder("llama"), **options)
    ids = torch.randint(3, tiny.VOCAB, (3, 10), generator=torch.Generator().manual_seed(1))
    for place in (2, 6, 9):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] - 3 + 7) % (tiny.VOCAB - 3) + 3
        before, after = logits(model, {"input_ids": ids}), logits(model, {"input_ids": changed})
        torch.testing.assert_close(before[:, :place], after[:, :place], rtol=1e-7, atol=1e-7)
        assert not torch.allclose(before[:, place], after[:, place])


@pytest.mark.parametrize(("second", "options"), [("llama", {}), ("copy", {"top_k": 2}), ("llama", {"num_beams": 3})])
def test_generation_with_a_cache_is_that_without(
    second: str, options: dict[str, Any], folder: Callable[[str], str]
) -> None:
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    settings = {name: value for name, value in options.items() if name != "num_beams"}
    model = mixture(tiny.llama(layers=4), folder(second), **settings)
    ids = torch.randint(3, tiny.VOCAB, (4, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with tiny.watch(model) as seen:
        expected = model.generate(**given, use_cache=False, **beams)
    assert any(int(routing.indices.max()) >= 4 for _, routing, _ in seen)
    kinds: list[dict[str, Any]] = [{}] if beams else [{}, {"cache_implementation": "static"}]
    for kind in kinds:
        assert torch.equal(model.generate(**given, **beams, **kind), expected)


def test_a_cache_that_cannot_be_right_is_refused_before_the_first_token(folder: Callable[[str], str]) -> None:
    model = mixture(tiny.build("mistral"), folder("llama"), candidates=[4, 5])
    ids = torch.randint(3, tiny.VOCAB, (2, 5))
    with pytest.raises(LamellaError, match=r"llama\) goes on with a cache only where .* DynamicSlidingWindowLayer"):
        model.generate(input_ids=ids, max_new_tokens=2)
    assert model.generate(input_ids=ids, max_new_tokens=2, use_cache=False).shape == (2, 7)


@pytest.mark.parametrize(("host", "second"), [("bert", "mpnet"), ("llama", "copy")])
def test_saved_and_loaded_it_is_bit_equal(host: str, second: str, tmp_path: Path, folder: Callable[[str], str]) -> None:
    aligner = "identity" if second == "copy" else "linear"
    model = tiny.molex(tiny.build(host), guests_of=folder(second), guest_aligner=aligner)
    given = tiny.inputs(model.get_base_model())
    expected = logits(model, given)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["guests_of"] == folder(second)
    assert len(written["guests_sha256"]) == 64
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(tiny.build(host), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(again, given), expected)
        assert not any(p.requires_grad or p.is_meta for p in again.parameters())


def test_another_model_in_the_place_of_the_second_is_refused_by_name(
    tmp_path: Path, folder: Callable[[str], str]
) -> None:
    tiny.molex(tiny.bert(layers=2), guests_of=folder("mpnet")).save_pretrained(tmp_path / "adapter")
    wide_mpnet(seed=4).save_pretrained(tmp_path / "other")
    path = tmp_path / "adapter" / "adapter_config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps(written | {"guests_of": str(tmp_path / "other")}))
    with pytest.raises(LamellaError, match=r"was trained with guests of a model .* and those of guests_of=.*other"):
        PeftModel.from_pretrained(tiny.bert(layers=2), tmp_path / "adapter")
    path.write_text(json.dumps(written | {"guests_of": str(tmp_path / "nowhere")}))
    with pytest.raises(LamellaError, match="nowhere"):
        PeftModel.from_pretrained(tiny.bert(layers=2), tmp_path / "adapter")


def test_random_guests_are_drawn_alike_and_are_others(tmp_path: Path, folder: Callable[[str], str]) -> None:
    options: dict[str, Any] = {"guests_of": folder("mpnet"), "policy": "uniform"}
    model = tiny.molex(tiny.bert(layers=2), guest_weights="random", seed=5, **options)
    given = tiny.inputs(model.get_base_model())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.bert(layers=2), tmp_path), given), logits(model, given))
    for more in ({}, {"guest_weights": "random", "seed": 6}):
        other = tiny.molex(tiny.bert(layers=2), **options, **more)
        assert not torch.allclose(logits(other, given), logits(model, given))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_and_traces_under_checkpointing_are_the_same(reentrant: bool, folder: Callable[[str], str]) -> None:
    results, traces = [], []
    for checkpointed in (False, True):
        model = mixture(tiny.llama(layers=4), folder("llama"), router_aux_loss_coef=0.5).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with record_routing(model) as trace:
            model(**tiny.batch(model.get_base_model())).loss.backward()
        results.append(tiny.gradients(model))
        traces.append(trace.counts)
    assert any("molex_guests" in name for name in results[0])
    tiny.assert_same(results[1], results[0])
    assert all(torch.equal(traces[1][key], counts) for key, counts in traces[0].items())


@pytest.mark.parametrize("recompute", [False, True])
def test_all_of_the_adapter_trains_and_nothing_of_the_second_model(
    recompute: bool, folder: Callable[[str], str]
) -> None:
    model = tiny.molex(
        tiny.bert(layers=2), guests_of=folder("mpnet"), policy="fixed", fixed_layer=3, recompute_guest=recompute
    )
    before = {name: tensor.clone() for name, tensor in second_of(model).model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**tiny.batch(model.get_base_model())).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in second_of(model).parameters())
    assert not any("mpnet" in name or "encoder.layer.0.attention.o" in name for name, _ in model.named_parameters())
    assert model.get_nb_trainable_parameters()[0] == model.base_model.summary().trainable
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in second_of(model).model.state_dict().items())


def test_a_batch_in_which_nothing_chose_a_guest_gives_its_aligner_a_gradient_of_zero(
    folder: Callable[[str], str],
) -> None:
    model = tiny.molex(tiny.bert(layers=2), guests_of=folder("mpnet"), sharp=False)
    with torch.no_grad():
        tiny.blocks(model)[0].router("default").bias[:2] += 100
    model.train()(**tiny.batch(model.get_base_model())).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in second_of(model).parameters())


def test_in_bfloat16(folder: Callable[[str], str], tmp_path: Path) -> None:
    host = tiny.bert(layers=2).to(torch.bfloat16)
    model = tiny.molex(host, guests_of=folder("mpnet"), policy="uniform")
    assert {p.dtype for p in second_of(model).model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in second_of(model).parameters()} == {torch.float32}
    given = tiny.inputs(host)
    expected = logits(tiny.molex(tiny.bert(layers=2), guests_of=folder("mpnet"), policy="uniform"), given)
    torch.testing.assert_close(logits(model, given).float(), expected, rtol=0.1, atol=0.05)
    under = tiny.molex(tiny.bert(layers=2), guests_of=folder("mpnet"), policy="uniform", guest_dtype="bfloat16")
    torch.testing.assert_close(logits(under, given), expected, rtol=0.1, atol=0.05)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.bert(layers=2).to(torch.bfloat16), tmp_path)
    assert torch.equal(logits(again, given), logits(model, given))


def test_adapters_with_and_without_a_second_model_side_by_side(folder: Callable[[str], str]) -> None:
    model = tiny.molex(tiny.bert(layers=2), guests_of=folder("mpnet"))
    given = tiny.inputs(model.get_base_model())
    expected = logits(model, given)
    model.add_adapter("own", MolexConfig(alpha=0.5, lora=LoraConfig(r=2, target_modules="all-linear")))
    assert torch.equal(logits(model, given), expected)
    model.set_adapter("own")
    assert not torch.allclose(logits(model, given), expected)
    model.set_adapter("default")
    assert torch.equal(logits(model, given), expected)
    model.delete_adapter("default")
    assert not any("molex_guests" in name for name, _ in model.named_parameters())


def test_summary_and_doctor_name_the_guests(folder: Callable[[str], str]) -> None:
    model = tiny.molex(tiny.bert(layers=2), guests_of=folder("mpnet"), alpha=0.95)
    assert "guests 2 to 4 are blocks 0 to 2 of mpnet" in str(model.base_model.summary())
    batches = [tiny.batch(model.get_base_model(), rows=8, seed=seed) for seed in range(30)]
    assert "mpnet" in str(lamella.doctor(model, batches=batches))


REFUSED = {
    "an encoder beside a decoder": ("llama", "bert", {}, r"Tokens see later ones .* Give a decoder"),
    "two stacks": ("t5", "bert", {}, r"a model of one stack of blocks, and T5.* has 2"),
    "a second model of two stacks": ("bert", "t5", {}, r"has 2 stacks"),
    "blocks that the first one helps": ("bert", "t5-encoder", {}, "makes the position bias of all others"),
    "another width, as it is": ("bert", "mpnet", {"guest_aligner": "identity"}, "16 and 24"),
    "a block that is not there": ("bert", "mpnet", {"candidates": [7]}, "4 blocks and the second model 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gives_no_guests_is_refused_before_anything_is_touched(case: str, folder: Callable[[str], str]) -> None:
    host, second, options, message = REFUSED[case]
    model = tiny.build(host)
    with pytest.raises(LamellaError, match=message):
        get_peft_model(model, MolexConfig(guests_of=folder(second), **options))
    assert not tiny.blocks(model)


@pytest.mark.parametrize(
    "options",
    [
        {"guest_aligner": "identity"},
        {"guest_weights": "random"},
        {"guests_sha256": "0"},
        {"guests_of": "x", "candidates": "later"},
        {"guests_of": 3},
    ],
)
def test_settings_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LamellaError, match=r"guests_of|second model"):
        MolexConfig(**options)


def test_rows_of_several_documents_are_refused(folder: Callable[[str], str]) -> None:
    model = mixture(tiny.llama(layers=4), folder("llama"), policy="uniform")
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4]])
    with pytest.raises(LamellaError, match="several documents"):
        model(input_ids=torch.arange(3, 13)[None], position_ids=positions, use_cache=False)
