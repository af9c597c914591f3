import copy
from types import SimpleNamespace

import pytest
import torch
from studies.keep import RECIPES, study_recipe
from transformers import RobertaConfig, RobertaForSequenceClassification

from lamella.lab.data.entry import FOLDER, read_entry
from lamella.lab.methods import trainable_parameters
from lamella.lab.runs.settings import resolve

# processes x rows, rate, epochs, warm-up, seed, router (projection), scope, alpha, balance, router's rate and decay
PUBLISHED = {
    "cola": (2, 32, 4e-4, 80, 0.06, 5, "linear", None, "shared", ("fixed", 0.95), 0.01, 5e-5, 0.0),
    "mnli": (8, 16, 5e-4, 30, 0.06, 0, "cosine", 416, "shared", ("learned", 0.5), 0.005, 5e-5, 0.0),
    "mrpc": (8, 16, 4e-4, 30, 0.1, 0, "linear", None, "shared", ("learned", 0.5), 0.0, None, 0.0),
    "qnli": (8, 32, 4e-4, 25, 0.06, 0, "cosine", 96, "shared", ("learned", 0.5), 0.0, None, 0.0),
    "qqp": (8, 16, 5e-4, 25, 0.06, 0, "cosine", 384, "shared", ("learned", 0.5), 0.001, 0.1, 0.1),
    "rte": (8, 32, 5e-4, 80, 0.06, 10, "linear", None, "per-layer", ("fixed", 0.5), 0.001, 0.1, 0.1),
    "sst2": (8, 16, 5e-4, 60, 0.06, 10, "cosine", 128, "shared", ("fixed", 0.5), 0.01, 0.1, 0.1),
    "stsb": (8, 16, 4e-4, 40, 0.06, 0, "linear", None, "per-layer", ("fixed", 0.5), 0.001, 0.1, 0.1),
}
# shared linear router; twelve of them; the cosine routers with their projections
ROUTERS = {
    "cola": 9_228, "rte": 110_736, "stsb": 110_736, "mnli": 324_897, "qqp": 299_905, "qnli": 74_977, "sst2": 99_969,
    "mrpc": 9_228,
}  # fmt: skip
LORA, HEAD = 294_912, 592_130


def published(task):
    return resolve(str(RECIPES / "published" / "molex" / f"{task}.yaml"))


def test_there_is_a_recipe_for_each_published_task():
    assert {path.stem for path in RECIPES.glob("published/molex/*.yaml")} == {*PUBLISHED, "e2e"}


@pytest.mark.parametrize("task", [*PUBLISHED, "e2e"])
def test_a_published_recipe_names_a_task_that_can_be_read_and_the_defects_it_keeps(task):
    named = published(task).task
    assert named in (task, f"hub:glue/{task}")
    hub = read_entry(FOLDER / f"{task}.yaml").hub
    assert (hub and (hub.repository, hub.config)) == (None if task == "e2e" else ("nyu-mll/glue", task))
    path = RECIPES / "published" / "molex" / f"{task}.yaml"
    comment = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith("# Published defects kept: ") for line in comment)
    assert any(line.startswith("# Published defects not kept: ") for line in comment)


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_published_settings_of_glue(task):
    run, method = published(task), published(task).method

    assert run.model == "roberta-base"
    assert (
        run.accumulation,
        run.batch_size,
        run.lr,
        run.epochs,
        run.warmup_ratio,
        run.seed,
        method.router,
        method.router_proj,
        method.router_scope,
        (method.alpha_mode, method.alpha),
        method.router_aux_loss_coef,
        run.router_lr,
        run.router_weight_decay,
    ) == PUBLISHED[task]
    assert (run.weight_decay, run.schedule, run.max_length, run.length_sorted) == (0.1, "linear", 512, False)
    assert (method.granularity, method.aggregate, method.router_gradient, method.top_k) == ("batch", "mode", "none", 1)
    assert (method.policy, method.candidates, method.score) == ("learned", "all", "softmax")


