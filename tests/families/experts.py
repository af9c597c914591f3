"""Every family of mixtures of experts in transformers, and what is asked of its layers on a tiny random model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from tests.families.catalogue import FACTS
from tests.families.checks import TOLERANCE, Answer
from tests.families.models import Family, batch, tiny_config, tiny_model
from tests.tiny_moe import move_off_zero
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoBackbone

from lamella import LamellaError, moe_layers, record_routing
from lamella.backbones.moe import Dispatch, MoELayer, watch_dispatch
from lamella.similarity import swap

CHECKS = ("recombined", "routed", "traced", "cached", "replaced", "masked", "swapped")
_HALF_LINEAR = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
_LINEAR_HEADS = {**_HALF_LINEAR, "linear_head_dim": 8, "linear_num_heads": 2}
_PLAIN = (
    "afmoe aria_text axk1 axk2 cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 "
    "dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm_moe_dsa "
    "gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 "
    "inkling_text inkling2_text jamba jetmoe kolibri1 laguna mellum minimax "
    "minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_moe solar_open "
)
_TEXT: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN.split()},
    "bailing_hybrid": _HALF_LINEAR,
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "doge": {"is_moe": True},
    "flint": {"num_hidden_layers": 4},
    "gemma4_text": {"enable_moe_block": True, "top_k_experts": 2},
    "kimi_linear": _LINEAR_HEADS,
    "lfm2_moe": FACTS["lfm2"] | {"num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 24},
    "llama4_text": {"num_experts_per_tok": 1},
    "mimo_v2_flash": {"layer_types": ["full_attention"] * 3},
    "qwen3_5_moe_text": FACTS["qwen3_next"],
    "qwen3_next": FACTS["qwen3_next"],
    "qwen4_exp_text": {
        **FACTS["qwen3_next"], "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
_WITH_IMAGES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ["mistral4", "mistral_large4", "qwen3_vl_moe", "unlimited_ocr"]},
    "ernie4_5_vl_moe": {
        "text_config__moe_intermediate_size": [24, 16],
        "text_config__rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "glm4v_moe": {
        "text_config__rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 5},
    "step3p7": {"text_config__mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_ocr2": {
        "text_config__mlp_layer_types": ["dense", "sparse", "sparse"],
        "vision_config__sam_config__downsample_channels": [8, 16],
    },
    "glm5_next": {
        "text_config__index_kpool": 2,
        "text_config__linear_head_dim": 8,
        "text_config__linear_num_heads": 2,
        "text_config__layer_types": ["linear_attention", "full_attention", "full_attention"],
        "text_config__qk_rope_head_dim": 0,
        "text_config__mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "muse_spark": {
        "audio_config__patch_sizes": (2, 2, 2), "audio_config__hidden_sizes": (8, 8, 8),
        "audio_config__depths": (1, 1, 1),
    },
}  # fmt: skip
FAMILIES = (
    *(Family(name, "ForCausalLM", FACTS.get(name, {}) | facts) for name, facts in _TEXT.items()),
    *(Family(name, "ForImageTextToText", facts) for name, facts in _WITH_IMAGES.items()),
    Family(
        "dbrx",
        "ForCausalLM",
        {
            "attn_config": {"clip_qkv": 8, "kv_n_heads": 1, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    Family(
        "diffusion_gemma",
        "ForImageTextToText",
        {"text_config__top_k_experts": 2},
        extra={"decoder_input_ids": torch.arange(8, 14)},
    ),
    Family("openai_privacy_filter", "ForTokenClassification"),
    Family("nllb-moe", "ForSeq2SeqLM"),
    Family("switch_transformers", "ForSeq2SeqLM", FACTS["switch_transformers"]),
    Family("vitpose_backbone", "", {"image_size": (8, 8), "patch_size": (4, 4), "num_experts": 2, "part_features": 8}),
)


def folder(family: Family) -> str:
    """The folder of transformers that the family's model lies in."""
    return CONFIG_MAPPING[family.name].__module__.split(".")[2]


