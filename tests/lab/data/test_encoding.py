from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.errors import LamellaError
from lamella.lab.data import Collator, Task, encode
from lamella.texts.encoding import message_pieces, packed_blocks


def make_task(kind, rows, names=(), **splits):
    return Task(
        name="made",
        kind=kind,
        splits={split: Dataset.from_list(part) for split, part in {"train": rows, **splits}.items()},
        label_names=names,
        metric="accuracy",
        source="here",
        licence="none",
        notes=(),
    )


def words(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def decoded(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def learned(tokenizer, row):
    """The tokens that carry loss, after checking that a label is its own id."""
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    return decoded(tokenizer, [label for label in row["labels"] if label != -100])


def test_classification_pads_to_the_longest_row_and_keeps_types(encoder_tokenizer):
    rows = [{"text": words(1, 2, 3), "label": 1}, {"text": words(4), "label": 0}]
    encoded = encode(make_task("classification", rows, ("no", "yes")), encoder_tokenizer)
    assert encoded.train["length"] == [5, 3]
    assert encoded.validation is None
    batch = encoded.collator(list(encoded.train))
    assert decoded(encoder_tokenizer, batch["input_ids"][1].tolist()) == ["[CLS]", "w4", "[SEP]", "[PAD]", "[PAD]"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["token_type_ids"].shape == (2, 5)
    assert batch["labels"].tolist() == [1, 0]
    assert "length" not in batch


def test_a_pair_has_two_segments(encoder_tokenizer):
    rows = [{"text1": words(1), "text2": words(2), "label": 0}]
    encoded = encode(make_task("pair-classification", rows, ("no", "yes")), encoder_tokenizer)
    assert decoded(encoder_tokenizer, encoded.train[0]["input_ids"]) == ["[CLS]", "w1", "[SEP]", "w2", "[SEP]"]
    assert encoded.train[0]["token_type_ids"] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("inputs", [{"text1": "w1"}, {"text1": "w1", "text2": "w2"}])
def test_regression_labels_are_floats(encoder_tokenizer, inputs):
    encoded = encode(make_task("regression", [{**inputs, "label": 2.5}]), encoder_tokenizer)
    batch = encoded.collator(list(encoded.train))
    assert batch["labels"].dtype == torch.float32
    assert batch["input_ids"].shape[1] == (3 if len(inputs) == 1 else 5)


def test_long_text_is_cut_and_said_so(encoder_tokenizer):
    rows = [{"text": words(*range(20)), "label": 0}, {"text": words(1), "label": 1}]
    encoded = encode(make_task("classification", rows, ("a", "b")), encoder_tokenizer, max_length=8)
    assert encoded.train["length"] == [8, 3]
    assert encoded.notes == ("train: 1 of 2 rows fill all 8 tokens; longer text is cut",)


CHOICE_ROWS = [
    {"question": words(1), "choices": [words(2), words(3, 4)], "label": 1},
    {"question": words(5, 6), "choices": [words(7), words(8)], "label": 0},
]


def test_choices_of_an_encoder_are_one_row(encoder_tokenizer):
    encoded = encode(make_task("multiple-choice", CHOICE_ROWS), encoder_tokenizer)
    assert encoded.train["length"] == [6, 6]
    batch = encoded.collator(list(encoded.train))
    assert batch["input_ids"].shape == (2, 2, 6)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(-1).tolist() == [[5, 6], [6, 6]]
    assert decoded(encoder_tokenizer, batch["input_ids"][0, 1].tolist()) == [
        "[CLS]",
        "w1",
        "[SEP]",
        "w3",
        "w4",
        "[SEP]",
    ]


def test_an_encoder_refuses_different_numbers_of_choices(encoder_tokenizer):
    rows = [CHOICE_ROWS[0], {"question": "w1", "choices": ["w1", "w2", "w3"], "label": 0}]
    with pytest.raises(LamellaError, match=r"2 to 3 choices.*Use a decoder"):
        encode(make_task("multiple-choice", rows), encoder_tokenizer)


def test_a_decoder_learns_the_right_choice_and_scores_each(decoder_tokenizer):
    task = make_task("multiple-choice", CHOICE_ROWS, test=CHOICE_ROWS)
    encoded = encode(task, decoder_tokenizer)
    assert [learned(decoder_tokenizer, row) for row in encoded.train] == [["w3", "w4", "<end>"], ["w7", "<end>"]]
    assert decoded(decoder_tokenizer, encoded.train[0]["input_ids"])[:2] == ["w1", "Answer:"]
    assert "row" not in encoded.train.column_names
    assert [(row["row"], row["choice"], row["answer"]) for row in encoded.test] == [
        (0, 0, 1),
        (0, 1, 1),
        (1, 0, 0),
        (1, 1, 0),
    ]
    assert learned(decoder_tokenizer, encoded.test[0]) == ["w2", "<end>"]


def test_loss_on_the_completion_only_and_padding_by_mask(decoder_tokenizer):
    rows = [{"prompt": words(1, 2), "completion": words(3, 4)}, {"prompt": words(5), "completion": words(6)}]
    encoded = encode(make_task("causal-lm", rows), decoder_tokenizer)
    assert learned(decoder_tokenizer, encoded.train[0]) == ["w3", "w4", "<end>"]
    batch = encoded.collator(list(encoded.train))
    end = decoder_tokenizer.eos_token_id
    assert decoder_tokenizer.pad_token_id == end
    assert batch["input_ids"][1].tolist()[2:] == [end, end, end]  # one real end token, two of padding
    assert batch["attention_mask"][1].tolist() == [1, 1, 1, 0, 0]
    assert batch["labels"][1].tolist()[2:] == [end, -100, -100]


def test_a_long_prompt_loses_its_start_not_its_completion(decoder_tokenizer):
    rows = [{"prompt": words(*range(20)), "completion": words(30, 31)}]
    row = encode(make_task("causal-lm", rows), decoder_tokenizer, max_length=6).train[0]
    assert decoded(decoder_tokenizer, row["input_ids"]) == ["w17", "w18", "w19", "w30", "w31", "<end>"]


def test_chat_learns_only_what_the_assistant_says(chat_tokenizer):
    messages = [
        {"role": "system", "content": "w0"},
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2 w3"},
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5"},
    ]
    row = encode(make_task("causal-lm", [{"messages": messages}]), chat_tokenizer).train[0]
    assert learned(chat_tokenizer, row) == ["w2", "w3", "<end>", "w5", "<end>"]
    whole = chat_tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"]
    assert row["input_ids"] == list(whole)
    prompt = chat_tokenizer.apply_chat_template(messages[:2], tokenize=True, add_generation_prompt=True)["input_ids"]
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert row["labels"][len(prompt)] != -100


def test_a_long_chat_of_one_turn_keeps_its_answer(chat_tokenizer):
    turn = [{"role": "user", "content": words(*range(30))}, {"role": "assistant", "content": "w2"}]
    row = encode(make_task("causal-lm", [{"messages": turn}]), chat_tokenizer, max_length=6).train[0]
    assert decoded(chat_tokenizer, row["input_ids"]) == ["w28", "w29", "<end>", "<assistant>", "w2", "<end>"]


def test_chat_without_template_is_an_error(decoder_tokenizer):
    rows = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}]
    with pytest.raises(LamellaError, match=r"need a chat template.*smollm2"):
        encode(make_task("causal-lm", rows), decoder_tokenizer)


def test_a_template_that_refuses_a_conversation_names_it(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(LamellaError, match=r"refuses the conversation that begins 'w1'.*roles must alternate"):
        message_pieces([{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}], chat_tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_an_error(decoder_tokenizer):
    decoder_tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}new {% endif %}<{{ m['role'] }}> {{ m['content'] }} <end>{% endfor %}"
    )
    turn = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    with pytest.raises(LamellaError, match="writes earlier turns differently"):
        encode(make_task("causal-lm", [{"messages": turn * 2}]), decoder_tokenizer)


def test_chat_rows_whose_answer_is_cut_off_are_dropped(chat_tokenizer):
    short = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    long = [{"role": "user", "content": words(*range(30))}, short[1], *short]
    encoded = encode(make_task("causal-lm", [{"messages": long}, {"messages": short}]), chat_tokenizer, max_length=8)
    assert len(encoded.train) == 1
    assert "train: 1 rows dropped: nothing to learn within 8 tokens" in encoded.notes
    with pytest.raises(LamellaError, match=r"No row of made's train split is left.*Raise max_length"):
        encode(make_task("causal-lm", [{"messages": long}]), chat_tokenizer, max_length=8)


def test_prose_ends_with_the_end_token_and_says_what_it_cut(decoder_tokenizer):
    rows = [{"text": words(*range(12))}, {"text": words(1)}]
    encoded = encode(make_task("causal-lm", rows), decoder_tokenizer, max_length=8)
    assert encoded.train["length"] == [8, 2]
    assert decoded(decoder_tokenizer, encoded.train[1]["input_ids"]) == ["w1", "<end>"]
    assert encoded.train[0]["labels"] == encoded.train[0]["input_ids"]
    assert encoded.notes == ("train: 5 tokens beyond the first 8 of a text cut (packing keeps them)",)


def test_packing_joins_prose(decoder_tokenizer):
    rows = [{"text": words(1, 2, 3)}, {"text": words(4, 5)}, {"text": words(6, 7)}]
    encoded = encode(make_task("causal-lm", rows), decoder_tokenizer, max_length=4, packing=True)
    assert [decoded(decoder_tokenizer, row["input_ids"]) for row in encoded.train] == [
        ["w1", "w2", "w3", "<end>"],
        ["w4", "w5", "<end>", "w6"],
    ]
    assert encoded.notes == (
        "train: 3 texts packed into 2 blocks of 4 tokens",
        "train: the last 2 of 10 tokens dropped: less than a block",
    )


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), min_size=1), st.integers(1, 5))
def test_packing_keeps_every_token_but_the_last_block(documents, block):
    rows, _ = packed_blocks(documents, block)
    stream = [token for document in documents for token in document]
    packed = [token for row in rows for token in row["input_ids"]]
    assert packed == stream[: len(packed)]
    assert 0 <= len(stream) - len(packed) < block


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_mask_counts_real_tokens_even_when_they_equal_the_pad(sequences):
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": list(ids)} for ids in sequences]
    batch = Collator(pad_id=0)(rows)
    assert batch["attention_mask"].sum(1).tolist() == [len(ids) for ids in sequences]
    assert (batch["labels"] == -100).equal(batch["attention_mask"] == 0)
    for ids, row, mask in zip(sequences, batch["input_ids"], batch["attention_mask"], strict=True):
        assert row[mask.bool()].tolist() == ids


