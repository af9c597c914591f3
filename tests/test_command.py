"""The start of the command, beside the package."""

import signal
import sys

import pytest

import lamella_command


@pytest.fixture
def start(monkeypatch, capsys):
    """Run the start of the command in this process; gives exit status, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lamella", *words])
        with pytest.raises(SystemExit) as exit_:
            lamella_command.main()
        return exit_.value.code or 0, *capsys.readouterr()

    before = signal.getsignal(signal.SIGINT)
    yield run
    signal.signal(signal.SIGINT, before)  # which the command has taken over


def test_what_is_missing_is_named_with_what_to_install(start, monkeypatch):
    right = lamella_command.find_spec
    monkeypatch.setattr(lamella_command, "find_spec", lambda name: None if name in ("rich", "pandas") else right(name))
    status, out, err = start("--help")
    assert (status, out) == (2, "")
    assert err == "The lamella command needs pandas, rich, not installed here: pip install 'lamella[lab]'.\n"


def test_a_library_that_is_loaded_stays_as_it_is(start):
    import lamella

    status, out, _ = start("allocate", "2", "--layers", "2")
    assert (status, out.split()[0]) == (0, "2-2")
    assert sys.modules["lamella"] is lamella


def test_the_library_is_filled_when_a_command_runs(monkeypatch):
    monkeypatch.delitem(sys.modules, "lamella")
    load = lamella_command._postponed_library()
    package = sys.modules["lamella"]
    assert not hasattr(package, "MolaConfig")
    monkeypatch.setattr(package.__spec__.loader, "exec_module", lambda module: setattr(module, "MolaConfig", 1))
    load()
    assert package.MolaConfig == 1
