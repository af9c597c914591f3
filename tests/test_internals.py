"""Every name inside another library that lamella relies on is where it was; docs/architecture.md lists them all."""

import ast
import inspect
import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lamella"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "diffusers", "trl")
# Modules whose names their libraries document, or hand on under the library's own name.
DOCUMENTED = {
    *LIBRARIES,
    *("torch.nn", "torch.nn.functional", "torch.overrides", "torch.distributed", "torch.distributed.tensor"),
    *("torch.autograd.function", "torch.autograd.graph", "torch.nn.attention.flex_attention"),
    *("torch.utils.checkpoint", "torch.utils.data", "torch.utils.hooks"),
    *("accelerate.hooks", "accelerate.utils"),
}
BASES = (torch.nn.Module, transformers.Trainer, transformers.Cache, BaseTuner, BaseTunerLayer, PeftModel)


@dataclass(frozen=True)
class Internal:
    """A name of a row of the table, the parameters that a function has to take, and the row's other cells."""

    name: str
    parameters: tuple[str, ...]
    where: tuple[str, ...]
    why: str


def internals():
    """The rows of the table, one for each name."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = page.partition("## Internals of other libraries\n")[2]
    for row in re.findall(r"^\| (`.*?) \| (`.*?) \| (.*?) \|", section, re.MULTILINE):
        where = tuple(re.findall(r"`(.*?)`", row[1]))
        for cell in re.findall(r"`(.*?)`", row[0]):
            around, braces, inside = cell.rstrip("}").partition("{")
            for name in inside.split(", ") if braces else [""]:
                path, _, parameters = f"{around}{name}".partition("(")
                yield Internal(path, tuple(re.findall(r"\w+", parameters)), where, row[2])


INTERNALS = list(internals())


def found(path):
    """What a dotted name stands for; None where it is only set on objects by what stands before it."""
    words = path.split(".")
    for count in range(len(words), 0, -1):
        try:
            owner = import_module(".".join(words[:count]))
        except ModuleNotFoundError:
            continue
        break
    for word in words[count:-1]:
        owner = getattr(owner, word)
    if count == len(words):
        return owner
    return getattr(owner, words[-1]) if hasattr(owner, words[-1]) else set_by(owner, words[-1])


def set_by(owner, name):
    """None where a class, one that it stands on or a function speaks of an attribute of that name."""
    sources = [one for one in inspect.getmro(owner) if one is not object] if inspect.isclass(owner) else [owner]
    for one in sources:
        if re.search(rf"\b{name}\b", inspect.getsource(inspect.unwrap(one))):
            return None
    raise AttributeError(f"{owner} has no {name}")


@pytest.mark.parametrize("internal", INTERNALS, ids=[internal.name for internal in INTERNALS])
def test_it_is_where_it_was(internal):
    library = internal.name.partition(".")[0]
    here = f"in {library} {version(library)}, and {', '.join(internal.where)} need it ({internal.why})"
    try:
        thing = found(internal.name)
    except AttributeError as error:
        pytest.fail(f"{internal.name} is not {here}: {error}")
    missing = set(internal.parameters) - (set(inspect.signature(thing).parameters) if internal.parameters else set())
    assert not missing, f"{internal.name} takes no {', '.join(sorted(missing))} {here}"


def test_every_name_stands_where_the_table_says():
    def stands(internal, place):
        word = internal.parameters[0] if internal.name.endswith(".forward") else internal.name.rpartition(".")[2]
        return re.search(rf"\b{word}\b", (SOURCE / place).read_text(encoding="utf-8"))

    assert [one.name for one in INTERNALS if not any(stands(one, place) for place in one.where)] == []
    assert {place for one in INTERNALS for place in one.where} <= set(trees())


@cache
def trees():
    return {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}


def imported():
    """Names that lamella imports from modules of these libraries that are not documented."""
    for place, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                module, _, last = name.rpartition(".")
                is_documented = module in {"", *DOCUMENTED} and not last.startswith("_")
                if name.partition(".")[0] in LIBRARIES and not is_documented:
                    yield name, place


def is_private(name):
    return re.fullmatch(r"_[a-z][a-z_]*", name) is not None


def defined(tree):
    """The private names that a module makes itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self" and isinstance(node.ctx, ast.Store):
            yield node.attr


def touched():
    """Private attributes that are read or set on what is not ours, and private methods that are overridden."""
    ours = {name for tree in trees().values() for name in defined(tree)}
    inherited = {name for base in BASES for name in dir(base)}
    for place, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in ours:
                yield node.attr, place
            elif isinstance(node, ast.ClassDef) and node.bases:
                methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
                yield from ((name, place) for name in methods & inherited if is_private(name))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
                name = node.args[1]
                if isinstance(name, ast.Constant) and is_private(name.value) and name.value not in ours:
                    yield name.value, place


def test_every_import_of_an_undocumented_name_is_in_the_table():
    listed = {internal.name for internal in INTERNALS}
    on_the_way = {name.rsplit(".", depth)[0] for name in listed for depth in (1, 2)}  # a module, of which a name is
    assert sorted({one for one in imported() if one[0] not in listed | on_the_way}) == []


def test_every_private_name_that_is_touched_is_in_the_table():
    listed = {internal.name.rpartition(".")[2] for internal in INTERNALS}
    of_python = {"_getframe", "_exit", "_fields"}
    assert sorted({one for one in touched() if one[0] not in listed | of_python}) == []


def test_a_name_that_moved_is_told():
    with pytest.raises(AttributeError, match="has no hidden_elsewhere"):
        found("transformers.Trainer.hidden_elsewhere")
    with pytest.raises(AttributeError, match="elsewhere"):
        found("peft.tuners.elsewhere.moved")
    assert found("transformers.Trainer.current_gradient_accumulation_steps") is None  # set while it trains
