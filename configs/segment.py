"""Stage 3, segmentation: give every pixel a class, by UPerNet on the pre-trained backbone, all of it trained further.

Paper     Peng et al., BEiT v2 (arXiv 2208.06366), 3.1; UPerNet is Xiao et al. 2018 (arXiv 1807.10221)
Command   python -m beitv2_jax.main --config=configs/segment.py --workdir=runs/segment --config.init_from=runs/mim
          init_from is a run of configs/mim.py or configs/finetune.py, or a published file; '': random weights
          data.source is the folder of ADEChallengeData2016 as published: images/ and annotations/, training/ and
          validation/ in each; docs/data.md describes other sets
          one look at each image, without windows: --config.evaluation.long_side=512 (short_side stays 512)
          several scales and mirrored views: --config.evaluation.scales='(0.5, 0.75, 1.0, 1.25, 1.5, 1.75)'
          --config.evaluation.flip=true
Published ADE20K (20 210 training images, 150 classes), 8 GPUs, global batch 16, 160 000 steps; time not published
Expected  mean IoU on the 2 000 validation images: base1600 (this file) 53.1, base21k 53.5, large1600 56.7,
          large21k 57.5 (mean accuracy 68.8, pixel accuracy 86.2)

Relative positions have one table a block, enlarged to a grid of 32 x 32; [CLS] takes part in the attention and is not
used further. The rate falls in a straight line to zero, after a linear warm-up that multiplies it. Unlabelled pixels
have no loss but count in its mean, as released (loss.count_unlabelled). Batch norm takes its statistics over the whole
batch; with efficiency.accumulation_steps it takes them over each micro-batch.

Presets
  base1600   ViT-B/16 pre-trained on ImageNet-1k alone, as without any preset
  base21k    ViT-B/16 fine-tuned on ImageNet-21k before
  large1600  ViT-L/16 pre-trained on ImageNet-1k alone
  large21k   ViT-L/16 fine-tuned on ImageNet-21k before
  smoke      four steps of a toy model on generated pictures: one object each, and its surroundings
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections
from beitv2_jax.sizes import SIZES


def _recipe(size, *, out_layers, peak_lr, layer_decay, drop_path_rate, layer_scale_init):
    def preset(config):
        config.model.update(SIZES[size], drop_path_rate=drop_path_rate, layer_scale_init=layer_scale_init)
        config.model.update(out_layers=out_layers, channels=SIZES[size]["width"])
        config.optim.update(peak_lr=peak_lr, layer_decay=layer_decay)

    return preset


BASE = {"out_layers": (4, 6, 8, 12), "peak_lr": 5e-5, "drop_path_rate": 0.15, "layer_scale_init": 0.1}
LARGE = {"out_layers": (8, 12, 16, 24), "layer_decay": 0.9, "drop_path_rate": 0.2, "layer_scale_init": 1e-6}


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.labels.update(offset=0, ignored=())
    config.views.update(image_size=96, long_side=144, short_side=112)
    config.evaluation.update(long_side=160, short_side=112, stride=64, batch_size=8)
    config.model.update(width=64, depth=2, num_heads=2, mlp_dim=128, num_classes=11)
    config.model.update(out_layers=(1, 1, 2, 2), channels=16, aux_channels=8)
    config.optim.update(warmup="2 steps", peak_lr=1e-3, layer_decay=0.9)
    config.run.update(batch_size=8, duration="4 steps", log_every="1 step")
    config.run.update(checkpoint_every="2 steps", keep_every="4 steps", eval_every="4 steps")
    config.efficiency.dtype = "float32"


PRESETS = {
    "base1600": _recipe("base", layer_decay=0.75, **BASE),
    "base21k": _recipe("base", layer_decay=0.85, **BASE),
    "large1600": _recipe("large", peak_lr=4e-5, **LARGE),
    "large21k": _recipe("large", peak_lr=3e-5, **LARGE),
    "smoke": smoke,
}


def get_config(arg=""):
    """Return the published ADE20K recipe (base, after 1600 epochs) with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "segment",
            "seed": 0,
            # weights to start from: a run directory or a file of any layout, whose sizes the model takes unless they
            # are set here; '': random weights
            "init_from": "",
            "data": sections.data(source="folder:ADEChallengeData2016"),  # a source with label maps
            "labels": sections.labels(),
            "views": sections.label_map_crops(
                max_class_fraction=0.75,
                distortion={
                    "brightness": 32.0,  # levels
                    "contrast": 0.5,
                    "saturation": 0.5,
                    "hue": 0.1,  # turns
                    "probability": 0.5,  # of each of the four
                },
            ),
            "evaluation": sections.windows(),
            "normalization": "imagenet",
            "loss": {
                "auxiliary_weight": 0.4,
                "count_unlabelled": True,  # in the mean over pixels, where they are 0
            },
            "model": sections.backbone(
                position="relative",  # a table per block
                layer_scale_init=0.1,
                drop_path_rate=0.15,
                num_classes=150,  # unless set, that of the source
                out_layers=(4, 6, 8, 12),  # blocks, counted from 1, that give the four feature maps
                channels=768,  # of the head
                aux_channels=256,
                dropout_rate=0.1,
            ),
            "optim": sections.optim(schedule="linear", peak_lr=5e-5, min_lr=0.0, warmup="1500 steps", layer_decay=0.75),
            "run": sections.run(
                batch_size=16,
                duration="160000 steps",
                checkpoint_every="2000 steps",
                keep_every="16000 steps",
                eval_every="16000 steps",
            ),
            "mesh": sections.mesh(),
            "efficiency": sections.efficiency(),
        }
    )
    # the weight decay follows a cosine to its end value, and is constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
