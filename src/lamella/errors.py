"""The errors a user can mend: each message is one paragraph that names the culprit and the way out."""


class LamellaError(ValueError):
    """Something the caller gave cannot be used. The command prints the message alone and exits with status 2."""


class CannotMergeError(LamellaError, NotImplementedError):
    """A layer whose experts are routed per token has no single weight it could be merged into."""
