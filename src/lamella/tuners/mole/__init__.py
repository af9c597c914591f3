"""MOLE: LoRAs that are trained already, composed by learned routers that read the LoRAs' outputs (arXiv 2404.13628)."""
