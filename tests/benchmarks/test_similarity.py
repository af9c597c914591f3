import torch
from tests import tiny_moe

from benchmarks.naive_similarity import capture_pair
from benchmarks.tables import render
from lamella.backbones.moe import moe_layers


def test_every_case_times_what_gives_the_same_losses(record):
    cases = record("similarity").cases
    assert [case.name for case in cases] == [
        "training, d=8, 4 pairs", "training, d=16, 4 pairs", "end to end, d=16, 4 of 225 pairs of two layers",
    ]  # fmt: skip
    for case in cases:
        assert max(case.equality.output, case.equality.gradient) < 1e-9
    assert [method.name for method in cases[0].methods] == ["published", "sequential", "batched"]
    assert [method.name for method in cases[-1].methods] == ["published flow", "lamella"]


def test_the_record_stands_as_tables(record):
    page = render(record("similarity"))
    assert "12 samples of an expert, 3 steps" in page
    assert "| training, d=8, 4 pairs: published / batched |" in page
    assert ": published flow / lamella |" in page


def test_the_published_capture_takes_the_first_tokens_of_an_expert_in_their_order():
    model = tiny_moe.build("qwen2_moe", dtype=torch.float64)
    batches = [tiny_moe.inputs(3, 9, seed=seed) for seed in range(6)]
    layers = {layer.index: layer for layer in moe_layers(model)}
    x, y = capture_pair(model, batches, ((0, 1), (2, 3)), samples=5)
    given = []
    hook = layers[0].module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    real = torch.cat([h[batch["attention_mask"].bool()] for h, batch in zip(given, batches, strict=True)])
    with torch.no_grad():
        chosen = real[(layers[0].router(real).indices == 1).any(dim=1)][:5]
        torch.testing.assert_close(x, chosen)
        torch.testing.assert_close(y, layers[0].experts[1](chosen))
