from tests.lab.conftest import llama, prose, questions

__all__ = ["llama", "prose", "questions"]
