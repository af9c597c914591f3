"""Compositions of a library with a shortlist for each sequence, and the router that all LoRAs share."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests import tiny
from tests.reference import retrieval
from tests.reference.shared_router import logits_of
from tests.tuners.mole.trained import NAMES, lora, loras

import lamella
from lamella import AdapterLibrary, LamellaError, MoleConfig, compose
from lamella.adapters.card import Card
from lamella.kernels import concatenate
from lamella.kernels.chosen import mix_chosen, read_own, read_own_of_all
from lamella.tuners.mole import MoleLinear
from lamella.tuners.mole.shared import SharedRouter

KINDS = ["bert", "llama", "t5"]
ENTRY = {"bert": "query", "llama": "q_proj", "t5": "q"}


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Folders of six LoRAs for each kind, of different ranks, scalings and targets."""
    made = {}

    def pool(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            for at in range(3):
                lora(kind, made[kind], at)
            for seed in range(3):
                base = tiny.build(kind, layers=2)
                torch.manual_seed(seed)
                config = LoraConfig(r=2, lora_alpha=5, target_modules=[ENTRY[kind]], init_lora_weights=False)
                get_peft_model(base, config).save_pretrained(made[kind] / f"more-{seed}")
        return AdapterLibrary(made[kind])

    return pool


def shake(model, seed=0):
    """Routers off zero, the same for the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lamella_mole_router" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def composed(kind, library, **settings):
    config = MoleConfig(router_scale=None, temperature=0.2, **settings)
    return shake(compose(tiny.build(kind, layers=2), library, config))


def logits(model, given):
    with torch.no_grad():
        return model(**given).logits


def test_each_lora_is_read_by_itself_as_the_plain_form_does():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ranks = [[2, 3, 1], [2, 0, 3]]
    widths = [5, 4]
    x, e = draw(6, 7), draw(9)
    pairs = [[(draw(r, 7), draw(out, r)) for r in each] for each, out in zip(ranks, widths, strict=True)]
    frozen = [concatenate([(A, B, 1.5) if len(A) else None for A, B in each], torch.float64) for each in pairs]
    products, lengths = read_own_of_all([x @ one.A.t() for one in frozen], frozen, e)
    expected = logits_of(x, pairs, 1.5, e)
    torch.testing.assert_close(products, expected[0])
    torch.testing.assert_close(lengths, expected[1])
    chosen = torch.tensor([[2, 0]] * 6)
    A = [torch.stack([torch.nn.functional.pad(one, (0, 0, 0, 3 - len(one))) for one, _ in each]) for each in pairs]
    B = [torch.stack([torch.nn.functional.pad(one * 1.5, (0, 3 - one.shape[1])) for _, one in each]) for each in pairs]
    h = [torch.einsum("si,snri->snr", x, one[chosen]) for one in A]
    few = read_own(h, [one[chosen] for one in B], e)
    for some, all_ in zip(few, (products, lengths), strict=True):
        torch.testing.assert_close(some, all_.gather(1, chosen))


def test_chosen_loras_are_mixed_with_their_gradients():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A, B, y = draw(2, 3, 2, 5), draw(2, 3, 2, 4), draw(2, 6, 4)
    for shape in [(2, 3), (2, 6, 3)]:
        x, weights = draw(2, 6, 5).requires_grad_(), draw(*shape).requires_grad_()
        by_token = weights[:, None] if weights.dim() == 2 else weights
        expected = y + torch.einsum("stn,snro,snri,sti->sto", by_token.expand(2, 6, 3), B, A, x)
        found = mix_chosen(y, x, weights, A, B)
        torch.testing.assert_close(found, expected)
        up = draw(2, 6, 4)
        for mine, theirs in zip(
            torch.autograd.grad(found, [x, weights], up), torch.autograd.grad(expected, [x, weights], up), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["matrix", "block", "network"])
def test_a_shortlist_of_all_is_the_ordinary_composition_of_the_same_router(kind, granularity, pools):
    library = pools(kind)
    whole = composed(kind, library, shortlist=len(library), granularity=granularity)
    ordinary = composed(kind, library, router="shared", granularity=granularity, balance="none")
    given = tiny.inputs(tiny.build(kind, layers=2))
    torch.testing.assert_close(logits(whole, given), logits(ordinary, given), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(whole, given), logits(tiny.build(kind, layers=2), given), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shortlist_of_all_trains_as_the_ordinary_composition(kind, pools):
    library, batch = pools(kind), tiny.batch(tiny.build(kind, layers=2))
    found = []
    for settings in ({"shortlist": len(library)}, {"router": "shared", "balance": "none"}):
        model = composed(kind, library, **settings).train()
        model(**batch).loss.backward()
        found.append(tiny.gradients(model, "lamella_mole_router"))
    assert any(bool(one.any()) for one in found[0].values())
    tiny.assert_same(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shortlist_of_one_is_peft_with_that_lora(kind, pools):
    library, model = pools(kind), tiny.build(kind, layers=2)
    batch = tiny.batch(model)
    prompts = {"labels": batch["labels"].index_fill(1, torch.tensor([0, 1, 2]), -100)} if kind == "llama" else {}
    given = {**batch, **prompts} if kind != "t5" else tiny.inputs(model)
    alone = composed(kind, library, shortlist=1)
    for name in library.names:
        part = library.only([name, *(other for other in library.names if other != name)][:2])
        peft = PeftModel.from_pretrained(tiny.build(kind, layers=2), library[name].reference.source).eval()
        model = composed(kind, part, shortlist=1)
        others = [other for other in part.names if other != name]
        with lamella.masked_experts(model, drop=others), lamella.prompt([3] * len(batch["labels"])):
            torch.testing.assert_close(logits(model, given), logits(peft, given), rtol=1e-4, atol=1e-5)
    assert alone.peft_config["default"].has_shared_router


@pytest.mark.parametrize("key", ["spectrum", "arrow"])
def test_the_shortlist_has_those_with_the_best_keys(key, pools):
    library, model = pools("bert"), composed("bert", pools("bert"), shortlist=2, retrieval=key)
    given = tiny.inputs(tiny.bert())
    seen = {}

    def keep(module, args, output):
        seen["x"] = args[0]

    base = tiny.bert()
    base.bert.encoder.layer[0].attention.self.query.register_forward_hook(keep)
    logits(base, given)
    mask = given["attention_mask"].bool()
    scores = torch.zeros(len(mask), len(library))
    for at, name in enumerate(library.names):
        modules = library.read(name).components["model"]
        for part in ("query", "key", "value"):
            one = modules.get(f"bert.encoder.layer.0.attention.self.{part}")
            for row in range(len(mask)) if one is not None else ():
                x = seen["x"][row][mask[row]].mean(dim=0)
                scaled = (one.scaling,) if key == "spectrum" else ()
                scores[row, at] += getattr(retrieval, key)(x, one.A, one.B, *scaled)
    with tiny.watch(model) as shown:
        logits(model, given)
    routing = shown[0][1]
    assert routing.indices.shape == (len(mask), 2)
    assert routing.indices.sort().values.tolist() == scores.topk(2).indices.sort().values.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["block", "network"])
def test_a_sequence_does_not_depend_on_batch_mates_padding_or_later_tokens(kind, granularity, pools):
    base = tiny.build(kind, layers=2)
    model = composed(kind, pools(kind), shortlist=2, granularity=granularity)
    given = tiny.inputs(base, rows=3, tokens=8, pad=3)
    together = logits(model, given)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in given.items()}
        real = int(one["attention_mask"].sum())
        cut = {n: v[:, :real] if n != "decoder_input_ids" else v for n, v in one.items()}
        alone = logits(model, cut)
        kept = together[row : row + 1] if alone.dim() == 2 or kind == "t5" else together[row : row + 1, :real]
        torch.testing.assert_close(alone, kept, rtol=1e-4, atol=1e-5)
    if kind != "bert":
        ids = "decoder_input_ids" if kind == "t5" else "input_ids"
        later = {**given, ids: given[ids].clone()}
        later[ids][:, -1] = 7
        later["attention_mask"] = torch.ones_like(given["attention_mask"])
        before = {**later, ids: given[ids].clone().masked_fill(given[ids] == 0, 5)}
        later[ids][:, :-1] = before[ids][:, :-1]
        torch.testing.assert_close(logits(model, later)[:, :-1], logits(model, before)[:, :-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_with_a_cache_equals_without(kind, beams, pools):
    model = composed(kind, pools(kind), shortlist=2)
    given = {k: v for k, v in tiny.inputs(tiny.build(kind, layers=2)).items() if k != "decoder_input_ids"}
    if kind == "llama":  # padding on the left
        given = {k: v.flip(1) for k, v in given.items()}
    said = [
        model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=beams, use_cache=cached)
        for cached in (True, False)
    ]
    assert said[0].tolist() == said[1].tolist()


def test_a_composition_is_saved_and_loads_with_loras_added_or_left_out(pools, tmp_path):
    library, given = pools("llama"), tiny.inputs(tiny.llama())
    model = composed("llama", library.only(library.names[:4]), shortlist=2)
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (written["shortlist"], written["retrieval"]) == (2, "spectrum")
    assert list(written["adapters"]) == list(library.names[:4])
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved").eval()
    assert torch.equal(logits(loaded, given), logits(model, given))

    config = MoleConfig.from_pretrained(str(tmp_path / "saved"))
    config.adapters = {name: library[name].reference.to_dict() for name in library.names}
    more = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved", config=config).eval()
    expected = composed("llama", library, shortlist=2)
    for name, parameter in more.named_parameters():
        if "lamella_mole_router" in name:
            assert torch.equal(parameter, dict(model.named_parameters())[name])
    assert torch.equal(logits(more, given), logits(expected, given))
    with lamella.masked_experts(more, drop=library.names[4:]):
        torch.testing.assert_close(logits(more, given), logits(model, given))


def test_centroids_retrieve_by_the_card(tmp_path):
    for at in range(3):
        path = lora("bert", tmp_path, at)
        middles = {}
        for layer in range(2):
            for part in ("query", "value"):
                module = f"bert.encoder.layer.{layer}.attention.self.{part}"
                if any(module in name for name in _tensors(path)):
                    middles[module] = torch.eye(tiny.HIDDEN)[at : at + 1]
        Card("t", centroids=middles).save(path)
    library = AdapterLibrary(tmp_path)
    model = composed("bert", library, shortlist=1, retrieval="centroids")
    given = tiny.inputs(tiny.bert())
    with tiny.watch(model) as shown:
        logits(model, given)
    assert shown[0][1].indices.shape == (3, 1)
    (tmp_path / "bert-news" / "lamella_card.json").unlink()
    with pytest.raises(LamellaError, match="1 of 3 have none to read, first 'bert-news'"):
        compose(tiny.bert(), AdapterLibrary(tmp_path), MoleConfig(shortlist=1, retrieval="centroids"))


@pytest.fixture(scope="module")
def texted(tmp_path_factory):
    """LoRAs with cards: each was trained on rows of one word."""

    def make(kind):
        folder = tmp_path_factory.mktemp(f"texted-{kind}")
        embed = tiny.build(kind, layers=2).get_input_embeddings().weight.detach()
        for at in range(3):
            Card("t", texts=embed[WORDS[at]][None]).save(lora(kind, folder, at))
        return AdapterLibrary(folder)

    return make


WORDS = (5, 9, 11)


def of_words(kind, rows=((5, 5, 5, 11), (9, 9, 5, 9), (11, 11, 9, 11))):
    ids = torch.tensor([[*row, 0] for row in rows])
    return {"input_ids": ids, "attention_mask": ids.ne(0).long()}


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("granularity", ["block", "network"])
def test_text_retrieves_by_the_words_of_the_prompt_in_every_block(kind, granularity, texted):
    library = texted(kind)
    model = composed(kind, library, shortlist=1, retrieval="text", granularity=granularity)
    names = [name.rpartition("-")[2] for name in library.names]
    expected = [names.index(NAMES[at]) for at in range(3)]
    given = of_words(kind)
    with tiny.watch(model) as shown, lamella.prompt([4, 4, 4]):
        logits(model, given)
    groups = [one for one in shown if "pooler" not in one[0].module]
    assert groups
    for _, routing, *_ in groups:
        assert routing.indices.flatten().tolist() == expected
    if kind == "llama":  # what comes after the prompt says nothing
        given["input_ids"][:, 1:] = 9
        with tiny.watch(model) as shown, lamella.prompt([1, 1, 1]):
            logits(model, given)
        assert all(routing.indices.flatten().tolist() == expected for _, routing, *_ in shown)
        embedded = model.get_input_embeddings()(given["input_ids"])
        with lamella.prompt([1, 1, 1]):
            said = model(inputs_embeds=embedded, attention_mask=given["attention_mask"]).logits
            torch.testing.assert_close(said, logits(model, given))


def test_text_is_decided_once_and_goes_with_the_cache_and_into_checkpointed_blocks(texted):
    library = texted("llama")
    model = composed("llama", library, shortlist=1, retrieval="text")
    given = of_words("llama", rows=((5, 5, 5, 5), (9, 9, 9, 9)))
    given = {name: value[:, :4] for name, value in given.items()}
    said = [model.generate(**given, max_new_tokens=5, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert said[0].tolist() == said[1].tolist()
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied, given), logits(model, given))
    gradients = []
    labels = given["input_ids"].clone()
    labels[:, :2] = -100
    model = composed("llama", library, shortlist=2, retrieval="text").train()
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**given, labels=labels).loss.backward()
        gradients.append(tiny.gradients(model, "lamella_mole_router"))
    tiny.assert_same(*gradients)


def test_what_has_no_text_to_retrieve_by_is_refused(texted, pools, tmp_path):
    config = MoleConfig(shortlist=1, retrieval="text")
    with pytest.raises(LamellaError, match="reads a LoRA's card, and 6 of 6 have none to read"):
        compose(tiny.bert(), pools("bert"), config)
    with pytest.raises(LamellaError, match="or is an encoder-decoder"):
        compose(tiny.build("t5", layers=2), pools("t5"), config)
    for at in range(2):
        Card("t", texts=torch.ones(1, 3)).save(lora("bert", tmp_path, at))
    with pytest.raises(LamellaError, match="text embeddings of 3 numbers, and the model's have 16"):
        compose(tiny.bert(), AdapterLibrary(tmp_path), config)
    model = compose(tiny.bert(), texted("bert"), config)
    with pytest.raises(LamellaError, match="nothing says which text its tokens are"):
        model.get_base_model().bert.encoder.layer[0].attention.self.query(torch.ones(1, 2, tiny.HIDDEN))


def _tensors(path):
    from safetensors import safe_open

    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        return list(file.keys())


def test_the_shared_router_has_no_k_in_its_size(folder):
    few = compose(tiny.bert(), loras("bert", folder, 2), MoleConfig(router="shared"))
    many = compose(tiny.bert(), loras("bert", folder, 3), MoleConfig(router="shared"))
    sizes = [
        {name: p.shape for name, p in model.named_parameters() if "router" in name and "query" in name}
        for model in (few, many)
    ]
    assert sizes[0] == sizes[1]
    assert any(isinstance(module, SharedRouter) for module in many.modules())


def test_a_copied_model_decides_alike_and_fixed_weights_use_what_they_name(pools):
    library, given = pools("bert"), tiny.inputs(tiny.bert())
    model = composed("bert", library, shortlist=2)
    assert torch.equal(logits(copy.deepcopy(model), given), logits(model, given))
    ordinary = composed("bert", library, router="shared")
    weights = {name: 0.1 * (1 + at) for at, name in enumerate(library.names)}
    for given_weights in (weights, [weights, {library.names[0]: 1.0}, {}]):
        found = []
        for one in (model, ordinary):
            with lamella.fixed_weights(one, given_weights):
                found.append(logits(one, given))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_what_does_not_go_with_a_shortlist_is_refused(pools):
    library = pools("bert")
    with pytest.raises(LamellaError, match="shortlist=9 is more than the 6 LoRAs"):
        compose(tiny.bert(), library, MoleConfig(shortlist=9))
    for wrong, words in [
        ({"router": "published"}, "Use router='shared'"),
        ({"router_input": "token"}, "router_input='token' does not go"),
        ({"balance": "switch"}, "balance='switch' does not go"),
        ({"embed_adapters": True}, "embed_adapters=True does not go"),
        ({"form": "block-delta"}, "needs router='published'"),
        ({"retrieval": "magic"}, "'magic' is not one of arrow, centroids, spectrum, text"),
    ]:
        with pytest.raises(LamellaError, match=words):
            MoleConfig(shortlist=2, **wrong)
    model = compose(tiny.bert(), library, MoleConfig(shortlist=2))
    with pytest.raises(LamellaError, match="has a shortlist for each sequence"):
        lamella.collapse(model, [tiny.inputs(tiny.bert())])
    assert "lora-adds-nothing" not in {
        one.code for one in lamella.doctor(model, batches=[tiny.batch(tiny.bert())]).findings
    }
    assert all(
        isinstance(name, str)
        for layer in model.modules()
        if isinstance(layer, MoleLinear)
        for name in layer.adding("default")
    )
