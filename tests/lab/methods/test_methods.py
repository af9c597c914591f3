import re
from dataclasses import fields

import pytest
from peft import LoraConfig, PeftConfig, PeftModel

from lamella import MolaConfig, MoleConfig, MolexConfig, __version__
from lamella.errors import LamellaError
from lamella.lab.data import load_backbone, load_task
from lamella.lab.methods import Mola, method_from, read_saved, trainable_parameters

MOLA = {"name": "mola", "r": 4, "num_experts": "2-4"}


@pytest.fixture
def loaded(bert, questions):
    task = load_task(questions)
    return load_backbone(bert, task), task


def test_the_matched_rank_is_the_nearest(loaded, bert):
    backbone, task = loaded
    built = method_from({"name": "lora", "match": MOLA}).build(backbone, task)

    wanted = trainable_parameters(Mola.parse(MOLA).build(load_backbone(bert, task), task).model)
    assert built.decided["matched_parameters"] == wanted
    rank = built.decided["rank"]
    assert built.model.peft_config["default"].r == rank
    distances = []
    for near in (rank - 1, rank, rank + 1):
        model = method_from({"name": "lora", "r": near}).build(load_backbone(bert, task), task).model
        distances.append(abs(trainable_parameters(model) - wanted))
    assert distances[1] == min(distances)
    assert distances[1] == abs(trainable_parameters(built.model) - wanted)


def test_matching_keeps_the_scale(loaded):
    built = method_from({"name": "lora", "r": 8, "lora_alpha": 16, "match": MOLA}).build(*loaded)

    config = built.model.peft_config["default"]
    assert config.lora_alpha / config.r == 2.0


@pytest.mark.parametrize("method", ["head", "lora", MOLA, "prompt-tuning"])
def test_every_adapter_trains_the_task_head(loaded, method):
    model = method_from(method).build(*loaded).model

    assert isinstance(model, PeftModel)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("classifier" in name for name in trained)


def test_the_head_alone_is_two_tensors(loaded):
    model = method_from("head").build(*loaded).model

    assert trainable_parameters(model) == 32 * 2 + 2


def test_full_trains_everything(loaded):
    model = method_from("full").build(*loaded).model

    assert trainable_parameters(model) == sum(parameter.numel() for parameter in model.parameters())


def test_one_expert_is_lora_and_no_mixture_that_has_to_earn_its_cost():
    assert not method_from({"name": "mola", "num_experts": 1}).is_mixture
    assert method_from({"name": "mola", "num_experts": 2}).is_mixture


def test_a_wrong_allocation_names_the_culprit(loaded):
    with pytest.raises(LamellaError, match="2-4-6-8"):
        method_from({"name": "mola", "num_experts": "2-4-6-8"}).build(*loaded)  # 2 layers cannot make 4 groups


def test_a_target_that_matches_nothing_is_an_error(loaded):
    with pytest.raises(ValueError, match="nowhere"):
        method_from({"name": "mola", "num_experts": 2, "target_modules": ["nowhere"]}).build(*loaded)


CONFIGS = {"mola": MolaConfig, "molex": MolexConfig, "mole": MoleConfig, "lora": LoraConfig}
LORAS = {"adapters": {"a": "x", "b": "y"}}
OF_LORA = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_and_their_defaults_are_those_of_the_config(name):
    values = method_from({"name": name, **(LORAS if name == "mole" else {})}).model_dump()
    mine = {key: value for key, value in values.items() if key not in ("name", "adapters", "train_head", "match")}
    expected = CONFIGS[name]()
    inside = LoraConfig() if name == "molex" else None
    for key, value in mine.items():
        assert value == getattr(inside if inside and key in OF_LORA else expected, key), key
    assert mine.keys() >= OF_LORA - ({"target_modules", *OF_LORA} if name == "mole" else set())


