"""Stage 3, fine-tuning: classify images with the pre-trained backbone, all of it trained further.

Paper     Peng et al., BEiT v2 (arXiv 2208.06366), 3.1; augmentation after BEiT and DeiT
Command   python -m beitv2_jax.main --config=configs/finetune.py --workdir=runs/finetune --config.init_from=runs/mim
          init_from is a run of configs/mim.py or a published file; '': random weights
          at 384 pixels: --config.views.image_size=384, position tables are interpolated, evaluation sees whole images
Published ImageNet-1k, 8 GPUs, global batch 1024 (ImageNet-21k: 32 GPUs, 4096); time not published
Expected  top-1 on ImageNet-1k: base1600 (this file) 85.5 %, base300 85.0 %, large300 86.6 %, large1600 87.3 %;
          after fine-tuning on ImageNet-21k first: base21k 86.5 % (top-5 98.0 %), large21k 88.4 % (98.6 %)

The learning rates are absolute. Relative positions have one table a block; the shared one of pre-training is copied to
each. Patch tokens are averaged, [CLS] is not used, and the norm after them and the head start anew. The warm-up of the
presets without 21k in their name is that of the published commands for ImageNet-21k; theirs is not published. Where
RandAugment is on, colour jitter is off, as released. Data whose images may have several classes are learnt with a
sigmoid for each class (docs/photographs.md).

Presets
  base300    ViT-B/16 pre-trained for 300 epochs
  base1600   ViT-B/16 pre-trained for 1600 epochs, as without any preset
  base21k    ViT-B/16 fine-tuned on ImageNet-21k before; no mixup and CutMix
  large300   ViT-L/16 pre-trained for 300 epochs
  large1600  ViT-L/16 pre-trained for 1600 epochs
  large21k   ViT-L/16 fine-tuned on ImageNet-21k before; no mixup and CutMix
  21kbase    the step before base21k: ViT-B/16 on the 21 841 classes of ImageNet-21k
  21klarge   likewise before large21k
  imagenette ten classes of ImageNet at 160 pixels (9 469 images), ViT-S/16; unpublished, small enough for one GPU
  smoke      four steps of a toy model on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections
from beitv2_jax.sizes import SIZES

NO_MIXING = {"mixup": 0.0, "cutmix": 0.0}


def _recipe(size, *, epochs, warmup, peak_lr, layer_decay, drop_path_rate, augment=None):
    def preset(config):
        config.model.update(SIZES[size], drop_path_rate=drop_path_rate)
        config.optim.update(peak_lr=peak_lr, warmup=f"{warmup} epochs", layer_decay=layer_decay)
        config.run.duration = f"{epochs} epochs"
        config.augment.update(augment or {})

    return preset


def _intermediate(size, drop_path_rate):
    recipe = _recipe(size, epochs=90, warmup=20, peak_lr=6e-4, layer_decay=0.75, drop_path_rate=drop_path_rate)

    def preset(config):
        recipe(config)
        config.data.source = "folder:imagenet21k"  # where the prepared set lies; there is no public TFDS set of it
        config.model.num_classes = 21841
        config.run.batch_size = 4096

    return preset


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.views.image_size = 160
    config.model.update(SIZES["small"], num_classes=10)
    config.run.update(batch_size=256)


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.views.image_size = 96
    config.model.update(width=64, depth=2, num_heads=2, mlp_dim=128, num_classes=10)
    config.optim.warmup = "2 steps"
    config.run.update(batch_size=8, duration="4 steps", log_every="1 step")
    config.run.update(checkpoint_every="2 steps", keep_every="4 steps", eval_every="4 steps")
    config.efficiency.dtype = "float32"


PRESETS = {
    "base300": _recipe("base", epochs=100, warmup=20, peak_lr=5e-4, layer_decay=0.65, drop_path_rate=0.1),
    "base1600": _recipe("base", epochs=100, warmup=20, peak_lr=5e-4, layer_decay=0.6, drop_path_rate=0.2),
    "base21k": _recipe(
        "base", epochs=30, warmup=20, peak_lr=5e-5, layer_decay=0.75, drop_path_rate=0.1, augment=NO_MIXING
    ),
    "large300": _recipe("large", epochs=50, warmup=5, peak_lr=5e-4, layer_decay=0.8, drop_path_rate=0.2),
    "large1600": _recipe("large", epochs=50, warmup=5, peak_lr=2e-4, layer_decay=0.8, drop_path_rate=0.2),
    "large21k": _recipe(
        "large", epochs=20, warmup=5, peak_lr=7e-5, layer_decay=0.8, drop_path_rate=0.25, augment=NO_MIXING
    ),
    "21kbase": _intermediate("base", drop_path_rate=0.1),
    "21klarge": _intermediate("large", drop_path_rate=0.2),
    "imagenette": imagenette,
    "smoke": smoke,
}


def get_config(arg=""):
    """Return the published ImageNet-1k recipe (base, after 1600 epochs) with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "finetune",
            "seed": 0,
            # weights to start from: a run directory or a file of any layout, whose sizes the model takes unless they
            # are set here; '': random weights
            "init_from": "",
            "data": sections.labelled_data(),
            "views": sections.views(min_scale=0.08),
            "normalization": "imagenet",
            "label_smoothing": 0.1,  # probability moved from the label to all classes
            # of images in the loss; 'balanced': every class has the same sum of weights, and where an image may have
            # several, the images with a class as much as those without it
            "class_weights": "none",
            "augment": sections.augment(randaugment_ops=2, mixup=0.8, cutmix=1.0, erasing=0.25),
            "model": sections.backbone(
                position="relative",  # a table per block
                drop_path_rate=0.2,
                num_classes=1000,  # unless set, that of the source
                pooling="mean",  # of the patches; 'cls' takes [CLS]
                layer_scale_init=0.1,
                head_init_scale=0.001,
            ),
            # part of the resized shorter side that the central crop keeps; 0: 0.875, from 384 pixels on 1, as released
            "evaluation": {"crop_fraction": 0.0},
            "optim": sections.optim(peak_lr=5e-4, min_lr=1e-6, warmup="20 epochs", layer_decay=0.6),
            "run": sections.run(
                batch_size=1024,
                duration="100 epochs",
                checkpoint_every="1 epoch",
                keep_every="5 epochs",
                eval_every="1 epoch",
            ),
            "mesh": sections.mesh(),
            "efficiency": sections.efficiency(),
        }
    )
    # the weight decay follows a cosine to its end value, and is constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
