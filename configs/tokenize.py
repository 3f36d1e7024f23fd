"""Tokenize: write the code ids of fixed views of every image, so that MIM need not run the tokenizer.

Each image gets `num_views` crops that are functions of (seed, example id, view index), colour jitter included; the mim
stage reads them back when its `views`, seed and data source are the same and its `tokenizer.codes` is this stage's
workdir.

Command   python -m beitv2_jax.main --config=configs/tokenize.py --workdir=runs/codes --config.tokenizer.run=runs/vqkd
Published nothing: the released code runs the tokenizer inside every training step, on a new crop each epoch
Storage   a view of ImageNet-1k takes 410 bytes an image (196 ids of 13 bits, and the record around them): 0.5 GB
Workers   the same command any number of times, on any machines that share the workdir; see docs/target-cache.md
Check     --task=verify added to the command, when it has finished

Presets
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images)
  smoke       one view of generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.views.image_size = 160
    config.run.batch_size = 256


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.views.update(image_size=96, num_views=1)
    config.run.batch_size = 8
    config.efficiency.dtype = "float32"


PRESETS = {"imagenette": imagenette, "smoke": smoke}


def get_config(arg=""):
    """Return the settings that fit configs/mim.py, with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "tokenize",
            "seed": 0,
            "data": sections.data(),
            "views": sections.views(min_scale=0.2, num_views=16, color_jitter=0.4),
            "tokenizer": {"run": ""},  # required: run directory of the vqkd stage
            "output": {
                "shard_examples": 32768,  # examples that a worker leases at a time, and loses when it is killed
                "verify_examples": 64,  # that --task=verify computes again
            },
            "run": sections.inference_run(batch_size=256),
            "mesh": sections.mesh(),
            "efficiency": {"dtype": "bfloat16"},  # of the matrix products
        }
    )
    return apply_presets(config.lock(), arg, PRESETS)
