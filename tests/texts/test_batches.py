"""Batches of tokens from tasks and files."""

import json

import pytest
import torch
from tests.similarity.activations.streams import assert_same_samples
from tests.tiny_moe import FAMILIES

from lamella.errors import LamellaError
from lamella.lab.data import load_task
from lamella.similarity.activations import capture, text_batches

NUMBERS = range(30)
KINDS = {
    "classification": lambda n: {"text": f"w{n} w1 w2", "label": n % 2},
    "pair-classification": lambda n: {"text1": f"w{n} w1", "text2": "w2 w3", "label": n % 2},
    "regression": lambda n: {"text1": f"w{n} w1", "text2": "w2 w3", "label": n / 2},
    "multiple-choice": lambda n: {"question": f"w{n} w1", "choices": ["w2", "w3"], "label": n % 2},
    "prose": lambda n: {"text": f"w{n} w1 w2"},
    "completion": lambda n: {"prompt": f"w{n} w1", "completion": " w2"},
    "chat": lambda n: {
        "messages": [{"role": "user", "content": f"w{n}"}, {"role": "assistant", "content": "w1 w2"}]
    },
    "seq2seq": lambda n: {"source": f"w{n} w1", "target": "w2 w3"},
}  # fmt: skip


def written(folder, kind: str):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(KINDS[kind](n)) + "\n" for n in NUMBERS))
    return path


def texts(batches, tokenizer) -> list[str]:
    """The documents of all batches as words."""
    return [
        " ".join(tokenizer.convert_ids_to_tokens(ids[mask.bool()]))
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("classification", "w7 w1 w2"),
        ("pair-classification", "w7 w1 w2 w3"),
        ("regression", "w7 w1 w2 w3"),
        ("multiple-choice", "w7 w1 Answer: w3 <end>"),
        ("prose", "w7 w1 w2 <end>"),
        ("completion", "w7 w1 w2 <end>"),
        ("chat", "<user> w7 <end> <assistant> w1 w2 <end>"),
        ("seq2seq", "w7 w1 w2 w3 <end>"),
    ],
)
def test_every_kind_of_task_is_text_for_a_decoder(tmp_path, chat_tokenizer, kind, expected):
    path = written(tmp_path, kind)
    prepared = text_batches(path, chat_tokenizer, "all", batch_size=4)
    assert prepared.documents == len(NUMBERS)
    assert len(prepared) == 8
    assert expected in texts(prepared, chat_tokenizer)
    assert all("labels" not in batch for batch in prepared)
    task = load_task(f"file:{path}")
    for split in ("train", "test"):
        of_split = text_batches(task, chat_tokenizer, split)
        assert of_split.documents == len(task.splits[split])  # one document a row, also of questions
        assert f"({split})" in of_split.origin
        assert "sha256" in of_split.origin
    assert set(texts(text_batches(task, chat_tokenizer, "test"), chat_tokenizer)) < set(texts(prepared, chat_tokenizer))


def test_an_encoder_decoder_reads_a_text_and_writes_one(tmp_path, encoder_tokenizer):
    seq2seq = next(iter(text_batches(written(tmp_path, "seq2seq"), encoder_tokenizer, encoder_decoder=True)))
    assert texts([seq2seq], encoder_tokenizer)[0].split()[2:] == ["w1", "[SEP]"]
    assert encoder_tokenizer.convert_ids_to_tokens(seq2seq["labels"][0]) == ["[CLS]", "w2", "w3", "[SEP]"]
    for kind in ("classification", "prose", "multiple-choice"):
        source = written(tmp_path, kind)
        for batch in text_batches(source, encoder_tokenizer, encoder_decoder=True, batch_size=30, split="all"):
            real = batch["attention_mask"].bool()
            if kind == "multiple-choice":
                assert (batch["labels"] >= 0).any(dim=1).all()
            else:
                assert torch.equal(batch["labels"], batch["input_ids"].masked_fill(~real, -100))


def test_paragraphs_of_a_text_file_are_documents(tmp_path, decoder_tokenizer):
    path = tmp_path / "prose.txt"
    path.write_text("w1 w2\nw3\n\n\nw4 w5\n \nw6 w7\n")
    prepared = text_batches(str(path), decoder_tokenizer)
    assert texts(prepared, decoder_tokenizer) == ["w1 w2 w3 <end>", "w4 w5 <end>", "w6 w7 <end>"]
    assert texts(prepared, decoder_tokenizer) == texts(prepared, decoder_tokenizer)  # it can be gone through again
    assert "3 documents of prose.txt (train)" in prepared.origin


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_file_is_measured_on_other_documents_than_it_is_captured_on(tmp_path, chat_tokenizer, kind):
    path = written(tmp_path, kind)
    if kind == "prose":
        path = tmp_path / "prose.txt"
        path.write_text("\n\n".join(KINDS[kind](n)["text"] for n in [*NUMBERS, 3, 7]))  # two documents come twice
    sides = {split: texts(text_batches(path, chat_tokenizer, split), chat_tokenizer) for split in ("train", "test")}
    everything = texts(text_batches(path, chat_tokenizer, "all"), chat_tokenizer)
    assert sorted([*sides["train"], *sides["test"]]) == sorted(everything)
    assert not set(sides["train"]) & set(sides["test"])
    assert 6 <= len(sides["test"]) <= 7
    assert texts(text_batches(path, chat_tokenizer), chat_tokenizer) == sides["train"]
    with pytest.raises(LamellaError, match="has no split 'banana'; it has train, test, all"):
        text_batches(path, chat_tokenizer, "banana")


