"""Which layers of a pretrained model hold which properties of a text, and whether a router picks those layers."""
