import pytest
import torch
from tests.tiny_moe import PATHS, VOCAB, build

from lamella.similarity.activations import capture
from lamella.similarity.alignment import align
from lamella.similarity.screening import screen

NAMES = ["source_layer", "source_expert", "target_layer", "target_expert"]
HIDDEN_UNITS = 8  # fewer than features, so that there is something no aligner reaches
NAMED = {
    "qwen2_moe": "moe_intermediate_size", "qwen3_moe": "moe_intermediate_size", "deepseek_v2": "moe_intermediate_size",
    "deepseek_v3": "moe_intermediate_size", "switch_transformers": "d_ff",
}  # fmt: skip


def documents(model, count=40, length=16):
    draw = torch.Generator().manual_seed(0)
    for start in range(0, count, 8):
        ids = torch.randint(3, VOCAB, (8, length), generator=draw)
        given = {"input_ids": ids, "rows": torch.arange(start, start + 8)}
        yield {**given, "labels": ids} if model.config.is_encoder_decoder else given


@pytest.mark.parametrize(("name", "aligner"), zip(PATHS, ("layernorm", "linear") * 2, strict=True))
def test_no_trained_aligner_gets_below_the_floor(name, aligner, tmp_path):
    changed = {"num_experts": 2} if name == "switch_transformers" else {}
    model = build(name, **{NAMED.get(name, "intermediate_size"): HIDDEN_UNITS}, **changed)
    captured = capture(model, documents(model), tmp_path, per_expert=64)
    pairs = [(source, target) for source in captured.experts[:3] for target in captured.experts[-3:]]
    frame = align(captured, model, pairs, aligner, steps=40, lr=3e-2, controls=False)
    screened = screen(captured, model, pairs)
    both = frame.merge(screened, on=NAMES)
    assert len(both) == len(frame) > 0
    assert (both["held_out_x"] == both["held_out_y"]).all()
    others = both[both["kind"] == "pair"]
    assert (others["floor"] > 0.05).all()  # it says something
    assert (others["floor"] <= others["nmse"]).all()
    assert (others["floor"] <= others["identity_nmse"]).all()
    assert others["cka_distance"].between(0, 1).all()
    assert (others["weight_distance"] > 0.1).all()
