"""Trained models under noise at test time, side by side."""
