"""Convert BEiT weights between layouts: python -m beitv2_jax.convert SOURCE DEST [--layout=...]."""

import argparse
import os
import sys
from collections.abc import Sequence

from beitv2_jax.choices import NORMALIZATIONS
from beitv2_jax.command_line import Parser, report_errors
from beitv2_jax.config.paths import refuse_remote
from beitv2_jax.convert.files import group_by_reason, read_config

_DESCRIPTION = """\
Convert BEiT weights between layouts.

Without --layout, DEST becomes a run directory of this package. Use it as
--config.tokenizer.run, --config.backbone.run, --config.teacher.weights or
--config.init_from.
"""
_EXAMPLES = """\
examples:
  # released weights to a run directory
  python -m beitv2_jax.convert beitv2_base_patch16_224_pt1k.pth runs/base
  # a run to a file in the layout of the released PyTorch code
  python -m beitv2_jax.convert runs/mim mim.pth --layout=official
  # a classifier to a Hugging Face folder, with positions resized to 384 pixels
  python -m beitv2_jax.convert runs/finetune hub --layout=huggingface --image_size=384
  # a compiled function for CPUs, GPUs and TPUs that needs jax alone
  python -m beitv2_jax.convert runs/finetune classifier --layout=stablehlo
"""


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the conversion that `argv` describes."""
    options = _parser().parse_args(argv)
    refuse_remote("SOURCE", options.source, weights=True)
    refuse_remote("DEST", options.dest)
    # converting needs no accelerator, so none is initialised
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from beitv2_jax.convert.model_card import Licenses
    from beitv2_jax.convert.weights import read
    from beitv2_jax.convert.writing import write

    weights = read(
        options.source,
        image_size=options.image_size,
        num_heads=options.num_heads,
        normalization=options.normalization,
        average=options.weights == "average",
        state_dict=options.state_dict,
    )
    licenses = Licenses(options.license, options.teacher_license, options.teacher_origin)
    not_written = write(weights, options.dest, options.layout, licenses)
    try:
        print(summary(weights, options.dest, options.layout, not_written), flush=True)
        if options.layout == "stablehlo":
            print(f"{options.dest} expires: {read_config(options.dest, 'manifest.json')['expiry']}.", flush=True)
    except BrokenPipeError:
        # the reader, such as `head`, has closed the pipe; the weights are written, and the exit flushes once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def summary(weights, dest: str, layout: str, not_written: dict[str, str]) -> str:
    """Return the text that lists what was converted, what was left out with the reasons, and what was assumed."""
    lines = [
        f"{weights.kind} in layout {weights.layout} -> {dest} in layout {layout}",
        f"{weights.num_params:,} parameters in {weights.num_arrays} arrays",
        *(f"  {name}: {value}" for name, value in weights.arguments.items()),
    ]
    lines += [f"not read: {text}" for text in group_by_reason(weights.dropped)]
    lines += [f"not written: {text}" for text in group_by_reason(not_written)]
    lines += [f"assumed: {text}" for text in weights.assumptions]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m beitv2_jax.convert", description=_DESCRIPTION, epilog=_EXAMPLES)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="weights file (.pth, .safetensors, .npz), folder of Hugging Face or timm, run directory, "
        "RUN/checkpoints/STEP, or hf:OWNER/NAME",
    )
    parser.add_argument(
        "dest", metavar="DEST", help="new file (official, timm) or new folder (all layouts but official)"
    )
    layouts = ("run", "official", "timm", "huggingface", "stablehlo", "onnx")
    parser.add_argument("--layout", default="run", choices=layouts, help="of DEST (default: run)")
    parser.add_argument(
        "--image_size", type=int, metavar="PIXELS", help="resize position embeddings and tables to this image size"
    )
    parser.add_argument(
        "--num_heads", type=int, metavar="N", help="attention heads, for weights without position tables or config.json"
    )
    parser.add_argument(
        "--normalization",
        choices=NORMALIZATIONS,
        help="input normalisation that the weights were trained with (tokenizers have a fixed one)",
    )
    parser.add_argument(
        "--state_dict",
        default="",
        metavar="NAME",
        help="of a file with several state dicts: the one to read, such as model_ema, teacher or model.teacher",
    )
    parser.add_argument(
        "--weights",
        default="last",
        choices=("last", "average"),
        help="of a run: those of its last step, or their average (optim.weight_average)",
    )
    parser.add_argument(
        "--license", default="", metavar="ID", help="of the weights, for the model card, such as apache-2.0"
    )
    parser.add_argument(
        "--teacher_license", default="", metavar="ID", help="of the teacher, in place of what the runs have kept of it"
    )
    parser.add_argument(
        "--teacher_origin", default="", metavar="TEXT", help="where the teacher was published, likewise"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
