"""Each thing that cannot be composed is one clear error, and the model is as it was."""

from pathlib import Path

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from tests.tuners.mole import trained
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

import lamella
from lamella import LamellaError, MoleConfig, compose, fixed_weights, masked_experts
from lamella.adapters import read_lora


def refused(base: torch.nn.Module, adapters: object, match: str, config: MoleConfig | None = None) -> None:
    names, tensors = [name for name, _ in base.named_modules()], [id(p) for p in base.parameters()]
    with pytest.raises(LamellaError, match=match):
        compose(base, adapters, config)
    assert [name for name, _ in base.named_modules()] == names
    assert [id(p) for p in base.parameters()] == tensors
    assert not hasattr(base, "peft_config")
    assert all(p.requires_grad for p in base.parameters())
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_too_few(folder: Path) -> None:
    paths = trained.loras("bert", folder)
    refused(tiny.bert(), {}, "at least two LoRAs, and there is none")
    refused(tiny.bert(), {"a": paths["news"]}, "only 'a'.*load it with PEFT")
    with pytest.raises(LamellaError, match="at least two"):
        get_peft_model(tiny.bert(), MoleConfig())


def test_two_of_one_name(folder: Path) -> None:
    path = trained.lora("bert", folder, 0)
    refused(tiny.bert(), [path, path], "Two LoRAs are called 'bert-news'")
    both = compose(tiny.bert(), [path, trained.lora("bert", folder, 1)])
    assert list(both.peft_config["default"].adapters) == ["bert-news", "bert-code"]


def test_another_base(folder: Path, tmp_path: Path) -> None:
    paths = trained.loras("bert", folder)
    refused(tiny.build("distilbert"), paths, "does not have")
    named = tiny.bert()
    named.name_or_path = named.config._name_or_path = "somebody/this"
    other = tiny.bert()
    other.name_or_path = other.config._name_or_path = "somebody/that"
    get_peft_model(other, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "that")
    refused(named, {"a": tmp_path / "that", "b": paths["news"]}, "trained on somebody/that.*here is somebody/this")


def test_what_is_no_lora(folder: Path, tmp_path: Path) -> None:
    paths = trained.loras("bert", folder)
    (tmp_path / "old.pt").write_bytes(b"pickle")
    refused(tiny.bert(), {"a": tmp_path / "old.pt", "b": paths["news"]}, "pickle")
    refused(tiny.bert(), {"a": tmp_path / "nowhere", "b": paths["news"]}, "not a file or folder here")


def test_the_config_given_to_compose_names_no_loras(folder: Path) -> None:
    paths = trained.loras("bert", folder)
    refused(tiny.bert(), paths, "names LoRAs already", MoleConfig(adapters=paths))
    config = MoleConfig(granularity="matrix")
    compose(tiny.bert(), paths, config)
    assert config.adapters == {}


def test_nothing_left(folder: Path) -> None:
    everything = MoleConfig(exclude_modules=["query", "value", "dense"])
    refused(tiny.bert(), trained.loras("bert", folder), "No module is left", everything)


def test_flatten_on_a_decoder(folder: Path) -> None:
    config = MoleConfig(router_input="flatten", flatten_length=8)
    refused(tiny.llama(), trained.loras("llama", folder), "model.layers is a decoder", config)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"granularity": "layer"}, "granularity='layer' must be one of 'matrix'"),
        ({"router_input": "max"}, "router_input='max'"),
        ({"form": "sum"}, "form='sum'"),
        ({"balance": "lob"}, "balance='lob'"),
        ({"temperature": 0}, "temperature=0 must be a number from 0.01 to 1,000,000"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"router_aux_loss_coef": -1}, "router_aux_loss_coef=-1 must be a number from 0 to 1,000,000"),
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"target_modules": ["query"]}, "target_modules=.*is not a setting of MOLE"),
        ({"router_input": "flatten"}, "needs flatten_length"),
        ({"flatten_length": 5}, "needs flatten_length"),
        ({"router_input": "flatten", "flatten_length": 0}, "flatten_length=0"),
        ({"layers_pattern": "layer"}, "layers_pattern='layer' must be given together with layers_to_transform"),
        ({"router_aux_los_coef": 1}, "did you mean 'router_aux_loss_coef'"),
        ({"adapters": {"a": 3}}, r"adapters\['a'\]=3 must be"),
        ({"adapters": {"a": {"path": "x"}}}, r"adapters\['a'\]="),
    ],
)
def test_settings_out_of_range(options: dict[str, object], match: str) -> None:
    with pytest.raises(LamellaError, match=match):
        MoleConfig(**options)