def test_packing_refuses_rows_that_are_not_prose(decoder_tokenizer):
    with pytest.raises(LamellaError, match="packing joins running prose, but made is a causal-lm task without a text"):
        encode(make_task("causal-lm", [{"prompt": "w1", "completion": "w2"}]), decoder_tokenizer, packing=True)


def test_seq2seq_for_an_encoder_decoder_and_for_a_decoder(decoder_tokenizer):
    task = make_task("seq2seq", [{"source": words(1, 2), "target": words(3)}, {"source": "w1", "target": words(4, 5)}])
    encoded = encode(task, decoder_tokenizer)
    batch = encoded.collator(list(encoded.train))
    assert decoded(decoder_tokenizer, encoded.train[0]["labels"]) == ["w3"]
    assert batch["labels"].shape == (2, 2)
    assert batch["labels"][0, 1] == -100
    joined = encode(task, decoder_tokenizer, decoder=True)
    assert learned(decoder_tokenizer, joined.train[0]) == ["w3", "<end>"]


def test_limit_samples_train_by_seed_and_evaluation_always_alike(encoder_tokenizer):
    rows = [{"text": f"w{number % 40} w{number // 40}", "label": number % 2} for number in range(80)]
    task = make_task("classification", rows, ("a", "b"), test=rows)
    limit = {"train": 10, "test": 10}
    first, second, again = (encode(task, encoder_tokenizer, limit=limit, seed=seed) for seed in (1, 2, 1))
    assert first.train["input_ids"] == again.train["input_ids"] != second.train["input_ids"]
    assert first.test["input_ids"] == second.test["input_ids"]
    assert len(first.train) == len(first.test) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 1}, "max_length=1 leaves no room"),
        ({"limit": {"dev": 3}}, "limit names dev, but made has train"),
        ({"limit": {"train": 0}}, "limit of 0 rows for train"),
    ],
)
def test_bad_settings(encoder_tokenizer, settings, message):
    task = make_task("classification", [{"text": "w1", "label": 0}, {"text": "w2", "label": 1}], ("a", "b"))
    with pytest.raises(LamellaError, match=message):
        encode(task, encoder_tokenizer, **settings)


def test_a_task_without_train_split_encodes(encoder_tokenizer):
    task = make_task("classification", [{"text": "w1", "label": 0}], ("a", "b"))
    only_test = replace(task, splits={"test": task.splits["train"]})
    assert encode(only_test, encoder_tokenizer).train is None
