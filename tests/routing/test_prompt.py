import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import tiny
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig

from lamella import LamellaError
from lamella.routing import prompt, track_calls, untrack_calls
from lamella.routing.context import current_context, stated_prompt
from lamella.routing.prompt import Beginning, Generation, Given, Prompt, find_readable

REAL = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]).bool()


def said_from(*starts: int) -> Given:
    """Labels that begin at these positions."""
    return Given(torch.arange(REAL.shape[1]) >= torch.tensor(starts)[:, None])


def rows(mask: Tensor | None) -> list[str] | None:
    return None if mask is None else ["".join(".x"[int(v)] for v in row) for row in mask]


def test_the_first_real_tokens_decide_and_run_without() -> None:
    readable = find_readable(REAL, None, None, 3)
    assert rows(readable.read) == rows(readable.without) == ["..xxx.", "xxx..."]


def test_lengths_count_real_tokens() -> None:
    readable = find_readable(REAL, Prompt(lengths=torch.tensor([1, 3])), None, 2)
    assert rows(readable.read) == ["..x...", "xxx..."]
    assert readable.without is None


def test_a_width_counts_positions_and_without_one_all_is_prompt() -> None:
    assert rows(find_readable(REAL, Prompt(width=3), said_from(6, 6), 2).read) == ["..x...", "xxx..."]
    assert rows(find_readable(REAL, Prompt(), said_from(1, 1), 2).read) == ["..xxxx", "xxxx.."]


def test_an_extent_says_how_many_tokens_are_read_and_how_many_run_without() -> None:
    assert find_readable(REAL, None, said_from(5, 0), 2).extent.tolist() == [[3, 0], [2, 2]]
    assert find_readable(REAL, Prompt(width=3), None, 2).extent.tolist() == [[1, 0], [3, 0]]


def test_labels_tell_where_the_given_ends_and_rows_without_a_prompt_have_the_first_tokens() -> None:
    readable = find_readable(REAL, None, said_from(5, 0), 2)
    assert rows(readable.read) == ["..xxx.", "xx...."]
    assert rows(readable.without) == ["......", "xx...."]
    assert find_readable(REAL, None, said_from(5, 4), 2).without is None


@settings(max_examples=50, deadline=None)
@given(
    real=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    lengths=st.lists(st.integers(0, 7), min_size=4, max_size=4),
    first=st.integers(1, 6),
)
def test_only_real_tokens_are_read_and_none_that_is_read_is_later_than_what_decides(
    real: list[list[bool]], lengths: list[int], first: int
) -> None:
    mask = torch.tensor(real)
    readable = find_readable(mask, Prompt(lengths=torch.tensor(lengths[: len(mask)])), None, first)
    for row, (read, given_length) in enumerate(zip(readable.read.tolist(), lengths, strict=False)):
        wanted = min(given_length or first, sum(real[row]))
        assert sum(read) == wanted
        order = [at for at, is_real in enumerate(real[row]) if is_real]
        assert [at for at, is_read in enumerate(read) if is_read] == order[:wanted]
        left_out = [] if readable.without is None else readable.without[row].tolist()
        assert any(left_out) == (given_length == 0 and wanted > 0)


def test_the_context_ends_and_nests() -> None:
    assert stated_prompt() is None
    with prompt([1, 2]):
        assert stated_prompt().lengths.tolist() == [1, 2]
        with prompt(torch.tensor([3])):
            assert stated_prompt().lengths.tolist() == [3]
        assert current_context().generation is None
    assert stated_prompt() is None


