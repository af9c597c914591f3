"""What counts as the same model and the same tokenizer."""

import pytest
import torch
from tests.similarity.activations.streams import batches, documents
from tests.tiny_moe import FAMILIES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.similarity.activations import capture, model_fingerprint, tokenizer_fingerprint


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "switch_transformers", "deepseek_v3"])
def test_it_changes_with_any_expert_and_any_tensor(family):
    model = FAMILIES[family]()
    seen = {model_fingerprint(model)}
    experts = [expert for layer in moe_layers(model) for expert in layer.experts]
    with torch.no_grad():
        for expert in experts:
            expert.down.mul_(1.01)
            seen.add(model_fingerprint(model))
        tensors = list(model.state_dict().values())
        for tensor in tensors:
            tensor.add_(1)
            seen.add(model_fingerprint(model))
    assert len(seen) == 1 + len(experts) + len(tensors)


def test_it_sees_every_expert_of_a_large_fused_tensor():
    model = torch.nn.Module()
    model.register_parameter("fused", torch.nn.Parameter(torch.randn(16, 200, 300)))
    seen = {model_fingerprint(model)}
    for expert in range(16):
        with torch.no_grad():
            model.fused[expert] += 1
        seen.add(model_fingerprint(model))
    assert len(seen) == 17


def test_it_is_the_same_wherever_and_however_the_same_model_is_loaded(tmp_path):
    model = FAMILIES["qwen2_moe"]().bfloat16()
    expected = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    for settings in ({"dtype": torch.bfloat16}, {"dtype": torch.float32}, {"experts_implementation": "eager"}):
        assert model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, **settings)) == expected
    model.config.use_cache = False
    assert model_fingerprint(model.train()) == expected
    model.config.num_experts_per_tok = 1
    assert model_fingerprint(model) != expected


def tokenizer(words=("a", "b"), lower: bool = False, **settings) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(["[UNK]", *words])}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        made.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[UNK]", **settings)


def test_a_tokenizer_is_its_words_and_rules():
    first = tokenizer()
    seen = {tokenizer_fingerprint(one) for one in (first, tokenizer(("b", "a")), tokenizer(lower=True))}
    assert len(seen) == 3
    before = tokenizer_fingerprint(first)
    first(["a b", "a"], padding=True, truncation=True, max_length=1)  # leaves settings behind
    assert tokenizer_fingerprint(first) == before == tokenizer_fingerprint(tokenizer(padding_side="left"))


def test_a_tokenizer_without_rules_of_its_own_is_its_words():
    class Slow:
        all_special_tokens = ("<s>",)

        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: index for index, word in enumerate(self.words)}

    assert tokenizer_fingerprint(Slow("a", "b")) == tokenizer_fingerprint(Slow("a", "b"))
    assert tokenizer_fingerprint(Slow("a", "b")) != tokenizer_fingerprint(Slow("b", "a"))


def test_another_tokenizer_is_refused(tmp_path):
    model = FAMILIES["mixtral"]()
    snapshot = capture(model, batches(documents()), tmp_path / "known", per_expert=4, tokenizer=tokenizer())
    snapshot.check(model, tokenizer())
    other = tokenizer(lower=True)
    with pytest.raises(LamellaError, match="is of the tokenizer") as error:
        snapshot.check(model, other)
    assert tokenizer_fingerprint(other) in str(error.value)
    with pytest.raises(LamellaError, match=r"has tokenizer '.*', but tokenizer '.*' is asked for"):
        capture(model, batches(documents()), tmp_path / "known", per_expert=4, tokenizer=other)
    unknown = capture(model, batches(documents()), tmp_path / "unknown", per_expert=4)
    unknown.check(model, other)  # nothing is known about its tokenizer
