"""LoRAs that PEFT wrote for text models: read as PEFT itself computes them, mapped, referred to."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from tests import tiny
from torch import nn
from transformers import BertModel, PreTrainedModel

from lamella import LamellaError
from lamella.adapters import LoraSource, Reference, by_name, check_base, map_to, read_lora

CONFIGS = {
    "bert": {"r": 3, "lora_alpha": 6, "target_modules": ["query", "value", "dense"]},
    "llama": {"r": 4, "lora_alpha": 4, "target_modules": "all-linear", "use_rslora": True},
    "t5": {"r": 2, "lora_alpha": 5, "target_modules": ["q", "v", "wo"], "rank_pattern": {"wo": 5}},
    "gpt2": {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_proj"], "alpha_pattern": {"attn.c_proj": 7}},
}


def trained(kind: str, folder: Path, **changes: object) -> PeftModel:
    """A LoRA that does something, saved by PEFT."""
    torch.manual_seed(5)
    config = {**CONFIGS[kind], **changes}
    model = get_peft_model(
        tiny.MODELS[kind](), LoraConfig(**config, init_lora_weights=False, fan_in_fan_out=kind == "gpt2")
    )
    model.save_pretrained(folder)
    return model


def deltas_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """PEFT's own delta of each module's weight, as (out, in)."""
    actual = {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A") and module.lora_A:
            delta = module.get_delta_weight("default")
            actual[name] = delta.t() if module.fan_in_fan_out else delta
    return actual


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_module_has_the_delta_that_peft_gives_it(kind: str, tmp_path: Path) -> None:
    expected = deltas_of(trained(kind, tmp_path / "a"))
    source = read_lora(tmp_path / "a")
    mapped = map_to(tiny.MODELS[kind](), source)
    assert mapped.modules.keys() == expected.keys()
    for name, (A, B, scaling) in mapped.modules.items():
        torch.testing.assert_close(scaling * B @ A, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    assert mapped.skipped == []
    assert source.format == "PEFT"
    assert source.name == "a"


@settings(max_examples=15, deadline=None)
@given(
    r=st.integers(1, 5),
    alpha=st.integers(1, 9),
    rslora=st.booleans(),
    odd_rank=st.integers(1, 5),
    odd_alpha=st.integers(1, 9),
)
def test_ranks_and_alphas_follow_peft_whatever_the_patterns(
    r: int, alpha: int, rslora: bool, odd_rank: int, odd_alpha: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("lora")
    patterns = {"rank_pattern": {"layer.1.*.query": odd_rank}, "alpha_pattern": {"value": odd_alpha}}
    settings = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, **patterns}
    model = trained("bert", folder, **settings)
    for name, factors in read_lora(folder).components["model"].items():
        module = model.get_base_model().get_submodule(name)
        assert len(factors.A) == module.r["default"]
        assert math.isclose(factors.scaling, module.scaling["default"])


def test_what_was_trained_beside_the_factors_is_kept_by_name(tmp_path: Path) -> None:
    config = LoraConfig(
        target_modules=["query", "word_embeddings"], modules_to_save=["classifier"], bias="lora_only",
        init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(tiny.bert(), config)
    model.save_pretrained(tmp_path / "a")
    source = read_lora(tmp_path / "a")
    biases = {f"bert.encoder.layer.{n}.attention.self.query.bias" for n in (0, 1)}
    assert source.skipped == ()
    embedding = "bert.embeddings.word_embeddings"
    assert set(source.whole) == {"classifier.weight", "classifier.bias", *biases}
    assert source.components["model"][embedding].A.shape == (8, tiny.VOCAB)
    assert "trained whole: " in str(source)


def test_a_bias_of_b_is_kept_with_its_scaling(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["query"], lora_bias=True, init_lora_weights=False)
    model = get_peft_model(tiny.bert(), config)
    model.save_pretrained(tmp_path)
    name = "bert.encoder.layer.0.attention.self.query"
    bias = model.get_base_model().get_submodule(name).lora_B["default"].bias
    torch.testing.assert_close(read_lora(tmp_path).constants["model"][name], 3 * bias.detach())


def bare_bert() -> BertModel:
    return BertModel(tiny.bert().config)


def test_names_are_found_with_and_without_the_head_around_the_model(tmp_path: Path) -> None:
    trained("bert", tmp_path / "with", target_modules=["query"])
    from_head = map_to(bare_bert(), read_lora(tmp_path / "with"))
    assert set(from_head.modules) == {f"encoder.layer.{n}.attention.self.query" for n in (0, 1)}
    assert from_head.renamed == "bert. taken off each name"
    get_peft_model(bare_bert(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "without")
    into_head = map_to(tiny.bert(), read_lora(tmp_path / "without"))
    assert set(into_head.modules) == {f"bert.encoder.layer.{n}.attention.self.query" for n in (0, 1)}
    assert into_head.renamed == "bert. put before each name"
    trained("llama", tmp_path / "decoder")
    same = map_to(tiny.llama_classifier(), read_lora(tmp_path / "decoder"))
    assert len(same.modules) == 14
    assert same.renamed == ""


def test_a_model_that_carries_an_adapter_is_seen_through(tmp_path: Path) -> None:
    trained("bert", tmp_path, target_modules=["query"])
    carrying = get_peft_model(tiny.bert(), LoraConfig(target_modules=["query"])).get_base_model()
    assert len(map_to(carrying, read_lora(tmp_path)).modules) == 2


def test_a_reference_knows_the_bytes_and_survives_json(tmp_path: Path) -> None:
    trained("bert", tmp_path / "a")
    written = read_lora(tmp_path / "a").reference.to_dict()
    reference = Reference(**json.loads(json.dumps(written)))
    assert read_lora(reference).reference == reference
    assert reference.sha256 is not None
    assert reference.revision is None
    config = tmp_path / "a/adapter_config.json"
    saved = json.loads(config.read_text())
    config.write_text(json.dumps({**saved, "lora_alpha": 99}))
    with pytest.raises(LamellaError, match="has changed since") as error:
        read_lora(reference)
    assert reference.sha256 in str(error.value)


def test_the_digest_of_a_folder_counts_what_the_lora_does(tmp_path: Path) -> None:
    trained("bert", tmp_path)
    config = tmp_path / "adapter_config.json"
    before, saved = read_lora(tmp_path).reference, json.loads(config.read_text())
    assert read_lora(tmp_path / "adapter_model.safetensors").reference.sha256 == before.sha256
    config.write_text(json.dumps(dict(reversed(saved.items())), indent=7))
    assert read_lora(before).reference == before
    config.write_text(json.dumps({**saved, "base_model_name_or_path": "somebody/the-same", "inference_mode": False}))
    assert read_lora(before).reference == before
    config.write_text(json.dumps({**saved, "use_rslora": True}))
    with pytest.raises(LamellaError, match="has changed since"):
        read_lora(before)


def test_a_digest_of_the_bytes_as_earlier_versions_recorded_it_still_holds(tmp_path: Path) -> None:
    trained("bert", tmp_path)
    joined = (tmp_path / "adapter_config.json").read_bytes() + (tmp_path / "adapter_model.safetensors").read_bytes()
    former = Reference(str(tmp_path), sha256=hashlib.sha256(joined).hexdigest())
    assert read_lora(former).reference.sha256 == read_lora(tmp_path).reference.sha256


def test_a_subfolder_is_read(tmp_path: Path) -> None:
    trained("bert", tmp_path / "inner/adapter")
    source = read_lora(tmp_path, subfolder="inner/adapter")
    assert source.reference.subfolder == "inner/adapter"
    assert source.name == "adapter"


def hub_cache(folder: Path, repository: str, commit: str) -> Path:
    """The hub's cache as its own client leaves it: returns the snapshot's folder."""
    home = folder / f"models--{repository.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text(commit)
    snapshot = home / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_read_at_its_revision_and_its_commit_recorded(offline_hub: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    trained("bert", hub_cache(offline_hub, "somebody/reviews", commit))
    source = read_lora("somebody/reviews")
    assert source.reference.revision == commit
    assert source.name == "reviews"
    assert read_lora(source.reference).reference == source.reference
    with pytest.raises(LamellaError, match="could not be fetched"):
        read_lora("somebody/reviews", revision="other")


def test_a_file_of_a_hub_repository_is_read_and_a_repository_without_a_lora_named(offline_hub: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = hub_cache(offline_hub, "somebody/styles", commit)
    (snapshot / "README.md").write_text("nothing here")
    with pytest.raises(LamellaError, match=r"has none of adapter_config\.json"):
        read_lora("somebody/styles")

    save_file(
        {"proj.lora_A.weight": torch.ones(1, 2), "proj.lora_B.weight": torch.ones(2, 1)}, snapshot / "ink.safetensors"
    )
    source = read_lora("somebody/styles/ink.safetensors")
    assert (source.name, source.reference.revision) == ("ink", commit)


def test_two_loras_of_one_name_are_refused(tmp_path: Path) -> None:
    for place in ("x/adapter", "y/adapter"):
        trained("bert", tmp_path / place)
    both = [read_lora(tmp_path / place) for place in ("x/adapter", "y/adapter")]
    with pytest.raises(LamellaError, match="Two LoRAs are called 'adapter'"):
        by_name(both)
    assert list(by_name([both[0], read_lora(tmp_path / "y/adapter", name="other")])) == ["adapter", "other"]


def named(model: PreTrainedModel, name: str) -> PreTrainedModel:
    model.config._name_or_path = name
    model.name_or_path = name
    return model


def source_for(base: str | None, folder: Path) -> LoraSource:
    model = named(tiny.bert(), base or "")
    get_peft_model(model, LoraConfig(target_modules=["query"])).save_pretrained(folder)
    return read_lora(folder)


def test_a_base_of_another_name_is_refused_and_both_are_named(tmp_path: Path) -> None:
    source = source_for("somebody/bert-a", tmp_path)
    check_base(named(tiny.bert(), "somebody/bert-a"), source)
    check_base(named(tiny.bert(), "/cache/models--somebody--bert-a/snapshots/0123"), source)
    with pytest.warns(UserWarning, match="could not be compared"):
        check_base(named(tiny.bert(), "/elsewhere/bert-a"), source)
    check_base(nn.Linear(2, 2), source)
    for other in ("somebody/bert-b", "somebody-else/bert-a"):
        with pytest.raises(LamellaError, match=f"trained on somebody/bert-a, and the model here is {other}"):
            check_base(named(tiny.bert(), other), source)


def saved_at(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny.bert(seed=seed).to(dtype)
    model.save_pretrained(folder)
    return named(model, str(folder))


def test_the_same_weights_are_the_same_base_wherever_they_lie_and_others_are_not(tmp_path: Path) -> None:
    model = saved_at(tmp_path / "runA/merged", seed=0)
    source = source_for(str(tmp_path / "runA/merged"), tmp_path / "lora")
    check_base(saved_at(tmp_path / "copy-of-a", seed=0), source)
    for dtype in (torch.bfloat16, torch.float16):
        check_base(saved_at(tmp_path / "half", seed=0, dtype=dtype), source)
    check_base(named(model, "somebody/published"), source)
    headless = BertModel(model.config)
    headless.load_state_dict(model.bert.state_dict(), strict=False)
    check_base(named(headless, "somebody/headless"), source)
    other = saved_at(tmp_path / "runB/merged", seed=0)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.mul_(1.004)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(LamellaError, match="their weights differ"):
            check_base(other.to(dtype), source)


class Codes(nn.Parameter):
    """Eight bits of a matrix, in place of a library's own class."""


def test_a_quantised_model_is_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are compared to the error of the coarsest quantisation, where PEFT knows how to get them."""
    step = 0.005

    def dequantised(module: nn.Module) -> torch.Tensor:
        return module.weight.data * step

    monkeypatch.setattr("lamella.adapters.identity.dequantize_module_weight", dequantised)
    saved_at(tmp_path / "base", seed=0)
    source = source_for(str(tmp_path / "base"), tmp_path / "lora")
    for changed in (False, True):
        quantised = named(tiny.bert(seed=0), "somebody/base-8bit")
        for layer in quantised.bert.encoder.layer:
            exact = layer.attention.self.query.weight.data
            codes = (exact.flip(0) if changed else exact).div(step).round().to(torch.int8)
            layer.attention.self.query.weight = Codes(codes, requires_grad=False)
        if changed:
            with pytest.raises(LamellaError, match="their weights differ"):
                check_base(quantised, source)
        else:
            check_base(quantised, source)
