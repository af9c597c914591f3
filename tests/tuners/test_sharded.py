"""FSDP over two processes: FSDP2 of whole blocks or of each adapted module, FSDP1; one process does the same."""

from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from tests import tiny
from tests.processes import run_on_two
from tests.tuners.mole import trained
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from lamella.tuners.tensors import AdapterLayer

CPU = torch.device("cpu")
METHODS = ["mola", "mole"]
WRAPPED = ["blocks", "modules", "fsdp1"]


def build(method: str, folder: Path) -> PeftModel:
    if method == "mole":
        return trained.composition("llama", folder, balance="log").train()
    return tiny.adapted(tiny.llama().double(), router_aux_loss_coef=0.5).double().train()


def train(model: nn.Module, halves: list[slice]) -> None:
    """Two steps over the rows of these halves, whose losses count alike."""
    rows = tiny.batch(tiny.llama(), rows=4, pad=0)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for half in halves:
            (model(**{key: value[half] for key, value in rows.items()}).loss / len(halves)).backward()
        optimizer.step()


def shard(model: PeftModel, wrapped: str) -> nn.Module:
    blocks = model.get_base_model().model.layers
    if wrapped == "fsdp1":
        policy = ModuleWrapPolicy({type(blocks[0])})
        return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy, device_id=CPU)
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks:
        inside = [module for module in block.modules() if isinstance(module, AdapterLayer)]
        for module in (*(inside if wrapped == "modules" else ()), block):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def gather(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole tensors, by the names of the model that is not sharded."""
    if not isinstance(model, FullyShardedDataParallel):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):  # its state_dict needs an accelerator
        named = {name.replace("_fsdp_wrapped_module.", ""): one for name, one in model.named_parameters()}
        return {name: one.detach().clone() for name, one in named.items()}


def shard_and_train(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for method in METHODS:
        for wrapped in WRAPPED:
            model = build(method, folder)
            sharded = shard(model, wrapped)
            train(sharded, [slice(2 * rank, 2 * rank + 2)])
            gathered = gather(sharded)
            if rank == 0:
                build(method, folder).save_pretrained(folder / f"{method}-{wrapped}", state_dict=gathered)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(fresh: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    trained.loras("llama", folder)
    run_on_two(fresh, shard_and_train, folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_sharded_training_is_that_of_one_process(folder: Path, method: str, wrapped: str) -> None:
    model = build(method, folder)
    before = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    train(model, [slice(0, 2), slice(2, 4)])
    assert all(not torch.equal(one, before[name]) for name, one in model.named_parameters() if name in before)

    model.save_pretrained(folder / "one")
    saved = folder / f"{method}-{wrapped}"
    expected, actual = (load_file(path / "adapter_model.safetensors") for path in (folder / "one", saved))
    tiny.assert_same(actual, expected)
    base = tiny.build("llama", layers=2) if method == "mole" else tiny.llama()
    again = PeftModel.from_pretrained(base.double(), saved).double().eval()
    given = tiny.inputs(again.get_base_model())
    with torch.no_grad():
        tiny.assert_same({"logits": again(**given).logits}, {"logits": model.eval()(**given).logits})
