from tests.lab.conftest import bert, questions

__all__ = ["bert", "questions"]
