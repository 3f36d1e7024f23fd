"""Dense: measure what the patch features of a frozen backbone know about pixels, by nearest patches and by regression.

Paper     the dense evaluation of CAPI (Darcet et al., arXiv 2502.08769), after its code
Command   python -m beitv2_jax.main --config=configs/dense.py --workdir=runs/dense --config.backbone.run=runs/mim
          backbone.run is a run of configs/mim.py, of another stage, or a published file
          data.source is the folder of ADEChallengeData2016 as published; docs/dense.md describes other sets
Published images of 224 pixels; a tenth of the training images choose the number of neighbours and their distance, and
          the strength of the regression; ADE20K ignores the numbers 0 and 255
Expected  CAPI measured BEiT, not BEiT v2

Presets
  voc         PASCAL VOC 2012 in its own folders: 21 classes with the background
  cityscapes  Cityscapes in its own folders: the 19 classes of its benchmark, from the numbers of *_labelIds.png
  smoke       a toy network's patches on generated pictures: one object each, and its surroundings
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections

STRENGTHS = tuple(10 ** (11 * step / 7 - 6) for step in range(8))


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.labels.update(offset=0, ignored=())
    config.views.image_size = 96
    config.model.num_classes = 11
    config.dense.update(neighbors=(1, 3), strengths=(0.01, 1.0), max_iterations=20, max_patches=300)
    config.run.batch_size = 8
    config.efficiency.dtype = "float32"


PRESETS = {"voc": sections.voc, "cityscapes": sections.cityscapes, "smoke": smoke}


def get_config(arg=""):
    """Return the settings for ADE20K with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "dense",
            "seed": 0,
            "data": sections.data(source="folder:ADEChallengeData2016"),  # a source with label maps
            "labels": sections.labels(),
            "views": {"image_size": 224},  # pixels; unless set, the next that the patches of the backbone divide
            "model": {"num_classes": 150},  # unless set, that of the source
            "backbone": {
                "run": "",  # required: a run directory or a file of any layout
                "layer": 12,  # block, from 1, whose patch tokens are taken; unless set, the last
            },
            "dense": {
                "neighbors": (1, 3, 10, 30),  # nearest patches that vote; tried with cosine and Euclidean distance
                "strengths": STRENGTHS,  # of the regression: inverses of its penalty, from 1e-6 to 1e5
                "max_iterations": 1000,  # of its L-BFGS
                "validation_fraction": 0.1,  # of the training images, on which these are chosen
                "max_patches": 0,  # of the training images, drawn once; 0: all
            },
            "run": sections.inference_run(batch_size=128),  # of the feature pass
            "mesh": sections.mesh(),
            "efficiency": {"dtype": "bfloat16"},  # of the matrix products of the backbone
        }
    )
    return apply_presets(config.lock(), arg, PRESETS)
