import pytest
import torch
from tests import tiny, tiny_pipelines
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CodeGenConfig,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    Gemma3TextConfig,
    GPTNeoXConfig,
    HeliumConfig,
    JambaConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    MptConfig,
    Olmo3Config,
    Qwen2Config,
    RobertaConfig,
    SiglipTextConfig,
    SiglipTextModel,
    T5GemmaConfig,
    ViTConfig,
    Zamba2Config,
)

from lamella import LamellaError
from lamella.backbones import Place, find_place, find_stacks, locate_stacks, siblings_with_same_input


def actual(model: nn.Module) -> list[tuple[str, str, int]]:
    return [(stack.name, stack.role, stack.depth) for stack in locate_stacks(model)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", [("bert.encoder.layer", "encoder", 3)]),
        ("mpnet", [("mpnet.encoder.layer", "encoder", 3)]),
        ("gpt2", [("transformer.h", "decoder", 3)]),
        ("llama", [("model.layers", "decoder", 3)]),
        ("t5", [("encoder.block", "encoder", 3), ("decoder.block", "decoder", 3)]),
    ],
)
def test_the_stacks_of_the_families_we_train(name: str, expected: list[tuple[str, str, int]]) -> None:
    assert actual(tiny.MODELS[name](layers=3)) == expected


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 48, "pad_token_id": 0}
BART = BartConfig(
    d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_ffn_dim=24,
)  # fmt: skip
ENCODER, DECODER = [("encoder", 2)], [("decoder", 2)]
OTHERS = [
    (AutoModel, RobertaConfig(**SMALL), ENCODER, "is_decoder is False"),
    (AutoModel, ModernBertConfig(**SMALL), ENCODER, "modernbert fills in masked tokens"),
    (AutoModel, DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24), ENCODER, "fills in masked tokens"),
    (AutoModel, ViTConfig(**SMALL, image_size=8, patch_size=4), ENCODER, "it reads image"),
    (AutoModel, Qwen2Config(**SMALL, num_key_value_heads=1), DECODER, "is_causal is True"),
    (AutoModel, GPTNeoXConfig(**SMALL), DECODER, "is_causal is True"),
    (AutoModel, BART, ENCODER + DECODER, "is_decoder is False"),
    # Of the families that once were in no list.
    (AutoModel, Olmo3Config(**GROUPED), DECODER, "is_causal is True"),
    (AutoModel, HeliumConfig(**GROUPED), DECODER, "is_causal is True"),
    (AutoModelForCausalLM, BertConfig(**SMALL, is_decoder=True), DECODER, "is_causal is True"),
    (AutoModelForCausalLM, MptConfig(d_model=16, n_heads=2, n_layers=2), DECODER, "MptForCausalLM generates with it"),
    (AutoModelForCausalLM, CodeGenConfig(n_embd=16, n_layer=2, n_head=4, rotary_dim=4), DECODER, "generates with it"),
    (AutoModel, MptConfig(d_model=16, n_heads=2, n_layers=2), DECODER, "nothing shows that it is not causal"),
    (AutoModel, T5GemmaConfig(encoder=GROUPED, decoder=GROUPED), ENCODER + DECODER, "encoder-decoder's encoder"),
    (LlamaForSequenceClassification, LlamaConfig(**GROUPED), DECODER, "is_causal is True"),
]


@pytest.mark.parametrize(
    ("made_by", "config", "expected", "evidence"), OTHERS, ids=lambda x: getattr(x, "__name__", "")
)
def test_whether_a_stack_is_causal_is_read_from_the_model(made_by, config, expected, evidence) -> None:
    with torch.device("meta"):
        model = made_by.from_config(config) if hasattr(made_by, "from_config") else made_by(config)
    stacks = locate_stacks(model)
    assert [(stack.role, stack.depth) for stack in stacks] == expected
    assert evidence in stacks[0].evidence


