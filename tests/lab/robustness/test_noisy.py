import itertools
import json

import numpy as np
import pytest
import torch
from tests import tiny
from tests.lab.tiny_runs import MOLA, MOLEX, tiny_settings
from torch import nn

from lamella.errors import LamellaError
from lamella.lab.robustness.noisy import NOISES, _numbered, check_strengths, noise_kind, noisy_scores, task_losses
from lamella.lab.runs.run import train
from lamella.lab.runs.trained import load_trained
from lamella.lab.scoring import score

LOSS = {"nll", "squared_error"}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Questions with three options."""
    folder = tmp_path_factory.mktemp("tasks") / "options"
    folder.mkdir()
    words = ["who", "where", "she", "they", "it", "we", "now", "then", "here"]
    rows = [
        {"question": f"who is {a} {b}", "choices": ["she now", "we are here", "it"], "label": at % 3}
        for at, (a, b) in enumerate((a, b) for a in words for b in words if a < b)
    ]
    for name, part in (("train", rows[:16]), ("validation", rows[16:24]), ("test", rows[24:32])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return f"file:{folder}"


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "numbers"
    folder.mkdir()
    words = ["she", "they", "it", "we", "now", "then", "here", "going"]
    rows = [{"text1": f"who is {a} {b}", "label": len(a) / len(b)} for a in words for b in words if a != b]
    for name, part in (("train", rows[:32]), ("validation", rows[32:40]), ("test", rows[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return f"file:{folder}"


@pytest.fixture(scope="module")
def trained(finished_run, bert, llama, questions, options, numbers, tmp_path_factory):
    """A trained model by model and kind of task; each is trained once."""
    models = {"bert": bert, "llama": llama}
    tasks = {"questions": questions, "options": options, "numbers": numbers}
    made = {}

    def run(model, task, method):
        if (model, task) in (("bert", "questions"), ("llama", "prose")):
            return finished_run(method, decoder=model == "llama").folder.path
        settings = tiny_settings(models[model], tasks[task], method, max_steps=3)
        return train(settings, tmp_path_factory.mktemp("noisy") / "run").folder.path

    def make(*case):
        name = json.dumps(case)
        if name not in made:
            made[name] = load_trained(run(*case))
        return made[name]

    return make


CASES = [
    ("bert", "questions", MOLA),
    ("bert", "questions", MOLEX),
    ("bert", "questions", "lora"),
    ("bert", "questions", "prompt-tuning"),
    ("bert", "questions", "full"),
    ("bert", "options", "lora"),
    ("bert", "numbers", "lora"),
    ("llama", "questions", "lora"),
    ("llama", "prose", MOLA),
    ("llama", "prose", MOLEX | {"target_modules": ["q_proj"]}),
    ("llama", "options", "lora"),
]


# one for each form of answers
FORMS = [CASES[0], CASES[5], CASES[6], CASES[8], CASES[10]]


def scores(one, kind, strength, seed=0, batch_size=None):
    rows, encoded = one.rows("test")
    if batch_size is not None:
        changed = one.place.settings.model_copy(update={"batch_size": batch_size, "eval_batch_size": batch_size})
        one = type(one)(type(one.place)(one.place.folder, changed), one.model, one.tokenizer, one.task)
    return noisy_scores(one, rows, encoded.collator, NOISES[kind], strength, seed)


def plain(one):
    rows, encoded = one.rows("test")
    return score(one.model, one.task, rows, encoded.collator, one.place.reading.eval_batch_size)


def losses(found):
    """The loss of each example, of which accuracy knows too little."""
    name = next((name for name in found.columns if name in LOSS), "prediction")
    return found.columns[name]


@pytest.mark.parametrize(("case", "kind"), zip(CASES, itertools.cycle(NOISES)))
def test_no_noise_is_the_plain_score_exactly_and_noise_is_not(trained, case, kind):
    one = trained(*case)
    clean = plain(one)
    none = scores(one, kind, 0.0, batch_size=one.place.reading.eval_batch_size)
    for name, column in clean.columns.items():
        np.testing.assert_array_equal(none.columns[name], column)
    noisy = scores(one, kind, 0.8)
    if case[1] != "options":  # whose columns are too coarse to move at once
        assert not np.array_equal(losses(noisy), losses(clean))
    assert all(not module._forward_hooks for module in one.model.modules() if isinstance(module, nn.Embedding))


@pytest.mark.parametrize(("case", "kind"), zip([*FORMS, CASES[1]], itertools.cycle(reversed(NOISES))))
def test_batches_change_nothing(trained, case, kind):
    one = trained(*case)
    together, alone = (scores(one, kind, 0.3, batch_size=size) for size in (16, 5))
    for name in together.columns:
        np.testing.assert_allclose(together.columns[name], alone.columns[name], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("model", "task", "method"), FORMS)
def test_an_attack_raises_the_loss_of_every_row(trained, model, task, method):
    one = trained(model, task, method)
    clean, attacked = plain(one), scores(one, "pgd", 0.5)
    if task == "options":
        assert attacked.metrics["accuracy"] < clean.metrics["accuracy"] or clean.metrics["accuracy"] == 0.0
    else:
        assert (losses(attacked) >= losses(clean) - 1e-6).all()
        assert losses(attacked).mean() > losses(clean).mean()
        assert losses(attacked).mean() > losses(scores(one, "embedding", 0.5)).mean()


def test_the_same_seed_gives_the_same_scores_and_another_one_others(trained):
    one = trained("bert", "questions", "lora")
    for kind in NOISES:
        first, again, other = (losses(scores(one, kind, 0.5, seed)) for seed in (3, 3, 4))
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_two_methods_read_the_same_replaced_tokens(trained):
    seen = {}
    for method in ("lora", "full"):
        one = trained("bert", "questions", method)
        read = seen[method] = []
        handle = one.model.get_input_embeddings().register_forward_pre_hook(
            lambda module, args, read=read: read.append(args[0])
        )
        scores(one, "tokens", 0.5)
        handle.remove()
    assert len(seen["lora"]) == len(seen["full"]) > 0
    for one, two in zip(seen["lora"], seen["full"], strict=True):
        assert torch.equal(one, two)
    # [UNK] and the like are never drawn; the special tokens of the text stand where they stood
    ids = torch.cat([batch.flatten() for batch in seen["lora"]])
    assert set(ids.tolist()) <= {0, 2, 3, *range(5, 17)}
    assert all((batch[:, 0] == 2).all() for batch in seen["lora"])


def test_labels_of_a_language_model_stay_those_of_the_clean_text(trained):
    one = trained("llama", "prose", MOLA)
    np.testing.assert_array_equal(scores(one, "tokens", 1.0).columns["tokens"], plain(one).columns["tokens"])
    assert losses(scores(one, "tokens", 1.0)).mean() > losses(plain(one)).mean()


def test_an_attack_on_options_moves_right_and_wrong_ones_apart(trained):
    """Raising the loss of wrong options would help the model."""
    one = trained("llama", "options", "lora")
    rows, encoded = one.rows("test")
    batch = _numbered(encoded.collator)([{**rows[at], "noise_row": at} for at in range(len(rows))])
    signs = dict(zip(batch["noise_rows"].tolist(), batch["noise_signs"].tolist(), strict=True))
    assert signs == {at: 1.0 if row["choice"] == row["answer"] else -1.0 for at, row in enumerate(rows)}


def test_every_option_of_a_question_has_noise_of_its_own(trained, monkeypatch):
    seen = []

    def keep(ids, touched, rows, *rest):
        seen.extend(rows)
        return ids

    monkeypatch.setattr("lamella.lab.robustness.noisy.replaced_tokens", keep)
    one = trained("bert", "options", "lora")
    scores(one, "tokens", 0.5, batch_size=3)
    assert sorted(seen) == list(range(3 * len(one.task.splits["test"])))


def test_task_losses_are_those_of_the_scores(trained):
    for model, task, method in CASES:
        if task == "options":
            continue
        one = trained(model, task, method)
        rows, encoded = one.rows("test")
        batch = encoded.collator([rows[at] for at in range(len(rows))])
        with torch.no_grad():
            logits = one.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        found = task_losses(one.task, one.model, logits, batch["labels"])
        np.testing.assert_allclose(found.numpy(), losses(plain(one)), rtol=1e-3, atol=1e-4)


def test_encoder_decoder_losses_are_not_shifted():
    model = tiny.t5()
    batch = tiny.batch(model)
    task = type("Task", (), {"kind": "seq2seq"})
    with torch.no_grad():
        output = model(**batch)
    found = task_losses(task, model, output.logits, batch["labels"])
    assert (found.sum() / (batch["labels"] != -100).sum()).item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_an_unknown_noise_and_a_wrong_strength_are_refused():
    with pytest.raises(LamellaError, match=r"no noise 'gauss'\. Choose one of embedding, tokens, pgd"):
        noise_kind("gauss")
    for kind, strengths in (("embedding", [-0.1]), ("tokens", [1.2]), ("pgd", [float("nan")]), ("pgd", [float("inf")])):
        with pytest.raises(LamellaError, match=f"not a strength of the noise '{kind}'; it is"):
            check_strengths(NOISES[kind], strengths)
    for strengths in ([], [0.1, 0.1]):
        with pytest.raises(LamellaError, match="Give at least one, and each only once"):
            check_strengths(NOISES["embedding"], strengths)
    for kind in NOISES.values():
        check_strengths(kind, kind.strengths)
