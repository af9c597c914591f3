from benchmarks.tables import render


def test_every_size_and_key_is_timed_beside_the_ordinary_composition(record):
    cases = record("library").cases
    assert [case.name for case in cases] == ["forward", "training step"]
    for case in cases:
        assert [method.name for method in case.methods] == [
            "ordinary", "arrow, K=2", "arrow, K=4", "spectrum, K=2", "spectrum, K=4",
        ]  # fmt: skip
        assert max(case.equality.output, case.equality.gradient) < 1e-9
        assert case.method("arrow, K=2").trainable_parameters == case.method("arrow, K=4").trainable_parameters
    assert "training step, arrow, K=4 / ordinary" in render(record("library"))
