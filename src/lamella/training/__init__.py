"""Runs on transformers' Trainer: settings, methods, one run, and comparisons of runs.

Import from the modules (`lamella.training.run`, ...): this one stays empty so that `import lamella` stays light.
"""
