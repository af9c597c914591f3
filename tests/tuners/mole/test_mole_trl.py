"""TRL's trainers, unchanged: they take the config or the composed model."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tests import tiny
from tests.tuners.mola.test_mola_trainers import QUIET, TEXTS, changed, snapshot, tokenizer
from tests.tuners.mole import trained

from lamella import MoleConfig


@pytest.mark.parametrize("checkpointing", [True])
def test_trl_sft_takes_the_config(checkpointing: bool, folder: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2, max_length=16, bf16=False,
        gradient_checkpointing=checkpointing, **QUIET,
    )  # fmt: skip
    trainer = SFTTrainer(
        tiny.llama(), args=arguments, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer(),
        peft_config=MoleConfig(adapters=trained.loras("llama", folder), task_type="CAUSAL_LM", granularity="sublayer"),
    )  # fmt: skip
    assert isinstance(trainer.model, PeftModel)
    start = snapshot(trainer.model)
    trainer.train()
    moved = changed(start, snapshot(trainer.model))
    assert all("mole_router" in key for key in moved)
    assert sum(key.endswith("bias") for key in moved) == 4
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    given = tiny.inputs(tiny.llama())
    assert torch.equal(trained.run(again, given), trained.run(trainer.model.eval(), given))


def test_trl_dpo_builds_its_loss_from_logits_and_the_balance_loss_arrives(folder: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": text, "chosen": "w1 w2", "rejected": "w3"} for text in TEXTS]
    results = []
    for coefficient in (0.0, 5.0):
        model = trained.composition("llama", folder, double=False, balance="log", router_aux_loss_coef=coefficient)
        arguments = DPOConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=1, learning_rate=1e-2, max_length=32, bf16=False,
            gradient_checkpointing=False, optim="sgd", max_grad_norm=0.0, **QUIET,
        )  # fmt: skip
        trainer = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())
        start = snapshot(trainer.model)
        trainer.train()
        end = snapshot(trainer.model)
        results.append({key: end[key] - start[key] for key in changed(start, end)})
    without, with_balance = results
    assert all("mole_router" in key for key in with_balance)
    moved = {key: (with_balance[key] - without.get(key, 0)).norm().item() for key in with_balance if "bias" in key}
    assert len(moved) == 2
    assert min(moved.values()) > 1e-5, moved
