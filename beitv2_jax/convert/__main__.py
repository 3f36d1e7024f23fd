"""Convert weights from any layout to any other: python -m beitv2_jax.convert SOURCE DEST [--layout=...].

Without --layout, DEST becomes a run directory of ours, good for --config.tokenizer.run, --config.backbone.run,
--config.teacher.weights and --config.init_from.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

from beitv2_jax.errors import UserError, print_error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the conversion that `argv` describes; return 0, or 2 after a UserError was printed."""
    options = _parser().parse_args(argv)
    # weights are only moved here: no accelerator is claimed for it
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from beitv2_jax.convert import weights as weights_lib

    try:
        weights = weights_lib.read(options.source, image_size=options.image_size, num_heads=options.num_heads)
        if options.normalization and weights.normalization:
            told = tuple(text for text in weights.assumptions if not text.startswith("normalization="))
            weights = dataclasses.replace(weights, normalization=options.normalization, assumptions=told)
        left_out = weights_lib.write(weights, options.dest, options.layout)
    except UserError as error:
        print_error(f"Error: {error}")
        return 2
    print(summary(weights, options.dest, options.layout, left_out))
    return 0


def summary(weights, dest: str, layout: str, left_out: dict[str, str]) -> str:
    """Return what was converted, what was left out on either side and what was assumed, as text."""
    lines = [
        f"{weights.kind} in layout {weights.layout} -> {dest} in layout {layout}",
        f"{weights.num_params:,} parameters in {weights.num_arrays} arrays",
        *(f"  {name}: {value}" for name, value in weights.arguments.items()),
    ]
    for title, entries in (("dropped on reading", weights.dropped), ("without a place in DEST", left_out)):
        reasons: dict[str, list[str]] = {}
        for name, reason in entries.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"{title}: {names[0]}{more} ({reason})")
    return "\n".join([*lines, *(f"assumed: {text}" for text in weights.assumptions)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m beitv2_jax.convert", description=__doc__.partition("\n\n")[0])
    parser.add_argument("source", help="weights file (.pth, .safetensors, .npz), Hugging Face folder or run directory")
    parser.add_argument("dest", help="new file (official, timm) or new folder (huggingface, run)")
    parser.add_argument("--layout", default="run", choices=("run", "official", "timm", "huggingface"))
    parser.add_argument("--image_size", type=int, help="pixels; position tables and embeddings are resized to it")
    parser.add_argument("--num_heads", type=int, help="where neither a table, a config nor heads of 64 tell")
    parser.add_argument("--normalization", choices=("half", "imagenet", "clip"), help="input statistics of the weights")
    return parser


if __name__ == "__main__":
    sys.exit(main())
