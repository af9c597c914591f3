"""The project's studies: their recipes, what is kept of them, and the pages of evidence."""
