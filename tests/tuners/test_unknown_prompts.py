"""What says where a prompt ends, and what is said where nothing does."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tests import tiny
from tests.tuners.mole import trained
from torch import Tensor
from transformers import Trainer, TrainingArguments

from lamella import prompt

IDS = torch.randint(3, tiny.VOCAB, (3, 10), generator=torch.Generator().manual_seed(2))
PROMPTS = (3, 6, 4)
AFTER = torch.arange(10) >= torch.tensor(PROMPTS)[:, None]


@pytest.fixture(params=["molex", "mole"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PeftModel:
    return tiny.molex(tiny.llama(layers=3)) if request.param == "molex" else trained.composition("llama", tmp_path)


@contextmanager
def heard() -> Iterator[list[str]]:
    """What lamella warns of."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield messages
    messages += [str(one.message) for one in said if "prompts" in str(one.message)]


def logits(model: PeftModel, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, **more).logits
    return found


SAID = {
    "labels": {"labels": IDS.masked_fill(~AFTER, -100)},
    "shift_labels": {"shift_labels": torch.nn.functional.pad(IDS.masked_fill(~AFTER, -100), (0, 1), value=-100)[:, 1:]},
    "completion_mask": {"completion_mask": AFTER.long()},
    "assistant_masks": {"assistant_masks": AFTER.long()},
}


@pytest.mark.parametrize("said", SAID)
def test_what_the_call_says_of_its_prompts_is_what_a_user_would(model: PeftModel, said: str) -> None:
    with prompt(PROMPTS):
        expected = logits(model)
    with heard() as messages:
        torch.testing.assert_close(logits(model, **SAID[said]), expected)
    assert not messages


@pytest.mark.parametrize("kept", [4, torch.arange(6, 10)])
def test_logits_that_are_not_asked_for_are_of_given_tokens(model: PeftModel, kept: int | Tensor) -> None:
    ids = torch.cat([torch.full((3, 2), tiny.PAD), IDS[:, 2:]], dim=1)  # prompts on the left, as GRPO has them
    mask = (ids != tiny.PAD).long()
    with prompt([5, 5, 5]):  # the first logits kept predict the eighth token
        expected = logits(model, ids, attention_mask=mask)[:, 6:]
    with heard() as messages:
        torch.testing.assert_close(logits(model, ids, attention_mask=mask, logits_to_keep=kept), expected)
    assert not messages


def test_an_unknown_prompt_is_said_once(model: PeftModel) -> None:
    with heard() as messages:
        for _ in range(2):
            logits(model)
    assert len(messages) == 1
    assert "Nothing in this forward says where the prompts of 3 of 3 sequences end" in messages[0]
    assert "lamella.prompt" in messages[0]
    assert "completion_mask" in messages[0]
    with heard() as messages:
        for _ in range(2):
            logits(model, labels=IDS)
    assert len(messages) == 1
    assert "the labels of 3 of 3 sequences begin with the text" in messages[0]
    assert "assistant_only_loss" in messages[0]
    with heard() as messages, prompt(PROMPTS):
        logits(model, labels=IDS)
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=1)
    assert not messages


@pytest.mark.parametrize("whole", ["encoder", "classifier"])
def test_what_reads_its_whole_input_has_no_prompt_to_be_unknown(whole: str) -> None:
    base = tiny.bert() if whole == "encoder" else tiny.llama_classifier()
    with heard() as messages:
        logits(tiny.molex(base), IDS, attention_mask=torch.ones_like(IDS))
    assert not messages


def test_label_smoothing_takes_the_labels_away_and_a_completion_mask_says_the_same(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    def choices(columns: tuple[str, ...], **smoothing: float) -> tuple[list[Tensor], list[str]]:
        model = tiny.molex(tiny.llama(layers=3))
        values = {"input_ids": IDS, "labels": IDS.masked_fill(~AFTER, -100), "completion_mask": AFTER.long()}
        rows = Dataset.from_dict({name: values[name].tolist() for name in ("input_ids", *columns)})
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=3, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False, learning_rate=0.0, **smoothing,
        )  # fmt: skip
        with heard() as messages, tiny.watch(model) as seen:
            Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()
        return [routing.logits.sort(dim=0).values for _, routing, _ in seen], messages

    expected, quiet = choices(("labels",))
    silent_before, said = choices(("labels",), label_smoothing_factor=0.1)
    actual, nothing = choices(("labels", "completion_mask"), label_smoothing_factor=0.1)
    assert not quiet
    assert len(said) == 1
    assert "label smoothing" in said[0]
    assert not nothing
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(silent_before[0], expected[0])
