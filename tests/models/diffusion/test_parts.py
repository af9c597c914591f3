"""Text encoder, autoencoder and denoiser: what they read, and what they are taught."""

import pytest
import torch

from models.diffusion.autoencoder import Components, autoencoder
from models.diffusion.captions import WORDS, captions
from models.diffusion.denoiser import scheduler
from models.diffusion.text import LENGTH, answers, taught_reader, token_ids, word_tokenizer
from models.diffusion.training import seeded
from models.diffusion.world import BASE, COLOURS, EVERYTHING, KINDS, PLACES, SHAPES, TEXTURES, render
from models.settings import AutoencoderSettings, Pace, TextSettings

PACE = Pace(steps=1, batch_size=4, lr=1e-3)


def test_every_word_of_captions_is_one_token_and_other_words_are_letters():
    tokenizer = word_tokenizer()

    for word in WORDS:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    assert "".join(tokenizer.tokenize("zigzag")) == "zigzag</w>"
    assert tokenizer("on grey, A Red BAR")["input_ids"] == tokenizer("on grey , a red bar")["input_ids"]


def test_the_longest_caption_is_read_whole():
    tokenizer, generator = word_tokenizer(), seeded(0)
    said = captions(EVERYTHING.draw(500, generator, objects=[3]), generator)
    lengths = [len(ids) for ids in tokenizer(said)["input_ids"]]

    assert max(lengths) <= LENGTH
    ids = token_ids(tokenizer, said)
    assert ids.shape == (500, LENGTH)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).replace(" ", "") == said[0].replace(" ", "")


def test_answers_name_what_stands_in_each_place():
    scenes = EVERYTHING.draw(30, seeded(0), kinds=EVERYTHING.numbers)
    found = answers(scenes)

    assert found[:, -1].tolist() == scenes.backgrounds.tolist()
    named = found[:, :-1].unflatten(1, (3, len(PLACES)))
    for row, kinds in zip(named.tolist(), scenes.kinds.tolist(), strict=True):
        for shape, colour, texture, kind in zip(*row, kinds, strict=True):
            words = [
                ["", *names][at]
                for names, at in zip((SHAPES, COLOURS, TEXTURES), (shape, colour, texture), strict=True)
            ]
            assert words == (list(KINDS[kind - 1]) if kind else ["", "", ""])


def test_a_reader_learns_what_captions_say(tmp_path):
    settings = TextSettings(layers=1, hidden=16, heads=2, pace=Pace(steps=30, batch_size=16, lr=1e-2, warmup_steps=5))
    _, losses = taught_reader(settings, word_tokenizer(), tmp_path / "text.safetensors", 0)

    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_components_tell_nearly_all_of_a_picture_and_are_scaled_by_the_root_of_their_deviation():
    components = Components.of_world(20, 0)
    pictures = 2 * render(BASE.draw(200, seeded(1))) - 1
    latents = components.latents(pictures)

    assert latents.shape == (200, 20, 8, 8)
    assert latents.square().mean().item() == pytest.approx(1, rel=0.1)
    exact = Components.of_world(48, 0)
    norms = exact.weights.norm(dim=1)
    assert (exact.weights @ exact.weights.T - torch.diag(norms**2)).abs().max() < 1e-3 * norms.max() ** 2
    back = exact.latents(pictures).movedim(1, 3) @ torch.linalg.pinv(exact.weights).T + exact.mean
    patches = pictures.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
    assert torch.allclose(back, patches, atol=1e-3)


def test_an_untrained_autoencoder_has_its_shapes_and_says_the_deviation_it_was_given():
    settings = AutoencoderSettings(latents=20, widths=(4, 4, 8), groups=2, noise=0.05, pace=PACE)
    made = autoencoder(settings)
    told = made.encode(2 * render(BASE.draw(3, seeded(0))) - 1).latent_dist

    assert told.mean.shape == (3, 20, 8, 8)
    assert torch.allclose(told.std, torch.tensor(0.05))
    assert made.decode(told.mean).sample.shape == (3, 3, 32, 32)


def test_a_denoiser_that_knows_the_picture_draws_it_from_noise():
    latents = Components.of_world(20, 0).latents(2 * render(BASE.draw(2, seeded(1))) - 1)
    noises = scheduler()
    noises.set_timesteps(20)
    drawn = torch.randn(latents.shape, generator=seeded(2))
    for time in noises.timesteps:
        signal = noises.alphas_cumprod[time]
        noise = (drawn - signal.sqrt() * latents) / (1 - signal).sqrt()
        drawn = noises.step(noises.get_velocity(latents, noise, time.expand(2)), time, drawn).prev_sample

    assert noises.timesteps[0] == noises.config.num_train_timesteps - 1
    assert torch.allclose(drawn, latents, atol=1e-3)