class Generates(nn.Module):
    """Stands for a model that can generate."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids

    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> str:
        stated, widths = stated_prompt(), [one.width for one in current_context().generation.beginnings]
        self.seen.append((widths, stated and stated.lengths.tolist()))
        return "said"


def test_generate_tells_the_ids_it_was_given() -> None:
    model = Generates()
    track_calls(model)
    assert model.generate(torch.zeros(2, 5)) == "said"
    model.generate(input_ids=torch.zeros(2, 4))
    model.generate(inputs_embeds=torch.zeros(2, 3, 8), input_ids=torch.zeros(2, 0))
    model.generate()
    with prompt([2]):
        model.generate(torch.zeros(1, 5))
    assert model.seen == [([5], None), ([4], None), ([3], None), ([], None), ([5], [2])]
    assert current_context().generation is None
    clone = copy.deepcopy(model)
    clone.generate(torch.zeros(2, 6))
    assert len(model.seen) == 5
    untrack_calls(model)
    assert "generate" not in model.__dict__


def test_a_generate_of_the_models_own_is_kept() -> None:
    model = Generates()
    model.generate = lambda *args, **kwargs: current_context().generation.beginnings[0].width
    track_calls(model)
    assert model.generate(torch.zeros(2, 7)) == 7
    untrack_calls(model)
    with pytest.raises(AttributeError):
        model.generate()  # outside, nothing is known


@pytest.mark.parametrize(
    ("own", "given", "disabled"),
    [
        ({}, {}, True),
        ({}, {"generation_config": GenerationConfig(max_new_tokens=1)}, True),
        ({}, {"disable_compile": False}, False),
        ({}, {"generation_config": GenerationConfig(max_new_tokens=1, disable_compile=False)}, False),
        ({"disable_compile": False}, {}, False),
        ({"compile_config": CompileConfig()}, {}, None),
    ],
)
def test_generate_compiles_only_for_who_asks(
    own: dict[str, Any], given: dict[str, Any], disabled: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tiny.llama(), []

    def notice(self: Any, model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> bool:
        seen.append(generation_config.disable_compile)
        return False

    monkeypatch.setattr(type(model), "_valid_auto_compile_criteria", notice)
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    for statement in (nullcontext(), prompt([3])):
        track_calls(model)
        with statement:
            model.generate(torch.tensor([[3, 4, 5]]), **{"max_new_tokens": 1, **given})
        untrack_calls(model)
        assert set(seen) == {disabled}


IDS = torch.tensor([[5, 6, 7], [8, 9, 9]])


def test_a_forward_is_known_by_what_it_begins_with() -> None:
    unconditional = torch.tensor([[5], [8]])
    generation = Generation([Beginning(IDS, is_asked=True), Beginning(unconditional)])
    said, beside = IDS.repeat_interleave(2, dim=0), unconditional.repeat_interleave(2, dim=0)  # two beams
    for _ in range(4):  # of which the second has forwards that begin like the prompt
        assert generation.prompt_of(said).width == 3
        assert generation.prompt_of(beside).width == 1
        said = torch.cat([said, said[:, :1] + 1], dim=1)
        beside = torch.cat([beside, said[:, beside.shape[1] : beside.shape[1] + 1]], dim=1)
    assert generation.prompt_of(torch.tensor([[3, 3, 3, 3, 3]])).width == 5  # of other sequences, all that it is given
    assert generation.prompt_of(torch.tensor([[3, 3, 3, 3, 3, 4]])).width == 5
    assert generation.prompt_of(None).width is None
    numbers = {Generation([]).number for _ in range(3)}
    assert len(numbers) == 3


def test_a_prompt_that_comes_in_parts_is_an_error() -> None:
    generation = Generation([Beginning(IDS, is_asked=True)])
    part = generation.prompt_of(IDS[:, :2])  # MoLA, which decides for each token, goes on
    with pytest.raises(LamellaError, match="2 of its 3 tokens first"):
        find_readable(torch.ones_like(IDS[:, :2], dtype=torch.bool), part, None, 2)


def test_guessed_tokens_are_no_part_of_the_prompt() -> None:
    generation = Generation([Beginning(IDS, drafts=True)], drafts=True)
    assert generation.prompt_of(torch.cat([IDS, IDS], dim=1)).width == 3
    guessed = torch.cat([IDS + 1, IDS], dim=1)
    unknown = generation.prompt_of(guessed)
    with pytest.raises(LamellaError, match=r"guessed tokens .* lamella\.prompt"):
        find_readable(torch.ones_like(guessed, dtype=torch.bool), unknown, None, 2)


def test_another_number_of_sequences_is_an_error() -> None:
    with pytest.raises(LamellaError, match="3 lengths"):
        find_readable(REAL, Prompt(lengths=torch.tensor([1, 2, 3])), None, 2)