def test_long_documents_are_cut_and_said(tmp_path, decoder_tokenizer):
    prepared = text_batches(written(tmp_path, "prose"), decoder_tokenizer, max_length=3)
    assert {len(text.split()) for text in texts(prepared, decoder_tokenizer)} == {3}
    assert any("cut" in note for note in prepared.notes)
    assert "at most 3 tokens" in prepared.origin


def test_a_limit_is_a_fixed_sample_in_order(tmp_path, decoder_tokenizer):
    path = written(tmp_path, "prose")
    everything = texts(text_batches(path, decoder_tokenizer), decoder_tokenizer)
    some = texts(text_batches(path, decoder_tokenizer, limit=10, batch_size=3), decoder_tokenizer)
    assert len(some) == 10
    assert some == [text for text in everything if text in some]


def test_what_is_not_there_is_told(tmp_path, decoder_tokenizer):
    task = load_task(f"file:{written(tmp_path, 'prose')}")
    with pytest.raises(LamellaError, match="no split 'dev'; it has train, validation, test"):
        text_batches(task, decoder_tokenizer, "dev")
    with pytest.raises(LamellaError, match=r"There is no file .*gone.txt"):
        text_batches(tmp_path / "gone.txt", decoder_tokenizer)
    with pytest.raises(LamellaError, match=r"There is no file .*gone.jsonl"):
        text_batches(str(tmp_path / "gone.jsonl"), decoder_tokenizer)
    with pytest.raises(
        LamellaError, match=r"There is no file 'gone'.* text_batches\(lamella.lab.data.load_task\('gone'"
    ):
        text_batches("gone", decoder_tokenizer)
    (tmp_path / "one.txt").write_text("w1 w2")
    with pytest.raises(LamellaError, match=r"The 1 documents of one.txt are too few for a split 'test'"):
        text_batches(tmp_path / "one.txt", decoder_tokenizer, "test")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(LamellaError, match=r"empty\.txt has no text"):
        text_batches(tmp_path / "empty.txt", decoder_tokenizer)
    with pytest.raises(LamellaError, match="batch_size=0"):
        text_batches(task, decoder_tokenizer, batch_size=0)
    with pytest.raises(LamellaError, match="limit=0"):
        text_batches(task, decoder_tokenizer, limit=0)
    with pytest.raises(LamellaError, match="no text in the texts given"):
        text_batches([], decoder_tokenizer)
    with pytest.raises(LamellaError, match="the texts given, row 2, column 'text': empty"):
        text_batches(["w1", " "], decoder_tokenizer)


def test_texts_and_rows_are_taken_as_they_come(decoder_tokenizer):
    given = text_batches((f"w{n} w1" for n in range(3)), decoder_tokenizer)
    assert texts(given, decoder_tokenizer) == ["w0 w1 <end>", "w1 w1 <end>", "w2 w1 <end>"]
    assert given.origin.startswith("3 documents of the texts given (all)")
    assert text_batches([f"w{n}" for n in range(10)], decoder_tokenizer, "test").documents == 2
    pairs = text_batches([KINDS["completion"](n) for n in range(4)], decoder_tokenizer, batch_size=3)
    assert sorted(texts(pairs, decoder_tokenizer)) == [f"w{n} w1 w2 <end>" for n in range(4)]


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers"])
def test_they_are_what_a_capture_reads(tmp_path, decoder_tokenizer, family):
    model = FAMILIES[family](dtype=torch.float64, **({} if family == "mixtral" else {"expert_capacity": 64}))
    source = written(tmp_path, "prose")
    prepared = []
    for size in (4, 7):
        given = text_batches(source, decoder_tokenizer, batch_size=size, encoder_decoder=family != "mixtral")
        settings = {"tokenizer": decoder_tokenizer, "origin": given.origin}
        prepared.append(capture(model, given, tmp_path / str(size), per_expert=9, **settings))
    assert_same_samples(*prepared)
    assert prepared[0].manifest.origin == given.origin


def test_a_model_that_writes_answers_with_the_token_of_the_class(tmp_path, encoder_tokenizer):
    rows = [{"text": f"w{at} w2", "label": "ab"[at % 2]} for at in range(6)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words, given = encoder_tokenizer, {"split": "all", "batch_size": 3}
    words.add_tokens(["<|a|>"])
    assert text_batches(path, words, encoder_decoder=True, **given).label_tokens == ()  # not one for every class
    words.add_tokens(["<|b|>"])
    batches = text_batches(path, words, encoder_decoder=True, **given)
    a, b = words.convert_tokens_to_ids(["<|a|>", "<|b|>"])
    assert batches.label_tokens == (a, b)
    first = [text.split()[1] for text in texts(batches, words)]
    labels = torch.cat([batch["labels"] for batch in batches])  # (6, 1)
    assert labels.tolist() == [[a] if word in ("w0", "w2", "w4") else [b] for word in first]
    assert text_batches(path, words, **given).label_tokens == ()
