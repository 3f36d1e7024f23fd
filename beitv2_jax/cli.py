"""The command `beitv2`: one verb for each program of the package."""

import importlib
import sys

from beitv2_jax import __version__
from beitv2_jax.errors import UserError, did_you_mean, print_error

VERBS = {
    "train": ("beitv2_jax.main", "run or resume a stage, or predict what it needs on other chips"),
    "evaluate": ("beitv2_jax.evaluate", "measure accuracy, reconstruction or IoU of trained weights on a data set"),
    "robustness": ("beitv2_jax.robustness", "measure a classifier of ImageNet on its successors, such as ImageNet-C"),
    "predict": ("beitv2_jax.predict", "predict classes of images, or of their pixels"),
    "embed": ("beitv2_jax.embed", "write the features of images to a file"),
    "atlas": ("beitv2_jax.atlas", "write a page that shows every code of a tokenizer, or of two"),
    "convert": ("beitv2_jax.convert.__main__", "convert weights between layouts"),
    "report": ("beitv2_jax.runners.report", "write a page on a run, or on several side by side"),
    "prepare": ("beitv2_jax.data.prepare.__main__", "prepare ImageNet as a TFDS data set"),
}
"""Verb -> the module that has its `main`, and what it does."""
USAGE = f"""\
usage: beitv2 VERB [ARGUMENTS]

BEiT v2 in JAX and Flax, version {__version__}. The verbs:

{chr(10).join(f"  {verb:<11}{help_text}" for verb, (_, help_text) in VERBS.items())}

beitv2 VERB --help describes the arguments. For example:

  beitv2 train --config=configs/quickstart.py --workdir=runs/quickstart
"""


def main() -> int | None:
    """Run the verb that the command line names; return 2 after printing what is wrong with it."""
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help", "--version"):
        print(__version__ if verb == "--version" else USAGE)
        return 0
    if verb not in VERBS:
        error = UserError(
            f"There is no verb {verb!r}.",
            did_you_mean(verb, VERBS),
            f"Write beitv2 VERB with one of {', '.join(VERBS)}.",
        )
        print_error(f"Error: {error}")
        return 2
    sys.argv = [f"beitv2 {verb}", *arguments]
    return importlib.import_module(VERBS[verb][0]).main()
