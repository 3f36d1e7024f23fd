r"""Linear segmentation: learn a linear layer on the patch features of a frozen backbone, pixel by pixel.

Paper     the linear segmentation of DINOv3 (Simeoni et al., arXiv 2508.10104), after its code
Command   python -m beitv2_jax.main --config=configs/segment_linear.py --workdir=runs/linear \
              --config.backbone.run=runs/mim
          backbone.run is a run of configs/mim.py, of another stage, or a published file
          data.source is the folder of ADEChallengeData2016 as published; docs/dense.md describes other sets
          the same architecture before any training, to compare with: --config.backbone.random=true
Published ADE20K (20 210 training images, 150 classes), 8 GPUs, global batch 16, 40 000 steps of AdamW at 1e-3 with a
          warm-up and a cosine to zero; batch norm with dropout before the layer; windows of 512, every 341 pixels.
          The weight decay and the 1 500 steps of warm-up are those of a later user of the protocol
Expected  no value of BEiT v2 is known

Presets
  voc         PASCAL VOC 2012 in its own folders: 21 classes with the background
  cityscapes  Cityscapes in its own folders: the 19 classes of its benchmark, from the numbers of *_labelIds.png
  smoke       four steps on a toy network and generated pictures: one object each, and its surroundings
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.labels.update(offset=0, ignored=())
    config.views.update(image_size=96, long_side=144, short_side=112)
    config.evaluation.update(long_side=160, short_side=112, stride=64, batch_size=8)
    config.model.num_classes = 11
    config.optim.warmup = "2 steps"
    config.run.update(batch_size=8, duration="4 steps", log_every="1 step")
    config.run.update(checkpoint_every="2 steps", keep_every="4 steps", eval_every="4 steps")
    config.efficiency.dtype = "float32"


PRESETS = {"voc": sections.voc, "cityscapes": sections.cityscapes, "smoke": smoke}


def get_config(arg=""):
    """Return the settings for ADE20K with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "segment_linear",
            "seed": 0,
            "data": sections.data(source="folder:ADEChallengeData2016"),  # a source with label maps
            "labels": sections.labels(),
            "views": sections.label_map_crops(max_class_fraction=1.0),
            "evaluation": sections.windows(),
            "model": {
                "num_classes": 150,  # unless set, that of the source
                "dropout_rate": 0.1,  # of whole channels
            },
            "backbone": {
                "run": "",  # required: a run directory or a file of any layout
                "layer": 12,  # block, from 1, whose patch tokens are taken; unless set, the last
                "random": False,  # the architecture of the run at random weights, to compare with
            },
            "optim": sections.optim(peak_lr=1e-3, min_lr=0.0, warmup="1500 steps", weight_decay=1e-3, clip_norm=35.0),
            "run": sections.run(
                batch_size=16,
                duration="40000 steps",
                checkpoint_every="2000 steps",
                keep_every="40000 steps",
                eval_every="40000 steps",
            ),
            "mesh": sections.mesh(),
            "efficiency": {
                "dtype": "bfloat16",  # of the matrix products of the backbone
                "accumulation_steps": 1,  # micro-batches per step
            },
        }
    )
    # the weight decay follows a cosine to its end value, and is constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
