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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.endswith("stored") else pytest.mark.long) for name in STEPS]
)
def test_a_step_counts_its_flops_by_component(name):
    step = cases.step_of(name, {"quick": True, "changes": SIZES})
    assert step.images == 3 and step.parameters > 0
    flops = {component: count / 3 for component, count in step.flops.items()}
    # 4 x 4 patches of 16 pixels and [CLS], in blocks of width 16 whose MLP has width 24
    block = 2 * 17 * (4 * 16**2 + 2 * 16 * 24) + 2 * (2 * 17**2 * 16)
    expected = {
        "mim_base_stored": {"backbone/blocks": 3 * 2 * block},
        "vqkd_stored": {"encoder/blocks": 3 * 2 * block, "decoder/blocks": 3 * block},
        "finetune": {"backbone/blocks": 3 * 2 * block, "head": 3 * 2 * 16 * 7},
        "segment": {"backbone/blocks": 3 * 2 * block},
    }
    assert set(expected) < set(STEPS)
    for component, count in expected.get(name, {}).items():
        assert flops[component] == count
