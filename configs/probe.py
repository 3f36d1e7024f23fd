"""Probe: measure what a frozen backbone knows about labels, by a linear layer and by nearest neighbours.

Paper     Peng et al., BEiT v2 (arXiv 2208.06366), linear probing; weighted kNN as in DINO (arXiv 2104.14294)
Command   python -m beitv2_jax.main --config=configs/probe.py --workdir=runs/probe --config.backbone.run=runs/mim
          backbone.run is a run of configs/mim.py, of another stage, or a published file; the image size and the layers
          follow from it
Published 8 GPUs; AdamW 4e-3 at batch 1024, weight decay 1e-4, 100 epochs (the released script, written for BEiT v1)
Expected  80.1 % for base after 300 epochs of pre-training; the layer and optimizer behind that number were not
          published, and the released script chooses on the validation set, which this stage never does

Presets
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images)
  smoke       a few steps on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.views.image_size = 160
    config.probe.batch_size = 256
    config.run.batch_size = 256


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.views.image_size = 96
    config.probe.update(layers=(2, 3), duration="4 steps", batch_size=8, learning_rates=(1e-3,), knn_neighbors=3)
    config.run.batch_size = 8
    config.efficiency.dtype = "float32"


PRESETS = {"imagenette": imagenette, "smoke": smoke}


def get_config(arg=""):
    """Return the settings for ImageNet-1k with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "probe",
            "seed": 0,
            "data": sections.labelled_data(),
            "views": {"image_size": 224},  # pixels; unless set, that of the backbone
            "backbone": {"run": ""},  # required: a run directory or a file of any layout
            "probe": {
                "protocol": "ours",  # or one of published tables: dinov3, capi, ep, beit (docs/evaluation.md)
                "layers": (9, 12),  # blocks, from 1, whose tokens are tried; unless set, the early layer and the last
                "duration": "100 epochs",  # of the linear heads; unless set, that of the protocol
                "batch_size": 1024,  # of the linear heads; unless set, that of the protocol
                "learning_rates": (1e-3, 4e-3, 1.6e-2),  # this key and those below are of the protocol ours alone
                "weight_decay": 1e-4,
                "knn_neighbors": 20,
                "knn_temperature": 0.07,
                "validation_fraction": 0.1,  # of the training split, on which layer and rate are chosen
            },
            "run": sections.inference_run(batch_size=1024),  # of the feature pass
            "mesh": sections.mesh(),
            "efficiency": {"dtype": "bfloat16"},  # of the matrix products
        }
    )
    return apply_presets(config.lock(), arg, PRESETS)
