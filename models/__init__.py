"""Scripts that make small models with a mixture of experts from demo assets: `make models`, `python -m models NAME`."""
