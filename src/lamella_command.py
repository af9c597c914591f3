"""The start of the `lamella` command, beside the package: help, version and completion load no torch.

Importing lamella registers its methods with PEFT and so loads torch, which takes seconds. The command's modules
need none of it before a command runs, so their package stands here without its content until then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec

# What the command imports beside the library: the extra `lab` of pyproject.toml.
LAB = ("datasets", "jinja2", "pandas", "pyarrow", "pydantic", "rich", "sklearn", "typer", "yaml")


def main() -> None:
    """Run the command, or say in one sentence what to install for it."""
    try:
        _run()
    except KeyboardInterrupt:  # in the first moments; later the command itself says what is saved
        print("Interrupted before anything began.", file=sys.stderr)
        sys.exit(130)


def _run() -> None:
    missing = [name for name in LAB if find_spec(name) is None]
    if missing:
        print(
            f"The lamella command needs {', '.join(missing)}, not installed here: pip install 'lamella[lab]'.",
            file=sys.stderr,
        )
        sys.exit(2)
    load_library = _postponed_library()
    from lamella.cli import main as command

    command(load_library)


def _postponed_library() -> Callable[[], None]:
    """Put the package without its content into place, unless it is loaded; returns what fills it."""
    spec = find_spec("lamella")
    if "lamella" in sys.modules or spec is None or spec.loader is None:
        return lambda: None
    package, loader = module_from_spec(spec), spec.loader
    sys.modules["lamella"] = package
    return lambda: loader.exec_module(package)


if __name__ == "__main__":
    main()
