import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.similarity.alignment.sweeping.conftest import documents
from tests.tiny_moe import CONFIGS, PATHS, build
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import DeepseekV3Config, Qwen2MoeConfig, Qwen3MoeConfig

from lamella.aligners import KINDS
from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.activations import capture
from lamella.similarity.alignment import align
from lamella.similarity.alignment.tiles import cut
from lamella.similarity.planning import model_shape, plan, tokens_to_fill
from lamella.similarity.screening import all_pairs, screen

NOTHING = {0: {"selected": torch.zeros(2, dtype=torch.long), "tokens": torch.tensor(0)}}


@pytest.fixture
def qwen():
    """Qwen1.5-MoE-A2.7B."""
    return Qwen2MoeConfig(
        vocab_size=151936, hidden_size=2048, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=5632, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=60,
        num_experts_per_tok=4, decoder_sparse_step=1, tie_word_embeddings=False,
    )  # fmt: skip


def test_qwen_by_its_config_alone(qwen):
    planned = plan(qwen, per_expert=512, dtype="bfloat16", flops_per_second=4e14)
    assert (planned.layers, planned.experts) == (24, 1440)
    assert planned.pairs_all == planned.pairs == 1440 * 1439 == 2_072_160
    assert planned.parameters == 14_315_784_192
    # all but the embedding that is looked up and 56 of 60 experts
    assert planned.active == 14_315_784_192 - 151936 * 2048 - 24 * 56 * 3 * 2048 * 1408 == 2_378_008_576
    # 3.0 GB of samples; they are 6.0 GB in float32, and with outputs, which are recomputed instead
    assert 1440 * 512 * 2048 * 2 == 3_019_898_880
    assert planned.capture_bytes == 3_019_898_880 + 1440 * 512 * 24
    assert plan(qwen, per_expert=512, flops_per_second=1).capture_bytes == 6_039_797_760 + 1440 * 512 * 24
    assert planned.model_bytes == 4 * 14_315_784_192
    of_block = 60 * 3 * 2048 * 1408 + 3 * 2048 * 5632 + 2048 + 60 * 2048 + 4 * 2048**2 + 3 * 2048 + 2 * 2048
    assert "once for every 64 documents" in str(planned)
    assert planned.block_bytes == 4 * (of_block + 2 * 151936 * 2048 + 2048)
    assert planned.tiles == 1440
    assert 512 * 60 / 4 == 7680 < planned.tokens == planned.tokens_needed == 9303
    assert planned.capture_hours == 2 * 9303 * 2_378_008_576 / 4e14 / 3600
    assert planned.screen_hours < 0.5 * planned.align_hours


@pytest.mark.parametrize(
    ("config", "parameters", "active", "experts"),
    [
        (
            Qwen3MoeConfig(
                vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
                num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
                moe_intermediate_size=768,
            ),
            30_532_122_624, 3_041_867_776, 48 * 128,
        ),
        (DeepseekV3Config(), 671_026_404_352, 36_625_603_584, 58 * 256),
    ],
)  # fmt: skip
def test_models_of_hundreds_of_gigabytes_are_planned_without_weights(config, parameters, active, experts):
    shape = model_shape(config)
    assert (shape.parameters, shape.active, shape.experts) == (parameters, active, experts)


def test_qwen_by_the_published_protocol(qwen):
    """Ten steps on 5,000 tokens: 2.57 TFLOP a pair, 5.1 EFLOP for all pairs across layers."""
    pair = 10 * 5000 * (4 * 2048**2 + 12 * 2048 * 1408)
    planned = plan(qwen, per_expert=12_500, steps=10, flops_per_second=1)  # 5,000 of 12,500 are trained on
    assert planned.align_hours * 3600 == pytest.approx(1440 * 1441 * pair, rel=0.2)  # looks and scores beside


def test_a_capture_ends_when_every_expert_has_its_samples_or_with_the_text(qwen):
    planned = plan(qwen, tokens=789_786, flops_per_second=4e14)
    assert planned.tokens == planned.tokens_needed == 9303
    assert planned == plan(qwen, flops_per_second=4e14)
    short = plan(qwen, tokens=1000, flops_per_second=4e14)
    assert (short.tokens, short.tokens_needed) == (1000, 9303)
    assert short.capture_hours == 2 * 1000 * 2_378_008_576 / 4e14 / 3600
    assert "the text has 1,000" in str(short)


