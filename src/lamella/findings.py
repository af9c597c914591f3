"""What a check says: findings, and what was examined."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning"]

_WIDTH = 100
_NAMED = 4


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        severity: "error" where a result is wrong or nothing is learned, "warning" where it is worse than it looks.
        code: a short name of the kind of fault, for programs.
        what: what was found.
        where: the modules, tensors or files.
        why: why it matters.
        fix: what to do.
    """

    severity: Severity
    code: str
    what: str
    where: str
    why: str
    fix: str

    def __str__(self) -> str:
        lines = [f"{self.severity}: {self.what} [{self.code}]"]
        for name in ("where", "why", "fix"):
            lines.append(f"  {name + ':':<7}{getattr(self, name)}")
        return "\n".join(_fill(line, " " * 9) for line in lines)


@dataclass(frozen=True)
class Diagnosis:
    """What was found and what was examined; `print` it.

    Attributes:
        findings: the faults, errors first.
        checked: what was examined, and what could not be and why, a line each.
    """

    findings: tuple[Finding, ...]
    checked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was found, neither error nor warning."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: ok, findings, checked."""
        findings = [asdict(finding) for finding in self.findings]
        return {"ok": self.ok, "findings": findings, "checked": list(self.checked)}

    def __str__(self) -> str:
        errors = sum(finding.severity == "error" for finding in self.findings)
        count = f"{errors} error(s), {len(self.findings) - errors} warning(s)" if self.findings else "nothing found"
        examined = ["examined:", *(_fill(f"  - {line}", "    ") for line in self.checked)]
        return "\n".join([*(f"{finding}\n" for finding in self.findings), *examined, count])


@dataclass
class Examination:
    """Where checks write while they run."""

    findings: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)

    def error(self, code: str, what: str, where: str | Sequence[str], why: str, fix: str) -> None:
        """Adds an error."""
        self.findings.append(Finding("error", code, what, _named(where), why, fix))

    def warning(self, code: str, what: str, where: str | Sequence[str], why: str, fix: str) -> None:
        """Adds a warning."""
        self.findings.append(Finding("warning", code, what, _named(where), why, fix))

    def saw(self, line: str) -> None:
        """Says what was examined, or what was not and why."""
        self.checked.append(line)

    def diagnosis(self) -> Diagnosis:
        """The result, errors first."""
        ordered = sorted(self.findings, key=lambda finding: finding.severity != "error")
        return Diagnosis(tuple(ordered), tuple(self.checked))


def _named(where: str | Sequence[str]) -> str:
    """``a, b and 7 more``: enough to look at, without a page of names."""
    if isinstance(where, str):
        return where
    more = len(where) - _NAMED
    return ", ".join(where[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _fill(line: str, indent: str) -> str:
    return textwrap.fill(
        line, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
