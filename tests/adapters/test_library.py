"""A folder of LoRAs and its index: what is in it, what is left out and why, and what is read again."""

import json
import re
import resource
import shutil
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import tiny

import lamella
from lamella import AdapterLibrary, LamellaError, MoleConfig, compose
from lamella.adapters import indexing, library, read_lora
from lamella.adapters.card import CARD, Card
from lamella.adapters.directions import directions
from lamella.adapters.indexing import INDEX


def save(folder, seed=0, model=tiny.bert, **settings):
    base = model()
    torch.manual_seed(seed)  # building seeds too
    config = {"r": 2, "target_modules": ["query", "value"], "init_lora_weights": False, **settings}
    get_peft_model(base, LoraConfig(**config)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("code", "law", "news")):
        save(tmp_path / "pool" / name, seed)
    return tmp_path / "pool"


def change(folder, edit):
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_an_entry_says_what_a_lora_is(folder):
    entry = AdapterLibrary(folder)["law"]
    source = read_lora(folder / "law")
    assert entry.reference == source.reference
    assert (entry.ranks, entry.targets, entry.dtype, entry.format) == ((2,), ("query", "value"), "float32", "PEFT")
    assert entry.size == (folder / "law" / "adapter_model.safetensors").stat().st_size
    assert [shape.scaling for _, shape in entry.layout] == [4.0] * 4


def test_the_index_holds_each_loras_directions(folder):
    save(folder / "art", 7, r=3)  # another layout
    for opened in (AdapterLibrary(folder), AdapterLibrary(folder)):  # read, and from the index
        assert len(opened.layouts) == 2
        for layout, names in opened.layouts.items():
            for module, _ in layout:
                expected = torch.stack([directions(opened.read(n).components["model"][module]) for n in names])
                torch.testing.assert_close(opened.held("directions", layout, module), expected)


def test_a_second_look_reads_only_what_changed(folder, monkeypatch):
    AdapterLibrary(folder)
    read = []
    monkeypatch.setattr(library, "examine", lambda name, place: read.append(name) or indexing.examine(name, place))
    AdapterLibrary(folder)
    assert read == []
    save(folder / "art", 8)
    change(folder / "news", lambda tensors: tensors.update({k: 2 * v for k, v in tensors.items()}))
    shutil.rmtree(folder / "code")
    opened = AdapterLibrary(folder)
    assert read == ["art", "news"]
    assert opened.names == ("art", "law", "news")
    fresh = AdapterLibrary(folder, index=folder.parent / "fresh.safetensors")
    for layout in opened.layouts:
        for module, _ in layout:
            assert torch.equal(opened.held("directions", layout, module), fresh.held("directions", layout, module))


def test_a_folder_may_move_with_its_index(folder, tmp_path, monkeypatch):
    AdapterLibrary(folder)
    folder.rename(tmp_path / "moved")
    monkeypatch.setattr(library, "examine", lambda *_: pytest.fail("read again"))
    assert AdapterLibrary(tmp_path / "moved").read("law").reference.source == str(tmp_path / "moved" / "law")


def test_what_cannot_be_used_is_left_out_by_name_and_the_rest_is_there(folder):
    def blow_up(tensors):
        next(iter(tensors.values())).fill_(torch.inf)

    save(folder / "infinite")
    change(folder / "infinite", blow_up)
    save(folder / "zero", init_lora_weights=True)
    save(folder / "dora", use_dora=True)
    (folder / "law.safetensors").write_bytes(b"nothing")  # and of a name that is taken
    (folder / "old.bin").write_bytes(b"pickle")
    (folder / "notes").mkdir()
    (folder / "README.md").write_text("no LoRA, and not meant to be one")
    opened = AdapterLibrary(folder)
    assert opened.names == ("code", "law", "news")
    said = {name: reason for name, reason in opened.left_out.items() if not name.startswith("law")}
    assert said.keys() == {"infinite", "zero", "dora", "old", "notes"}
    for name, words in {"infinite": "not finite", "zero": "adds nothing", "dora": "DoRA", "old": "pickle"}.items():
        assert words in said[name]
    assert any("Two LoRAs are called 'law'" in reason for reason in opened.left_out.values())
    with pytest.raises(LamellaError, match=r"no LoRA 'zero' .*adds nothing"):
        opened["zero"]


