"""Damaged adapter folders are refused by name, or give what the whole ones give; nothing of them is guessed."""

import copy
import json
import random
import shutil
import warnings
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.fuzzing.mutations import damage
from tests.fuzzing.oracle import Ending, another_adapter, judge
from tests.tuners.mole import trained

from lamella import LamellaError, MolaConfig, MoleConfig, MolexConfig, doctor

CONFIGS = {"mola": MolaConfig, "molex": MolexConfig, "mole": MoleConfig}
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The folder of each adapter, and what it answers."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["query", "value"])
    made = {
        "mola": tiny.adapted(
            tiny.bert(), task_type="SEQ_CLS", target_modules=["query", "value"], top_k=1, lora_dropout=0.1
        ),
        "molex": tiny.molex(tiny.bert(), lora=lora, alpha_mode="learned"),
        "mole": trained.composed(tiny.bert(), "bert", folder, embed_adapters=True, temperature=1.5),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
    base = tiny.bert()
    return {name: (folder / name, answer(base, folder / name)) for name in made}, base


def answer(base, folder):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(folder))
        return model(**tiny.inputs(base)).logits


def case(number, adapters, folder):
    """The ending of a case, and what was said where it ends otherwise."""
    (made, base), pick = adapters, random.Random(f"adapter {number}")
    name = pick.choice(sorted(made))
    whole, expected = made[name]
    broken = shutil.copytree(whole, folder / "broken")
    how = damage(broken / pick.choice(FILES), pick)
    ending, said = judge(lambda: answer(base, broken), expected, lambda: another_adapter(broken, whole, CONFIGS[name]))
    shutil.rmtree(broken)
    return ending, f"{number} {name}: {how}: {said}"[:400] if ending is Ending.OTHER else None


def cases(numbers, adapters, folder):
    """How often each ending came, and the cases that ended otherwise."""
    endings = [case(number, adapters, folder) for number in numbers]
    return Counter(ending for ending, _ in endings), [said for _, said in endings if said]


def test_a_broken_adapter_is_named_or_makes_no_difference(adapters, tmp_path):
    endings, others = cases(range(60), adapters, tmp_path)

    assert not others, "\n".join(others)
    assert endings[Ending.NAMED] > 15
    assert endings[Ending.EQUAL]


@pytest.mark.heavy
def test_many_broken_adapters_are(adapters, tmp_path):
    endings, others = cases(range(2500), adapters, tmp_path)

    print(*(f"{ending.value}: {count}" for ending, count in endings.items()), sep="\n")
    assert not others, "\n".join(others)


def config_without(key):
    return lambda config, tensors: config.pop(key)


def config_with(**values):
    return lambda config, tensors: config.update(values)


def inside(**values):
    """Of the LoRA inside MoLEx; None takes a key out."""

    def edit(config, tensors):
        gone = {key for key, value in values.items() if value is None}
        config["lora"] = {key: value for key, value in (config["lora"] | values).items() if key not in gone}

    return edit


def tensor(part, change, name=lambda name: name):
    def edit(config, tensors):
        first = next(one for one in tensors if part in one)
        tensors[name(first)] = change(tensors[first])

    return edit


def of_the_base(name):
    return name.rpartition(".lamella")[0] + ".base_layer.weight"


def without_bias(config, tensors):
    del tensors["base_model.model.classifier.bias"]


BROKEN = {
    "whole numbers in place of floats": ("mola", tensor("lora_B", lambda t: t.to(torch.int64)), "int64"),
    "truth values": ("molex", tensor("router.weight", lambda t: t.bool()), "bool"),
    "a weight of the base": (
        "mola",
        tensor("lora_A", lambda t: torch.zeros(16, 16), of_the_base),
        "without a place",
    ),
    "a word for a truth value": ("mola", config_with(use_rslora="false"), "use_rslora"),
    "a word for a truth value inside": ("molex", inside(use_rslora="false"), "use_rslora"),
    "NaN in a learned alpha": ("molex", tensor("alpha", lambda t: t * float("nan")), "alpha.*NaN"),
    "NaN as a setting": ("mola", config_with(lora_alpha=float("nan")), "lora_alpha"),
    "no scaling": ("mola", config_without("lora_alpha"), "lacks 'lora_alpha'"),
    "no scaling inside": ("molex", inside(lora_alpha=None), r"lacks 'lora\.lora_alpha'"),
    "no target inside": ("molex", inside(target_modules=None), r"lacks 'lora\.target_modules'"),
    "no rank inside, by another PEFT": ("molex", inside(r=None, peft_version="0.20.0"), r"lacks 'lora\.r'"),
    "no mode of alpha": ("molex", config_without("alpha"), "lacks 'alpha'"),
    "another method": ("mola", config_with(peft_type="LORA"), "none of its methods"),
    "ranks of fewer LoRAs": ("mole", lambda config, tensors: config["adapters"].popitem(), "embedded has 3 ranks"),
    "a head without bias": (
        "mola",
        without_bias,
        "classifier.bias",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_would_be_guessed_is_refused(adapters, tmp_path, name):
    (made, base), (method, edit, named) = adapters, BROKEN[name]
    broken = shutil.copytree(made[method][0], tmp_path / "broken")
    config, tensors = json.loads((broken / FILES[0]).read_text()), load_file(broken / FILES[1])
    edit(config, tensors)
    (broken / FILES[0]).write_text(json.dumps(config))
    save_file(tensors, broken / FILES[1], metadata={"format": "pt"})

    with pytest.raises(LamellaError, match=named):
        answer(base, broken)


def test_an_adapter_that_cannot_be_loaded_leaves_nothing(adapters, tmp_path):
    (made, _), model = adapters, tiny.adapted(tiny.bert())
    broken = shutil.copytree(made["mola"][0], tmp_path / "broken")
    (broken / FILES[1]).write_bytes(b"")

    with pytest.raises(LamellaError, match=r"adapter_model\.safetensors"):
        model.load_adapter(str(broken), "second")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("mistake", [KeyError("rank"), TypeError("no"), ValueError("no"), KeyboardInterrupt()])
def test_a_mistake_in_the_code_is_not_told_as_a_broken_file(adapters, monkeypatch, mistake):
    def check(*_):
        raise mistake

    (made, base), model = adapters, tiny.adapted(tiny.bert())
    whole = made["mola"][0]
    monkeypatch.setattr("lamella.tuners.model.check_tensors", check)
    for use in (lambda: model.load_adapter(str(whole), "second"), lambda: doctor(whole, base)):
        with pytest.raises(type(mistake)) as told:
            use()
        assert told.value is mistake
    assert list(model.peft_config) == ["default"]
