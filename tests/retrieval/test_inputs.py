"""What a card holds: means of what the base gives its modules, by the tokens that a composition decides by."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import tiny

from lamella.retrieval import mean_inputs
from lamella.routing import find_tracker

MODULES = {
    "bert": ["bert.encoder.layer.0.attention.self.query", "bert.encoder.layer.1.output.dense"],
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"],
    "t5": ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.k"],
}


def given_to(model, names, batch):
    """Each module's inputs, ``(batch, tokens, in)``."""
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0]}))
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", ["bert", "llama", "t5"])
def test_they_are_means_over_rows_of_means_over_the_tokens_that_decide(kind):
    model = tiny.build(kind, layers=2)
    batches = [tiny.batch(model, rows=3, seed=seed) for seed in range(2)]
    if kind == "llama":  # the first row has no prompt: all of it is read
        for batch in batches:
            batch["labels"][1:, :3] = -100
    found = mean_inputs(model, MODULES[kind], [batches, batches[:1]])
    for group, of in enumerate((batches, batches[:1])):
        rows = {name: [] for name in MODULES[kind]}
        texts = []
        for batch in of:
            seen = given_to(model, MODULES[kind], batch)
            for at, real in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
                end = 3 if kind == "llama" and at else real
                for name, x in seen.items():
                    rows[name].append(x[at, :end].mean(dim=0))
                texts.append(model.get_input_embeddings()(batch["input_ids"][at, :end]).mean(dim=0))
        for name, each in rows.items():
            torch.testing.assert_close(found.centroids[name][group], torch.stack(each).mean(dim=0))
        if kind != "t5":
            torch.testing.assert_close(found.texts[group], torch.stack(texts).mean(dim=0))
    assert (found.texts is None) == (kind == "t5")


def test_a_model_with_a_lora_that_is_off_answers_as_its_base_and_is_left_as_it_was():
    base = tiny.bert()
    adapted = get_peft_model(tiny.bert(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)).train()
    batch = tiny.batch(base)
    with adapted.disable_adapter():
        found = mean_inputs(adapted.get_base_model(), MODULES["bert"], [[batch]])
    expected = mean_inputs(base, MODULES["bert"], [[batch]])
    for name in MODULES["bert"]:
        torch.testing.assert_close(found.centroids[name], expected.centroids[name])
    for model in (adapted, base):
        assert find_tracker(model) is None
    assert adapted.training
    assert not base._forward_pre_hooks