def test_the_published_settings_of_e2e():
    run, method = published("e2e"), published("e2e").method

    assert (run.model, run.batch_size, run.accumulation, run.lr, run.epochs) == ("gpt2-medium", 8, 1, 2e-4, 5)
    assert (run.weight_decay, run.seed, run.router_lr, run.router_weight_decay) == (0.01, 96, 0.01, 0.1)
    assert round(run.warmup_ratio * 26_290) == 500
    assert (method.alpha, method.alpha_mode, method.router_aux_loss_coef) == (0.95, "fixed", 0.01)
    assert method.layers_to_transform == list(range(12))


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_published_models_have_the_published_sizes(task):
    config = RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, num_labels=2)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(copy.deepcopy(config))
    backbone = SimpleNamespace(model=model, decoder=False, name="roberta-base")
    built = published(task).method.build(backbone, SimpleNamespace(kind="classification", name=task))

    trains = published(task).method.router_aux_loss_coef > 0  # the published MRPC and QNLI routers stay as they began
    alpha = published(task).method.alpha_mode == "learned"
    assert trainable_parameters(built.model) == LORA + HEAD + trains * ROUTERS[task] + alpha
    routers = sum(p.numel() for name, p in built.model.named_parameters() if "lamella_molex_router" in name)
    assert routers == ROUTERS[task]


@pytest.mark.parametrize(
    ("name", "seeds", "uniform"),
    [
        ("molex-trec", 5, True),
        ("molex-movies", 5, True),
        ("molex-sst2", 5, True),
        ("molex-smollm2", 3, False),
    ],
)
def test_the_studies_of_molex_have_its_controls(name, seeds, uniform):
    cells = study_recipe(name).cells()
    policies = {cell.method: getattr(cell.settings.method, "policy", None) for cell in cells}
    controls = ["random", "fixed", "self", *["uniform"] * uniform]

    assert policies == {"LoRA": None, "MoLEx": "learned"} | {f"MoLEx {policy}": policy for policy in controls}
    assert len(cells) == len({cell.key for cell in cells}) == len(policies) * seeds
    assert cells[0].settings.method.match == cells[1].settings.method
    assert len({cell.settings.lr for cell in cells if cell.method != "LoRA"}) == 1


def test_the_ablations_change_one_thing_each():
    first, *others = (cell for cell in study_recipe("molex-ablations").cells() if cell.seed == 0)
    plain = first.settings.model_dump()
    changed = {}
    for cell in others:
        own = cell.settings.model_dump()
        assert {key for key in own if own[key] != plain[key]} == {"method"}
        method = own["method"]
        changed[cell.method] = {key: method[key] for key in method if method[key] != plain["method"][key]}

    assert changed == {
        "alpha 0.5": {"alpha": 0.5},
        "alpha learned": {"alpha_mode": "learned"},
        "mode": {"aggregate": "mode"},
        "cosine": {"router": "cosine"},
        "cosine sigmoid": {"router": "cosine", "score": "sigmoid"},
        "router per layer": {"router_scope": "per-layer"},
        "top-2": {"top_k": 2},
        "balance 0": {"router_aux_loss_coef": 0.0},
        "balance 1e-2": {"router_aux_loss_coef": 1e-2},
    }


def test_molex_by_size_searches_both_sides_alike_on_every_model():
    cells = study_recipe("molex-size").cells()

    assert list(dict.fromkeys(cell.backbone for cell in cells)) == ["minilm@3", "minilm", "mpnet"]
    assert len(cells) == len({cell.key for cell in cells}) == 2 * 3 * 3
    searched = {(cell.backbone, cell.method): cell.search for cell in cells}
    assert len({search.key for search in searched.values()}) == 6
    assert len({(search.tries, str(search.space)) for search in searched.values()}) == 1
    assert all(cell.settings.method.match.name == "molex" for cell in cells if cell.method == "LoRA")


def test_every_recipe_of_a_study_is_valid():
    names = [path.stem for path in RECIPES.glob("*.yaml")]
    assert {"molex-trec", "molex-guests"} <= set(names), "the folder is the studies' own"
    for name in names:
        assert study_recipe(name).cells()


def test_the_study_of_shapes_compares_equals():
    study = study_recipe("trec-shapes")
    cells = study.cells()

    assert len(cells) == len({cell.key for cell in cells}) == 40
    budgets = {cell.settings.method.expert_budget for cell in cells if cell.settings.method.name == "mola"}
    assert budgets == {5.0}
    matched = {cell.settings.method.match.num_experts for cell in cells if cell.settings.method.name == "lora"}
    assert matched == {"inverted-triangle"}
    assert study.reference_name == "LoRA"
