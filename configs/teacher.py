"""A small teacher from scratch: train a ViT classifier on labels where no pretrained network is at hand.

Not part of the published method, whose teachers are CLIP and DINO; the quickstart needs one that trains in minutes.
Any run of this stage serves as teacher: --config.teacher.weights=<workdir> of configs/extract.py or configs/vqkd.py.

Command   python -m beitv2_jax.main --config=configs/teacher.py --workdir=runs/teacher
Hardware  one GPU, or a CPU with patience
Expected  no published number

Presets
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images), ViT-S/16
  smoke       four steps of a toy model on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.views.image_size = 160
    config.model.update(width=384, depth=12, num_heads=6, mlp_dim=1536, num_classes=10, drop_path_rate=0.1)
    config.run.update(batch_size=256, duration="200 epochs")


def smoke(config):
    config.data.source = "embedded/tiny"
    config.data.num_threads = 2
    config.model.update(width=64, depth=2, num_heads=2, mlp_dim=128)
    config.optim.warmup = "2 steps"
    config.run.update(batch_size=8, duration="4 steps", log_every="1 step")
    config.run.update(checkpoint_every="2 steps", keep_every="4 steps", eval_every="4 steps")
    config.efficiency.dtype = "float32"


PRESETS = {"imagenette": imagenette, "smoke": smoke}


def get_config(arg=""):
    """Return the recipe for the generated scenes with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "finetune",
            "seed": 0,
            "init_from": "",  # weights to start from: a run directory or a file of any layout; '' is from scratch
            "data": {
                "source": "embedded",  # or 'tfds:NAME', 'folder:PATH'
                "train_split": "train",
                "eval_split": "validation",
                "data_dir": "",
                "num_threads": 8,
                "num_workers": 0,  # processes that prepare batches in place of the threads
                "max_bad_share": 0.001,  # of the records may be unreadable; above it the run stops
            },
            "views": {
                "image_size": 96,  # pixels
                "min_scale": 0.35,  # smallest share of the image's area in a crop
                "num_views": 0,  # a new view each epoch
                "interpolation": "bicubic",
                "color_jitter": 0.0,
            },
            "normalization": "imagenet",
            "label_smoothing": 0.1,  # probability moved from the label to all classes
            "augment": {  # what is done to training images beside the random view
                "randaugment_ops": 0,  # operations drawn for an image; 0: none
                "randaugment_magnitude": 9.0,  # their mean strength, of 10
                "randaugment_std": 0.5,  # standard deviation of the strength
                "mixup": 0.0,  # parameter of its Beta distribution; 0: never
                "cutmix": 0.0,  # likewise
                "mix_probability": 1.0,  # of a batch to be mixed at all
                "switch_probability": 0.5,  # of CutMix where both are on
                "erasing": 0.0,  # probability of an image to lose a box to noise; 0: none
            },
            "model": {
                "patch_size": 16,
                "stem": "linear",  # how a patch is embedded; 'conv': small convolutions inside each patch
                "width": 192,
                "depth": 6,
                "num_heads": 3,
                "mlp_dim": 768,
                "position": "absolute",
                "drop_path_rate": 0.0,
                "num_classes": 10,  # that of the source
                "pooling": "mean",
                "layer_scale_init": 0.0,  # 0: no layer scale
                "head_init_scale": 1.0,
            },
            "optim": {
                "peak_lr": 1e-3,
                "min_lr": 1e-6,
                "warmup": "3 epochs",
                "betas": (0.9, 0.999),
                "eps": 1e-8,
                "weight_decay": 0.05,
                "clip_norm": 1.0,  # global l2 norm; 0: off
                "spike_factor": 0.0,  # a step with a loss or gradient of so many times the usual is left out; 0: off
                "layer_decay": 1.0,
                "ema_decay": 0.0,  # 0: no averaged weights
            },
            "run": {
                "batch_size": 128,  # global
                "duration": "30 epochs",
                "log_every": "50 steps",
                "checkpoint_every": "5 epochs",
                "keep_every": "30 epochs",
                "eval_every": "5 epochs",
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
            },
        }
    )
    # the decay goes by a cosine to its end; constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
