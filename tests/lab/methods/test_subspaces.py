"""KnOTS, TSV-M and Core Space against merges of full deltas, in float64."""

import pytest
import torch
from tests.lab.tiny_loras import inputs, logits_with
from tests.reference import merging as slow

from lamella.adapters import Factors
from lamella.errors import LamellaError
from lamella.lab.data import load_backbone, load_task
from lamella.lab.methods import method_from, subspaces, trainable_parameters

SIZES = {"wide": (7, 11), "tall": (12, 6), "small": (4, 5)}  # of "small" the ranks' sum is above both sizes
RANKS = {"a": 2, "b": 3, "c": 1}
SETTINGS = [
    ("knots", {"density": 0.3}),
    ("knots", {"density": 1.0}),
    ("knots", {"combination": "mean"}),
    ("tsv", {}),
    ("tsv", {"rank": 1}),
    ("core-space", {"density": 0.3}),
    ("core-space", {"combination": "tsv"}),
    ("core-space", {"combination": "mean"}),
]


def lora(rank, scaling, modules=tuple(SIZES)):
    return {
        module: Factors(
            A=torch.randn(rank, SIZES[module][1], dtype=torch.float64),
            B=torch.randn(SIZES[module][0], rank, dtype=torch.float64),
            scaling=scaling,
        )
        for module in modules
    }


def drawn(seed):
    """Three LoRAs of different ranks and scalings; "c" does not adapt "tall"."""
    torch.manual_seed(seed)
    return {
        "a": lora(RANKS["a"], 0.5),
        "b": lora(RANKS["b"], 2.0),
        "c": lora(RANKS["c"], 1.5, modules=("wide", "small")),
    }


def merged(loras, name, **settings):
    method = method_from({"name": name, "adapters": dict.fromkeys(loras, "here"), **settings})
    values = {key: getattr(method, key) for key in method.parameters - {"loras"}}
    return {module: delta(factors) for module, factors in method.function(loras, **values).items()}


def delta(factors):
    return factors.scaling * factors.B @ factors.A


def full(loras):
    """Of each module each LoRA's delta."""
    return {
        module: [
            delta(one[module]) if module in one else torch.zeros(size, dtype=torch.float64) for one in loras.values()
        ]
        for module, size in SIZES.items()
    }


