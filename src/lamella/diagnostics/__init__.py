"""doctor and preflight: a family of checks per module, each adding to a `lamella.findings.Examination`."""
