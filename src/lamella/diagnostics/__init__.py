"""What doctor and preflight examine: one family of checks per file, each adding to an `Examination`."""
