"""Made with commit 4cdf030 of lamella. Folders as its code wrote them, kept to show that later code opens them.

Run it with that commit's `src` on the path: `PYTHONPATH=src HF_HUB_OFFLINE=1 python tests/first_edition/make.py`. It
works in its own folder, so that every path in what it writes is relative to it; what it made before is removed first.
Takes about a minute on one core. Whoever opens these folders does so from here, or from a copy of all of it:

- base: tiny random models, with tokenizer: bert (with a head of three classes), llama, encoder (bert without a head)
  and moe, and what bert and llama answer to `inputs`
- mola, molex, mole: adapters, and what each answers to `inputs`; mole/loras are the LoRAs that are composed
- rows: what the runs and studies read; recipes: the studies
- run: `lamella train`; study and composition_study: `lamella compare`
- similarity: `lamella similarity`, every step; compressed: the model that its `compress --save` wrote
- expected.json: what the first edition said of them
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pandas as pd
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import lamella
from lamella import MolaConfig, MoleConfig, MolexConfig
from lamella.cli import main
from lamella.routing import collect_losses
from lamella.training.composition.grid import read_composition, stages_of
from lamella.training.composition.running import folder_of
from lamella.training.grid import cells_of, read_grid

HERE = Path(__file__).parent
MADE = ("base", "mola", "molex", "mole", "rows", "recipes", "run", "study", "composition_study", "similarity")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["who", "where", "is", "are", "she", "they", "it", "we", "going", "now", "then", "here"]
VOCABULARY = {word: index for index, word in enumerate(SPECIAL + WORDS)}
LLAMA, BERT = "base/llama", "base/bert"
TRAINING = {"batch_size": 8, "max_steps": 12, "max_length": 32, "lr": 3e-2, "log_every": 2, "evaluate_every": 4}


def make() -> None:
    for name in (*MADE, "compressed"):
        shutil.rmtree(name, ignore_errors=True)
    torch.set_num_threads(1)
    make_bases()
    make_rows()
    expected: dict[str, Any] = {"adapters": {}}
    for maker in (make_mola, make_molex, make_mole):
        expected["adapters"] |= maker()
    expected["run"] = make_run()
    expected["study"] = make_study()
    expected["composition_study"] = make_composition_study()
    expected["similarity"] = make_similarity()
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


# Models and rows


def save_tokenizer(folder: str) -> None:
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", bos_token="[CLS]", eos_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip


def make_bases() -> None:
    shape = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    shape |= {"max_position_embeddings": 64, "pad_token_id": 0}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "num_key_value_heads": 1}
    torch.manual_seed(0)
    built = {
        "bert": BertForSequenceClassification(BertConfig(**shape, **still, num_hidden_layers=4, num_labels=3)),
        "llama": LlamaForCausalLM(LlamaConfig(**shape, **ends, num_hidden_layers=4)),
        "encoder": BertModel(BertConfig(**shape, **still, num_hidden_layers=2)),
        "moe": Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **shape, **ends, num_hidden_layers=3, moe_intermediate_size=24, shared_expert_intermediate_size=8,
                num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
            )
        ),
    }  # fmt: skip
    for name, model in built.items():
        move_off_start(model)
        model.save_pretrained(f"base/{name}")
        save_tokenizer(f"base/{name}")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(len(SPECIAL), len(VOCABULARY), (4, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 7, 6, 9])[:, None]).long()
    inputs = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    save_file(inputs, "base/inputs.safetensors")
    save_file({name: answer(load_base(f"base/{name}")) for name in ("bert", "llama")}, "base/logits.safetensors")


@torch.no_grad()
def move_off_start(model: nn.Module) -> None:
    """Weights of order one, where a fresh model has tiny ones that hardly matter."""
    for name, parameter in model.named_parameters():
        if "norm" not in name.lower():
            fan_in = parameter.shape[-1] if parameter.dim() > 1 and "embed" not in name else 1
            nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else fan_in**-0.5)


def make_rows() -> None:
    """Sentences that begin with 'who' (label 0) or 'where' (label 1), and prose of the same words."""
    Path("rows").mkdir()
    for name, count, seed in (("questions", 40, 1), ("a", 56, 2), ("b", 60, 3), ("c", 44, 4)):
        generator = random.Random(seed)
        tails: dict[str, None] = {}
        while len(tails) < count:
            tails[" ".join(generator.choices(WORDS[2:], k=generator.randint(3, 9)))] = None
        rows = [{"text": f"{WORDS[index % 2]} {tail}", "label": index % 2} for index, tail in enumerate(tails)]
        Path(f"rows/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    documents = [
        " ".join(WORDS[(5 * d + d * t + t * t) % len(WORDS)] for t in range(8 + d % 9)) for d in range(len(WORDS) * 4)
    ]
    Path("rows/text.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")


# Adapters


def load_base(path: str) -> Any:
    kind = AutoModelForSequenceClassification if path == BERT else AutoModelForCausalLM
    return kind.from_pretrained(path).eval()


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(**load_file("base/inputs.safetensors")).logits
    return logits.contiguous()


def labels_for(path: str) -> Tensor:
    """Of bert three classes; of llama each token but the first three, which are the prompt."""
    inputs = load_file("base/inputs.safetensors")
    if path == BERT:
        return torch.tensor([0, 1, 2, 0])
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    return labels


def losses(model: nn.Module, path: str) -> dict[str, float]:
    """Of the task, in evaluation; and what the routers pay in training, which coefficients are in."""
    given = {**load_file("base/inputs.safetensors"), "labels": labels_for(path)}
    task = model.eval()(**given).loss.item()
    with collect_losses() as collected:
        model.train()(**given)
    return {"task": task, "routers": collected.total().item()}


@torch.no_grad()
def train_a_little(model: nn.Module, seed: int) -> None:
    """Every trainable parameter somewhere else than at its start, as training leaves it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            step = 0.1 if parameter.numel() == 1 else 1.0 if "router" in name or "mole" in name else 0.2
            parameter.add_(step * torch.randn(parameter.shape, generator=generator))


