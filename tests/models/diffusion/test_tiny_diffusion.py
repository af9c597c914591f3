"""The recipe, in miniature: a folder that diffusers opens, with rates by the judge."""

import json
import shutil
import signal

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel, CLIPTokenizer

from lamella.errors import LamellaError
from lamella.files import read_tensors
from models.command import build, main
from models.diffusion.rates import drawn, rates
from models.diffusion.training import seeded
from models.diffusion.world import EVERYTHING, KINDS, NOTHING
from models.settings import DrawingSettings, Pace, TinyClipSettings
from models.tiny_clip import colours_exchanged, cosines, share_chosen, untrained

SMALL = [
    *("text.layers=1", "text.hidden=16", "text.heads=2", "text.pace.steps=2", "text.pace.batch_size=4"),
    *(
        "autoencoder.widths=[4,4,8]",
        "autoencoder.groups=2",
        "autoencoder.pace.steps=2",
        "autoencoder.pace.batch_size=4",
    ),
    *("denoiser.widths=[8,8]", "denoiser.groups=4", "denoiser.heads=2"),
    *("denoiser.pace.steps=3", "denoiser.pace.batch_size=4", "drawing.pictures=4", "drawing.steps=2"),
]


CLIP = ["layers=1", "hidden=8", "heads=2", "pace.steps=2", "pace.batch_size=4", "pictures=6"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "pipe"
    return folder, build("tiny-diffusion", folder, SMALL)


def test_diffusers_opens_it_and_its_rates_are_those_of_the_kept_weights(tiny):
    folder, log = tiny
    pipe = StableDiffusionPipeline.from_pretrained(folder)

    assert json.loads((folder / "log.json").read_text()) == log
    assert json.loads((folder / "rates.json").read_text()) == log["rates"]
    assert rates(pipe, DrawingSettings(pictures=4, steps=2, guidance=3.0), 0) == log["rates"]
    assert {kinds: list(table) for kinds, table in log["rates"].items()} == {
        kinds: ["1", "2", "3"] for kinds in ("trained", "held_out")
    }
    assert len(log["failed"]) == 3
    assert "the recipe promises 97.0%" in log["failed"][0]
    assert pipe("a red circle top left on black", num_inference_steps=2).images[0].size == (32, 32)


def test_it_is_kept_in_half_precision_and_opens_in_the_precision_that_is_asked_for(tiny):
    parts = ("unet", "vae", "text_encoder")
    for part in parts:
        (file,) = (tiny[0] / part).glob("*.safetensors")
        assert {tensor.dtype for tensor in read_tensors(file).values()} == {torch.float16}
    for asked, dtype in (({}, torch.float32), ({"torch_dtype": torch.float16}, torch.float16)):
        pipe = StableDiffusionPipeline.from_pretrained(tiny[0], **asked)
        assert {getattr(pipe, part).dtype for part in parts} == {dtype}


def test_a_picture_depends_on_its_caption_and_its_place_in_the_row_alone(tiny):
    pipe = StableDiffusionPipeline.from_pretrained(tiny[0])
    settings = DrawingSettings(pictures=1, steps=2, guidance=3.0)
    said = ["a red bar top left on black", "a blue ring top left on white", "a red bar top left on black"]
    first, second, third = drawn(pipe, said, settings, 0)

    assert torch.allclose(drawn(pipe, said[:1], settings, 0)[0], first, atol=1e-5)
    assert not torch.allclose(first, third)
    assert not torch.allclose(drawn(pipe, ["", said[0]], settings, 0)[1], second)


def test_it_goes_on_from_what_is_kept_with_more_steps_of_the_denoiser_and_with_no_other_change(tiny, tmp_path):
    folder, log = tiny
    shutil.copytree(folder.with_name("pipe-stages"), tmp_path / "pipe-stages")
    again = build("tiny-diffusion", tmp_path / "pipe", [*SMALL, "denoiser.pace.steps=5"])

    assert again["curves"]["text"] == log["curves"]["text"]
    assert again["curves"]["denoiser"][0]["step"] == 5
    with pytest.raises(LamellaError, match="keeps a training with other settings"):
        build("tiny-diffusion", tmp_path / "pipe", [*SMALL, "seed=1"], force=True)


def test_the_command_shows_rates_and_says_where_an_interrupted_one_goes_on(tiny, tmp_path, capsys, monkeypatch):
    shutil.copytree(tiny[0].with_name("pipe-stages"), tmp_path / "pipe-stages")
    words = ["tiny-diffusion", *SMALL, "-o", str(tmp_path / "pipe")]
    assert main(words) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "pictures that are right, by the number of objects, trained kinds: 1: " in said

    monkeypatch.setattr("models.command.build", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit):
        main(words)
    said = " ".join(capsys.readouterr().err.split())
    assert f"the same command goes on from {tmp_path / 'pipe-stages'}." in said


# --- tiny-clip


def test_the_clip_model_has_the_text_encoder_of_the_pipeline_and_lamella_embeds_with_it(tiny, tmp_path):
    log = build("tiny-clip", tmp_path / "clip", [f"pipeline={tiny[0]}", *CLIP])
    clip = CLIPModel.from_pretrained(tmp_path / "clip", dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    encoder = StableDiffusionPipeline.from_pretrained(tiny[0]).text_encoder

    expected = encoder.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in clip.text_model.state_dict().items())
    assert share_chosen(clip, tokenizer, 6, 0) == log["chosen"]
    assert "95.0% are promised" in log["failed"][0]


def test_the_clip_model_needs_a_pipeline(tmp_path):
    with pytest.raises(LamellaError, match=r"holds no pipeline\. Make one with `python -m models tiny-diffusion`"):
        build("tiny-clip", tmp_path / "clip", [f"pipeline={tmp_path}"])


def test_the_first_two_objects_exchange_their_colours_and_nothing_else():
    scenes = EVERYTHING.draw(90, seeded(0), kinds=EVERYTHING.numbers)
    wrong = colours_exchanged(scenes)

    assert torch.equal(wrong.kinds == NOTHING, scenes.kinds == NOTHING)
    for before, after in zip(scenes.kinds.tolist(), wrong.kinds.tolist(), strict=True):
        first, *rest = ([KINDS[kind - 1] for kind in kinds if kind] for kinds in (before, after))
        (second,) = rest
        assert [(kind.shape, kind.texture) for kind in first] == [(kind.shape, kind.texture) for kind in second]
        colours = [kind.colour for kind in first]
        assert [kind.colour for kind in second] == [*colours[:2][::-1], *colours[2:]]


def test_a_caption_in_which_the_exchange_changes_nothing_is_no_wrong_one(tiny):
    pipe = StableDiffusionPipeline.from_pretrained(tiny[0])
    settings = TinyClipSettings(
        pipeline="",
        layers=1,
        hidden=8,
        heads=2,
        patch=8,
        pictures=1,
        promised=1,
        pace=Pace(steps=1, batch_size=1, lr=1),
    )
    scenes = EVERYTHING.draw(20, seeded(0), objects=[1])
    right, exchanged = cosines(untrained(settings, pipe.text_encoder), pipe.tokenizer, scenes, seeded(1))

    assert right.shape == (20, 20)
    assert torch.isfinite(right).all()
    assert (exchanged == -torch.inf).all()
