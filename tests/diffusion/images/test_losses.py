"""The losses of images, against what their formulas say."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests import tiny_pipelines as tiny
from tests.tiny_pipelines import clip
from torch import Tensor, nn

from lamella import LamellaError
from lamella.diffusion import ClipGuidance, denoising_loss
from lamella.diffusion.clip import embed_images, embed_texts
from lamella.diffusion.denoising import decode, denoise

PROMPTS = ["a cat", "a blue dog"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_denoiser(pipe: Any, predict: Any) -> Any:
    """The pipeline with a denoiser that knows the answer."""

    class Knowing(nn.Module):
        def forward(self, noised: Tensor, timestep: Tensor, **_: Any) -> Any:
            return SimpleNamespace(sample=predict(noised, timestep))

    pipe.unet = Knowing()
    return pipe


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_denoiser_that_knows_the_clean_image_has_no_loss_and_gives_it_back(kind: str) -> None:
    pipe = tiny.stable_diffusion(kind)
    clean = tiny.latents(2)
    alphas = pipe.scheduler.alphas_cumprod

    def predict(noised: Tensor, times: Tensor) -> Tensor:
        kept = alphas[times].sqrt()[:, None, None, None]
        spread = (1 - alphas[times]).sqrt()[:, None, None, None]
        noise = (noised - kept * clean) / spread
        return noise if kind == "epsilon" else kept * noise - spread * clean

    pipe = with_denoiser(pipe, predict)
    assert denoising_loss(pipe, PROMPTS, clean, seeded()) < 1e-8
    denoised = denoise(pipe, PROMPTS, clean, seeded())
    torch.testing.assert_close(denoised.clean, clean, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_diffusers_schedulers(kind: str) -> None:
    seen: dict[str, Tensor] = {}

    def predict(noised: Tensor, times: Tensor) -> Tensor:
        seen.update(noised=noised, times=times)
        return torch.zeros_like(noised)

    pipe = with_denoiser(tiny.stable_diffusion(kind), predict)
    clean = tiny.latents(2)
    loss = denoising_loss(pipe, PROMPTS, clean, seeded(3))
    generator = seeded(3)
    times = torch.randint(50, (2,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    assert torch.equal(seen["times"], times)
    torch.testing.assert_close(seen["noised"], pipe.scheduler.add_noise(clean, noise, times))
    target = noise if kind == "epsilon" else pipe.scheduler.get_velocity(clean, noise, times)
    torch.testing.assert_close(loss, target.square().mean())


def sized_pixart() -> Any:
    return tiny.pixart(told_size=True)


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.sdxl, tiny.pixart, sized_pixart])
@torch.no_grad()
def test_the_denoiser_is_conditioned_as_the_pipeline_itself_does(make: Any) -> None:
    """The pipeline's own call, without guidance and for one step, gives its denoiser the same arguments."""
    pipe = make()
    denoiser = pipe.components.get("unet") or pipe.transformer
    seen: list[dict[str, Any]] = []
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    tiny.run(pipe, PROMPTS, num_inference_steps=1, guidance_scale=1.0)
    if hasattr(pipe, "transformer"):
        pipe.tokenizer.model_max_length = 16
    denoising_loss(pipe, PROMPTS, tiny.latents(2), seeded())
    theirs, ours = seen
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        assert (theirs.get(name) is None) == (ours.get(name) is None)
        if ours.get(name) is not None:
            torch.testing.assert_close(ours[name], theirs[name])
    added = ours.get("added_cond_kwargs") or {}
    assert added.keys() == (theirs.get("added_cond_kwargs") or {}).keys()
    for name, value in added.items():
        torch.testing.assert_close(value, theirs["added_cond_kwargs"][name])


def test_what_has_no_denoising_loss_is_refused() -> None:
    pipe = tiny.stable_diffusion("sample")
    with pytest.raises(LamellaError, match="prediction_type='sample'"):
        denoising_loss(pipe, PROMPTS, tiny.latents(2), seeded())
    other = SimpleNamespace(scheduler=tiny.scheduler(), components={"unet": pipe.unet})
    with pytest.raises(LamellaError, match="do not know how SimpleNamespace conditions"):
        denoising_loss(other, PROMPTS, tiny.latents(2), seeded())


def test_decoding_is_the_pipelines_own() -> None:
    pipe = tiny.stable_diffusion()
    latents = tiny.latents(2) * 0.3
    with torch.no_grad():
        theirs = pipe.image_processor.postprocess(
            pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample, "pt"
        )
        torch.testing.assert_close(decode(pipe, latents), theirs)


@torch.no_grad()
def test_guidance_is_the_cosines_by_hand() -> None:
    model, words = clip(), tiny.tokenizer()
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    guide = ClipGuidance(model, words, ["cat", "dog"], local=0.5, patches=3, patch_share=0.5)

    def text(prompt: str) -> Tensor:
        tokens = words([prompt], return_tensors="pt")
        return embed_texts(model, tokens["input_ids"])[0]

    generator = seeded(4)
    expected = torch.zeros(())
    for image, prompt in zip(images, PROMPTS, strict=True):
        expected += (1 - embed_images(model, image[None])[0] @ text(prompt)) / 2
        tops = torch.randint(9, (3,), generator=generator).tolist()
        lefts = torch.randint(9, (3,), generator=generator).tolist()
        shown = [image[:, t : t + 8, s : s + 8] for t, s in zip(tops, lefts, strict=True)]
        for concept in ("cat", "dog"):
            best = max(float(embed_images(model, patch[None])[0] @ text(concept)) for patch in shown)
            expected += 0.5 * (1 - best) / 4
    torch.testing.assert_close(guide.judge(images, PROMPTS, seeded(4)), expected)
    only_global = ClipGuidance(model, words, ["cat"], local=0.0).judge(images, PROMPTS, seeded(4))
    by_hand = torch.stack([1 - embed_images(model, i[None])[0] @ text(p) for i, p in zip(images, PROMPTS, strict=True)])
    torch.testing.assert_close(only_global, by_hand.mean())


def test_guidance_that_judges_nothing_is_refused() -> None:
    with pytest.raises(LamellaError, match="0 concepts"):
        ClipGuidance(clip(), tiny.tokenizer(), [])
    with pytest.raises(LamellaError, match="patch_share=2"):
        ClipGuidance(clip(), tiny.tokenizer(), ["cat"], patch_share=2)
