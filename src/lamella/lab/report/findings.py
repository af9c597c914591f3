"""The doctor's findings, put in order for the page."""

from collections.abc import Sequence
from typing import Protocol


class Finding(Protocol):
    """One thing that is wrong: how badly ("error" or "warning"), what, where, why it matters, what to do."""

    @property
    def severity(self) -> str:
        """How badly: "error" or "warning"."""

    @property
    def what(self) -> str:
        """What is wrong."""

    @property
    def where(self) -> str:
        """The place in the model, the run or the folder."""

    @property
    def why(self) -> str:
        """Why it matters."""

    @property
    def fix(self) -> str:
        """What to do."""


def worst_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors before warnings, otherwise in the order given."""
    return tuple(sorted(findings, key=lambda finding: finding.severity != "error"))


def findings_words(findings: Sequence[Finding], checked: bool) -> str:
    """The findings in one sentence; without any it matters whether anybody looked."""
    if not findings:
        return "No finding: the doctor found nothing wrong." if checked else "The doctor has not examined this run."
    errors = sum(finding.severity == "error" for finding in findings)
    counts = ((errors, "error"), (len(findings) - errors, "warning"))
    parts = [f"{count} {word}{'s' if count > 1 else ''}" for count, word in counts if count]
    return f"The doctor found {' and '.join(parts)}."
