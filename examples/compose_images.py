"""Several concepts in one picture: LoRAs of Stable Diffusion, composed by routers that CLIP trains.

Each LoRA was trained for one concept. Their mean (NLA, what diffusers' ``set_adapters`` gives with weights 1/K) weakens
all of them. Here, as in MOLE (arXiv 2404.13628), a router in each block of the UNet and the text encoder weighs them by
what they put out. The routers alone train, on images that the mean draws of the prompts, so that no picture is needed:
CLIP says how well an image fits its prompt and whether each concept is somewhere in it. Then the script draws from the
same noise with each LoRA alone, their mean, the composition, and the composition without its first LoRA, and writes a
report with the grid and CLIP's numbers.

    python examples/compose_images.py --lora cat=OWNER/CAT_LORA --lora dog=OWNER/DOG_LORA \\
        --prompt "a cat and a dog on a beach" -o runs/beach

A LoRA is a hub id, ``OWNER/NAME/FILE.safetensors``, or a local file, trained on the base model. The paper's own concept
LoRAs, for Stable Diffusion 2.1, are on the hub as YUSHUIWX/MoLE_(concept). Name each by the words that its concept goes
by in prompts.

``--tiny`` runs all of it in miniature with random weights, offline, on a CPU: its pictures are noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import lamella
from lamella.diffusion import ClipGuidance, ImageBatch, ImageStep, PipelineComposition, train_routers
from lamella.diffusion.clip import embed_images, embed_texts, image_alignment, text_alignment
from lamella.errors import LamellaError
from lamella.lab.report import PictureGrid, Report, write_report


@dataclass
class Models:
    """What is composed, and who judges it."""

    pipe: Any
    clip: Any
    tokenizer: Any
    loras: dict[str, Path | str]
    drawing: dict[str, Any]


def real(arguments: argparse.Namespace) -> Models:
    """Stable Diffusion, CLIP and the LoRAs from the hub."""
    try:
        from diffusers import StableDiffusionPipeline
    except ImportError as error:
        raise LamellaError("This needs diffusers: run `pip install 'lamella[diffusion]'`.") from error
    from transformers import CLIPModel, CLIPTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionPipeline.from_pretrained(arguments.base, safety_checker=None).to(device)
    pipe.unet.enable_gradient_checkpointing()
    clip = CLIPModel.from_pretrained(arguments.clip).to(device).eval()
    loras: dict[str, Path | str] = dict(entry.split("=", 1) for entry in arguments.lora)
    drawing = {"num_inference_steps": 50, "guidance_scale": 7.5}
    return Models(pipe, clip, CLIPTokenizer.from_pretrained(arguments.clip), loras, drawing)


def tiny(folder: Path) -> Models:
    """The same in miniature, at random."""
    import tiny_stable_diffusion as small

    pipe = small.stable_diffusion("v_prediction")
    loras: dict[str, Path | str] = {
        name: small.write_lora(pipe, folder / "loras" / name, seed) for seed, name in enumerate(("cat", "dog", "ink"))
    }
    drawing = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 16, "width": 16}
    return Models(pipe, small.clip(), small.tokenizer(), loras, drawing)


def draw(models: Models, prompts: Sequence[str], seed: int, kind: str = "pt") -> Tensor:
    """An image, or its latents, for each prompt, from noise that depends on the seed and the prompt's place alone."""
    drawn = [
        models.pipe([prompt], generator=torch.Generator().manual_seed(seed + at), output_type=kind, **models.drawing)
        for at, prompt in enumerate(prompts)
    ]
    return torch.cat([one.images for one in drawn])


def arms(composition: PipelineComposition) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """The ways to draw, each with the context that it is drawn in."""
    names = composition.names
    for name in names:
        yield f"{name} alone", composition.fixed_weights({name: 1.0})
    yield "NLA", composition.fixed_weights(dict.fromkeys(names, 1 / len(names)))
    yield "MOLE", nullcontext()
    yield f"MOLE without {names[0]}", composition.masked_experts([names[0]])


@torch.no_grad()
def judge(models: Models, images: Tensor, prompts: Sequence[str], concepts: dict[str, Tensor]) -> dict[str, float]:
    """CLIP's alignment with the prompts, and with pictures of each concept."""
    tokens = models.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
    embedded = embed_images(models.clip, images)
    texts = embed_texts(models.clip, tokens["input_ids"], tokens["attention_mask"])
    scores = {"text alignment": float(text_alignment(embedded, texts).mean())}
    for name, pictures in concepts.items():
        scores[f"{name} alignment"] = float(image_alignment(embedded, embed_images(models.clip, pictures)).mean())
    return scores


