"""Runs on transformers' Trainer: settings, methods, one run, and studies of many.

Import from the modules (`lamella.training.run`, ...): this one stays empty so that `import lamella` stays light.
"""
