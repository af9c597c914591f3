"""The families of the matrix, and what a tiny model of each needs beyond small sizes."""

from typing import Any

import torch
from tests.families.models import PAD, Family

_MAMBA2 = {"mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "num_hidden_layers": 4}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_SLIDING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}
_MROPE = {"text_config__rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_GROUPED = {"num_key_value_heads": 1}
FACTS: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "codegen": {"n_head": 4, "n_embd": 32, "rotary_dim": 4},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 32},
    "gemma2": _SLIDING,
    "gemma3_text": _SLIDING,
    "gemma3n_text": {**_SLIDING, "num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 5},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "llama": _GROUPED,
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "mamba": {"state_size": 8},
    "mistral": {**_GROUPED, "sliding_window": 5},
    "olmo3": _SLIDING,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "whisper": {"max_source_positions": 16},
    "speech_to_text": {"input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 64},
    "wav2vec2-bert": {"feature_projection_input_dim": 8, "conv_depthwise_kernel_size": 3,
                      "position_embeddings_type": "rotary"},
    "moonshine": {"encoder_num_hidden_layers": 3, "decoder_num_hidden_layers": 3, "encoder_num_attention_heads": 2,
                  "decoder_num_attention_heads": 2},
    "audio-spectrogram-transformer": {"max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4},
    "videomae": {"num_frames": 2},
    "vivit": {"num_frames": 2, "tubelet_size": (2, 4, 4)},
    "timesformer": {"num_frames": 2, "drop_path_rate": 0},
    "swin": {"image_size": 32, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4},
    "swinv2": {"image_size": 32, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4},
    "segformer": {"num_encoder_blocks": 2, "depths": (2, 2), "sr_ratios": (2, 1), "hidden_sizes": (16, 16),
                  "patch_sizes": (3, 3), "strides": (4, 2), "num_attention_heads": (2, 2), "mlp_ratios": (2, 2)},
    "pvt": {"image_size": 32, "num_encoder_blocks": 2, "depths": (2, 2), "sequence_reduction_ratios": (2, 1),
            "hidden_sizes": (16, 16), "patch_sizes": (4, 2), "strides": (4, 2), "num_attention_heads": (2, 2),
            "mlp_ratios": (2, 2)},
    "hiera": {"image_size": (32, 32), "patch_size": (7, 7), "depths": (2, 2), "num_heads": (2, 4), "num_query_pool": 1,
              "masked_unit_size": (4, 4), "masked_unit_attention": (True, False)},
    "convnext": {"hidden_sizes": (16, 16), "depths": (2, 2), "num_stages": 2, "image_size": 32,
                 "layer_scale_init_value": 0.5},
    "poolformer": {"hidden_sizes": (16, 16), "depths": (2, 2), "num_encoder_blocks": 2, "patch_sizes": (7, 3),
                   "strides": (4, 2), "padding": (2, 1), "mlp_ratios": (2, 2), "layer_scale_init_value": 0.5},
    "focalnet": {"depths": (2, 2), "hidden_sizes": (16, 16), "focal_levels": (2, 2), "focal_windows": (3, 3),
                 "image_size": 32},
    "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "longformer": {"attention_window": 4},
    "ctrl": {"dff": 24},
    **{name: {"decoder_start_token_id": PAD} for name in ("longt5", "mt5", "switch_transformers", "t5", "umt5")},
    "funnel": {"block_sizes": [2, 2]},
    "mobilebert": {"intra_bottleneck_size": 16, "num_feedforward_networks": 2, "classifier_activation": False},
    "canine": {"num_hash_buckets": 32},
    "xlnet": {"d_inner": 24},
    "llava": {"image_seq_length": 4},
    "vipllava": {"vision_feature_layer": (-2, -1)},
    "aya_vision": {"vision_config__vision_use_head": False, "downsample_factor": 1},
    "gemma3": {"mm_tokens_per_image": 4, "boi_token_index": 4, "eoi_token_index": 5},
    "internvl": {"downsample_ratio": 1.0, "image_seq_length": 4, "vision_config__image_size": (8, 8),
                 "vision_config__patch_size": (4, 4)},
    "idefics3": {"scale_factor": 1},
    "smolvlm": {"scale_factor": 1},
    "mistral3": {"spatial_merge_size": 1},
    "qwen2_vl": {**_MROPE, "vision_config__spatial_merge_size": 1},
    "qwen2_5_vl": {**_MROPE, "vision_config__spatial_merge_size": 1, "vision_config__window_size": 8,
                   "vision_config__fullatt_block_indexes": (1,)},
    "qwen3_vl": {**_MROPE, "vision_config__spatial_merge_size": 1, "vision_config__num_position_embeddings": 4,
                 "vision_config__deepstack_visual_indexes": (0, 1)},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 2,
              "attention_hidden_size": 32, "attention_head_dim": 16, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 2,
               "mamba_d_state": 8, "adapter_rank": 4},
}  # fmt: skip


_GAINS = {"mobilebert": 0.3}
# PEFT refuses these of Mamba's, whose kernels read their weights.
_NOT_LORA = dict.fromkeys(("falcon_h1", "mamba", "mamba2", "falcon_mamba"), ("out_proj",))
_NOT_LORA["phimoe"] = ("router",)  # a linear module that puts out more than a tensor


def _families(head: str, names: str, **more: Any) -> tuple[Family, ...]:
    return tuple(
        Family(name, head, FACTS.get(name, {}), not_lora=_NOT_LORA.get(name, ()), gain=_GAINS.get(name, 1.0), **more)
        for name in names.split()
    )


DECODERS = _families(
    "ForCausalLM",
    "apertus arcee bamba bitnet bloom codegen cohere cohere2 ctrl deepseek_v2 deepseek_v3 diffllama ernie4_5 "
    "ernie4_5_moe exaone4 falcon falcon_h1 falcon_mamba gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 "
    "glm4_moe gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid helium "
    "hunyuan_v1_dense jamba jetmoe lfm2 llama mamba mamba2 mistral mixtral modernbert-decoder mpt nanochat nemotron "
    "olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe "
    "qwen3_next recurrent_gemma seed_oss smollm3 stablelm starcoder2 xglm zamba zamba2",
)
ENCODERS = _families(
    "ForSequenceClassification",
    "albert bert big_bird camembert canine convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm "
    "flaubert fnet funnel longformer megatron-bert mobilebert modernbert mpnet nomic_bert nystromformer roberta "
    "roformer squeezebert xlm xlm-roberta xlnet yoso",
)
ENCODER_DECODERS = _families(
    "ForSeq2SeqLM",
    "bart bigbird_pegasus blenderbot led longt5 m2m_100 marian mbart mt5 nllb-moe pegasus pegasus_x prophetnet "
    "switch_transformers t5 t5gemma umt5",
)
_IMAGE = {"main": "pixel_values", "shape": (3, 8, 8)}
VISION = (
    *_families(
        "ForImageClassification",
        "beit data2vec-vision dinov2 dinov2_with_registers ijepa vit vit_msn",
        **_IMAGE,
    ),
    *_families(
        "ForImageClassification",
        "convnext focalnet hiera poolformer pvt segformer swin swinv2",
        main="pixel_values",
        shape=(3, 32, 32),
    ),
    *_families("ForVideoClassification", "timesformer videomae vivit", main="pixel_values", shape=(2, 3, 8, 8)),
)
SPEECH = (
    *_families(
        "ForCTC",
        "data2vec-audio hubert sew sew-d unispeech unispeech-sat wav2vec2 wav2vec2-conformer wavlm",
        main="input_values",
        shape=(-1,),
    ),
    *_families("ForCTC", "wav2vec2-bert", main="input_features", shape=(-1, 8)),
    *_families("ForSpeechSeq2Seq", "whisper", main="input_features", shape=(8, 32)),
    *_families("ForSpeechSeq2Seq", "speech_to_text", main="input_features", shape=(-1, 8)),
    *_families("ForSpeechSeq2Seq", "moonshine", main="input_values", shape=(2048,)),
    *_families("ForAudioClassification", "audio-spectrogram-transformer", main="input_values", shape=(16, 8)),
)
MULTIMODAL = (
    *_families("", "clip clipseg siglip", images=0, **_IMAGE),
    *_families("ForImageTextToText", "aya_vision gemma3 internvl llava paligemma vipllava", images=4, **_IMAGE),
    *_families("ForImageTextToText", "blip git", images=0, **_IMAGE),
    *_families("ForImageTextToText", "idefics3 smolvlm", images=4, main="pixel_values", shape=(1, 3, 8, 8)),
    *_families(
        "ForImageTextToText",
        "qwen2_5_vl qwen2_vl qwen3_vl",
        main="pixel_values",
        shape=(4, 96),
        images=4,
        joined=True,
        extra={"image_grid_thw": torch.tensor([1, 2, 2])},
    ),
    *_families("ForImageTextToText", "mistral3", images=4, extra={"image_sizes": torch.tensor([8, 8])}, **_IMAGE),
)
GROUPS = {
    "Decoders": DECODERS,
    "Encoders": ENCODERS,
    "Encoder-decoders": ENCODER_DECODERS,
    "Vision": VISION,
    "Speech": SPEECH,
    "Text and images": MULTIMODAL,
}
FAMILIES = tuple(family for families in GROUPS.values() for family in families)
# An unknown decoder, an encoder beside a decoder, and states instead of attention.
PATHS = ("glm", "t5", "mamba")
