"""Two processes, each with half the rows, make the step that one process makes by accumulating the two halves."""

from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.processes import run_on_two
from transformers import Trainer, TrainingArguments

NAMES = ["mola-llama", "mola-llama-smoothed", "mola-bert", "molex-llama", "molex-bert"]
ROWS = 4


def rows_of(model: torch.nn.Module) -> list[dict[str, list[int]]]:
    """Two rows for each process; those of the first are shorter, so that label counts differ."""
    given = tiny.batch(model, rows=ROWS, pad=0)
    given["attention_mask"][:2, 5:] = 0
    if given["labels"].dim() == 2:
        given["labels"][:2, 3:] = -100
    return [{key: value[row].tolist() for key, value in given.items()} for row in range(ROWS)]


def step(folder: Path, name: str, copies: int, processes: int) -> dict[str, torch.Tensor]:
    """Gradients of one step over all rows, two at a time."""
    torch.set_num_threads(1)
    method, family, *smoothed = name.split("-")
    if (
        method == "molex"
    ):  # some blocks of each process choose nothing but themselves, and their alpha waits all the same
        base = tiny.MODELS[family](layers=4).double()
        options = {"alpha_mode": "learned", "alpha_scope": "per-layer", "router_scope": "per-layer"}
        model = tiny.molex(base, router_aux_loss_coef=0.5, **options).double().train()
    else:
        model = tiny.adapted(tiny.MODELS[family]().double(), router_aux_loss_coef=0.5).double().train()
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], save_strategy="no", per_device_train_batch_size=2, max_steps=1,
        gradient_accumulation_steps=copies, optim="sgd", max_grad_norm=0.0, disable_tqdm=True,
        remove_unused_columns=False, train_sampling_strategy="sequential",
        label_smoothing_factor=0.1 if smoothed else 0.0,
    )  # fmt: skip
    rows = Dataset.from_list(rows_of(model.get_base_model())).with_format("torch")
    trainer = Trainer(model, arguments, train_dataset=rows)
    assert trainer.args.world_size == processes
    actual: dict[str, torch.Tensor] = {}
    trainer.create_optimizer().register_step_pre_hook(
        lambda *_: actual.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    trainer.train()
    return actual


def step_of_two(folder: Path) -> None:
    """One Trainer step in each of two processes, on its own rows; rank 0 writes the gradients."""
    for name in NAMES:
        gradients = step(folder, name, copies=1, processes=2)
        assert dist.get_world_size() == 2
        assert dist.get_backend() == "gloo"
        if dist.get_rank() == 0:
            save_file(gradients, folder / f"{name}.safetensors")
    dist.destroy_process_group()


def test_two_processes_make_the_step_of_one(fresh: ForkServerContext, tmp_path: Path) -> None:
    run_on_two(fresh, step_of_two, tmp_path)
    for name in NAMES:
        actual = load_file(tmp_path / f"{name}.safetensors")
        assert any("router" in key for key in actual)
        tiny.assert_same(actual, step(tmp_path, name, copies=2, processes=1))
