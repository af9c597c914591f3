"""One run: its settings, training, scores and folder."""
