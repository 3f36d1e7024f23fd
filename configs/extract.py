"""Extract: write the teacher's patch features of fixed views of every image, so that VQ-KD need not run the teacher.

Each image gets `num_views` crops that are functions of (seed, example id, view index); the vqkd stage reads them back
when its `views`, seed and data source are the same and its `teacher.features` is this stage's workdir.

Command   python -m beitv2_jax.main --config=configs/extract.py --workdir=runs/extract --config.teacher.weights=PATH
Published nothing: the released code runs the teacher inside every training step, on a new crop each epoch
Storage   a view of ImageNet-1k takes 101 kB an image (196 x 512 8-bit numbers and 196 scales): 135 GB
Workers   the same command any number of times, on any machines that share the workdir; see docs/target-cache.md
Check     --task=verify added to the command, when it has finished

Presets
  augreg      what the weights of timm's AugReg networks leave open; OpenAI CLIP, DINOv2 and SigLIP leave nothing
  dino        the same of DINO and DeiT
  openclip    the same of OpenCLIP
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images)
  smoke       one view of generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections


def augreg(config):
    config.teacher.normalization = "half"


def dino(config):
    config.teacher.normalization = "imagenet"


def openclip(config):
    config.teacher.activation = "gelu"


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.views.update(image_size=160, num_views=16)
    config.run.batch_size = 256


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.views.update(image_size=96, num_views=1)
    config.run.batch_size = 8
    config.efficiency.dtype = "float32"


PRESETS = {"augreg": augreg, "dino": dino, "openclip": openclip, "imagenette": imagenette, "smoke": smoke}


def get_config(arg=""):
    """Return the settings that fit configs/vqkd.py, with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "extract",
            "seed": 0,
            "data": sections.data(),
            "views": sections.views(min_scale=0.08, num_views=4),
            "teacher": sections.teacher(tokenizer_patch_size=16),  # weights are required; features are on this grid
            "output": {
                "dtype": "int8",  # with a scale per token; or 'bfloat16', 'float16', 'float32'
                "shard_examples": 8192,  # examples that a worker leases at a time, and loses when it is killed
                "verify_examples": 64,  # that --task=verify computes again
            },
            "run": sections.inference_run(batch_size=1024),
            "mesh": sections.mesh(),
            "efficiency": {"dtype": "bfloat16"},  # of the matrix products
        }
    )
    return apply_presets(config.lock(), arg, PRESETS)
