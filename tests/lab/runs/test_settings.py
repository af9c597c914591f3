import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamella.errors import LamellaError
from lamella.lab.methods import Lora, Mola
from lamella.lab.runs.settings import RunSettings, read_recipe, recipe_names, resolve
from lamella.lab.studies.recipe import read_study


def test_overrides_come_last_and_may_be_dotted():
    settings = resolve("trec-mola", ["lr=1e-3", "method.num_experts=1-2-3-4", "method.top_k=1"], task="movies")

    assert (settings.lr, settings.task, settings.model) == (1e-3, "movies", "minilm")
    assert (settings.method.num_experts, settings.method.top_k, settings.method.r) == ("1-2-3-4", 1, 8)


def test_a_recipe_is_not_changed_by_overrides():
    resolve("trec-mola", ["method.r=2"])

    assert resolve("trec-mola").method.r == 8


def test_another_method_starts_from_its_own_defaults():
    settings = resolve("trec-mola", ["method.r=4"], method="lora")

    assert settings.method == Lora(r=4)


def test_a_method_given_by_name_in_a_file_can_be_refined(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("method: lora\nlr: 2e-3\n")

    settings = resolve(str(recipe), ["method.r=3"])

    assert settings.method == Lora(r=3)
    assert settings.lr == 2e-3


@pytest.mark.parametrize("override", ["limit=20", "limit={train: 20, test: 5}", "limit.train=20"])
def test_limits_are_for_all_splits_or_for_some(override):
    assert resolve(None, [override]).limit in (20, {"train": 20, "test": 5}, {"train": 20})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learning_rate=1"], r"no setting 'learning_rate'"),
        (["epoch=1"], r"Did you mean 'epochs'"),
        (["method.num_expert=4"], r"no setting 'method\.num_expert'\. Did you mean 'method\.num_experts'"),
        (["method=lorra"], r"no method .*lorra.*Did you mean .*lora"),
        (["method.name=lora", "method.match.name=molla"], r"Did you mean .*mola"),
        (["lr=-1"], r"'lr' cannot be -1: .*greater than 0"),
        (["batch_size=many"], r"'batch_size' cannot be 'many'"),
        (["limit.trian=4"], r"limit"),
        (["schedule=step"], r"'schedule' cannot be 'step'"),
        (["epochs=2", "max_steps=5"], r"max_steps.*epochs"),
        (["lr"], r"key=value"),
        (["lr=.inf"], r"'lr' cannot be inf"),
        (["method="], r"method is None"),
        (["method=3"], r"method is 3"),
        (["method=[1]"], r"method is \[1\]"),
        (["method.name="], r"no method .*None"),
        (["limit=0"], r"'limit' cannot be 0"),
        (["limit={train: 0}"], r"'limit.*' cannot be"),
        (["report_to=[wandb]"], r"report_to names wandb, which is not installed"),
        (["lr={"], r"not valid YAML"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(overrides, words):
    with pytest.raises(LamellaError, match=words):
        resolve(None, overrides)


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(LamellaError, match="trec-lora, trec-mola"):
        resolve("trek")


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path):
    recipe = tmp_path / "list.yaml"
    recipe.write_text("- model\n")
    with pytest.raises(LamellaError, match="key: value"):
        read_recipe(str(recipe))


def test_every_packaged_recipe_is_valid():
    assert {"trec-mola", "trec-lora", "demo", "demo-compose"} <= set(recipe_names())
    for name in recipe_names():
        if {"methods", "sources"} & set(read_recipe(name)):
            assert read_study(name).cells()
        else:
            assert isinstance(resolve(name), RunSettings)


def test_the_demo_recipes_differ_in_the_method_and_its_own_rate():
    mola, lora = resolve("trec-mola"), resolve("trec-lora")

    unset = {"method": None, "lr": None}
    assert mola.model_copy(update=unset) == lora.model_copy(update=unset)
    assert lora.method.match == mola.method


@given(st.integers(0, 5), st.sampled_from(["head", "lora", "mola", "prompt-tuning", "full"]), st.booleans())
def test_settings_survive_their_own_file(seed, method, bf16):
    settings = RunSettings.parse({"method": method, "seed": seed, "bf16": bf16})

    assert RunSettings.parse(settings.model_dump(mode="json")) == settings


def test_mola_is_the_default():
    assert resolve(None).method == Mola()
