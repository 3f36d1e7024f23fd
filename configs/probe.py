"""Probe: measure what the frozen backbone of a mim run knows about labels, by a linear layer and by nearest neighbours.

Paper     Peng et al., BEiT v2 (arXiv 2208.06366), linear probing; weighted kNN as in DINO (arXiv 2104.14294)
Command   python -m beitv2_jax.main --config=configs/probe.py --workdir=runs/probe --config.backbone.run=runs/mim
Published 8 GPUs; AdamW 4e-3 at batch 1024, weight decay 1e-4, 100 epochs (the released script, written for BEiT v1)
Expected  80.1 % for base after 300 epochs of pre-training; the layer and optimizer behind that number were not
          published, and the released script chooses on the validation set, which this stage never does

Presets
  large       layers 21 and 24 of ViT-L instead of 9 and 12 of ViT-B
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images)
  smoke       a few steps on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets


def large(config):
    config.probe.layers = (20, 23)


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.views.image_size = 160
    config.probe.batch_size = 256
    config.run.batch_size = 256


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.views.image_size = 96
    config.probe.update(layers=(1, 2), duration="4 steps", batch_size=8, learning_rates=(1e-3,), knn_neighbors=3)
    config.run.batch_size = 8
    config.efficiency.dtype = "float32"


PRESETS = {"large": large, "imagenette": imagenette, "smoke": smoke}


def get_config(arg=""):
    """Return the settings for ImageNet-1k with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "probe",
            "seed": 0,
            "data": {
                "source": "tfds:imagenet2012",  # or 'folder:PATH', 'embedded'
                "train_split": "train",
                "eval_split": "validation",
                "data_dir": "",  # where tfds looks; '' is its default
                "num_threads": 16,
                "num_workers": 0,  # processes that prepare batches in place of the threads
                "max_bad_share": 0.001,  # of the records may be unreadable; above it the run stops
            },
            "views": {"image_size": 224},  # pixels, that of the run
            "backbone": {"run": ""},  # required: run directory of the mim stage
            "probe": {
                "layers": (8, 11),  # blocks whose tokens are tried, counted from 0: the early layer and the last
                "duration": "100 epochs",
                "batch_size": 1024,
                "learning_rates": (1e-3, 4e-3, 1.6e-2),
                "weight_decay": 1e-4,
                "knn_neighbors": 20,
                "knn_temperature": 0.07,
                "validation_share": 0.1,  # share of the training split on which layer and rate are chosen
            },
            "run": {
                "batch_size": 1024,  # of the feature pass
                "hang_timeout": 600,  # seconds without a move after which a process ends; 0: never
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "efficiency": {"dtype": "bfloat16"},  # of the matrix products
        }
    )
    return apply_presets(config.lock(), arg, PRESETS)
