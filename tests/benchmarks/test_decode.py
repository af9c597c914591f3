from benchmarks.tables import render


def test_every_mixture_decodes_beside_lora_and_says_what_one_forward_says(record):
    (case,) = record("decode").cases
    assert [method.name for method in case.methods] == ["base", "lora", "mola", "molex", "mole"]
    assert max(case.equality.output, case.equality.gradient) < 1e-9
    assert case.equality.tensors == 4
    page = render(record("decode"))
    assert all(f"decode, {name}" in page for name in ("mola / lora", "molex / lora", "mole of 4 / lora"))
