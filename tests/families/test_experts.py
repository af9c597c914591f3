"""Every mixture of experts of transformers is read, or refused by name; one of each kind by default."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests import tiny_moe
from tests.families.experts import CHECKS, FAMILIES, examine, folder
from tests.families.models import batch, tiny_model
from tests.families.page import EXPERTS, EXPERTS_ROWS
from tests.families.rows import kept_row

from lamella import LamellaError, moe_layers, record_routing
from lamella.backbones.moe import Dispatch, watch_dispatch
from lamella.backbones.moe.expert import NormedExpert
from lamella.similarity import capture, compress
from lamella.similarity.alignment.frozen import FrozenExpert

BY_NAME = {family.name: family for family in FAMILIES}
# Each has a file of its own, or keeps router and experts in the block itself.
KINDS: dict[str, set[str]] = {
    "dbrx": set(),
    "deepseek_v4": {"routed", "masked"},
    "gemma4_text": set(),
    "llama4_text": set(),
    "longcat_flash": set(),
    "zaya": {"routed"},
}


@pytest.mark.parametrize("name", KINDS)
def test_one_family_of_each_kind(name: str) -> None:
    answers = examine(BY_NAME[name])["answers"]
    assert {check: answer for check, answer in answers.items() if answer["said"] == "fault"} == {}
    assert {check for check, answer in answers.items() if answer["said"] == "no"} == KINDS[name]


def test_choices_of_no_expert_are_not_counted(tmp_path: Path) -> None:
    model = tiny_model(BY_NAME["zaya"])
    layers = moe_layers(model)
    for layer in layers:
        layer.router_module.balancing_biases[-1] = 0.1  # so that some tokens skip the layer
    seen: list[Dispatch] = []
    given = batch(BY_NAME["zaya"], (7, 5, 4))
    with torch.no_grad(), watch_dispatch(model, layers, seen.append), record_routing(model) as trace:
        model(**given)
    taken = [int(one.routing.kept[one.real].sum()) for one in seen if one.routing.kept is not None]
    assert 0 < sum(taken) < 3 * 16
    assert [int(counts.sum()) for counts in trace.counts.values()] == taken
    assert not any(dropped.any() for dropped in trace.dropped.values())
    routing = capture(model, [given], tmp_path).routing
    assert [int(layer) for layer in routing.groupby("layer").selected.sum()] == taken
    assert not routing.dropped.any()


def test_experts_that_are_more_than_their_matrices_are_not_stored_as_fewer_or_aligned_to() -> None:
    with pytest.raises(LamellaError, match="cannot be stored as fewer"):
        compress(tiny_model(BY_NAME["llama4_text"]), None, 0.5, scope="layer")
    plain = moe_layers(tiny_moe.FAMILIES["mixtral"]())[0].experts[0]
    normed = NormedExpert(**vars(plain), norm=torch.nn.functional.normalize)
    assert torch.allclose(normed(torch.randn(3, tiny_moe.HIDDEN)).norm(dim=1), torch.ones(3))
    with pytest.raises(LamellaError, match="is more than its matrices"):
        FrozenExpert(normed, torch.float32)


@pytest.mark.parametrize("name", ["doge", "jetmoe", "nllb-moe"])
def test_what_is_not_read_is_refused_by_name(name: str) -> None:
    assert "that lamella does not read: " in examine(BY_NAME[name])["refused"]


@pytest.mark.heavy
@pytest.mark.parametrize("name", BY_NAME)
def test_every_family(name: str) -> None:
    row = kept_row(EXPERTS_ROWS, name, lambda: examine(BY_NAME[name]), unused=("cli", "lab", "diffusion", "tuners"))
    assert not [check for check, answer in row.get("answers", {}).items() if answer["said"] == "fault"]


@pytest.mark.heavy
def test_no_folder_of_transformers_is_left_out() -> None:
    models = Path(transformers.__file__).parent / "models"
    marked = {path.parent.name for path in models.glob("*/modeling_*.py") if "@use_experts" in path.read_text()}
    assert marked <= {folder(family) for family in FAMILIES}


def test_at_most_five_folders_are_not_read() -> None:
    rows: dict[str, Any] = json.loads(EXPERTS.read_text())["families"]
    assert rows.keys() == BY_NAME.keys()
    assert sum("refused" in row for row in rows.values()) <= 5
    assert all(answer["said"] != "fault" for row in rows.values() for answer in row.get("answers", {}).values())
    assert all(set(row["answers"]) <= set(CHECKS) for row in rows.values() if "answers" in row)
