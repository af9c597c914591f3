"""Every block of code in README and docs runs as it stands, or says what it needs; so does each cell of the notebook.

Models are tiny and random, tasks are a few made-up rows, and both go by the names that the pages use. Commands run in
this process.
"""

import json
import re
import runpy
import shlex
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import typer
import yaml
from peft import LoraConfig, get_peft_model
from tests.lab.conftest import once
from tests.lab.tiny_runs import save_tokenizer, sentences, tiny_bert, tiny_llama
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from typer.core import TyperGroup

from lamella import cli
from lamella.cli.app import app
from lamella.lab.data import load, models
from lamella.lab.data.entry import FOLDER, read_entry

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NEEDS = ("a fresh machine", "a quiet machine", "several machines", "several GPUs", "a GPU", "the hub")
# Pages that go on with what those before them made, in one folder.
TOGETHER = [["tutorials/mole-text.md", "tutorials/library.md"]]
CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
CHAT += "{% if add_generation_prompt %}assistant {% endif %}"


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and what it says that it needs."""

    place: str
    language: str
    text: str
    needs: str | None


def blocks(page):
    name, found = page.relative_to(ROOT).as_posix(), []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"(?:<!-- needs ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        place = f"{name}:{text.count(chr(10), 0, match.start()) + 1}"
        found.append(Block(place, match[2], match[3], match[1]))
    return found


def runnable(page):
    return any(block.needs is None and block.language != "text" for block in blocks(page))


def groups():
    """The pages that have something to run, those that go together side by side."""
    joined = [[ROOT / "docs" / name for name in names] for names in TOGETHER]
    alone = [[page] for page in PAGES if runnable(page) and not any(page in group for group in joined)]
    return joined + alone


def tiny_moe(folder):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=17, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=16, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=4,
        num_experts_per_tok=2, decoder_sparse_step=1, max_position_embeddings=256, pad_token_id=0, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)


def talking_llama(folder):
    tiny_llama(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT}))


def tiny_task(folder, name):
    """Rows for a task of lamella, of its kind, in a file of its form."""
    folder.mkdir(exist_ok=True)
    prose = read_entry(FOLDER / f"{name}.yaml").kind == "causal-lm"
    lines = sentences(200, zlib.crc32(name.encode()))
    rows = [
        {"text": line} if prose else {"text": f"{('who', 'where')[at % 2]} {line}", "label": at % 2}
        for at, line in enumerate(lines)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = {"files": {"all": f"{name}.jsonl"}, "split": {"test": 40, "validation": 40}, "licence": "none"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(entry))
    return folder / f"{name}.yaml"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Folders of tiny models by the names of the demo's."""
    make = {"minilm": lambda folder: tiny_bert(folder, layers=4), "smollm2": talking_llama, "tiny-moe": tiny_moe}
    return {name: once(tmp_path_factory, f"docs-{name}", made) for name, made in make.items()}


@pytest.fixture
def small_world(stand_ins, tmp_path, monkeypatch):
    """The working folder of a reader whose models and tasks are tiny."""
    here, tasks = tmp_path / "here", tmp_path / "tasks"
    here.mkdir()
    named, locate = load._known, models._locate

    def known(name):
        stem, _, subset = name.partition("/")
        return (tiny_task(tasks, stem), "") if stem in load.KNOWN_TASKS and not subset else named(name)

    monkeypatch.setattr(load, "_known", known)
    monkeypatch.setattr(
        models, "_locate", lambda name: (str(stand_ins[name]), "tiny") if name in stand_ins else locate(name)
    )
    for name, folder in stand_ins.items():
        monkeypatch.setitem(models._PUBLISHED, name, str(folder))
    hub = {"bert-base-uncased": "minilm", "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2"}
    for loader in (
        transformers.AutoModelForSequenceClassification,
        transformers.AutoModelForCausalLM,
        transformers.AutoTokenizer,
    ):
        read = loader.from_pretrained
        monkeypatch.setattr(
            loader,
            "from_pretrained",
            lambda name, *args, read=read, **given: read(
                str(stand_ins[hub[name]]) if name in hub else name, *args, **given
            ),
        )
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(here)
    return here


def command(words, place, monkeypatch, capsys):
    """Runs a line of a block of shell."""
    if words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(str(ROOT / "examples" / words[1]), run_name="__main__")
        return
    assert words[0] == "lamella", f"{place}: nothing here runs {words[0]!r}; say what it needs"
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err[-2000:]
    findings = words[1] == "doctor" and ended.value.code == 1  # of a model that has hardly been trained
    assert findings or not ended.value.code, f"{place}: {shlex.join(words)} ended with {ended.value.code}: {said}"


def lines_of(shell):
    """The words of each command of a block."""
    joined = shell.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def run(block, told, monkeypatch, capsys):
    if block.language == "python":
        exec(compile(block.text, block.place, "exec"), told)
    elif block.language == "yaml":
        name = block.text.partition("\n")[0].removeprefix("# ")
        Path(name).write_text(block.text, encoding="utf-8")
    else:
        for words in lines_of(block.text):
            command(words, block.place, monkeypatch, capsys)


def loras_of_a_reader():
    """What README's reader has already."""
    for seed, name in enumerate(["loras/news", "loras/law", "you/code-lora"]):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")).save_pretrained(name)


@pytest.mark.parametrize("pages", groups(), ids=lambda pages: pages[0].relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(pages, small_world, monkeypatch, capsys):
    if pages[0].name == "README.md":
        loras_of_a_reader()
    for page in pages:
        told = {}
        for block in blocks(page):
            if block.needs is None and block.language != "text":
                run(block, told, monkeypatch, capsys)


def test_no_block_is_left_out():
    """Each is output, runs, or has a reason from the list."""
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```") == 2 * len(blocks(page)), page
        for block in blocks(page):
            assert block.language in ("python", "sh", "yaml", "text"), f"{block.place}: of which language?"
            assert block.needs is None or block.needs in NEEDS, f"{block.place}: needs {block.needs}?"


def test_the_cells_of_the_notebook_run(small_world, capsys):
    (notebook,) = (ROOT / "docs").rglob("*.ipynb")
    told = {}
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}:{number}", "exec"), told)
            assert cell["outputs"] == [], "the outputs of cells are not kept"


def test_commands_inside_sentences_are_understood():
    """`lamella ...` in running text names a command and options that there are."""
    root = typer.main.get_command(app)
    seen = 0
    for page in PAGES:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for text in re.findall(r"`(lamella [a-z][^`]*)`", prose):
            here = root
            words = shlex.split(text.replace("...", ""))[1:]
            while isinstance(here, TyperGroup) and words and words[0] in here.commands:
                here, words = here.commands[words[0]], words[1:]
            assert not isinstance(here, TyperGroup) or not words, f"{page.name}: {text}: no command {words[:1]}"
            options = {name for parameter in here.params for name in parameter.opts}
            assert {word for word in words if word.startswith("-")} <= options | {"--help"}, f"{page.name}: {text}"
            seen += 1
    assert seen > 20
