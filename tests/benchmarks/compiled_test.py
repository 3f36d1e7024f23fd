"""A compiled step, described by kinds of operations, bytes and products."""

from benchmarks import compiled

SIZES = ("views.image_size=32", "run.batch_size=2", "tokenizer.encoder.width=16", "tokenizer.encoder.depth=1",
         "tokenizer.encoder.num_heads=2", "tokenizer.encoder.mlp_dim=24", "tokenizer.codebook_size=29")  # fmt: skip
PROGRAM = """HloModule step
%half (p: f32[5,7]) -> bf16[5,7] {
  %p = f32[5,7]{1,0} parameter(0)
  ROOT %c = bf16[5,7]{1,0} convert(%p)
}
%turned (p: f32[5,7]) -> f32[7,5] {
  %p.1 = f32[5,7]{1,0} parameter(0)
  ROOT %t = f32[7,5]{1,0} transpose(%p.1), dimensions={1,0}
}
%product (p: bf16[5,7], q: bf16[7,3]) -> f32[5,3] {
  %p.2 = bf16[5,7]{1,0} parameter(0)
  %q.2 = bf16[7,3]{1,0} parameter(1)
  %d = f32[5,3]{1,0} dot(%p.2, %q.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %n = f32[5,3]{1,0} negate(%d)
}
ENTRY %main (a: f32[5,7], b: bf16[7,3]) -> f32[5,3] {
  %a = f32[5,7]{1,0} parameter(0)
  %b = bf16[7,3]{1,0} parameter(1)
  %half.1 = bf16[5,7]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%half, metadata={op_name="jit(step)/a_12/cast"}
  %turned.1 = f32[7,5]{1,0} fusion(%a), kind=kLoop, calls=%turned
  %kernel = f32[7,5]{1,0} custom-call(%turned.1), custom_call_target="tpu_custom_call", backend_config={"x":1}
  ROOT %end = f32[5,3]{1,0} fusion(%half.1, %b), kind=kOutput, calls=%product
}
"""


def test_operations_have_kinds_and_bytes_of_memory_alone():
    found = list(compiled.operations(compiled.read_program(PROGRAM)))
    assert [(one.kind, one.bytes) for one in found] == [
        ("conversions", 4 * 35),  # what it yields stays on the core
        ("copies and transposes", 2 * 4 * 35),
        ("tpu_custom_call", 2 * 4 * 35),
        ("products, with what is fused to them", 2 * 21 + 4 * 15),
    ]
    assert found[0].source == "jit(step)/a_12/cast" and found[0].result == "bf16[5,7]"


def test_the_command_tells_of_a_step(capsys, tmp_path):
    changes = [word for size in SIZES for word in ("--set", size)]
    compiled.main(["tokenize", "--quick", f"--text={tmp_path}/step.txt", *changes])
    printed = capsys.readouterr().out
    assert "| products, with what is fused to them |" in printed and "GB a step" in printed
    assert (tmp_path / "step.txt").read_text().startswith("HloModule")
