"""The project's studies: their recipes, what is kept of them, and the page docs/evidence.md."""