def keep(adapters: Mapping[str, tuple[str, Any]], method: str) -> dict[str, Any]:
    """Saves the adapters of a method and what they answer; returns what is known of each."""
    known, logits = {}, {}
    for seed, (name, (path, build)) in enumerate(adapters.items()):
        torch.manual_seed(seed)
        model = build(load_base(path))
        train_a_little(model, 10 + seed)
        folder = f"{method}/{name}"
        model.save_pretrained(folder, save_embedding_layers=False)
        logits[name] = answer(model)
        again = PeftModel.from_pretrained(load_base(path), folder)
        assert torch.equal(answer(again), logits[name])
        assert not torch.allclose(logits[name], load_file("base/logits.safetensors")[Path(path).name], atol=0.05)
        known[folder] = {
            "base": path,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "loss": losses(model, path),
        }
    save_file(logits, f"{method}/logits.safetensors")
    return known


def make_mola() -> dict[str, Any]:
    def with_config(config: MolaConfig) -> Any:
        return lambda base: get_peft_model(base, config)

    encoder = MolaConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=6, use_rslora=True, num_experts="2-4", top_k=[1, 2, 2, 3], router="cosine",
        balance_coef=0.02, z_coef=0.003, init_weights=False,
    )  # fmt: skip
    decoder = MolaConfig(
        task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"],
        num_experts="triangle", expert_budget=3.0, top_k=2, balance_coef=0.05, z_coef=0.01, init_weights=False,
    )  # fmt: skip
    return keep(
        {
            "encoder": (BERT, with_config(encoder)),
            "decoder": (LLAMA, with_config(decoder)),
            "defaults": (LLAMA, with_config(MolaConfig(task_type="CAUSAL_LM"))),
        },
        "mola",
    )


def make_molex() -> dict[str, Any]:
    def with_config(config: MolexConfig) -> Any:
        return lambda base: get_peft_model(base, config)

    encoder = MolexConfig(
        task_type="SEQ_CLS", alpha=0.6, alpha_mode="learned", alpha_scope="per-layer", router="cosine", router_proj=4,
        score="sigmoid", top_k=2, candidates=[0, 1, 3], balance_coef=0.05, init_weights=False,
        lora=LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"]),
    )  # fmt: skip
    decoder = MolexConfig(
        task_type="CAUSAL_LM", alpha=0.7, router_scope="per-layer", router_gradient="straight-through", prompt_tokens=3,
        balance_coef=0.02, init_weights=False, lora=LoraConfig(r=2, target_modules="all-linear"),
    )  # fmt: skip
    return keep(
        {
            "encoder": (BERT, with_config(encoder)),
            "decoder": (LLAMA, with_config(decoder)),
            "defaults": (LLAMA, with_config(MolexConfig(task_type="CAUSAL_LM"))),
        },
        "molex",
    )


def make_mole() -> dict[str, Any]:
    """Of two LoRAs: one adapter has them in its file, two name where they lie.

    Places given as absolute paths are written relative to the adapter, as `../loras/red`; those given as relative paths
    are written as given, here `mole/loras/red`.
    """
    sources = {
        "red": LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
        "blue": LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"]),
    }
    for seed, (name, lora) in enumerate(sources.items()):
        torch.manual_seed(30 + seed)
        model = get_peft_model(load_base(LLAMA), lora)
        train_a_little(model, 30 + seed)
        model.save_pretrained(f"mole/loras/{name}", save_embedding_layers=False)
    places = {name: Path(f"mole/loras/{name}") for name in sources}
    absolute = {name: place.absolute() for name, place in places.items()}

    def with_config(config: MoleConfig, loras: Mapping[str, Path]) -> Any:
        return lambda base: lamella.compose(base, loras, config)

    embedded = MoleConfig(
        task_type="CAUSAL_LM", granularity="sublayer", temperature=1.5, balance="switch", balance_coef=0.25,
        prompt_tokens=3, embed_adapters=True, init_weights=False,
    )  # fmt: skip
    reference = MoleConfig(
        task_type="CAUSAL_LM", granularity="network", router_input="token", learn_temperature=False, balance="entropy",
        balance_coef=0.1, init_weights=False,
    )  # fmt: skip
    return keep(
        {
            "embedded": (LLAMA, with_config(embedded, places)),
            "reference": (LLAMA, with_config(reference, absolute)),
            "defaults": (LLAMA, with_config(MoleConfig(task_type="CAUSAL_LM"), places)),
        },
        "mole",
    )


