"""The doctor's findings, put in order for the page."""

from collections.abc import Sequence

from lamella.findings import Finding


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