def test_nothing_that_can_be_used_is_an_error(tmp_path):
    with pytest.raises(LamellaError, match="is no folder"):
        AdapterLibrary(tmp_path / "nowhere")
    with pytest.raises(LamellaError, match="holds no LoRA that can be used"):
        AdapterLibrary(tmp_path)
    with pytest.raises(LamellaError, match="here a int is given"):
        AdapterLibrary(3)


def test_a_lora_that_changed_after_it_was_indexed_is_refused(folder):
    opened = AdapterLibrary(folder)
    change(folder / "law", lambda tensors: tensors.update({k: 2 * v for k, v in tensors.items()}))
    with pytest.raises(LamellaError, match=r"'law' .*has changed since it was indexed"):
        opened.read("law")
    opened.read("news")


def test_an_index_of_another_version_or_a_damaged_one_is_made_anew(folder):
    AdapterLibrary(folder)
    with safe_open(folder / INDEX, "pt") as file:
        written, tensors = json.loads(file.metadata()["library"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, folder / INDEX, {"library": json.dumps({**written, "version": 7})})
    with pytest.warns(UserWarning, match="made anew: it is of version 7"):
        assert len(AdapterLibrary(folder)) == 3
    (folder / INDEX).write_bytes((folder / INDEX).read_bytes()[:100])
    with pytest.warns(UserWarning, match="made anew: it is damaged"):
        assert len(AdapterLibrary(folder)) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdapterLibrary(folder)


def test_a_full_disk_leaves_no_half_written_index(folder):
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        with pytest.warns(UserWarning, match="could not be written .*in memory alone"):
            opened = AdapterLibrary(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert len(opened) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["code", "law", "news"]
    opened.read("law")


@pytest.mark.parametrize("shortlist", [None, 2])
def test_a_folder_of_unlike_loras_is_composed_of_those_that_are_for_the_base(folder, shortlist):
    save(folder / "art", 4, r=3, lora_alpha=5)
    save(folder / "few", 5, target_modules=["intermediate.dense"])
    save(folder / "other", model=tiny.llama, target_modules=["q_proj"])
    for name, dtype in (("law", torch.bfloat16), ("news", torch.float16), ("art", torch.float64)):
        change(folder / name, lambda tensors, dtype=dtype: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
    opened = AdapterLibrary(folder)
    said = {one.name: one.dtype for one in opened}
    assert said == {
        "art": "float64", "code": "float32", "few": "float32", "law": "bfloat16", "news": "float16", "other": "float32"
    }  # fmt: skip
    with pytest.warns(UserWarning, match="1 of the library's 6 LoRAs are left out, first 'other'"):
        model = compose(tiny.bert(), opened, MoleConfig(shortlist=shortlist)).eval()
    assert list(model.peft_config["default"].adapters) == ["art", "code", "few", "law", "news"]
    batch = tiny.inputs(tiny.bert())
    for name in ("art", "few", "law"):
        with torch.no_grad(), lamella.fixed_weights(model, {name: 1.0}):
            alone = PeftModel.from_pretrained(tiny.bert(), folder / name).eval()
            torch.testing.assert_close(model(**batch).logits, alone(**batch).logits, rtol=1e-4, atol=1e-5)


def test_a_lora_that_changed_under_a_composition_is_named_where_it_is_chosen(folder):
    model = compose(tiny.bert(), AdapterLibrary(folder), MoleConfig(shortlist=3)).eval()
    change(folder / "law", lambda tensors: tensors.update({k: 2 * v for k, v in tensors.items()}))
    with pytest.raises(LamellaError, match=r"'law' .*has changed since it was indexed"):
        model(**tiny.inputs(tiny.bert()))
    shutil.rmtree(folder / "law")
    with pytest.raises(LamellaError, match=r"'law' .*has changed since it was indexed"):
        model(**tiny.inputs(tiny.bert()))
    with torch.no_grad(), lamella.masked_experts(model, drop=["law"]):
        assert model(**tiny.inputs(tiny.bert())).logits.isfinite().all()  # the rest is usable


def test_places_by_name_and_in_a_list(folder):
    by_name = AdapterLibrary({"mine": folder / "law", "other": folder / "news"})
    assert by_name.names == ("mine", "other")
    assert by_name.path is None
    assert not (folder / INDEX).exists()
    listed = AdapterLibrary([folder / "law", folder / "news", "nobody/nothing"])
    assert listed.names == ("law", "news")
    assert "nobody/nothing" in listed.left_out["nothing"]


QUERY = "bert.encoder.layer.0.attention.self.query"


def card(base=None, module=QUERY, width=tiny.HIDDEN):
    texts = torch.full((1, tiny.HIDDEN), 3.0)
    return Card("law", ("yes", "no"), base, 2, {module: torch.tensor([[1.0] * width, [2.0] * width])}, texts)


def test_a_card_brings_task_labels_and_what_retrieval_reads(folder):
    card().save(folder / "law")
    save(folder / "art", 5, target_modules=["query"])  # another layout, none of which has a card
    opened = AdapterLibrary(folder)
    assert (opened["law"].task, opened["law"].labels) == ("law", ("yes", "no"))
    assert opened.cards_left_out == {}
    for library_ in (opened, AdapterLibrary(folder)):  # read, and from the index
        layout = opened["law"].layout
        held = library_.held("centroids", layout, QUERY)
        at = library_.layouts[layout].index("law")
        assert torch.equal(held[at], card().centroids[QUERY])
        assert not held[:at].any()
        assert torch.equal(library_.held("texts", layout, "")[at, :1], card().texts)
        assert not library_.held("texts", layout, "")[:at].any()
        assert not library_.held("texts", opened["art"].layout, "").any()


def _without(key):
    def edit(path):
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps(values))

    return edit


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_text('{"version": 1'), "JSON"),
        (lambda path: path.write_text("[]"), "holds list"),
        (_without("inputs"), "is damaged"),
        (lambda path: path.write_text(path.read_text().replace("1.0", "NaN")), "is damaged"),
        (lambda path: path.write_text(path.read_text().replace('"version": 1', '"version": 9')), "of version 9"),
        (_without("version"), "of version None"),
        (lambda path: card(base="other/model").save(path.parent), "of the base other/model, and the LoRA of None"),
        (lambda path: card(width=7).save(path.parent), "of 7 numbers for .*query, which has 16 inputs"),
    ],
)
def test_a_card_that_cannot_be_used_is_named_and_its_lora_is_there_by_its_weights(folder, spoil, words):
    card().save(folder / "law")
    spoil(folder / "law" / CARD)
    opened = AdapterLibrary(folder)
    assert opened.names == ("code", "law", "news")
    assert opened["law"].task == ""
    assert list(opened.cards_left_out) == ["law"]
    assert re.search(words, opened.cards_left_out["law"])
    assert str(folder / "law" / CARD) in opened.cards_left_out["law"]
    assert AdapterLibrary(folder).cards_left_out == opened.cards_left_out  # from the index
    with pytest.raises(LamellaError, match=r"3 of 3 have none to read, first 'code'"):
        compose(tiny.bert(), opened, MoleConfig(shortlist=1, retrieval="centroids"))
    compose(tiny.bert(), opened, MoleConfig(shortlist=1, retrieval="spectrum"))
    card().save(folder / "law")
    assert AdapterLibrary(folder).cards_left_out == {}


