"""A mixture behind transformers' own server: what a client is answered is what the mixture generates."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from tests import tiny
from tests.lab.tiny_runs import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serve import Serve

import lamella

PROMPTS = ["who is she", "where are they going now", "it"]
NEW = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def mixture(base: str, **changes: object) -> PeftModel:
    """A MoLA whose routers give every token the same weights, so that one LoRA can do the same."""
    model = tiny.adapted(AutoModelForCausalLM.from_pretrained(base), num_experts=3, top_k=3, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:
                parameter.zero_()
    return model


@contextmanager
def serving(folder: Path) -> Iterator[Callable[[str], str]]:
    """Asks a server of the model in a folder to go on with a text."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = Serve(force_model=str(folder), device="cpu", port=port, non_blocking=True, log_level="error")

    def completed(prompt: str) -> str:
        body = {"model": str(folder), "prompt": prompt, "max_tokens": NEW, "temperature": 0.0}
        asked = Request(
            f"http://localhost:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(asked, timeout=60) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    try:
        yield completed
    finally:
        server.kill_server()


def test_a_collapsed_mixture_is_served_by_transformers(base: str, tmp_path: Path) -> None:
    model, tokenizer = mixture(base), AutoTokenizer.from_pretrained(base)
    given = [dict(tokenizer(prompt, return_tensors="pt")) for prompt in PROMPTS]
    lamella.collapse(model, given).model.save_pretrained(str(tmp_path / "lora"))
    merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    with serving(tmp_path / "merged") as completed:
        for prompt, inputs in zip(PROMPTS, given, strict=True):
            length = inputs["input_ids"].shape[1]
            written = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, length:]
            assert completed(prompt) == tokenizer.decode(written, skip_special_tokens=True)
            untrained = model.get_base_model()
            with model.disable_adapter():
                plain = untrained.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, length:]
            assert not torch.equal(plain, written), "the prompt does not tell the mixture from its base"