def train(models: Models, composition: PipelineComposition, arguments: argparse.Namespace) -> list[ImageStep]:
    """Trains the routers on what the uniform composition draws."""
    batches = []
    for at in range(arguments.samples):
        prompt = arguments.prompt[at % len(arguments.prompt)]
        batches.append(ImageBatch([prompt], draw(models, [prompt], arguments.seed + 1000 + at, "latent")))
    guidance = ClipGuidance(models.clip, models.tokenizer, composition.names)
    return train_routers(composition, guidance, batches, arguments.steps, arguments.learning_rate, seed=arguments.seed)


def report(
    composition: PipelineComposition, models: Models, log: Sequence[ImageStep], arguments: argparse.Namespace
) -> Report:
    """Draws every way and has CLIP judge it."""
    concepts: dict[str, Tensor] = {}
    for name in composition.names:
        with composition.fixed_weights({name: 1.0}):
            concepts[name] = draw(models, [name] * arguments.references, arguments.seed + 2000)
    columns: dict[str, Any] = {}
    rows = []
    for arm, way in arms(composition):
        with way:
            images = draw(models, arguments.prompt, arguments.seed)
        rows.append({"method": arm, **judge(models, images, arguments.prompt, concepts)})
        columns[arm] = (images.permute(0, 2, 3, 1).cpu().float().numpy() * 255).round().astype(np.uint8)
    results = pd.DataFrame(rows).set_index("method")
    gain = float(results.loc["MOLE", "text alignment"] - results.loc["NLA", "text alignment"])
    trained = sum(parameter.numel() for parameter in composition.parameters())
    return Report(
        title=f"{' + '.join(composition.names)}, composed",
        summary=f"MOLE's text alignment is {gain:+.3f} from the mean's (NLA), over {len(arguments.prompt)} prompts and "
        "one seed, without an interval. Look at the pictures.",
        results=results.reset_index(),
        cost=pd.DataFrame({"method": ["MOLE"], "trainable parameters": [trained], "steps": [len(log)]}),
        routing=None,
        settings={"run": {name: str(value) for name, value in vars(arguments).items()}},
        notes=[
            f"A concept's pictures are {arguments.references} that its LoRA alone draws of its name.",
            *([f"{arguments.steps} steps with random weights: the pictures mean nothing."] if arguments.tiny else []),
            *str(composition).splitlines(),
        ],
        pictures=PictureGrid(arguments.prompt, columns, "The same noise in every column"),
    )


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="random weights in miniature, offline")
    parser.add_argument("--base", default="stabilityai/stable-diffusion-2-1")
    parser.add_argument("--clip", default="openai/clip-vit-base-patch16")
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=HUB_ID")
    parser.add_argument("--prompt", action="append", metavar="TEXT")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--samples", type=int, default=16, help="images that the routers are trained on")
    parser.add_argument("--references", type=int, default=4, help="pictures of each concept to compare with")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args(given)
    if arguments.tiny:
        arguments.steps, arguments.samples = min(arguments.steps, 4), min(arguments.samples, 2)
        arguments.prompt = arguments.prompt or ["a cat and a dog", "ink"]
    if not arguments.prompt or not (arguments.tiny or len(arguments.lora) > 1):
        parser.error("name at least two --lora and one --prompt, or try --tiny")
    if any("=" not in entry for entry in arguments.lora):
        parser.error("a --lora is NAME=HUB_ID")
    return arguments


def main(given: Sequence[str] | None = None) -> Path:
    """Composes, trains, draws and reports; returns the report's path."""
    arguments = parse(given)
    arguments.out.mkdir(parents=True, exist_ok=True)
    models = tiny(arguments.out) if arguments.tiny else real(arguments)
    composition = lamella.compose_pipeline(models.pipe, models.loras)
    print(composition)
    log = train(models, composition, arguments)
    composition.save(arguments.out / "composition")
    steps = "\n".join(json.dumps(dataclasses.asdict(row)) for row in log)
    (arguments.out / "steps.jsonl").write_text(steps + "\n", encoding="utf-8")
    page = write_report(report(composition, models, log, arguments), arguments.out / "report.html")
    print(f"Wrote {page}")
    return page


if __name__ == "__main__":
    main()