def test_a_card_is_none_of_the_single_files_beside_it(folder, tmp_path):
    shutil.copy(folder / "law" / "adapter_model.safetensors", folder / "alone.safetensors")
    card().save(folder)
    opened = AdapterLibrary(folder)
    assert opened["law"].task == ""


def test_a_part_of_a_library(folder):
    part = AdapterLibrary(folder).only(["news", "code"])
    assert part.names == ("news", "code")
    ((layout, names),) = part.layouts.items()
    expected = torch.stack([directions(part.read(name).components["model"][layout[0][0]]) for name in names])
    assert torch.equal(part.held("directions", layout, layout[0][0]), expected)
    with pytest.raises(LamellaError, match=r"no LoRA 'law'\. It has news, code"):
        part["law"]
    with pytest.raises(LamellaError, match="No LoRA is left"):
        part.only([])


def test_a_library_is_composed_as_its_loras_are_and_those_of_another_base_are_left_out(folder):
    batch = tiny.inputs(tiny.bert())
    by_place = compose(tiny.bert(), {name: folder / name for name in ("code", "law", "news")})
    save(folder / "art", model=tiny.llama, target_modules=["q_proj"])
    save(folder / "wide", model=tiny.llama, target_modules=["v_proj"])
    with pytest.warns(UserWarning, match="2 of the library's 5 LoRAs are left out, first 'art'"):
        composed = compose(tiny.bert(), AdapterLibrary(folder))
    assert torch.equal(composed(**batch).logits, by_place(**batch).logits)
    with pytest.raises(LamellaError, match="None of the library's 2 LoRAs is for this model"):
        compose(tiny.bert(), AdapterLibrary(folder).only(["art", "wide"]))
