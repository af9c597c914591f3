"""The wheel, installed without extras where nothing but its requirements can be imported, does what users need."""

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lamella_command import LAB

ROOT = Path(__file__).parents[1]

TRAIN = """
import json, sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, Trainer, TrainingArguments

import lamella

torch.set_num_threads(1)
folder = Path(sys.argv[1])
SIZES = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


ids = torch.randint(3, 32, (8, 6), generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": row, "labels": row} for row in ids]

# user 1: a mixture trained with the Trainer, traced and saved
model = get_peft_model(llama(), lamella.MolaConfig(task_type="CAUSAL_LM", num_experts=2, r=2))
arguments = TrainingArguments(
    str(folder / "trainer"), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to="none",
    disable_tqdm=True, save_strategy="no", learning_rate=1e-2,
)
Trainer(model=model, args=arguments, train_dataset=rows).train()
with lamella.record_routing(model.eval()) as trace, torch.no_grad():
    logits = model(ids).logits
model.save_pretrained(folder / "adapter")
again = PeftModel.from_pretrained(llama(), folder / "adapter").eval()
with torch.no_grad():
    equal = torch.equal(again(ids).logits, logits)

# user 2: two trained LoRAs composed, one dropped
loras = {}
for seed, name in enumerate(("a", "b")):
    torch.manual_seed(seed)
    loras[name] = str(folder / name)
    config = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(loras[name])
composed = lamella.compose(llama(), loras)
composed(ids, labels=ids).loss.backward()
with lamella.masked_experts(composed.eval(), drop=["b"]), torch.no_grad():
    composed.generate(ids[:, :3], max_new_tokens=2, do_sample=False, pad_token_id=0)

# user 3: a mixture's experts captured and compressed
moe = Qwen2MoeForCausalLM(
    Qwen2MoeConfig(
        **SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, decoder_sparse_step=1,
    )
).eval()
captured = lamella.similarity.capture(moe, [{"input_ids": ids}], folder / "capture", per_expert=4)
smaller = lamella.similarity.compress(moe, captured, budget=0.5, texts=[{"input_ids": ids}])

# what the laboratory has made is refused in one sentence
(folder / "run.yaml").write_text("model: minilm")
try:
    lamella.doctor(folder)
except lamella.LamellaError as error:
    refused = str(error)
print(json.dumps({
    "equal": equal,
    "refused": refused,
    "entropy": trace.routers[0].entropy,
    "healthy": lamella.doctor(folder / "adapter", llama()).ok,
    "experts": [smaller.report.experts, smaller.report.experts_left],
}))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of a fresh environment with the wheel and what it requires, and nothing else."""
    place = tmp_path_factory.mktemp("install")
    wheel = built_wheel(place)
    venv.create(place / "venv", with_pip=False)
    interpreter = place / "venv" / "bin" / "python"
    pip("--python", interpreter, "install", "--no-deps", "--no-index", wheel)
    for needed in required(installed(interpreter), set()):
        link(metadata.distribution(needed), site_of(interpreter))
    return interpreter


def site_of(interpreter):
    (site,) = (interpreter.parents[1] / "lib").glob("python*/site-packages")
    return site


def installed(interpreter):
    """The metadata of lamella there."""
    (distribution,) = metadata.distributions(name="lamella", path=[str(site_of(interpreter))])
    return distribution


def built_wheel(place):
    """Built from a copy, so that neither an earlier build gets into it nor this one stays in the repository."""
    source = place / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, source)
    (wheel,) = place.glob("lamella-*.whl")
    return wheel


def pip(*words):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def required(distribution, known):
    """Names of all distributions that one requires, those of its requirements included."""
    for line in distribution.requires or []:
        requirement = Requirement(line)
        if requirement.name not in known and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            known.add(requirement.name)
            required(metadata.distribution(requirement.name), known)
    return known


def link(distribution, site):
    """Puts a distribution of this environment into another one."""
    for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
        source = Path(distribution.locate_file(top)).resolve()
        if source.exists() and not (site / top).exists():
            (site / top).symlink_to(source)


def run(python, *words):
    hidden = ("PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"HF_HUB_OFFLINE": "1"}
    command = [str(python), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=python.parent)


def test_nothing_of_the_laboratory_is_there(python):
    code = f"from importlib.util import find_spec; print(*[name for name in {LAB} if find_spec(name)])"
    there = set(run(python, "-c", code).stdout.split())
    assert {"pandas", "sklearn", "datasets", "pyarrow"}.isdisjoint(there)


def test_a_mixture_trains_and_reloads_loras_compose_and_experts_are_compressed(python, tmp_path):
    done = run(python, "-c", TRAIN, tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed["equal"]
    assert 0 < printed["entropy"] < 0.7
    assert printed["healthy"]
    assert printed["experts"] == [8, 4]
    assert "lamella needs pandas, which is not installed: pip install 'lamella[lab]'" in printed["refused"]


def test_the_command_says_what_to_install(python):
    done = run(python.parent / "lamella", "--help")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'lamella[lab]'" in done.stderr
    assert "pandas" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_command_asks_for_what_the_extra_lab_brings(python):
    lines = [Requirement(line) for line in installed(python).requires]
    lab = {line.name for line in lines if line.marker is not None and line.marker.evaluate({"extra": "lab"})}
    distributions = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
    assert lab == {distributions.get(name, name) for name in LAB}


def test_neither_benchmarks_nor_models_are_in_the_wheel(python):
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    mine = {path.name for path in site.iterdir() if not path.is_symlink()}
    assert {name for name in mine if not name.endswith(".dist-info")} <= {
        "lamella",
        "lamella_command.py",
        "__pycache__",
    }
    assert (site / "lamella" / "py.typed").is_file()
    assert (site / "lamella" / "lab" / "assets" / "tiny-moe" / "model.safetensors").is_file()
    assert (site / "lamella" / "lab" / "recipes" / "demo.yaml").is_file()
