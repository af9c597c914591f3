"""What `import lamella` costs and gives, and what the command loads, each seen in a fresh process."""

import json
import re
import subprocess
import sys
import warnings
from functools import reduce
from importlib import metadata
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from lamella import version as versions

ROOT = Path(__file__).parents[1]
HEAVY = ("pandas", "sklearn", "scipy", "datasets", "typer", "rich", "jinja2")


def fresh(code, argument=None):
    """What a new interpreter prints, each line as JSON; the argument is given as JSON too."""
    words = [sys.executable, "-c", code, json.dumps(argument)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def command(*words):
    """What the command prints in a fresh process, its exit status, and whether torch was loaded."""
    code = f"""
import sys
from lamella_command import main
sys.argv = ["lamella", *{list(map(str, words))!r}]
try:
    main()
finally:
    print("torch loaded:", "torch" in sys.modules, file=sys.stderr)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def documented_names():
    """Every dotted name of lamella on the pages, such as `lamella.similarity.capture`, but not those of imports."""
    name = re.compile(r"(?<![\w/.-])(?<!from )(?<!import )lamella(?:\.[A-Za-z_]\w*)+(?![/.]?\w)")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        yield from name.findall(page.read_text(encoding="utf-8"))


LOADED = f"print(json.dumps([name for name in sys.modules if name.partition('.')[0] in {HEAVY}]))"
UNREACHABLE = """
missing = []
for name in json.loads(sys.argv[1]):
    try:
        reduce(getattr, name.split(".")[1:], lamella)
    except AttributeError:
        missing.append(name)
print(json.dumps(missing))
"""


def test_importing_lamella_loads_nothing_heavy_that_peft_does_not_and_reaches_every_documented_name():
    names = sorted(set(documented_names()))
    assert len(names) > 5
    by_peft, loaded, unreachable = fresh(
        f"import json, sys, peft\n{LOADED}\nimport lamella\nfrom functools import reduce\n{LOADED}{UNREACHABLE}", names
    )
    assert set(loaded) == set(by_peft)
    assert unreachable == []


def test_the_public_names_are_all_there():
    import lamella

    assert set(lamella.__all__) <= set(dir(lamella))
    assert all(reduce(getattr, [name], lamella) is not None for name in lamella.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lora'"):
        _ = lamella.lora


TESTED = ["torch<2.16,>=2.10", 'diffusers<0.43,>=0.42; extra == "diffusion"', "numpy>=2", 'pytest; extra == "dev"']


@pytest.fixture
def installed(monkeypatch):
    """What lamella asks for is `TESTED`; sets what is there."""

    def there(**packages):
        def version_of(name):
            if name not in packages:
                raise PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr(versions, "version", version_of)

    monkeypatch.setattr(versions, "requires", lambda name: TESTED)
    return there


@pytest.mark.parametrize(
    ("packages", "told"),
    [
        ({"torch": "2.10.0", "diffusers": "0.42.1"}, []),
        ({"torch": "2.15.1+cpu"}, []),
        ({"torch": "2.15.0.dev20261101"}, []),  # a nightly of what passed
        ({"torch": "2.13.0", "numpy": "1.26.0"}, []),  # no range that was tested: pip sees to it
        ({"torch": "2.9.1+cu128"}, [("torch>=2.10,<2.16", "torch 2.9.1+cu128 is installed")]),
        (
            {"torch": "2.16.0", "diffusers": "0.41.0"},
            [
                ("torch>=2.10,<2.16", "torch 2.16.0 is installed"),
                ("diffusers>=0.42,<0.43", "diffusers 0.41.0 is installed"),
            ],
        ),
    ],
)
def test_a_version_outside_the_tested_range_is_said_in_one_sentence(installed, packages, told):
    installed(**packages)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        versions.warn_of_untested()
    said = [str(warning.message) for warning in caught]
    assert len(said) == len(told)
    for sentence, (tested, found) in zip(said, told, strict=True):
        assert tested in sentence
        assert found in sentence
        assert sentence.endswith(f": pip install '{tested}'.")
        assert ". " not in sentence


def test_a_folder_that_is_not_installed_asks_for_nothing(monkeypatch):
    monkeypatch.setattr(versions, "requires", lambda name: metadata.requires("no-such-package-at-all"))
    assert versions.requirements() == []


def test_the_sentence_comes_before_an_import_that_fails(tmp_path):
    """A PEFT that is too old for a name that lamella imports from it."""
    for name, number, needs in (("peft", "0.1", ""), ("lamella", "9", "Requires-Dist: peft<0.22,>=0.21\n")):
        folder = tmp_path / f"{name}-{number}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{needs}")
    (tmp_path / "peft.py").write_text("raise ImportError('cannot import name Obscure')")
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport lamella"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    sentence, _, rest = done.stderr.partition("peft 0.1 is installed")
    assert "is tested with peft>=0.21,<0.22" in sentence
    assert "Traceback" not in sentence
    assert "Obscure" in rest


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["similarity", "capture", "--help"]])
def test_help_loads_no_torch(words):
    done = command(*words)
    assert done.returncode == 0
    assert "Usage: lamella" in done.stdout
    assert "torch loaded: False" in done.stderr


def test_the_version_loads_no_torch():
    done = command("--version")
    assert (done.returncode, done.stdout) == (0, f"lamella {version('lamella')}\n")
    assert "torch loaded: False" in done.stderr


def test_completion_loads_no_torch(monkeypatch):
    monkeypatch.setenv("_LAMELLA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "lamella tr")
    monkeypatch.setenv("COMP_CWORD", "1")
    done = command()
    assert done.stdout.split() == ["train", "trace"]
    assert "torch loaded: False" in done.stderr


def test_completion_is_shown_and_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # else the shell is that of the tests
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "_LAMELLA_COMPLETE=complete_zsh" in command("--show-completion", "zsh").stdout
    assert command("--install-completion", "bash").returncode == 0
    script = tmp_path / ".bash_completions" / "lamella.sh"
    assert "_LAMELLA_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()


def test_a_command_whose_words_are_not_understood_loads_no_torch():
    misspelt = command("allocate", "2-4", "--layer", "4")
    assert misspelt.returncode == 2
    assert "torch loaded: False" in misspelt.stderr
