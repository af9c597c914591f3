import torch
from tests.tiny_pipelines import clip, tokenizer
from transformers import CLIPImageProcessorPil

from lamella.diffusion.clip import embed_images, embed_texts, image_alignment, text_alignment


@torch.no_grad()
def test_texts_are_embedded_as_the_model_does_and_padding_counts_for_nothing() -> None:
    model = clip()
    tokens = tokenizer()(["a cat", "dog"], padding=True, return_tensors="pt")
    actual = embed_texts(model, tokens["input_ids"], tokens["attention_mask"])
    by_model = model(pixel_values=torch.zeros(1, 3, 16, 16), **tokens).text_embeds
    torch.testing.assert_close(actual, by_model)
    alone = tokenizer()(["dog"], return_tensors="pt")
    torch.testing.assert_close(actual[1:], embed_texts(model, alone["input_ids"]))


@torch.no_grad()
def test_images_are_prepared_as_clips_own_processor_does() -> None:
    model = clip()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16)
    prepared = processor(list(pixels.numpy()), input_data_format="channels_first", return_tensors="pt")
    tokens = tokenizer()(["a cat"], return_tensors="pt")
    by_model = model(pixel_values=prepared["pixel_values"], **tokens).image_embeds
    torch.testing.assert_close(embed_images(model, pixels / 255), by_model, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_images_of_any_size_are_scaled_to_the_models() -> None:
    model = clip()
    flat = torch.full((1, 3, 16, 16), 0.3)
    torch.testing.assert_close(embed_images(model, torch.full((1, 3, 40, 24), 0.3)), embed_images(model, flat))


def test_gradients_reach_the_pixels() -> None:
    images = torch.rand(1, 3, 20, 20, requires_grad=True)
    embed_images(clip(), images)[0, 0].backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_alignments_are_cosines_by_hand() -> None:
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    texts = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(text_alignment(images, texts), torch.tensor([1.0, 0.0]))
    concept = torch.tensor([[0.0, 5.0], [2.0, 0.0], [4.0, 3.0]])
    expected = torch.tensor([(0.8 + 0.6 + 0.96) / 3, (0.0 + 1.0 + 0.8) / 3])
    torch.testing.assert_close(image_alignment(images, concept), expected)
