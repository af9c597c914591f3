import pytest

from lamella.lab.report.findings import findings_words, worst_first


def test_errors_come_first_otherwise_in_order(finding):
    given = [finding("warning", "a"), finding("error", "b"), finding("warning", "c"), finding("error", "d")]
    assert [found.what for found in worst_first(given)] == ["b", "d", "a", "c"]


@pytest.mark.parametrize(
    ("severities", "words"),
    [
        (["error"], "The doctor found 1 error."),
        (["warning", "warning"], "The doctor found 2 warnings."),
        (["warning", "error", "error"], "The doctor found 2 errors and 1 warning."),
    ],
)
def test_findings_are_counted(severities, words, finding):
    assert findings_words([finding(severity) for severity in severities], checked=True) == words


def test_nothing_found_is_not_nothing_examined():
    assert findings_words([], checked=True).startswith("No finding")
    assert "not examined" in findings_words([], checked=False)
