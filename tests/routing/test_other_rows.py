"""Modules that are given other rows than ``(sequences, tokens)``: padding is followed to them, or it is said."""

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tests import tiny
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FunnelConfig,
    FunnelForSequenceClassification,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
    XLMConfig,
    XLMForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from lamella import LamellaError, MolaConfig
from lamella.routing import collect_losses

_SIZES = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def deepseek() -> PreTrainedModel:
    return DeepseekV3ForCausalLM(DeepseekV3Config(
        **_SIZES, intermediate_size=24, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        moe_intermediate_size=8, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8,
        first_k_dense_replace=2, topk_group=1,
    ))  # fmt: skip


def xlnet() -> PreTrainedModel:
    return XLNetForSequenceClassification(
        XLNetConfig(vocab_size=tiny.VOCAB, d_model=16, n_layer=2, n_head=2, d_inner=24, dropout=0.0)
    )


def mola(model: PreTrainedModel, target: str) -> PeftModel:
    torch.manual_seed(17)
    config = MolaConfig(r=2, num_experts=3, target_modules=[target], router_aux_loss_coef=0.5)
    return get_peft_model(model, config).train()


def padded(rows: int, tokens: int, extra: int = 0) -> dict[str, Tensor]:
    """Sequences of different lengths, and further padding behind them."""
    ids = torch.randint(3, tiny.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(tokens) < tokens - torch.arange(rows)[:, None] % 3).long()
    pad = torch.nn.functional.pad
    return {"input_ids": pad(ids * mask, (0, extra)), "attention_mask": pad(mask, (0, extra))}


def balance(model: PeftModel, inputs: dict[str, Tensor]) -> Tensor:
    with collect_losses() as losses:
        model(**inputs)
    return losses.total().detach()


@pytest.mark.parametrize(("make", "target"), [(deepseek, "kv_b_proj"), (xlnet, "layer_1")])
def test_padding_counts_nothing_whatever_the_order_of_axes(make: Any, target: str) -> None:
    model = mola(make().eval(), target)
    # As many sequences as tokens: a forward of a few tokens has shown which is which.
    torch.testing.assert_close(balance(model, padded(7, 7)), balance(model, padded(7, 7, extra=2)))
    expected = balance(model, padded(4, 7))
    assert balance(model, padded(4, 7, extra=5)) != balance(model, padded(3, 7)), "it is no constant"
    torch.testing.assert_close(balance(model, padded(4, 7, extra=5)), expected)


def warned(model: PeftModel, inputs: dict[str, Tensor]) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            balance(model, inputs)
    return [str(one.message) for one in said if "axis" in str(one.message) or "rows" in str(one.message)]


def test_what_is_not_shown_is_said_once_by_name() -> None:
    switch = SwitchTransformersConfig(
        vocab_size=tiny.VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_sparse_encoder_layers=1, num_experts=4,
        num_heads=2, dropout_rate=0.0,
    )  # fmt: skip
    said = warned(mola(SwitchTransformersEncoderModel(switch).eval(), "wi"), padded(3, 6))
    assert len(said) == 1
    assert "expert_" in said[0]
    assert "padding too" in said[0]
    unknown = xlnet().eval()
    unknown.main_input_name = "states"  # so that no forward of a few tokens can be made
    said = warned(mola(unknown, "layer_1"), padded(5, 5))
    assert len(said) == 1
    assert "as many sequences as tokens (5)" in said[0]
    assert "layer_1" in said[0]
    unknown = xlnet().eval()
    unknown.main_input_name = "states"
    assert not warned(mola(unknown, "layer_1"), padded(3, 6))
    for make, target in ((xlnet, "layer_1"), (tiny.bert, "query"), (tiny.bert, "pooler.dense"), (tiny.llama, "q_proj")):
        assert not warned(mola(make().eval(), target), padded(5, 5))


def test_what_may_say_by_another_name_which_tokens_are_padding_is_refused_or_said() -> None:
    sizes = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "dropout": 0.0, "attention_dropout": 0.0, "num_labels": 3}
    base = XLMForSequenceClassification(XLMConfig(vocab_size=tiny.VOCAB, **sizes)).eval()
    given = padded(3, 6)
    lengths = {"input_ids": given["input_ids"], "lengths": given["attention_mask"].sum(dim=1)}
    model = tiny.molex(copy.deepcopy(base))
    with torch.no_grad():
        model(**given)
        model(given["input_ids"], lengths=torch.full((3,), 6))
        with pytest.raises(LamellaError, match=r"XLMModel is given 'lengths', which may say .* attention_mask"):
            model(**lengths)
    with pytest.warns(UserWarning, match=r"XLMModel is given 'lengths', .* balance loss and trace count them"):
        balance(mola(base, "q_lin"), lengths)


def test_frames_of_sound_have_the_mask_that_the_model_makes_of_its_samples() -> None:
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8),
        conv_stride=(4, 4), conv_kernel=(8, 8), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tiny.adapted(HubertModel(config).eval(), target_modules=["q_proj"])
    mask = (torch.arange(400) < torch.tensor([[400], [200]])).long()
    with tiny.watch(model) as seen, torch.no_grad():
        model(input_values=torch.randn(2, 400), attention_mask=mask)
    frames = model.get_base_model()._get_feature_vector_attention_mask(len(seen[0][2]) // 2, mask)
    assert 0 < frames[1].sum() < frames[0].sum()
    assert torch.equal(seen[0][2], frames.flatten())


def test_patches_are_real_by_whatever_name_the_model_is_told() -> None:
    config = Siglip2VisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_patches=16, patch_size=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tiny.molex(Siglip2VisionModel(config).eval())
    pixels, sides = torch.randn(2, 9, 12), torch.tensor([[3, 3], [2, 2]])
    real = (torch.arange(9) < torch.tensor([[9], [4]])).long()
    with torch.no_grad():
        together = model(pixel_values=pixels, pixel_attention_mask=real, spatial_shapes=sides)
        alone = model(pixel_values=pixels[1:, :4], pixel_attention_mask=real[1:, :4], spatial_shapes=sides[1:])
    torch.testing.assert_close(together.pooler_output[1:], alone.pooler_output)


def test_a_decision_for_sequences_refuses_rows_that_may_be_padding() -> None:
    funnel = FunnelConfig(vocab_size=tiny.VOCAB, d_model=16, n_head=2, d_head=8, d_inner=24, block_sizes=[2, 2])
    model = tiny.molex(FunnelForSequenceClassification(funnel).eval(), lora=None)
    with torch.no_grad(), pytest.raises(LamellaError, match="padding would be read"):
        model(**padded(3, 16))
    with torch.no_grad():
        model(input_ids=padded(3, 16)["input_ids"])