def test_overrides(folder: Path) -> None:
    model = trained.composition("bert", folder)
    given = tiny.inputs(model.get_base_model())
    bad = [
        (lambda: masked_experts(model, drop=["news", "code", "law"]), "leaves none of the 3 LoRAs"),
        (lambda: masked_experts(model, drop=["novels"]), "'novels'; the composition has news, code, law"),
        (lambda: masked_experts(model, drop="news"), "is one name; give a list"),
        (lambda: fixed_weights(model, {"novels": 1}), "'novels'"),
        (lambda: fixed_weights(model, {"news": float("nan")}), "finite, and those of news are not"),
        (lambda: fixed_weights(model, torch.tensor([1.0, float("inf"), 0])), "finite, and those of code are not"),
        (lambda: fixed_weights(model, torch.ones(2)), r"shape \(2,\) are not \(3,\)"),
        (lambda: fixed_weights(model, torch.ones(2, 2, 3)), "are not"),
        (lambda: fixed_weights(model, []), "are not"),
        (lambda: masked_experts(tiny.bert(), drop=["news"]), "has 0 active MOLE adapters"),
    ]
    for make, match in bad:
        with pytest.raises(LamellaError, match=match), make():
            pass
    with fixed_weights(model, [{"news": 1}, {"code": 1}]), pytest.raises(LamellaError, match="weights for 2 sequences"):
        trained.run(model, given)
    override = masked_experts(model, drop=["news"])
    with fixed_weights(model, {"news": 1}), pytest.raises(LamellaError, match="fixed weights are 0"), override:
        pass
    override = fixed_weights(model, {"news": 1})
    with masked_experts(model, drop=["news"]), pytest.raises(LamellaError, match="nothing but LoRAs that"), override:
        pass
    plain = trained.run(model, given)
    with masked_experts(model, drop=["news"]), masked_experts(model, drop=["code"]):
        left = trained.run(model, given)
    with fixed_weights(model, {"law": 1}):
        torch.testing.assert_close(trained.run(model, given), left)
    assert torch.equal(trained.run(model, given), plain), "nothing is left behind"
    model.add_adapter("second", MoleConfig(adapters=trained.loras("bert", folder)))
    model.base_model.set_adapter(["default", "second"])
    with (
        pytest.raises(LamellaError, match=r"2 active MOLE adapters.*set_adapter"),
        masked_experts(model, drop=["news"]),
    ):
        pass


@settings(max_examples=5, deadline=None)
@drawn(
    weights=st.lists(st.floats(0.1, 2), min_size=3, max_size=3),
    dropped=st.sets(st.sampled_from(trained.NAMES), min_size=1, max_size=2),
)
def test_a_mask_shares_out_fixed_weights_in_proportion(weights: list[float], dropped: set[str], folder: Path) -> None:
    model = trained.composition("bert", folder)
    given = tiny.inputs(model.get_base_model())
    table = dict(zip(trained.NAMES, weights, strict=True))
    left = {name: weight for name, weight in table.items() if name not in dropped}
    grown = {name: weight * sum(weights) / sum(left.values()) for name, weight in left.items()}
    with fixed_weights(model, table), masked_experts(model, drop=sorted(dropped)):
        actual = trained.run(model, given)
    with masked_experts(model, drop=sorted(dropped)), fixed_weights(model, table):
        assert torch.equal(trained.run(model, given), actual)
    with fixed_weights(model, grown):
        torch.testing.assert_close(actual, trained.run(model, given))


def test_a_layer_by_itself_says_what_it_lacks(folder: Path) -> None:
    model = trained.composition("bert", folder, balance="log").train()
    layers = trained.layers_of(model)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    with pytest.raises(LamellaError, match="outside a forward of its model"):
        layers["bert.encoder.layer.0.attention.output.dense"](x)
    with pytest.raises(LamellaError, match="balance='none'"):
        layers["bert.encoder.layer.0.attention.self.query"](x)
    with pytest.raises(LamellaError, match="to which sequence they belong"):
        layers["bert.encoder.layer.0.attention.self.query"](x[0])


def test_loras_that_were_read_already_are_composed_as_they_are(folder: Path) -> None:
    sources = [read_lora(path) for path in trained.loras("bert", folder).values()]
    by_list = lamella.compose(tiny.bert(), sources)
    by_name = lamella.compose(tiny.bert(), dict(zip("abc", sources, strict=True)))
    assert list(by_list.peft_config["default"].adapters) == [source.name for source in sources]
    assert list(by_name.peft_config["default"].adapters) == ["a", "b", "c"]


def test_a_module_that_is_given_what_is_no_sequence_cannot_decide_for_others(tmp_path: Path) -> None:
    """DeBERTa with share_att_key gives its queries and keys a table of relative positions too."""

    def deberta() -> torch.nn.Module:
        torch.manual_seed(0)
        return DebertaV2ForSequenceClassification(
            DebertaV2Config(
                vocab_size=tiny.VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=4,
                max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        ).eval()  # fmt: skip

    for index, targets in enumerate((["query_proj", "value_proj"], ["key_proj", "output.dense"])):
        base = deberta()
        torch.manual_seed(index)
        adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        adapted.save_pretrained(tmp_path / f"lora{index}")
    paths = [tmp_path / "lora0", tmp_path / "lora1"]
    given = tiny.inputs(tiny.bert())
    for router_input in ("mean", "token"):
        model = compose(deberta(), paths, MoleConfig(router_input=router_input))
        with pytest.raises(LamellaError, match=r"query_proj decides.*\(3, 7\).*\(1, 8\).*granularity='matrix'"):
            model(**given)
        model = compose(deberta(), paths, MoleConfig(router_input=router_input, granularity="matrix")).eval()
        with fixed_weights(model, {"lora0": 1}):
            alone = PeftModel.from_pretrained(deberta(), tmp_path / "lora0").eval()
            torch.testing.assert_close(trained.run(model, given), trained.run(alone, given))
        trained.run(model, tiny.inputs(tiny.bert(), pad=0))
        if router_input == "mean":  # nobody knows which rows of the table are padding
            with pytest.raises(LamellaError, match=r"\(1, 8\) rows.*batches without padding"):
                model(**given)