def expected(loras, name, combination="ties", density=0.2, rank=None):
    whole = full(loras)
    if combination == "mean":
        return {module: slow.mean(parts) for module, parts in whole.items()}
    if name == "knots":
        return slow.knots(whole, density)
    if name == "tsv":
        return {module: slow.tsv(parts, rank or min(SIZES[module]) // len(loras)) for module, parts in whole.items()}
    result = {}
    for module in SIZES:
        left, cores, right = slow.core_matrices([one.get(module) for one in loras.values()])
        if combination == "tsv":
            core = slow.tsv(cores, min(cores[0].shape) // len(loras))
        else:
            core = slow.ties_of_matrices(cores, density)
        result[module] = left @ core @ right.mT
    return result


def close(found, wanted):
    assert found.keys() == wanted.keys()
    for module in found:
        torch.testing.assert_close(found[module], wanted[module], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_is_the_merge_of_full_deltas(name, settings, seed):
    loras = drawn(seed)

    close(merged(loras, name, **settings), expected(loras, name, **settings))


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_the_order_of_the_loras_changes_nothing(name, settings):
    loras = drawn(3)
    turned = {place: loras[place] for place in ("c", "a", "b")}

    close(merged(turned, name, **settings), merged(loras, name, **settings))


@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_the_coefficient_multiplies_the_delta(name, settings):
    loras = drawn(4)

    once = merged(loras, name, **settings)
    close(merged(loras, name, coefficient=0.25, **settings), {module: 0.25 * change for module, change in once.items()})


@pytest.mark.parametrize(
    ("name", "settings"), [(name, settings) for name, settings in SETTINGS if settings != {"rank": 1}]
)
def test_one_lora_and_copies_of_it_are_that_lora(name, settings):
    one = drawn(5)["b"]
    settings = {**settings, "density": 1.0} if "density" in settings else settings

    alone = {module: delta(factors) for module, factors in one.items()}
    close(merged({"b": one}, name, **settings), alone)
    wide = {"a": {"wide": one["wide"]}, "b": {"wide": one["wide"]}}  # 2 of them keep all of rank 3
    close(merged(wide, name, **settings), {"wide": alone["wide"]})


@pytest.mark.parametrize("name", ["knots", "tsv", "core-space"])
def test_the_rank_is_no_larger_than_the_delta_needs(name):
    torch.manual_seed(6)
    one = lora(2, 1.0)
    twice = {"a": one, "b": {module: factors._replace(scaling=3.0) for module, factors in one.items()}}
    method = getattr(subspaces, name.replace("-", "_"))

    for settings in ({}, {"combination": "mean"}) if name != "tsv" else ({},):
        for factors in method.function(twice, **settings).values():
            assert len(factors.A) == factors.B.shape[1] == torch.linalg.matrix_rank(delta(factors)) <= 2


@pytest.mark.parametrize("name", ["knots", "tsv", "core-space"])
def test_loras_that_add_nothing_merge_to_one_of_rank_1_that_adds_nothing(name):
    nothing = {module: factors._replace(B=torch.zeros_like(factors.B)) for module, factors in lora(2, 1.0).items()}
    method = getattr(subspaces, name.replace("-", "_"))

    for factors in method.function({"a": nothing, "b": nothing}).values():
        assert len(factors.A) == 1
        assert not delta(factors).any()


def test_orthogonal_loras_are_summed_by_tsv():
    loras = {
        name: {
            "wide": Factors(A=torch.eye(2, 11).roll(shift, 1), B=torch.eye(7, 2).roll(shift, 0), scaling=shift + 1.0)
        }
        for name, shift in (("a", 0), ("b", 2), ("c", 4))
    }

    found = merged(loras, "tsv")["wide"]

    torch.testing.assert_close(found, sum(delta(one["wide"]) for one in loras.values()))
    assert found.dtype == torch.float32


def test_ties_counts_no_entry_that_is_zero_but_for_round_off():
    """LoRAs that write into subspaces at right angles have no direction in common, and each stays as it is."""
    torch.manual_seed(8)
    turn = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    loras = {
        name: {"wide": lora(2, 1.0)["wide"]._replace(B=turn[:, columns])}
        for name, columns in (("a", slice(0, 2)), ("b", slice(2, 4)))
    }
    loras["b"]["wide"] = loras["b"]["wide"]._replace(scaling=3.0)

    close(merged(loras, "knots", density=1.0), {"wide": sum(delta(one["wide"]) for one in loras.values())})


def test_core_space_of_equal_ranks_by_tsv_is_tsv():
    torch.manual_seed(7)
    loras = {name: lora(2, scaling, modules=("wide", "tall")) for name, scaling in (("a", 0.5), ("b", 1.0), ("c", 2.0))}

    close(merged(loras, "core-space", combination="tsv"), merged(loras, "tsv"))


@pytest.mark.parametrize("name", ["knots", "tsv", "core-space"])
def test_it_is_put_on_a_backbone(base, questions, loras, name):
    task = load_task(questions)

    method = method_from({"name": name, "adapters": loras})
    built = method.build(load_backbone(base, task), task)

    change = merged(method.loras(load_backbone(base, task), task), name)
    with torch.no_grad():
        found = built.model.eval()(**inputs()).logits
    torch.testing.assert_close(found, logits_with(base, questions, change), rtol=1e-4, atol=1e-5)
    assert trainable_parameters(built.model) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "knots", "density": 0}, r"'method\.density' cannot be 0"),
        ({"name": "core-space", "density": 1.5}, r"'method\.density' cannot be 1\.5"),
        ({"name": "tsv", "rank": 0}, r"'method\.rank' cannot be 0"),
        ({"name": "tsv", "coefficient": float("inf")}, r"'method\.coefficient' cannot be inf"),
        ({"name": "knots", "coefficient": -1}, r"'method\.coefficient' cannot be -1"),
        ({"name": "knots", "combination": "tsv"}, r"'method\.combination' cannot be 'tsv'"),
        ({"name": "tsv", "density": 0.5}, r"no setting 'method\.density'"),
    ],
)
def test_settings_that_make_no_merge_are_refused(settings, message):
    with pytest.raises(LamellaError, match=message):
        method_from({"adapters": {"a": "here"}, **settings})
