"""Scenes, their pictures, what is said of them, and a judge that sees what stands there."""

import re

import pytest
import torch

from models.diffusion.captions import WORDS, captions
from models.diffusion.judge import UNCLEAR, Judge, described
from models.diffusion.world import (
    BACKGROUNDS,
    BASE,
    COLOURS,
    EVERYTHING,
    KINDS,
    NOTHING,
    PLACES,
    TEXTURES,
    World,
    joined,
    patches,
    quarters,
    render,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def judge():
    return Judge(BASE)


@pytest.fixture(scope="module")
def scenes():
    trained, held_out = (BASE.draw(150, seeded(), kinds=kinds) for kinds in (BASE.trained, BASE.held_out))
    return joined([trained, held_out])


# --- the world


def test_the_world_is_as_large_as_it_is_said_to_be():
    kinds = [KINDS[number - 1] for number in BASE.numbers.tolist()]

    assert len(KINDS) == len(set(KINDS)) == len(EVERYTHING.numbers)
    assert [len(set(words)) for words in zip(*kinds, strict=True)] == [6, 8, 3]
    assert (len(set(kinds)), len(PLACES), len(BACKGROUNDS)) == (6 * 8 * 3, 4, 3)


def test_what_is_held_out_has_one_colour_of_each_shape_with_each_texture():
    held_out = [KINDS[number - 1] for number in BASE.held_out.tolist()]

    assert len({(kind.shape, kind.texture) for kind in held_out}) == len(held_out) == 6 * 3
    assert {kind.colour for kind in held_out} == set(COLOURS)
    assert sorted([*BASE.held_out.tolist(), *BASE.trained.tolist()]) == BASE.numbers.tolist()
    assert set(BASE.held_out.tolist()) < set(EVERYTHING.held_out.tolist())


def test_one_seed_draws_one_set_of_scenes():
    first, again, other = (BASE.draw(20, seeded(seed)) for seed in (1, 1, 2))

    assert torch.equal(render(first), render(again))
    assert not torch.equal(render(first), render(other))


def test_scenes_have_the_objects_that_were_asked_for():
    numbers = (BASE.draw(600, seeded()).kinds != NOTHING).sum(dim=1).bincount(minlength=5).tolist()

    assert numbers[0] == numbers[4] == 0
    assert all(150 < number < 250 for number in numbers[1:4])
    assert (BASE.draw(50, seeded(), objects=[2]).kinds != NOTHING).sum(dim=1).tolist() == [2] * 50
    assert set(BASE.draw(99, seeded()).kinds.unique().tolist()) <= {NOTHING, *BASE.trained.tolist()}


def test_no_scene_for_training_is_among_those_that_are_kept_out():
    shown, kept_out = (BASE.draw(3000, seeded(1), objects=[1], kept_out=which) for which in (False, True))
    contents = [
        {(*kinds, ground) for kinds, ground in zip(part.kinds.tolist(), part.backgrounds.tolist(), strict=True)}
        for part in (shown, kept_out)
    ]

    assert contents[1]
    assert not contents[0] & contents[1]


def test_a_picture_is_its_places_side_by_side(scenes):
    pictures = render(scenes)
    places = quarters(pictures)

    assert pictures.shape == (300, 3, 32, 32)
    assert 0 <= pictures.min() <= pictures.max() <= 1
    assert torch.equal(places[:, PLACES.index("top right")], pictures[:, :, :16, 16:])
    assert torch.equal(places[:, PLACES.index("bottom left")], pictures[:, :, 16:, :16])


def test_a_red_bar_on_white_is_red_where_it_is_and_white_around():
    number = 1 + next(at for at, kind in enumerate(KINDS) if kind == ("bar", "red", "plain"))
    picture = patches()[list(BACKGROUNDS).index("white"), number, 4]  # in the middle of its place

    assert picture[:, 8, 8].tolist() == pytest.approx(COLOURS["red"])
    assert picture[:, 3, 8].tolist() == [1, 1, 1]


# --- what is said


def test_a_caption_says_all_that_stands_there_and_nothing_else(scenes):
    for said, kinds, ground in zip(
        captions(scenes, seeded()), scenes.kinds.tolist(), scenes.backgrounds.tolist(), strict=True
    ):
        words = re.findall(r"\w+|,", said)
        assert set(words) <= set(WORDS)
        assert words[words.index("on") + 1] == list(BACKGROUNDS)[ground]
        pieces = re.split(r", | and ", re.sub(r"^on \w+, | on \w+$", "", said))
        assert len(pieces) == sum(kind != NOTHING for kind in kinds)
        for place, kind in zip(PLACES, kinds, strict=True):
            if kind != NOTHING:
                (piece,) = (piece for piece in pieces if place in piece)
                shape, colour, texture = KINDS[kind - 1]
                assert {shape, colour} < set(piece.split())
                assert texture in ({*piece.split(), "plain"} - ({*TEXTURES} - {texture}))


def test_one_scene_is_said_in_more_than_one_order_of_words():
    number = 1 + next(at for at, kind in enumerate(KINDS) if kind == ("circle", "orange", "striped"))
    scene = BASE.draw(1, seeded(), objects=[1], kinds=torch.tensor([number]))
    place = PLACES[int(scene.kinds.argmax())]
    ground = list(BACKGROUNDS)[int(scene.backgrounds)]

    assert {captions(scene, seeded(seed))[0] for seed in range(60)} == {
        f"an orange striped circle {place} on {ground}",
        f"a striped circle in orange {place} on {ground}",
        f"{place} an orange striped circle on {ground}",
        f"{place} a striped circle in orange on {ground}",
        f"on {ground}, an orange striped circle {place}",
        f"on {ground}, a striped circle in orange {place}",
        f"on {ground}, {place} an orange striped circle",
        f"on {ground}, {place} a striped circle in orange",
    }


# --- the judge


def test_the_judge_is_right_on_every_scene_and_on_noisy_ones(judge, scenes):
    pictures = render(scenes)
    noisy = pictures + 0.1 * torch.randn(pictures.shape, generator=seeded())

    assert judge(pictures).right(scenes).all()
    assert judge(noisy).right(scenes).all()


def test_the_judge_knows_every_object_of_the_widest_world():
    places = patches()[1, 1:, 4].unflatten(0, (-1, 4))  # on grey: (pictures, 4, 3, 16, 16)
    pictures = torch.cat([torch.cat([*places[:, :2].unbind(1)], 3), torch.cat([*places[:, 2:].unbind(1)], 3)], 2)
    found = Judge(EVERYTHING)(pictures)

    assert found.kinds.flatten().tolist() == list(range(1, len(KINDS) + 1))
    assert found.backgrounds.eq(1).all()


def test_what_is_like_nothing_is_unclear_and_the_rest_is_judged(judge, scenes):
    pictures = render(scenes)
    pictures[:, :, :16, :16] = torch.rand(len(scenes), 3, 16, 16, generator=seeded())
    found = judge(pictures)

    assert found.kinds[:, 0].eq(UNCLEAR).all()
    assert found.places_right(scenes)[:, 1:].all()
    assert not found.right(scenes).any()


def test_a_shape_that_the_world_has_not_is_unclear_or_wrong_and_known_to_a_judge_of_it():
    rings = World(["ring"], ["plain", "striped"])
    scenes = rings.draw(50, seeded(), objects=[1])
    stands = scenes.kinds != NOTHING
    found = Judge(BASE)(render(scenes))

    assert Judge(rings)(render(scenes)).right(scenes).all()
    assert found.kinds[stands].eq(UNCLEAR).float().mean() > 0.5


def test_one_wrong_place_or_the_wrong_background_is_not_right(judge, scenes):
    found, others = judge(render(scenes)), BASE.draw(len(scenes), seeded(9))
    for place in range(len(PLACES)):
        changed = joined([scenes])
        changed.kinds[:, place] = others.kinds[:, place]
        assert torch.equal(found.right(changed), changed.kinds[:, place] == scenes.kinds[:, place])
    changed = joined([scenes])
    changed.backgrounds[:] = (scenes.backgrounds + 1) % 3
    assert not found.right(changed).any()


def test_a_verdict_is_told_in_words(judge):
    scenes = BASE.draw(1, seeded(), objects=[2])
    pictures = render(scenes)
    ground, found = described(judge(pictures), 0)

    assert ground == list(BACKGROUNDS)[int(scenes.backgrounds)]
    numbers = dict(zip(PLACES, scenes.kinds[0].tolist(), strict=True))
    assert found == {place: KINDS[number - 1] for place, number in numbers.items() if number}
    ground, found = described(judge(torch.rand(1, 3, 32, 32, generator=seeded())), 0)
    assert set(found.values()) == {None}