def examine(family: Family) -> dict[str, Any]:
    """What the layers of a tiny model of the family are, and the answer to every check, by name."""
    model = _build(family)
    try:
        layers = moe_layers(model)
    except LamellaError as error:
        return {"folder": folder(family), "refused": " ".join(str(error).split())}
    _stir(layers)
    given = {name: batch(family, lengths, side) for name, lengths, side in _BATCHES}
    has_cache = hasattr(model, "generate") and "decoder_input_ids" not in given["whole"]
    asked: dict[str, Callable[[], float]] = {
        "recombined": lambda: _recombined(model, layers, given["whole"]),
        "routed": lambda: _routed(model, layers, given["whole"]),
        "traced": lambda: _traced(model, layers, given),
        "cached": lambda: _cached(model, given["whole"]),
        "replaced": lambda: _replaced(model, layers, given["whole"]),
        "masked": lambda: _masked(model, layers, given["whole"]),
        "swapped": lambda: _swapped(model, layers, given["whole"]),
    }
    return {
        "folder": folder(family),
        "block": type(layers[0].module).__name__,
        "layers": len(layers),
        "experts": layers[0].num_experts,
        "top_k": layers[0].top_k,
        "beside": _beside(layers[0]),
        "answers": {check: asdict(_answer(asked[check])) for check in CHECKS if check != "cached" or has_cache},
    }


_BATCHES = (("whole", (7, 7, 7), "right"), ("right", (7, 5, 4), "right"), ("left", (7, 5, 4), "left"))


def _build(family: Family) -> Any:
    if family.head:
        return tiny_model(family)
    return AutoBackbone.from_config(tiny_config(family.name, family.facts)).eval()


def _stir(layers: list[MoELayer]) -> None:
    """Weights of order one: fresh routers are zero in some families, and choose all experts alike."""
    for layer in layers:
        for part in (layer.router_module, layer.experts_module):
            move_off_zero(part)
        for buffer in layer.module.buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dim() == 1:
                nn.init.normal_(buffer, std=0.3)
        for table in layer.router_module.buffers(recurse=False):
            if table.dim() == 2:  # experts by token
                table.copy_(torch.rand(len(table), layer.num_experts).argsort(dim=1)[:, : layer.top_k])


def _beside(layer: MoELayer) -> list[str]:
    """The names of what else the module holds, and of what each expert's output passes."""
    if layer.module is layer.block:
        return ["the block"]
    parts = [name for name, _ in (*layer.module.named_children(), *layer.module.named_buffers(recurse=False))]
    own = {id(layer.router_module), id(layer.experts_module)}
    return [name for name in parts if id(getattr(layer.module, name)) not in own]


def _answer(ask: Callable[[], float]) -> Answer:
    try:
        with torch.no_grad():
            difference = ask()
    except LamellaError as error:
        return Answer("no", " ".join(str(error).split()))
    except Exception as error:
        return Answer("fault", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Answer("yes" if difference <= TOLERANCE else "fault", "", difference)


def _share(one: Tensor, other: Tensor) -> float:
    """By how much they differ, as a share of the largest value."""
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def _logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**given).logits
    return logits


@contextmanager
def _watched(model: nn.Module, layers: list[MoELayer]) -> Iterator[dict[int, dict[str, Any]]]:
    """Inside the context, each layer's dispatch, what its module and its router are given, and its experts' output."""
    seen: dict[int, dict[str, Any]] = {id(layer.experts_module): {} for layer in layers}

    def dispatched(dispatch: Dispatch) -> None:
        seen[id(dispatch.layer.experts_module)]["dispatch"] = dispatch

    def put_out(module: nn.Module, _: Any, output: Tensor) -> None:
        seen[id(module)]["output"] = output

    handles = []
    for layer in layers:
        at = seen[id(layer.experts_module)]
        reader = layer.router_module if layer.module is layer.block else layer.module
        handles += [
            layer.experts_module.register_forward_hook(put_out),
            reader.register_forward_pre_hook(lambda _, args, at=at: at.update(given=args[0].clone())),
        ]
    with watch_dispatch(model, layers, dispatched):
        yield seen
    for handle in handles:
        handle.remove()


