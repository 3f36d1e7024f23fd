"""The step benchmarks count their work as the compiler does."""

import pytest

from benchmarks import cases

STEPS = [name for name, case in cases.CASES.items() if isinstance(case, cases.StepCase) and "large" not in name]
SIZES = {
    "views.image_size": 64,
    "run.batch_size": 3,
    **{f"{part}.{key}": value for part in ("model", "model.encoder", "tokenizer.encoder", "teacher")
       for key, value in {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}.items()},
    **{f"{part}.{key}": value for part in ("model.decoder", "tokenizer.decoder")
       for key, value in {"width": 16, "depth": 1, "num_heads": 2, "mlp_dim": 24}.items()},
    "model.early_layer": 1, "model.head_depth": 1, "model.codebook_size": 29, "tokenizer.codebook_size": 29,
    "model.num_classes": 7, "model.out_layers": (1, 1, 2, 2), "model.channels": 8, "model.aux_channels": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_the_arithmetic_is_that_of_the_program(name):
    step = cases.step_of(name, {"quick": True, "changes": SIZES})
    by_arithmetic = step.images * sum(part.flops for part in step.parts)
    # jax itself chooses the order in which it resizes rows and columns
    exact = 1e-3 if name == "segment" else 0.0
    assert step.images == 3 and step.traced_flops == pytest.approx(by_arithmetic, rel=exact, abs=0.0) and by_arithmetic
    if name not in ("tokenize", "extract"):  # theirs is frozen
        assert step.parameters == sum(part.params for part in step.parts)
