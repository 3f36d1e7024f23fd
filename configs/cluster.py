"""Cluster: make a tokenizer without training one, from k-means clusters of stored teacher features.

The code of a patch is the centroid nearest to the direction of its teacher feature. Every stage that takes a tokenizer
takes this one; it keeps the weights of its teacher, which then runs wherever images are tokenized.

Command   python -m beitv2_jax.main --config=configs/cluster.py --workdir=runs/cluster
          --config.teacher.features=DIR, the workdir of configs/extract.py
Published nothing: a baseline that a trained tokenizer has to beat
Time      8192 clusters of 262 144 tokens are 25 x 1.1e12 multiplications with features of 512 numbers

Presets
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images) with 1 024 codes
  smoke       three rounds on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.views.update(image_size=160, num_views=16)
    config.model.codebook_size = 1024


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.views.update(image_size=96, num_views=1)
    config.model.codebook_size = 32
    config.clustering.iterations = 3
    config.run.batch_size = 8


PRESETS = {"imagenette": imagenette, "smoke": smoke}


def get_config(arg=""):
    """Return the settings that fit configs/extract.py, with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "cluster",
            "seed": 0,  # of the features; it also draws the tokens and the first centroids
            "data": sections.data(),
            "views": sections.views(min_scale=0.08, num_views=4),
            # features: required, workdir of the extract stage; weights: of the teacher, '': where that stage found them
            "teacher": {"features": "", "weights": ""},
            "model": {"patch_size": 16, "codebook_size": 8192},
            "clustering": {
                "max_tokens": 262144,  # tokens that are clustered; of more a part is drawn
                "iterations": 25,  # rounds of k-means
                "components": 0,  # principal components that the features are projected onto; 0: all of the feature
            },
            "run": sections.inference_run(batch_size=1024),
        }
    )
    return apply_presets(config.lock(), arg, PRESETS)