@pytest.mark.parametrize("name", ["mola", "molex", "mole"])
def test_every_setting_of_the_config_can_be_given(name):
    of_the_run = {field.name for field in fields(PeftConfig)} | {"modules_to_save", "base_experts", "lamella_version"}
    not_of_recipes = {"molex": {"lora"}, "mole": {"adapters", "embedded", "target_modules"}}.get(name, set())
    wanted = {field.name for field in fields(CONFIGS[name])} - of_the_run - not_of_recipes
    method = method_from({"name": name, **(LORAS if name == "mole" else {})})
    assert wanted <= type(method).model_fields.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "mola", "balance_coef": 0.1}, "'method.balance_coef' is called 'method.router_aux_loss_coef' now"),
        ({"name": "mola", "init_weights": False}, "'method.init_weights' is called 'method.init_lora_weights' now"),
        ({"name": "mola", "num_expert": 2}, "Did you mean 'method.num_experts'"),
        ({"name": "mola", "top_k": 0}, "top_k=0 must be a whole number from 1 to 1,000,000"),
        ({"name": "mola", "router": "mlp"}, "'method.router' cannot be 'mlp'"),
        ({"name": "mola", "router_aux_loss_coef": float("nan")}, "'method.router_aux_loss_coef' cannot be nan"),
        ({"name": "molex", "alpha": 2}, "alpha=2.0 must be a number from 0 to 1"),
        ({"name": "lora", "r": 0}, "lora has r=0, which must be a whole number from 1 to 1,000,000"),
        ({"name": "lora-only", "lora_dropout": 2}, "lora has lora_dropout=2.0, which must be a number of at least 0"),
        ({"name": "lora", "target_modules": "(("}, "which is not a regular expression"),
        ({"name": "mola", "lora_alpha": 1e308}, "lora_alpha=1e+308 must be a number from -1,000,000 to 1,000,000"),
        ({"name": "prompt-tuning", "num_virtual_tokens": 10**9}, "'method.num_virtual_tokens' cannot be"),
        ({"name": "mole", **LORAS, "temperature": 0}, "temperature=0.0 must be"),
        ({"name": "lora", "match": {"name": "mola", "top_k": 9}}, "top_k=9 is more than num_experts=4"),
        ({"name": "molla"}, "no method 'method.name=molla'. Did you mean 'method.name=mola'"),
        ({"name": "pem", **LORAS, "weight": {}}, "Did you mean 'method.weights'"),
        ({"name": "single", **LORAS}, "'method.adapter' is missing"),
        ({"name": "arrow", **LORAS, "top_k": 0}, "'method.top_k' cannot be 0"),
    ],
)
def test_what_cannot_be_set_is_named_when_it_is_given(values, message):
    with pytest.raises(LamellaError, match=re.escape(message)):
        method_from(values)


def test_lora_without_targets_says_so_where_peft_knows_none(loaded, monkeypatch):
    backbone, task = loaded
    monkeypatch.setattr(backbone.model.config, "model_type", "nobody-s")
    with pytest.raises(LamellaError, match=r"knows none for model_type='nobody-s'.*'all-linear'"):
        method_from("lora").build(backbone, task)


def test_what_a_finished_run_says_of_its_method_is_read_in_today_s_words():
    saved = {"lr": 1.0, "method": {"name": "lora", "r": 2, "match": {"name": "mola", "z_coef": 0.1}}}
    read = read_saved(saved)
    assert read["lr"] == 1.0
    method = method_from(read["method"])
    assert (method.r, method.lora_alpha, method.target_modules) == (2, 16, "all-linear")
    assert (method.match.router_z_loss_coef, method.match.num_experts) == (0.1, "2-4-6-8")


def test_what_a_study_s_recipe_left_out_is_what_it_meant_then():
    first = {
        "methods": {"a": {"method": "mola"}, "b": {"method": {"num_experts": 3, "balance_coef": 0.5}}},
        "lora": {"method": {"r": 2}, "lr": 0.1},
    }
    read = read_saved(first)
    a, b = (method_from(one["method"]) for one in read["methods"].values())
    assert (a.num_experts, b.num_experts, b.router_aux_loss_coef) == ("2-4-6-8", 3, 0.5)
    assert read["lora"] == {"method": {"r": 2, "lora_alpha": 16, "target_modules": "all-linear"}, "lr": 0.1}
    composed = read_saved({"arms": {"c": {"method": "uniform"}, "d": {"method": {"name": "mole", "balance_coef": 1}}}})
    mole = {"name": "mole", "router_aux_loss_coef": 1, "router_scale": None}
    assert composed == {"methods": {"c": {"method": "uniform"}, "d": {"method": mole}}}
    today = read_saved({"lamella_version": __version__} | first)
    assert today["methods"]["a"] == {"method": "mola"}
    assert today["lora"]["method"] == {"r": 2}
    assert "lamella_version" not in today


def test_a_method_that_is_not_known_is_left_to_be_refused():
    assert read_saved({"method": "nobody-s"}) == {"method": "nobody-s"}


@pytest.mark.parametrize("name", ["mola", "lora", "molex"])
def test_saved_settings_are_read_as_they_are(name):
    written = {"method": method_from(name).model_dump(mode="json")}
    assert read_saved(written) == written
    assert method_from(read_saved(written)["method"]) == method_from(name)