# Runs and studies


def command(*words: Any) -> str:
    """What a command of lamella prints; it must succeed."""
    print("lamella", *words, flush=True)
    sys.argv = ["lamella", *map(str, words)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise
    return printed.getvalue()


def make_run() -> dict[str, Any]:
    settings = [f"{key}={value}" for key, value in TRAINING.items()]
    settings += ["method.r=2", "method.num_experts=2-4", "method.balance_coef=0.01", "method.z_coef=0.001"]
    command(
        "train", *settings, "--model", "base/encoder", "--task", "file:rows/questions.jsonl", "--method", "mola",
        "-o", "run",
    )  # fmt: skip
    metrics = json.loads(Path("run/metrics.json").read_text(encoding="utf-8"))
    return {
        "metrics": {name: metrics[name] for name in ("validation", "test", "trainable_parameters", "routing")},
        "evaluate": json.loads(command("evaluate", "run", "--json")),
        "doctor": json.loads(command("doctor", "run", "--json")),
    }


def make_study() -> dict[str, Any]:
    """MoLA, LoRA of its size and MoLEx."""
    recipe = {
        "backbones": ["base/encoder"],
        "tasks": ["file:rows/questions.jsonl"],
        "seeds": [0],
        "budget": "equal-parameters",
        "match": "MoLA",
        "reference": "LoRA",
        "run": TRAINING,
        "methods": {
            "MoLA": {"method": {"name": "mola", "r": 2, "num_experts": 2, "balance_coef": 0.01, "z_coef": 0.001}},
            "LoRA": {"method": "lora"},
            "MoLEx": {"method": {"name": "molex", "r": 4, "balance_coef": 0.02}},
        },
    }
    write_recipe("study", recipe)
    words = ("compare", "recipes/study.yaml", "-o", "study")
    command(*words)
    cells = cells_of(read_grid("recipes/study.yaml"))
    return {"keys": {cell.label: cell.key for cell in cells}, "compare": json.loads(command(*words, "--json"))}


def make_composition_study() -> dict[str, Any]:
    recipe = {
        "backbone": "base/encoder",
        "sources": {"a": "file:rows/a.jsonl@24", "b": "file:rows/b.jsonl@28"},
        "held_out": {"c": "file:rows/c.jsonl"},
        "seeds": [0],
        "rows": 12,
        "test_rows": 8,
        "reference": "MOLE",
        "run": {**TRAINING, "keep": "last"},
        "lora": {"method": {"r": 2, "target_modules": ["query", "value"]}, "lr": 1e-1},
        "arms": {
            "MOLE": {"method": {"name": "mole", "train_head": False, "balance_coef": 0.2}},
            "uniform": {"method": "uniform"},
            "only a": {"method": {"name": "single", "adapter": "a"}},
        },
        "masked": ["MOLE", "uniform"],
    }
    write_recipe("composition_study", recipe)
    words = ("compare", "recipes/composition_study.yaml", "-o", "composition_study")
    command(*words)
    grid = read_composition("recipes/composition_study.yaml")
    cells = stages_of(grid, folder_of(grid, Path("composition_study"))).all
    return {"keys": {cell.label: cell.key for cell in cells}, "compare": json.loads(command(*words, "--json"))}


def write_recipe(name: str, recipe: Mapping[str, Any]) -> None:
    Path("recipes").mkdir(exist_ok=True)
    Path(f"recipes/{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def make_similarity() -> dict[str, Any]:
    study = "similarity"
    command("similarity", "capture", "base/moe", "--text", "rows/text.txt", "-o", study, "--per-expert", 32)
    command("similarity", "screen", study)
    command(
        "similarity", "align", study, "--aligner", "linear", "--aligner", "layernorm", "--seeds", 2, "--steps", 40,
        "--per-source", 2,
    )  # fmt: skip
    command("similarity", "swap", study, "--unit", "router+experts", "--documents", 6)
    command(
        "similarity", "compress", study, "--budget", 0.75, "--documents", 6, "--seeds", 1, "--save", "compressed"
    )  # fmt: skip
    command("similarity", "report", study)
    tables = {path.stem: pd.read_parquet(path) for path in sorted(Path(study).glob("*.parquet"))}
    known: dict[str, Any] = {"rows": {name: len(table) for name, table in tables.items()}}
    known["sums"] = {
        name: {column: float(table[column].sum()) for column in table.select_dtypes("number").columns}
        for name, table in tables.items()
    }
    opened = lamella.similarity.Compressed.load(Path("compressed"))
    save_file({"compressed": answer(opened.model)}, "compressed/logits.safetensors")
    return known


if __name__ == "__main__":
    os.chdir(HERE)
    make()
