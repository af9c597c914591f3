"""`python -m lamella` is the command."""

from lamella_command import main

main()
