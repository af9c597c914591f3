"""Models whose weights are kept elsewhere: the same samples, each weight read once for many batches, little memory."""

import ctypes
import resource
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from accelerate.utils import offload_state_dict
from tests.processes import run_fresh
from tests.similarity.activations.streams import assert_equal, batches, documents
from tests.tiny_moe import FAMILIES, inputs_for
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from lamella.backbones import find_stacks
from lamella.backbones.moe import moe_layers
from lamella.errors import LamellaError
from lamella.progress import listening
from lamella.similarity.activations import Capture, capture
from lamella.similarity.activations.norms import distributions
from lamella.similarity.activations.streaming import LOOK
from lamella.similarity.alignment import align
from lamella.similarity.compression import damages
from lamella.similarity.screening import screen

TEXTS = documents(LOOK + 6)


class Counted(Mapping):
    """Offloaded weights, with how often each was read."""

    def __init__(self, weights, reads, prefix):
        self.weights, self.reads, self.prefix = weights, reads, prefix

    def __getitem__(self, name):
        self.reads[self.prefix + name] += 1
        return self.weights[name]

    def __iter__(self):
        return iter(self.weights)

    def __len__(self):
        return len(self.weights)


def offloaded(family):
    """A model with its weights elsewhere, and how often each of them was read."""
    model, reads = FAMILIES[family](), Counter()
    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    for name, module in model.named_modules():
        if (hook := getattr(module, "_hf_hook", None)) is not None and getattr(hook, "weights_map", None) is not None:
            hook.weights_map = Counted(hook.weights_map, reads, f"{name}.")
    return model, reads


@pytest.mark.parametrize("family", ["gpt_oss", "switch_transformers"])  # kinds of blocks, and two stacks
def test_the_samples_are_those_of_the_whole_model_and_each_weight_is_read_once_for_many_batches(family, tmp_path):
    model, reads = offloaded(family)
    if family == "switch_transformers":
        stream = [inputs_for(model, seed=seed, batch=LOOK // 4, tokens=9) for seed in range(5)]
    else:
        stream = list(batches(TEXTS, size=16))
    told = []
    with listening(lambda work: told.append(str(work))):
        taken = capture(model, stream, tmp_path / "found", per_expert=8, whole_text=True)
    whole = capture(FAMILIES[family](), stream, tmp_path / "expected", per_expert=8, whole_text=True)
    assert_equal(taken, whole)
    # once for the fingerprint, then for each 64 documents
    assert {reads[name] for name in reads if ".experts" in name} == {1 + 2}
    stacks = len(find_stacks(model))
    assert max(reads.values()) <= 1 + 2 * (1 + stacks)  # outside the blocks: before the first, and with the last ones
    assert f"the next documents behind {len(moe_layers(model))} blocks" in " ".join(told)


def test_how_inputs_and_outputs_are_distributed_reads_each_layer_once(tmp_path):
    model, reads = offloaded("mixtral")
    taken = capture(model, batches(TEXTS[:9]), tmp_path, per_expert=4)
    reads.clear()
    for mine, whole in zip(distributions(taken, model), distributions(taken, FAMILIES["mixtral"]()), strict=True):
        assert mine.equals(whole)
    assert set(reads.values()) == {1}


def test_steps_read_each_layer_once_for_all_of_its_experts(tmp_path):
    model, reads = offloaded("mixtral")
    whole = FAMILIES["mixtral"]()
    taken = capture(whole, batches(TEXTS[:16]), tmp_path, per_expert=40)
    pairs = [((0, 0), (0, 1)), ((0, 1), (1, 2)), ((1, 2), (0, 3)), ((2, 1), (2, 3)), ((1, 3), (1, 0))]
    steps = {
        "damages": lambda one: damages(taken, one),
        "align": lambda one: align(taken, one, pairs, steps=2),
        "screen": lambda one: screen(taken, one, pairs, measures=["predicted", "floor"]),
        "weights": lambda one: screen(taken, one, pairs, measures=["weight_distance"]),
    }
    for name, step in steps.items():
        reads.clear()
        found = step(model)
        # once for the fingerprint; a screen reads a layer for tokens to train on and to measure on, and as targets
        times = {reads[one] for one in reads if ".experts" in one}
        assert max(times) <= {"damages": 2, "align": 2, "screen": 5, "weights": 6}[name], (name, times)
        pd.testing.assert_frame_equal(found, step(whole))


def test_what_one_of_the_batches_breaks_ends_all_of_them(tmp_path):
    model, _ = offloaded("mixtral")
    threads, hooks = threading.active_count(), [module.__dict__.get("_hf_hook") for module in model.modules()]
    model.model.embed_tokens._hf_hook.weights_map["weight"][TEXTS[4][2]] = torch.inf
    with pytest.raises(LamellaError, match=r"Layer 0 .* NaN or infinite .* in batch \d, document"):
        capture(model, batches(TEXTS[:9]), tmp_path)
    assert threading.active_count() == threads
    assert hooks == [module.__dict__.get("_hf_hook") for module in model.modules()]
    assert all(not block._forward_pre_hooks for block in model.model.layers)
    assert all(parameter.is_meta for parameter in model.parameters())


WIDE = {
    "vocab_size": 64, "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 512, "decoder_sparse_step": 1,
}  # fmt: skip
ROOM = 110_000_000  # bytes, where the weights take 200 million, a block 25, and the stacks of the threads 24


def empty():
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**WIDE), experts_implementation="eager").eval()


def capture_in_little_memory(weights, folder):
    ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: what is freed goes back at once
    capture(offloaded("mixtral")[0], batches(TEXTS[:4], size=2), folder.with_name("first"))  # imports what it needs
    model = empty()
    status = Path("/proc/self/status").read_text()
    used = 1024 * int(status.partition("VmData:")[2].split()[0])
    resource.setrlimit(resource.RLIMIT_DATA, (used + ROOM, used + ROOM))
    disk_offload(model, weights, execution_device=torch.device("cpu"))
    capture(model, batches(TEXTS[:12], size=4), folder, per_expert=4)
    with pytest.raises(RuntimeError, match="allocate"):  # as there is no room for the whole model
        model.to_empty(device="cpu")


def test_a_model_larger_than_the_memory_is_captured(fresh, tmp_path):
    torch.manual_seed(0)
    state = {name: torch.empty(one.shape).normal_(std=0.1) for name, one in empty().state_dict().items()}
    state |= {name: torch.ones_like(one) for name, one in state.items() if "norm" in name}
    assert sum(one.nbytes for one in state.values()) > 1.8 * ROOM
    offload_state_dict(tmp_path / "weights", state)
    run_fresh(fresh, capture_in_little_memory, str(tmp_path / "weights"), tmp_path / "found")
    whole = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**WIDE), experts_implementation="eager").eval()
    whole.load_state_dict(state)
    expected = capture(whole, batches(TEXTS[:12], size=4), tmp_path / "expected", per_expert=4)
    assert_equal(Capture.load(tmp_path / "found"), expected)
