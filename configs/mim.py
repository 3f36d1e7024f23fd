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

from beitv2_jax.config import apply_presets
from beitv2_jax.sizes import SIZES


def _size(name):
    size = SIZES[name]

    def preset(config):
        # of the early layer only 9 of 12 and 21 of 24 are published
        scale = 0.1 if size["depth"] <= 12 else 1e-5
        config.model.update(size, early_layer=size["depth"] - 3, layer_scale_init=scale)
        num_patches = (config.views.image_size // size["patch_size"]) ** 2
        config.masking.num_masked = round(75 / 196 * num_patches)

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
            "init_from": "",  # weights to start from: a run directory or a file of any layout; '' is from scratch
            "data": {
                "source": "tfds:imagenet2012",  # or 'folder:PATH', 'embedded'
                "train_split": "train",
                "eval_split": "validation",
                "data_dir": "",  # where tfds looks; '' is its default
                "num_threads": 16,
                "num_workers": 0,  # processes that prepare batches in place of the threads
                "max_bad_share": 0.001,  # of the records may be unreadable; above it the run stops
            },
            "views": {
                "image_size": 224,  # pixels
                "min_scale": 0.2,  # smallest share of the image's area in a crop
                "num_views": 0,  # 0: a new view each epoch; otherwise the number of stored views per image
                "interpolation": "bicubic",
                "tokenizer_image_size": 0,  # the tokenizer's view: the same box in another size; 0: image_size
                "tokenizer_interpolation": "",  # ... and resized otherwise; '': interpolation
                "color_jitter": 0.4,
            },
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
            "model": {
                "patch_size": 16,
                "stem": "linear",  # how a patch is embedded; 'conv': small convolutions inside each patch
                "width": 768,
                "depth": 12,
                "num_heads": 12,
                "mlp_dim": 3072,
                "codebook_size": 8192,  # that of the tokenizer
                "position": "relative_shared",
                "param_init": "clipped",  # as released; 'scaled' by the fan-in suits widths far below 768
                "layer_scale_init": 0.1,
                "drop_path_rate": 0.1,
                "patch_aggregation": True,
                "early_layer": 9,  # the aggregation head reads the patches after this block
                "head_depth": 2,  # blocks of the aggregation head
                "shared_head": True,  # both predictions through one norm and one linear layer
            },
            "optim": {
                "peak_lr": 1.5e-3,
                "min_lr": 1e-5,
                "warmup": "10 epochs",
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 0.05,
                "clip_norm": 3.0,  # global l2 norm; 0: off
                "spike_factor": 0.0,  # a step with a loss or gradient of so many times the usual is left out; 0: off
                "layer_decay": 1.0,
                "ema_decay": 0.0,  # 0: no averaged weights
            },
            "run": {
                "batch_size": 2048,  # global
                "duration": "1600 epochs",
                "log_every": "50 steps",
                "checkpoint_every": "1 epoch",
                "keep_every": "20 epochs",
                "eval_every": "20 epochs",
                "max_nonfinite_steps": 20,  # so many in a row end the run
                "on_failed_save": "continue",  # or 'stop'; the last save must not fail
                "hang_timeout": 600,  # seconds without a move after which a process ends; 0: never
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
            "efficiency": {
                "dtype": "bfloat16",  # of the matrix products; parameters, codebook and losses are float32
                "gradient_dtype": "float32",  # in which devices add up the gradients of matrices; or bfloat16
                "accumulation_steps": 1,  # micro-batches, one after the other, that a batch is cut into
                "remat": "none",  # kept of a block for its backward pass: all; or "dots": products, "full": its input
                "attention": "auto",  # reference, cudnn (GPU) or pallas (TPU); auto: the default of the platform
                "cross_entropy": "auto",  # reference, rounded or tiled: of the code ids
            },
        }
    )
    # the decay goes by a cosine to its end; constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
