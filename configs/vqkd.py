"""Stage 1, VQ-KD: learn a semantic visual tokenizer by reconstructing a teacher's patch features from discrete codes.

Paper     Peng et al., BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers (arXiv 2208.06366), 2.2
Command   python -m beitv2_jax.main --config=configs/vqkd.py --workdir=runs/vqkd --config.teacher.weights=PATH
          with precomputed targets: --config.teacher.features=DIR, the workdir of configs/extract.py
Published 8 x V100-32G, fp16, ImageNet-1k, 100 epochs = 250 200 steps of 512 images; time not published
Expected  share of codes used on the validation set: 97 % (this file), 100 % (decoder1), 100 % (dino)

The learning rate is absolute: the released command's 5e-5 x 512 / 128 = 2e-4.

Presets
  tiny        encoder and decoder of ViT-Ti/16; unpublished, like small and large
  small       ... of ViT-S/16
  large       ... of ViT-L/16
  patch14     patches of 14 pixels: a grid of 16 x 16, for students of that patch size and teachers such as CLIP L/14
  decoder1    decoder of one block instead of three
  dino        the published DINO tokenizer: one decoder block, teacher fed with ImageNet statistics
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images) with 1 024 codes; unpublished, for one GPU
  smoke       four steps of a toy model on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets
from beitv2_jax.sizes import SIZES


def _size(name):
    size = SIZES[name]

    def preset(config):
        config.model.encoder.update(size)
        config.model.decoder.update({key: size[key] for key in ("width", "num_heads", "mlp_dim")})

    return preset


def patch14(config):
    config.model.encoder.patch_size = 14


def decoder1(config):
    config.model.decoder.depth = 1


def dino(config):
    decoder1(config)
    config.teacher.normalization = "imagenet"


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.views.image_size = 160
    config.model.codebook_size = 1024
    config.model.encoder.update(width=384, num_heads=6, mlp_dim=1536)
    config.model.decoder.update(width=384, num_heads=6, mlp_dim=1536)
    config.run.batch_size = 256


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.views.image_size = 96
    config.model.encoder.update(width=64, depth=2, num_heads=2, mlp_dim=128)
    config.model.decoder.update(width=64, depth=1, num_heads=2, mlp_dim=128)
    config.model.update(codebook_size=32, code_dim=8)
    config.usage_window = "2 steps"
    config.optim.warmup = "2 steps"
    config.run.update(batch_size=8, duration="4 steps", log_every="1 step")
    config.run.update(checkpoint_every="2 steps", keep_every="4 steps", eval_every="4 steps")
    config.efficiency.dtype = "float32"


PRESETS = {
    "tiny": _size("tiny"),
    "small": _size("small"),
    "large": _size("large"),
    "patch14": patch14,
    "decoder1": decoder1,
    "dino": dino,
    "imagenette": imagenette,
    "smoke": smoke,
}


def get_config(arg=""):
    """Return the published ImageNet-1k recipe with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "vqkd",
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
                "min_scale": 0.08,  # smallest share of the image's area in a crop
                "num_views": 0,  # 0: a new view each epoch; otherwise the number of stored views per image
                "interpolation": "bicubic",
                "color_jitter": 0.0,
            },
            "teacher": {  # exactly one of the first two
                "features": "",  # workdir of the extract stage: read stored features
                "weights": "",  # weights of a published network, or a run directory of ours: run it in the step
                "num_heads": 0,  # this and '' below: as the weights say; an error names what they leave open
                "normalization": "",  # range of its input
                "output": "",  # 'projected' or 'tokens'
                "activation": "",
                "grid_match": "resize_input",  # or 'resample_features': how its grid becomes the tokenizer's
                "position_resize": "",  # how its position embeddings reach another grid
            },
            "model": {
                "encoder": {
                    "patch_size": 16,
                    "stem": "linear",  # how a patch is embedded; 'conv': small convolutions inside each patch
                    "width": 768,
                    "depth": 12,
                    "num_heads": 12,
                    "mlp_dim": 3072,
                },
                "decoder": {"width": 768, "depth": 3, "num_heads": 12, "mlp_dim": 3072},
                "codebook_size": 8192,
                "code_dim": 32,
                "ema_decay": 0.99,
                "commitment_weight": 1.0,
            },
            "kmeans_start": True,  # codebook from a k-means over the first global batch; that of init_from is kept
            "usage_window": "1 epoch",  # training codes are counted over this window
            "optim": {
                "peak_lr": 2e-4,
                "min_lr": 1e-5,
                "warmup": "10 epochs",
                "betas": (0.9, 0.99),
                "eps": 1e-8,
                "weight_decay": 1e-4,
                "clip_norm": 0.0,  # 0: off
                "spike_factor": 0.0,  # a step with a loss or gradient of so many times the usual is left out; 0: off
                "layer_decay": 1.0,
                "ema_decay": 0.0,  # 0: no averaged weights
            },
            "run": {
                "batch_size": 512,  # global
                "duration": "100 epochs",
                "log_every": "50 steps",
                "checkpoint_every": "1 epoch",
                "keep_every": "20 epochs",
                "eval_every": "1 epoch",
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
                "nearest_code": "auto",  # reference, scan or pallas: the search of the codebook
            },
        }
    )
    # the decay goes by a cosine to its end; constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