TOWER = {
    **SMALL,
    "vocab_size": 48,
    "max_position_embeddings": 16,
    "projection_dim": 8,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.mark.parametrize(
    ("model", "role"),
    [
        (CLIPTextModel(CLIPTextConfig(**TOWER)), "decoder"),
        (SiglipTextModel(SiglipTextConfig(**TOWER)), "encoder"),
        (AutoModel.from_config(Gemma3TextConfig(**GROUPED)), "decoder"),
        (AutoModel.from_config(Gemma3TextConfig(**GROUPED, use_bidirectional_attention=True)), "encoder"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_says_nothing_of_itself_is_tried_out(model: nn.Module, role: str) -> None:
    model.train()
    model.get_submodule(locate_stacks(model)[0].name).eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    (stack,) = locate_stacks(model)
    assert stack.role == role
    assert ("a probe" in stack.evidence) == (role == "encoder")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_both_towers_of_a_model_have_the_role_that_is_theirs() -> None:
    text = {name: value for name, value in TOWER.items() if name not in ("image_size", "patch_size")}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER, projection_dim=8))
    assert actual(model) == [("vision_model.encoder.layers", "encoder", 2), ("text_model.encoder.layers", "decoder", 2)]


def test_blocks_of_several_classes_and_with_lists_in_them_are_one_stack() -> None:
    jamba = JambaConfig(**GROUPED, attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False)
    zamba = Zamba2Config(
        **{**GROUPED, "num_hidden_layers": 4}, layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1,
        mamba_headdim=8, n_mamba_heads=4, mamba_ngroups=1, use_mamba_kernels=False,
    )  # fmt: skip
    with torch.device("meta"):
        assert actual(AutoModelForCausalLM.from_config(jamba)) == [("model.layers", "decoder", 2)]
        assert actual(AutoModelForCausalLM.from_config(zamba)) == [("model.layers", "decoder", 4)]


def block(features: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(features, features), nn.ReLU())


class Unknown(nn.Module):
    """A backbone of no known family."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([block(), block()])}) for _ in range(3))
        self.small_heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(5))


def test_an_unknown_model_is_searched_by_structure_and_says_so() -> None:
    (stack,) = locate_stacks(Unknown())
    assert (stack.name, stack.depth) == ("blocks", 3)
    assert stack.found_by == "structure"
    assert stack.causal, "nothing shows that it is not"


def test_two_large_lists_are_two_stacks() -> None:
    model = nn.ModuleDict(
        {"encoder": nn.ModuleList([block(), block()]), "decoder": nn.ModuleList([block(), block(), block()])}
    )
    assert actual(model) == [("encoder", "decoder", 2), ("decoder", "decoder", 3)], "a name says nothing"


NO_STACKS = [
    nn.Linear(2, 2),
    nn.ModuleDict({"one": nn.ModuleList([block()])}),
    nn.ModuleDict({"unlike": nn.ModuleList([block(), nn.ReLU()])}),
    nn.ModuleDict({"bare": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}),
]


@pytest.mark.parametrize("model", NO_STACKS)
def test_a_model_without_a_stack_is_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(LamellaError, match=rf"No stack of blocks was found in {type(model).__name__}"):
        locate_stacks(model)
    assert find_stacks(model) == []


def test_places() -> None:
    stacks = locate_stacks(tiny.t5(layers=2))
    place = find_place("decoder.block.1.layer.1.EncDecAttention.k", stacks)
    assert place == Place("decoder.block", 1, "layer.1.EncDecAttention.k")
    for outside in (
        "shared",
        "lm_head",
        "encoder.block",
        "encoder.block.1",
        "encoder.final_layer_norm",
        "decoder.blocks.1.q",
    ):
        assert find_place(outside, stacks) is None


@pytest.mark.parametrize(
    ("module", "reads"),
    [
        ("layer.1.EncDecAttention.k", True),
        ("layer.1.EncDecAttention.v", True),
        ("layer.1.EncDecAttention.q", False),
        ("layer.0.SelfAttention.k", False),
        ("encoder_attn.v_proj", True),
        ("encoder_attn.out_proj", False),
        ("crossattention.self.key", True),
        ("key", False),
        ("attn2.to_k", True),
        ("attn2.to_v", True),
        ("attn2.to_q", False),
        ("attn1.to_k", False),
        ("attention.self.key_proj", False),
    ],
)
def test_only_keys_and_values_of_cross_attention_read_the_encoder(module: str, reads: bool) -> None:
    assert Place("decoder", 0, module).reads_encoder is reads


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("self_attn.k_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.down_proj", ("mlp.down_proj",)),
        ("layer.0.SelfAttention.q", tuple(f"layer.0.SelfAttention.{name}" for name in "qkv")),
        ("layer.1.EncDecAttention.q", ("layer.1.EncDecAttention.q",)),
        ("layer.1.EncDecAttention.v", ("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v")),
        ("q", ("q", "k", "v")),
        ("attn1.to_v", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
        ("attn2.to_q", ("attn2.to_q",)),
        ("attn2.to_k", ("attn2.to_k", "attn2.to_v")),
    ],
)
def test_siblings_share_an_input_and_cross_attention_keeps_its_two_apart(
    module: str, expected: tuple[str, ...]
) -> None:
    assert siblings_with_same_input(Place("decoder", 0, module)) == expected


@pytest.mark.parametrize("name", tiny.MODELS)
def test_siblings_are_given_the_very_same_tensor(name: str) -> None:
    model = tiny.adapted(tiny.MODELS[name]())
    given_to: dict[int, object] = {}
    layers = [module for module in model.modules() if isinstance(module, tiny.MolaLinear)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: given_to.update({id(module): args[0]}))
    with torch.no_grad():
        model(**tiny.inputs(model.get_base_model()))
    shared = 0
    for layer in layers:
        for sibling in layer.same_input:
            assert given_to[id(sibling)] is given_to[id(layer)], (layer.name, sibling.name)
        shared += len(layer.same_input) > 1
    assert shared == {"bert": 6, "mpnet": 6, "gpt2": 0, "llama": 10, "t5": 24}[name]


class Given:
    """Which linear modules were given which tensor, in their first call."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.by_name: dict[str, torch.Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(lambda _, args, name=name: self.by_name.setdefault(name, args[0]))

    def siblings(self, endings: tuple[str, ...]) -> set[tuple[str, ...]]:
        """Those that the table says share an input with the modules so named, all of them asserted to do so."""
        actual = set()
        for name, x in self.by_name.items():
            *block, attention, own = name.split(".")
            if own in endings:
                names = siblings_with_same_input(Place("blocks", 0, f"{attention}.{own}"))
                assert all(self.by_name[".".join([*block, sibling])] is x for sibling in names), (name, names)
                actual.add(names)
        return actual


def test_siblings_in_deberta_are_given_the_very_same_tensor() -> None:
    model = DebertaV2Model(DebertaV2Config(**SMALL, vocab_size=9, relative_attention=True, share_att_key=True))
    given = Given(model)
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    names = tuple(f"self.{name}" for name in ("query_proj", "key_proj", "value_proj"))
    assert given.siblings(("query_proj", "key_proj", "value_proj")) == {names}


def test_siblings_in_diffusers_are_given_the_very_same_tensor_and_cross_attention_keeps_its_two_apart() -> None:
    given = Given(tiny_pipelines.stable_diffusion().unet)
    unet = given.model
    with torch.no_grad():
        unet(tiny_pipelines.latents(2), timestep=3, encoder_hidden_states=torch.randn(2, 5, tiny_pipelines.WIDTH))
    assert given.siblings(("to_q", "to_k", "to_v")) == {
        ("attn1.to_q", "attn1.to_k", "attn1.to_v"), ("attn2.to_q",), ("attn2.to_k", "attn2.to_v"),
    }  # fmt: skip
