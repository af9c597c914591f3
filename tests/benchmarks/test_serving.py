from benchmarks.tables import render


def test_every_way_is_timed_and_a_limit_of_all_experts_is_none(record):
    tiny, wide = record("serving").cases
    assert [method.name for method in tiny.methods] == ["off", "4 experts", "4, next choice", "4, at random"]
    assert max(max(case.equality.output, case.equality.gradient) for case in (tiny, wide)) < 1e-9
    assert all(method.perplexity for method in tiny.methods)
    assert not any(method.perplexity for method in wide.methods)
    page = render(record("serving"))
    assert "tiny-moe, 8 experts, top-2: tokens/s, 4 experts / off" in page
    assert "tiny-moe, 8 experts, top-2: perplexity, 4 experts / off" in page
