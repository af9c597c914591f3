"""A composition in a pipeline on disk, and what is refused."""

import json
import math
import shutil
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny_pipelines as tiny
from tests.diffusion.conftest import Loras
from tests.processes import run_fresh
from torch import nn

from lamella import LamellaError, MoleConfig, compose_pipeline, load_pipeline
from lamella.diffusion import PipelineComposition

PROMPTS = ["a cat", "a blue dog"]


@pytest.fixture
def loras(loras_of: Loras, tmp_path: Path) -> dict[str, Path]:
    files = loras_of(tiny.stable_diffusion)
    return {name: shutil.copytree(path, tmp_path / "loras" / name) for name, path in files.items()}


@pytest.fixture
def composition(loras: dict[str, Path]) -> PipelineComposition:
    torch.manual_seed(3)
    config = MoleConfig(init_lora_weights=False, temperature=20.0, granularity="sublayer")
    return compose_pipeline(tiny.stable_diffusion(), loras, config)


def load_and_run(saved: Path, out: Path) -> None:
    torch.set_num_threads(1)
    pipe = tiny.stable_diffusion()
    load_pipeline(pipe, saved)
    save_file({"latents": tiny.run(pipe, PROMPTS)}, out)


def test_a_fresh_process_makes_the_same_images_bit_for_bit(
    fresh: ForkServerContext, composition: PipelineComposition, tmp_path: Path
) -> None:
    saved = composition.save(tmp_path / "saved")
    assert sorted(path.name for path in saved.iterdir()) == ["adapter_config.json", "routers.safetensors"]
    run_fresh(fresh, load_and_run, saved, tmp_path / "out.safetensors")
    actual = load_file(tmp_path / "out.safetensors")["latents"]
    assert torch.equal(actual, tiny.run(composition.pipe, PROMPTS))


