"""`python -m lamella` is the command."""

from lamella.cli import main

main()