def _recombined(model: Any, layers: list[MoELayer], given: dict[str, Tensor]) -> float:
    """Experts weighted by their router are what the module of the experts puts out; layers that never run are said."""
    with _watched(model, layers) as seen:
        model(**given)
    differences = []
    for layer in layers:
        if not (at := seen[id(layer.experts_module)]):
            continue  # of another modality
        dispatch = at["dispatch"]
        weights = dispatch.routing.dense_weights()
        mixed = sum(weights[:, e, None] * layer.experts[e](dispatch.x) for e in range(layer.num_experts))
        if (
            dispatch.routing.skipped is not None and layer.shared is not None
        ):  # LongCat's identities lie among the experts
            mixed = mixed + layer.shared(dispatch.x)
        output = at["output"].reshape(-1, at["output"].shape[-1])
        if len(output) != len(mixed):  # Llama 4: one row for each token and expert
            output = output.view(layer.num_experts, len(mixed), -1).sum(dim=0)
        differences.append(_share(mixed, output))
    return max(differences)


def _routed(model: Any, layers: list[MoELayer], given: dict[str, Tensor]) -> float:
    """A router asked by hand decides as it did in the model."""
    with _watched(model, layers) as seen:
        model(**given)
    return max(
        _share(layer.router(at["given"]).dense_weights(), at["dispatch"].routing.dense_weights())
        for layer in layers
        if (at := seen[id(layer.experts_module)])
    )


def _traced(model: Any, layers: list[MoELayer], given: dict[str, dict[str, Tensor]]) -> float:
    """k selections of each real token, but those that skip the experts, and no others."""
    wrong = 0
    for inputs in given.values():
        with record_routing(model) as trace, _watched(model, layers) as seen:
            model(**inputs)
        for layer in layers:
            if not (at := seen[id(layer.experts_module)]):
                continue
            place = ("native", layer.place.stack, layer.place.layer, layer.place.module)
            own = "decoder_input_ids" in inputs and "decoder" in layer.place.stack
            tokens = inputs["decoder_input_ids"].numel() if own else int(inputs["attention_mask"].sum())
            dispatch = at["dispatch"]
            skipped = dispatch.routing.skipped
            passed_on = 0 if skipped is None else int(skipped[dispatch.real].sum())
            counted = int(trace.counts[place].sum() + trace.dropped[place].sum())
            wrong += abs(counted + passed_on - layer.top_k * tokens)
    return float(wrong)


def _cached(model: Any, given: dict[str, Tensor]) -> float:
    """With a cache, selections are those of one forward over the whole text."""
    ids = given["input_ids"]
    with record_routing(model) as whole:
        model(input_ids=ids)
    with record_routing(model) as parts:
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True)
    return float(sum(int((one - parts.counts[place]).abs().sum()) for place, one in whole.counts.items()))


def _changes(model: Any, given: dict[str, Tensor], change: Any) -> float:
    """Whether logits are others inside a context, and the same afterwards, to the last bit."""
    before = _logits(model, given)
    with change:
        inside = _logits(model, given)
    if not torch.equal(_logits(model, given), before):
        return 1.0
    return 1.0 if _share(inside, before) <= TOLERANCE else 0.0


def _replaced(model: Any, layers: list[MoELayer], given: dict[str, Tensor]) -> float:
    """Experts in their own places change nothing, others do."""
    before, wrong = _logits(model, given), 0.0
    for layer in layers:
        with layer.replace(dict(enumerate(layer.experts))):
            wrong = max(wrong, _share(_logits(model, given), before))
    first = layers[0]
    return max(wrong, _changes(model, given, first.replace(dict.fromkeys(range(first.num_experts), torch.zeros_like))))


def _masked(model: Any, layers: list[MoELayer], given: dict[str, Tensor]) -> float:
    """The expert most used gets no token once it is masked, in any layer."""
    place_of = {("native", layer.place.stack, layer.place.layer, layer.place.module): layer for layer in layers}
    with record_routing(model) as before:
        model(**given)
    wrong, refused = 0.0, []
    for place, counts in before.counts.items():
        layer, used = place_of[place], int(counts.argmax())
        try:
            with layer.mask([used]), record_routing(model) as trace:
                model(**given)
            wrong = max(wrong, float(trace.counts[place][used]))
            if layer is layers[0]:
                wrong = max(wrong, _changes(model, given, layer.mask([used])))
        except LamellaError as error:
            refused.append(error)
    if refused:
        raise refused[0]
    return wrong


def _swapped(model: Any, layers: list[MoELayer], given: dict[str, Tensor]) -> float:
    """An expert in another's place, of another layer where there is one."""
    one, other = layers[0], layers[-1]
    return _changes(model, given, swap(model, (one.index, 0), (other.index, one.num_experts - 1), exchange=True))