def test_the_folder_holds_routers_and_references_and_no_lora(
    composition: PipelineComposition, loras: dict[str, Path], tmp_path: Path
) -> None:
    saved = composition.save(tmp_path / "saved")
    tensors = load_file(saved / "routers.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in composition.parameters())
    assert {name.partition(".")[0] for name in tensors} == {"unet", "text_encoder"}
    written = json.loads((saved / "adapter_config.json").read_text())
    assert list(written["adapters"]) == ["cat", "dog"]
    for name, reference in written["adapters"].items():
        assert reference["source"] == f"../loras/{name}"
        assert len(reference["sha256"]) == 64


def test_folders_may_be_moved_together_and_references_overridden(
    composition: PipelineComposition, loras: dict[str, Path], tmp_path: Path
) -> None:
    expected = tiny.run(composition.pipe, PROMPTS)
    composition.save(tmp_path / "saved")
    (tmp_path / "elsewhere").mkdir()
    for name in ("saved", "loras"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    moved = tmp_path / "elsewhere"
    loaded = load_pipeline(tiny.stable_diffusion(), moved / "saved")
    assert torch.equal(tiny.run(loaded.pipe, PROMPTS), expected)
    shutil.move(moved / "loras" / "cat", tmp_path / "cat")
    loaded = load_pipeline(tiny.stable_diffusion(), moved / "saved", adapters={"cat": tmp_path / "cat"})
    assert torch.equal(tiny.run(loaded.pipe, PROMPTS), expected)
    with pytest.raises(LamellaError, match="has changed"):
        load_pipeline(tiny.stable_diffusion(), moved / "saved", adapters={"cat": moved / "loras" / "dog"})


def test_paths_that_were_relative_are_found_from_elsewhere(
    loras: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = tiny.stable_diffusion()
    compose_pipeline(pipe, [path.relative_to(tmp_path) for path in loras.values()]).save("saved")
    expected = tiny.run(pipe, PROMPTS)
    monkeypatch.chdir("/")
    loaded = load_pipeline(tiny.stable_diffusion(), tmp_path / "saved")
    assert loaded.names == ("cat", "dog")
    assert torch.equal(tiny.run(loaded.pipe, PROMPTS), expected)


def test_a_failed_load_leaves_the_pipeline_as_it_was(composition: PipelineComposition, tmp_path: Path) -> None:
    saved = composition.save(tmp_path / "saved")
    tensors = load_file(saved / "routers.safetensors")
    first = sorted(tensors)[0]
    damaged = {
        "missing": {name: t for name, t in tensors.items() if name != first},
        "left over": {**tensors, "unet.strange": torch.zeros(1)},
        "another shape": {**tensors, first: torch.zeros(77)},
    }
    pipe = tiny.stable_diffusion()
    plain = tiny.run(pipe, PROMPTS)
    for own in damaged.values():
        save_file(own, saved / "routers.safetensors")
        with pytest.raises(LamellaError, match="do not fit this pipeline"):
            load_pipeline(pipe, saved)
        assert torch.equal(tiny.run(pipe, PROMPTS), plain)
    (saved / "routers.safetensors").write_bytes(b"cut")
    with pytest.raises(LamellaError, match="is not a safetensors file or is cut short"):
        load_pipeline(pipe, saved)
    (saved / "routers.safetensors").unlink()
    with pytest.raises(LamellaError, match=r"has no routers\.safetensors"):
        load_pipeline(pipe, saved)
    assert torch.equal(tiny.run(pipe, PROMPTS), plain)


def refused(said: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(LamellaError, match=said) as error:
        compose_pipeline(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_bad_requests_are_refused_and_change_nothing(loras: dict[str, Path], loras_of: Loras, tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion()
    plain = tiny.run(pipe, PROMPTS)
    refused("is not a diffusers pipeline", nn.Linear(2, 2), loras)
    refused("neither of unet and transformer", SimpleNamespace(components={"text_encoder": nn.Linear(2, 2)}), loras)
    refused("at least two LoRAs", pipe, {"cat": loras["cat"]})
    refused("Two LoRAs are called 'cat'", pipe, [loras["cat"], loras["cat"]])
    refused("names LoRAs already", pipe, loras, MoleConfig(adapters={"x": loras["cat"]}))
    flatten = MoleConfig(router_input="flatten", flatten_length=9)
    refused("router_input='flatten' means nothing in a pipeline", pipe, loras, flatten)
    refused("form='published' means nothing", pipe, loras, MoleConfig(form="published"))
    refused("embed_adapters=True means nothing", pipe, loras, MoleConfig(embed_adapters=True))
    refused("exclude_modules=.* means nothing", pipe, loras, MoleConfig(exclude_modules=["to_q"]))
    refused("top_k=3 is more than the 2 LoRAs", pipe, loras, MoleConfig(top_k=3))
    of_xl = {f"xl {name}": path for name, path in loras_of(tiny.sdxl).items()}
    refused("text_encoder_2, which the pipeline does not have", pipe, {**loras, **of_xl})
    unet_of_xl = tiny.write_lora(tiny.sdxl(), tmp_path / "u", 0, parts=("unet",))
    refused("does not", pipe, {**loras, "u": unet_of_xl})
    assert torch.equal(tiny.run(pipe, PROMPTS), plain)
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_a_pipeline_that_carries_adapters_is_refused(loras: dict[str, Path]) -> None:
    pipe = tiny.stable_diffusion()
    pipe.load_lora_weights(loras["cat"], adapter_name="mine")
    refused(r"carries adapters already \(mine\).*unload_lora_weights", pipe, loras)
    pipe = tiny.stable_diffusion()
    compose_pipeline(pipe, loras)
    refused(r"carries adapters already", pipe, loras)


def test_overrides_are_checked(composition: PipelineComposition) -> None:
    with pytest.raises(LamellaError, match="drop names 'bird'"), composition.masked_experts(["bird"]):
        pass
    with pytest.raises(LamellaError, match="leaves none"), composition.masked_experts(["cat", "dog"]):
        pass
    with pytest.raises(LamellaError, match="must be finite"), composition.fixed_weights({"cat": math.nan}):
        pass
    three: list[dict[str, float]] = [{"cat": 1.0}, {"dog": 1.0}, {"dog": 1.0}]
    with pytest.raises(LamellaError, match="weights for 3 images"), composition.fixed_weights(three):
        tiny.run(composition.pipe, PROMPTS)
    tiny.run(composition.pipe, PROMPTS)  # nothing of it is left


def test_what_diffusers_would_do_to_loras_of_its_own_is_refused(composition: PipelineComposition) -> None:
    pipe = composition.pipe
    with pytest.raises(LamellaError, match="takes no scale from the pipeline"):
        tiny.run(pipe, PROMPTS, cross_attention_kwargs={"scale": 0.5})
    pipe.unet.peft_config = {"default": None}  # what diffusers looks into first
    with pytest.raises(LamellaError, match="set_adapters is for LoRAs that diffusers holds"):
        pipe.unet.set_adapters("default", 0.5)


def test_diffusers_own_way_to_save_is_refused_until_the_composition_is_out(
    composition: PipelineComposition, tmp_path: Path
) -> None:
    pipe = composition.pipe
    for target in (pipe, pipe.unet, pipe.text_encoder):
        with pytest.raises(LamellaError, match=r"composition\.save\(folder\).*composition\.unload\(\)"):
            target.save_pretrained(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()
    pipe.vae.save_pretrained(tmp_path / "vae")  # nothing is composed there
    composition.unload()
    composition.unload()
    pipe.save_pretrained(tmp_path / "pipe")
    again = type(pipe).from_pretrained(tmp_path / "pipe")
    for name in ("unet", "text_encoder"):
        state, expected = getattr(again, name).state_dict(), getattr(pipe, name).state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_the_number_of_loras_in_use_is_saved(loras: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(3)
    config = MoleConfig(init_lora_weights=False, temperature=20.0, top_k=1)
    composition = compose_pipeline(tiny.stable_diffusion(), loras, config)
    loaded = load_pipeline(tiny.stable_diffusion(), composition.save(tmp_path / "saved"))
    assert loaded.config.top_k == 1
    assert torch.equal(tiny.run(loaded.pipe, PROMPTS), tiny.run(composition.pipe, PROMPTS))
