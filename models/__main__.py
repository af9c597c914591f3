"""`python -m models`; torch is imported when Ctrl-C is in hand."""

from lamella_command import take_over


def _run() -> None:
    from models.command import main

    raise SystemExit(main())


take_over(_run)
