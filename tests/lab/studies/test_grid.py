import pytest
import yaml

from lamella.errors import LamellaError
from lamella.lab.studies.recipe import read_study
from lamella.tuners.mola.allocation import allocate

STUDY = {
    "backbones": ["minilm"],
    "tasks": ["trec"],
    "seeds": 2,
    "run": {"epochs": 1},
    "methods": {
        "LoRA": {"method": "lora", "lr": 1e-3},
        "tent": {"method": {"name": "mola", "num_experts": "triangle"}},
        "flat": {"method": {"name": "mola", "num_experts": "rectangle"}},
        "head": {"method": "head"},
    },
}


@pytest.fixture
def read(tmp_path):
    def grid(*words, **changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
        return read_study(str(path), words)

    return grid


def test_cells_are_every_combination_seed_by_seed(read):
    cells = read("seeds=[3,1]", tasks=["trec", "movies"]).cells()

    assert len(cells) == 2 * 2 * 4
    assert [cell.seed for cell in cells] == [3] * 8 + [1] * 8
    assert [(cell.task, cell.method) for cell in cells[:5]] == [
        ("trec", "LoRA"),
        ("trec", "tent"),
        ("trec", "flat"),
        ("trec", "head"),
        ("movies", "LoRA"),
    ]
    assert cells[0].settings.lr == 1e-3
    assert cells[0].settings.threads == 1
    assert {cell.settings.epochs for cell in cells} == {1}


def test_the_key_names_the_settings_and_not_the_method(read):
    methods = {"one": {"method": "lora"}, "two": {"method": {"name": "lora", "r": 8}}, "three": {"method": "head"}}
    one, two, three = read("seeds=1", methods=methods).cells()

    assert one.key == two.key != three.key
    again, *_ = read("seeds=1", "run.lr=0.1", methods=methods).cells()
    assert again.key != one.key
    assert len({cell.key for cell in read().cells()}) == 8


def test_the_key_is_that_of_the_studies_there_are(read):
    """What a run cannot be told by default leaves the keys of those that could not be told it."""
    first, *_ = read().cells()
    assert first.key == "2ecad571f6728c0d"


def test_equal_parameters_matches_ranks_and_means(read):
    grid = read(budget="equal-parameters", match="tent")
    lora, tent, flat, head = grid.cells()[:4]

    assert lora.settings.method.match == tent.settings.method
    assert tent.settings.method.expert_budget == flat.settings.method.expert_budget == 5
    assert sum(allocate("triangle", 12, 5.0)) == sum(allocate("rectangle", 12, 5.0)) == 60
    assert head.settings.method.name == "head"
    assert read().cells()[0].settings.method.match is None


def test_null_leaves_a_method_out(read):
    assert read("methods.flat=null", "methods.head=null").names == ["LoRA", "tent"]
    left = read("methods.LoRA=null", "reference=head")
    assert (left.names, left.reference_name) == (["tent", "flat", "head"], "head")


@pytest.mark.parametrize("key", ["backbones", "tasks"])
def test_what_a_recipe_lacks_is_named_with_the_way_out(key, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in STUDY.items() if name != key}))
    with pytest.raises(LamellaError, match=rf"The setting '{key}' is missing.* Add a line '{key}: VALUE', or the word"):
        read_study(str(path))


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (["budgett=none"], {}, "Did you mean 'budget'"),
        (["run.epocs=1"], {}, "Did you mean 'run.epochs'"),
        (["methods.head.lrr=1"], {}, "Did you mean 'methods.head.lr'"),
        (["methods.flat.method.num_expert=3"], {}, "Did you mean 'method.num_experts'"),
        (["reference=Lora"], {}, "Did you mean 'LoRA'"),
        (["seeds=0"], {}, "at least one seed"),
        (["seeds=[1,1]"], {}, "each of them once"),
        (["budget=equal-parameters"], {}, "belong together"),
        (["match=tent"], {}, "belong together"),
        (["budget=equal-compute", "methods.head.epochs=3"], {}, "other tokens"),
        (["run.method=lora"], {}, "every method of the study"),
        ([], {"methods": {"LoRA": {"lr": 1}}}, "method: lora"),
        (["methods.Lora.lr=1"], {}, r"Did you mean 'methods.LoRA'\? .*The others here are: LoRA, tent, flat, head"),
        (["epochs=3"], {}, "not of a study: write run.epochs for all of its runs, or methods.NAME.epochs"),
        (["model=mpnet"], {}, "not of a study: a study has 'backbones'"),
        ([], {"backbones": None}, "'backbones' cannot be None"),
        (["methods.head.method={name: single, adapters: {a: b}}"], {}, r"'method.adapter' is missing. Add a line"),
        (["methods.LoRA=null"], {}, "that 'reference' names, the first of a.* Give reference= .*tent, flat"),
        (["methods.flat=null", "reference=flat"], {}, "that 'reference' names.*Give reference="),
        (["methods.tent=null"], {"budget": "equal-parameters", "match": "tent"}, "that 'match' names. Give match="),
        (["methods.Flat=null"], {}, "There is no method 'Flat'. Did you mean 'flat'"),
        (
            ["budget=equal-parameters", "match=tent", "methods.flat.method.expert_budget=3"],
            {},
            "expert_budget=3",
        ),
        (["search.space.lr=[1]"], {}, "methods.LoRA gives lr"),
        (
            ["search.space.scaling=[1]", "methods.flat.method.lora_alpha=8"],
            {},
            r"methods.flat gives method.lora_alpha, which search.space.scaling chooses",
        ),
        (["search.space.epochs=[1]"], {}, "run gives epochs"),
        (["search.space.method.ranks=[1]"], {}, "none of the methods"),
        (["search.space.batch_size=[0]"], {}, "'batch_size' cannot be 0"),
        (["search.space.batch_size=[8]", "search.seed=1"], {}, "one of the study's seeds"),
        (
            ["search.space.method.num_experts=[2]"],
            {"budget": "equal-parameters", "match": "tent"},
            "methods.tent gives",
        ),
        (["search.space.method.r=[2]"], {"budget": "equal-parameters", "match": "tent"}, "keeps them equal"),
    ],
)
def test_what_does_not_fit_is_named(read, words, changes, message):
    with pytest.raises(LamellaError, match=message):
        read(*words, **changes).cells()


def test_the_recipe_of_a_run_is_no_study():
    with pytest.raises(LamellaError, match="lamella train"):
        read_study("trec-mola")