def test_skew_and_measured_shares_ask_for_more_text(qwen, tmp_path):
    uniform, skewed = plan(qwen, flops_per_second=1), plan(qwen, skew=4, flops_per_second=1)
    assert skewed.tokens == pytest.approx(4 * uniform.tokens, abs=4)
    assert skewed.rarest == pytest.approx(4 / 60 / 4)
    counts = {0: {"selected": torch.tensor([0, 10, 990]), "tokens": torch.tensor(1000)}}
    measured = plan(qwen, capture=SimpleNamespace(counts=counts), flops_per_second=1)
    assert (measured.rarest, measured.silent) == (0.01, 1)
    assert measured.tokens == tokens_to_fill(512, 0.01, 1440)
    assert "1 experts were never chosen" in str(measured)


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 600), st.floats(0.01, 0.9), st.integers(1, 2000))
def test_so_many_tokens_fill_every_expert_with_the_stated_probability(samples, chance, experts):
    tokens = tokens_to_fill(samples, chance, experts)
    draws = torch.distributions.Binomial(tokens, torch.tensor(chance, dtype=torch.float64))
    torch.manual_seed(0)
    one_short = (draws.sample((20_000,)) < samples).double().mean()
    # fewer than one in a hundred that any of them is short; the draws see it where there are few experts
    assert one_short <= 1 - 0.99 ** (1 / experts) + 4 * math.sqrt(0.01 / experts / 20_000) + 1e-3
    assert tokens >= samples / chance


def test_only_chosen_pairs_are_aligned_but_all_are_screened(qwen):
    everything, chosen = plan(qwen, flops_per_second=1), plan(qwen, per_source=5, flops_per_second=1)
    assert chosen.pairs == 5 * 1440
    assert chosen.screen_hours == everything.screen_hours
    assert chosen.align_hours == pytest.approx(everything.align_hours * 7 / 1441)
    assert plan(qwen, per_source=9999, flops_per_second=1).pairs == everything.pairs


@pytest.mark.parametrize("name", PATHS)
def test_by_model_by_config_and_by_file(name, tmp_path):
    config = CONFIGS[name]()
    model = build(name)
    model.config.save_pretrained(tmp_path)
    shape = model_shape(model)
    assert shape == model_shape(config) == model_shape(tmp_path) == model_shape(str(tmp_path / "config.json"))
    assert shape.parameters == model.num_parameters()
    assert 0 < shape.active < shape.parameters


class Counted(TorchDispatchMode):
    """FLOPs of products of matrices, by torch's own table; its `FlopCounterMode` cannot see through autograd.grad."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")  # in place it costs the same
        counted = flop_registry.get(getattr(torch.ops.aten, name, None))
        if counted is not None:
            self.total += counted(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("aligner", KINDS)
def test_hours_are_roughly_those_of_the_products_that_torch_counts(aligner, tmp_path):
    model = build("qwen2_moe", num_experts=2, num_hidden_layers=1)
    captured = capture(model, documents(80), tmp_path, per_expert=100)
    with Counted() as counter:
        align(captured, model, None, aligner, steps=25, rank=2)
    planned = plan(model, 100, aligner=aligner, steps=25, rank=2, flops_per_second=1 / 3600)
    assert planned.align_hours == pytest.approx(counter.total, rel=0.35)
    with Counted() as counter:
        screen(captured, model, measures=["predicted", "floor", "cka_distance"])
    assert 0.3 < planned.screen_hours / counter.total < 3


def test_tiles_are_as_many_as_there_will_be():
    for name in ("qwen2_moe", "deepseek_v2", "mixtral"):
        model = build(name)
        experts = [(layer.index, e) for layer in moe_layers(model) for e in range(layer.num_experts)]
        assert plan(model, flops_per_second=1).tiles == len(cut(all_pairs(experts)))


def test_it_is_written_and_printed(qwen, tmp_path):
    planned = plan(qwen, flops_per_second=4e14)
    planned.write(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == asdict(planned)
    for told in ("1,440 in 24 layers", "2,072,160 ordered", "9,303 tokens or more", "as given"):
        assert told in str(planned)


def test_speed_is_measured_where_none_is_given():
    planned = plan(CONFIGS["mixtral"]())
    assert planned.measured
    assert planned.flops_per_second > 1e6
    assert "measured here" in str(planned)


def test_bad_input_names_itself(qwen, tmp_path):
    for given_, told in (
        ({"per_expert": 1}, "at least 2 samples"),
        ({"held_out": 1.0}, "between 0 and 1"),
        ({"skew": 0.5}, "give 1 or more"),
        ({"dtype": "int8"}, "float32 or bfloat16"),
        ({"per_source": 0}, "at least 1 target"),
        ({"aligner": "mlp"}, "no aligner 'mlp'"),
        ({"flops_per_second": 0.0}, "flops_per_second"),
        ({"capture": SimpleNamespace(counts=NOTHING)}, "no token that chose an expert"),
    ):
        with pytest.raises(LamellaError, match=told):
            plan(qwen, **given_)
    with pytest.raises(LamellaError, match="No model config is found"):
        plan(tmp_path / "nothing")
    with pytest.raises(LamellaError):
        plan(torch.nn.Linear(2, 2))
