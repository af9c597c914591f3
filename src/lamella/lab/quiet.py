"""What the libraries below say that helps nobody who runs a command."""

from __future__ import annotations

import warnings

import transformers


def quiet_libraries() -> None:
    """Hide transformers' bars, load reports and deprecations, and PEFT's look-ups of bases that lie on this machine."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", "Unable to fetch remote file|Could not find a config file", module="peft")
