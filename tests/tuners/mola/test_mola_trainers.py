"""The trainers people use, unchanged."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tests import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from lamella import MolaConfig

QUIET = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("name", ["bert"])
def test_transformers_trainer_trains_every_router_and_nothing_of_the_base(name: str, tmp_path: Path) -> None:
    model = tiny.adapted(tiny.MODELS[name](), init_lora_weights=True, router_aux_loss_coef=1e-3, task_type="SEQ_CLS")
    given = tiny.batch(model.get_base_model(), rows=12)
    rows = [{key: value[row].tolist() for key, value in given.items()} for row in range(12)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, num_train_epochs=4, learning_rate=1e-2, **QUIET
    )
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows).with_format("torch"))
    before = snapshot(model)
    trainer.train()
    trainable = {key for key, p in model.named_parameters() if p.requires_grad}
    assert changed(before, snapshot(model)) == trainable
    assert sum("router" in key for key in trainable) == 12
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(tiny.VOCAB - 3))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


TEXTS = [" ".join(f"w{(i * 3 + j) % 40}" for j in range(4 + i % 5)) for i in range(8)]
ADAPTER = {"r": 2, "num_experts": 3, "task_type": "CAUSAL_LM"}


@pytest.mark.parametrize("checkpointing", [False])
def test_trl_sft_takes_the_config(checkpointing: bool, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    base = tiny.llama()
    before = snapshot(base)
    arguments = SFTConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, max_length=16, bf16=False,
        gradient_checkpointing=checkpointing, **QUIET,
    )  # fmt: skip
    trainer = SFTTrainer(
        base, args=arguments, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer(),
        peft_config=MolaConfig(**ADAPTER, router_aux_loss_coef=0.1),
    )  # fmt: skip
    assert isinstance(trainer.model, PeftModel)
    start = snapshot(trainer.model)
    trainer.train()
    moved = changed(start, snapshot(trainer.model))
    assert moved == {key for key, p in trainer.model.named_parameters() if p.requires_grad}
    assert sum("router" in key for key in moved) == 14
    trainer.save_model(str(tmp_path / "saved"))
    fresh = tiny.llama()
    assert all(torch.equal(p, before[key]) for key, p in fresh.named_parameters())
    again = PeftModel.from_pretrained(fresh, tmp_path / "saved")
    given = tiny.inputs(fresh)
    with torch.no_grad():
        assert torch.equal(again(**given).logits, trainer.model.eval()(**given).logits)
