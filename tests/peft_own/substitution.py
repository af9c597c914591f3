"""A pytest plugin: PEFT's own tests with a method of lamella where their case tables have LoRA.

``pytest -p substitution --tuner mola --outcomes FILE tests/test_custom_models.py`` inside PEFT's source archive. What
merges, and what is no row of LoRA in a table, is left out.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from lamella import LamellaError, MolaConfig, MoleConfig, MolexConfig

CONFIGS: dict[str, Any] = {"mola": MolaConfig, "molex": MolexConfig, "mole": MoleConfig}
# Rows with other settings are of variants of LoRA, which are methods of their own.
OF_LORA = {
    "target_modules", "modules_to_save", "r", "lora_alpha", "lora_dropout", "lora_bias", "init_lora_weights", "bias",
    "task_type", "trainable_token_indices",
}  # fmt: skip
SHARED = ("modules_to_save", "task_type")  # settings that every method has

_SIZES = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {
    **_SIZES, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 4,
}  # fmt: skip
# Tiny random models under the names that PEFT's tests ask the hub for.
STAND_INS: dict[str, PreTrainedConfig] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": OPTConfig(
        **_SIZES, hidden_size=16, ffn_dim=32, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=128,
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": GPT2Config(
        **_SIZES, n_embd=16, n_layer=3, n_head=4, n_positions=128
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": GPTJConfig(
        **_SIZES, n_embd=16, n_layer=3, n_head=4, n_positions=128, rotary_dim=4
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": LlamaConfig(**_DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": Qwen2Config(**_DECODER),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Gemma3TextConfig(
        **_DECODER, layer_types=["sliding_attention", "full_attention", "full_attention"], query_pre_attn_scalar=4
    ),
}  # fmt: skip


class TwoBlocks(nn.Module):
    """What MoLEx has for PEFT's MLP, which has no blocks: the same linear layers in each of two."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.config = PreTrainedConfig(hidden_size=10, name_or_path="MLP")
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.out = nn.Linear(10, 2)
        self.sm = nn.LogSoftmax(dim=-1)
        self.dtype = torch.float

    def forward(self, X: Tensor) -> Tensor:
        x = X.to(self.out.weight.dtype)[:, None]  # (batch, one token, features)
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.sm(self.out(x[:, 0]))
        return y


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 10)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lin1(self.drop(self.lin0(x).relu()))
        return y


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tuner", choices=sorted(CONFIGS), required=True)
    parser.addoption("--outcomes", required=True, help="JSON file for what became of each test")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Substitution(config.getoption("--tuner"), Path(config.getoption("--outcomes"))))


class Substitution:
    """Puts one method into the tables of each module that is collected, and keeps what becomes of its tests."""

    def __init__(self, tuner: str, outcomes: Path) -> None:
        self.tuner, self.outcomes = tuner, outcomes
        self.config = CONFIGS[tuner]
        self.said: dict[str, dict[str, str]] = {}
        self.loras = outcomes.parent / "loras"
        self.custom: Any = None  # what PEFT's tests take models of their own from

    def pytest_collectstart(self, collector: Any) -> None:
        if not isinstance(collector, pytest.Module):
            return
        module = collector.obj
        known = module.hub_online_once.__wrapped__.__globals__["_HUB_MODEL_ACCESSES"]
        known.update(dict.fromkeys(STAND_INS, 1))  # what it does not know, it asks the hub for
        if hasattr(module, "MockTransformerWrapper"):
            self.custom = module.MockTransformerWrapper
            module.TEST_CASES[:] = [(*row[:2], self.config, row[3]) for row in module.TEST_CASES if _is_lora(*row[2:])]
            module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
                (row[0], self.tuner, self.config, *row[3:])  # what a test looks up by LoRA's name is LoRA's own
                for row in module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES
                if row[1] == "lora" and _is_lora(*row[2:4])
            ]
            module.ALL_PEFT_CONFIG_CLASSES[:] = [self.config]
            if self.tuner == "molex":
                module.MLP = TwoBlocks
        if hasattr(module, "ALL_CONFIGS"):
            module.ALL_CONFIGS[:] = [(self.config, row[1]) for row in module.ALL_CONFIGS if _is_lora(*row)]
        original = module.set_init_weights_false
        module.set_init_weights_false = lambda config_cls, kwargs: (
            {**kwargs, "init_lora_weights": False} if config_cls is self.config else original(config_cls, kwargs)
        )

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[Any]) -> None:
        ours = [item for item in items if self._is_ours(item) and "merge" not in item.originalname]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours

    def _is_ours(self, item: Any) -> bool:
        return hasattr(item, "callspec") and item.callspec.params.get("config_cls") is self.config

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        """A row's settings of LoRA become those of the method, for the model of the test."""
        params = item.callspec.params
        model_id = params.get("model_id", "MLP")
        for name in ("config_kwargs", "config_kwargs_1", "config_kwargs_2"):
            if name in params and ("model_id" in params or name != "config_kwargs"):
                params[name] = self._settings(params[name], model_id, item.cls)

    def _settings(self, of_lora: Mapping[str, Any], model_id: str, tests: Any) -> dict[str, Any]:
        given = {name: value for name, value in of_lora.items() if (name, value) != ("bias", "none")}
        if self.tuner == "mola":
            return given
        shared = {name: given.pop(name) for name in SHARED if name in given}
        if "init_lora_weights" in given:
            shared["init_lora_weights"] = given["init_lora_weights"]
        if self.tuner == "molex":
            if isinstance(target := given["target_modules"], str):  # of a module that lies in blocks here
                given["target_modules"] = rf".*\b{target}"
            return {**shared, "lora": LoraConfig(**given)}
        return {**shared, "adapters": {name: str(self._lora(given, model_id, tests, name)) for name in ("a", "b")}}

    def _lora(self, settings: Mapping[str, Any], model_id: str, tests: Any, name: str) -> Path:
        """A LoRA of the row on the test's model, saved by PEFT; made once."""
        folder = self.loras / f"{model_id.replace('/', '-')} {sorted(settings.items())} {name}".replace("/", "-")
        if not folder.exists():
            models = getattr(tests, "transformers_class", None) or self.custom
            base = models.from_pretrained(model_id)
            torch.manual_seed(len(name) + ord(name))
            config = LoraConfig(**{**copy.deepcopy(dict(settings)), "init_lora_weights": False})
            get_peft_model(base, config).save_pretrained(folder)
        return folder

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if report.when == "call" or report.outcome != "passed":
            said = {"outcome": report.outcome, "kind": "", "error": ""}
            if report.failed and call.excinfo is not None:
                error = call.excinfo.value
                refused = isinstance(error, LamellaError)
                said |= {"kind": "refused" if refused else type(error).__name__, "error": str(error)}
            self.said[f"{item.originalname}[{item.callspec.id}]"] = said
        return report

    def pytest_sessionfinish(self) -> None:
        self.outcomes.write_text(json.dumps(self.said, indent=1))


def _is_lora(config: Any, kwargs: Mapping[str, Any]) -> bool:
    return config is LoraConfig and set(kwargs) <= OF_LORA and kwargs.get("init_lora_weights") in (None, True, False)


def write_stand_ins(cache: Path) -> None:
    """Puts the stand-ins into a folder in the layout of Hugging Face's cache."""
    for name, config in STAND_INS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "snapshots" / ("0" * 40))
