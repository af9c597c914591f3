"""A tiny model and a tiny task on disk, and settings that train one on the other in about a second."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lamella.lab.runs.settings import RunSettings

MOLA = {"name": "mola", "r": 2, "num_experts": [2, 4], "top_k": 2}
MOLEX = {"name": "molex", "r": 2, "target_modules": ["query", "value"]}
WORDS = ["who", "where", "is", "are", "she", "they", "it", "we", "going", "now", "then", "here"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_tokenizer(folder: Path) -> None:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
    ).save_pretrained(folder)


def tiny_bert(folder: Path, layers: int = 2) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def tiny_llama(folder: Path) -> str:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def sentences(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    unlike = {" ".join(generator.choices(WORDS[2:], k=generator.randint(3, 9))) for _ in range(4 * count)}
    return sorted(unlike)[:count]


def question_task(folder: Path, train: int = 48) -> str:
    """Sentences that start with 'who' (label 0) or 'where' (label 1)."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"text": f"{WORDS[index % 2]} {sentence}", "label": index % 2}
        for index, sentence in enumerate(sentences(train + 32, 1))
    ]
    random.Random(0).shuffle(rows)
    for name, part in (("train", rows[32:]), ("validation", rows[:16]), ("test", rows[16:32])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return f"file:{folder}"


def prose_task(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    lines = [f"who is {sentence}" for sentence in sentences(64, 2)]
    for name, part in (("train", lines[:40]), ("validation", lines[40:52]), ("test", lines[52:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in part))
    return f"file:{folder}"


def pairs_task(folder: Path) -> None:
    """Whether both texts begin alike: three labels, so that tasks differ in their heads."""
    folder.mkdir()
    words = ["who", "where", "it"]
    rows = [
        {"text1": f"{words[at % 3]} {one}", "text2": f"{words[at // 3 % 3]} {one}", "label": (at + at // 3) % 3}
        for at, one in enumerate(sentences(60, 5))
    ]
    for name, part in (("train", rows[:36]), ("validation", rows[36:48]), ("test", rows[48:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def tiny_settings(model: str, task: str, method: object = "lora", **changes: object) -> RunSettings:
    values = {"batch_size": 8, "max_steps": 6, "max_length": 32, "lr": 5e-3, "log_every": 2, "evaluate_every": 3}
    return RunSettings.parse({"model": model, "task": task, "method": method, **values, **changes})
