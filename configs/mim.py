"""Stage 2, MIM: pre-train a ViT to predict the tokenizer's codes of hidden patches, with the patch-aggregation head.

Paper     Peng et al., BEiT v2 (arXiv 2208.06366), 2.3 and 2.4
Command   python -m beitv2_jax.main --config=configs/mim.py --workdir=runs/mim --config.tokenizer.run=runs/vqkd
          with stored codes: --config.tokenizer.codes=DIR, the workdir of configs/tokenize.py
Published ImageNet-1k, global batch 2048, 625 steps an epoch; base 16 x V100 (about 5 minutes an epoch: 25 hours for 300
          epochs, 133 for 1600), large 64 x V100-32G
Expected  top-1 on ImageNet-1k after fine-tuning: base 85.5 % (this file), 85.0 % (300ep), 87.3 % (large), 86.6 %
          (large,300ep); linear probe of base after 300 epochs 80.1 %. Accuracy on masked patches is about 16 % for
          large; chance loss is ln 8192 = 9.01 nats per head

The learning rate is absolute. 75 of 196 patches are hidden (38 %; the paper says 40 %). The colour jitter of 0.4 is
what the released code applies whatever its flag says, and the tokenizer sees the jittered pixels too.

Presets
  tiny        ViT-Ti/16; unpublished, like small
  small       ViT-S/16
  base        ViT-B/16, as without any preset
  24x544      24 narrow blocks; registered, not published
  large       ViT-L/16: 24 blocks, early layer 21, layer scale from 1e-5
  huge        ViT-H/14: a grid of 16 x 16, so the tokenizer needs one too (configs/vqkd.py:patch14); unpublished
  giant       ViT-g/14; likewise
  300ep       the short schedule: 300 epochs, second beta 0.98, no stochastic depth
  1600ep      the long schedule, as without any preset
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images), ViT-S/16; unpublished, small enough for one GPU
  smoke       four steps of a toy model on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections
from beitv2_jax.sizes import MASKED_FRACTION, SIZES


def _size(name):
    size = SIZES[name]

    def preset(config):
        # of the early layer only 9 of 12 and 21 of 24 are published
        scale = 0.1 if size["depth"] <= 12 else 1e-5
        config.model.update(size, early_layer=size["depth"] - 3, layer_scale_init=scale)
        num_patches = (config.views.image_size // size["patch_size"]) ** 2
        config.masking.num_masked = round(MASKED_FRACTION * num_patches)

    return preset


def epochs300(config):
    config.run.duration = "300 epochs"
    config.optim.betas = (0.9, 0.98)
    config.model.drop_path_rate = 0.0


def epochs1600(config):
    config.run.duration = "1600 epochs"
    config.optim.betas = (0.9, 0.999)
    config.model.drop_path_rate = 0.1


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.views.image_size = 160
    config.masking.num_masked = 38
    config.model.update(width=384, depth=12, num_heads=6, mlp_dim=1536, codebook_size=1024)
    config.run.update(batch_size=256, duration="800 epochs")


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.views.image_size = 96
    config.masking.update(num_masked=14, min_patches=4)
    config.model.update(width=64, depth=3, num_heads=2, mlp_dim=128, codebook_size=32, early_layer=2, head_depth=1)
    config.optim.warmup = "2 steps"
    config.run.update(batch_size=8, duration="4 steps", log_every="1 step")
    config.run.update(checkpoint_every="2 steps", keep_every="4 steps", eval_every="4 steps")
    config.efficiency.dtype = "float32"


PRESETS = {
    "tiny": _size("tiny"),
    "small": _size("small"),
    "base": _size("base"),
    "24x544": _size("24x544"),
    "large": _size("large"),
    "huge": _size("huge"),
    "giant": _size("giant"),
    "300ep": epochs300,
    "1600ep": epochs1600,
    "imagenette": imagenette,
    "smoke": smoke,
}


def get_config(arg=""):
    """Return the published ImageNet-1k recipe (base, 1600 epochs) with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "mim",
            "seed": 0,
            # weights to start from: a run directory or a file of any layout, which set the sizes that are not set here;
            # '': random weights
            "init_from": "",
            "data": sections.data(),
            "views": sections.views(
                min_scale=0.2,
                color_jitter=0.4,
                tokenizer_image_size=0,  # the tokenizer's view: the same box at another size; 0: image_size
                tokenizer_interpolation="",  # ... or resized otherwise; '': interpolation
            ),
            "normalization": "imagenet",
            "masking": {
                "num_masked": 75,  # exact number of hidden patches per image
                "min_patches": 16,  # smallest block
                "max_patches": 0,  # largest block; 0: num_masked
            },
            "tokenizer": {  # exactly one
                "codes": "",  # workdir of the tokenize stage: read stored code ids
                "run": "",  # run directory of the vqkd stage: run the tokenizer in the step
            },
            "model": sections.backbone(
                codebook_size=8192,  # unless set, that of the tokenizer
                position="relative_shared",
                param_init="clipped",  # as released; 'scaled' by the fan-in suits widths far below 768
                layer_scale_init=0.1,
                drop_path_rate=0.1,
                patch_aggregation=True,
                early_layer=9,  # the aggregation head reads the patches after this block
                head_depth=2,  # blocks of the aggregation head
                shared_head=True,  # both predictions share one norm and one output layer
            ),
            "optim": sections.optim(peak_lr=1.5e-3, min_lr=1e-5, warmup="10 epochs", clip_norm=3.0),
            "run": sections.run(
                batch_size=2048,
                duration="1600 epochs",
                checkpoint_every="1 epoch",
                keep_every="20 epochs",
                eval_every="20 epochs",
            ),
            "mesh": sections.mesh(),
            "efficiency": sections.efficiency(**sections.output_layer()),
        }
    )
    # the weight decay follows a cosine to its end value, and is constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
