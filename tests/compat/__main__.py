"""``python -m tests.compat``: the unit tests with the lowest and with the newest versions that pyproject.toml allows.

``python -m tests.compat lowest peft==0.20`` asks about one environment, with other versions of what is named. Each
environment lies in runs/compat, where a later run finds it again; with torch for CUDA it takes 7 GB.
"""

import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from tests.compat.record import ENVIRONMENTS, ROOT, count, floor_of, keep, requirements

PLACE = ROOT / "runs" / "compat"
# What depends on other libraries by more than documented functions: 4 minutes of one core.
FOLDERS = ("routing", "kernels", "adapters", "backbones", "tuners", "convert", "diffusion", "families")
TESTS = ["tests/test_internals.py", *(f"tests/{folder}" for folder in FOLDERS)]
WITHOUT = ["-m", "not heavy and not gpu and not real", "-k", "not trl"]  # TRL needs a driver where torch is for CUDA


def main(words: list[str]) -> int:
    """Runs the environments that are asked for and keeps what they said; 1 if a test failed in one of them."""
    others = {wanted.name: wanted for wanted in map(Requirement, words[1:])}
    results = [run(name, others) for name in words[:1] or ENVIRONMENTS]
    for result in results:
        keep(result)
        print(f"{result['name']}: {count(result)}", *result["failed"], sep="\n")
    return int(any(result["failed"] for result in results))


def run(name: str, others: dict[str, Requirement]) -> dict[str, Any]:
    """Installs an environment, runs the tests in it and returns its row of the record.

    Args:
        name: one of `ENVIRONMENTS`.
        others: versions in place of those of the environment, by package.
    """
    python = PLACE / name / "bin" / "python"
    if not python.exists():
        venv.create(PLACE / name, with_pip=True)
    wanted = [others.get(line.name, floor_of(line) if name == "lowest" else line) for line in requirements()]
    held = PLACE / f"{name}.txt"
    held.write_text("".join(f"{line.name}{line.specifier}\n" for line in wanted))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    beside = [f"{line.name}{line.specifier}" for line in requirements("lab")]  # which many tests read rows with
    subprocess.run(
        [*pip, "--upgrade", "--constraint", held, "--requirement", held, *beside, "pytest", "hypothesis"], check=True
    )
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)
    said = PLACE / f"{name}.xml"
    said.unlink(missing_ok=True)
    command = [python, "-m", "pytest", *TESTS, *WITHOUT, f"--junitxml={said}"]
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status not in (0, 1):  # 1: some failed
        raise SystemExit(f"pytest ended with status {status} in the environment {name}: see what it said above.")
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep='\\n')"
    names = [line.name for line in wanted]
    found = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout.split()
    return {
        "name": ", ".join([name, *map(str, others.values())]),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": dict(zip(names, found, strict=True)),
        **outcome(said),
    }


def outcome(said: Path) -> dict[str, Any]:
    """How many tests passed, and the first line of what each other one said, by name."""
    cases = list(ElementTree.parse(said).getroot().iter("testcase"))
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (problem.get("message") or "").split("\n")[0]
        for case in cases
        for problem in case
        if problem.tag in ("failure", "error")
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "failed": failed}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
