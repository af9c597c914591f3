from tests.lab.conftest import bert, llama, prose, questions, run_folder

__all__ = ["bert", "llama", "prose", "questions", "run_folder"]
