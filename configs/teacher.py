"""A small teacher from scratch: train a ViT classifier on labels where no pretrained network is available.

Not part of the published method, whose teachers are CLIP and DINO; that of the quickstart was made by the preset scenes
(beitv2_jax/data/embedded/teacher/README.md).
Any run of this stage serves as teacher: --config.teacher.weights=<workdir> of configs/extract.py or configs/vqkd.py.

Command   python -m beitv2_jax.main --config=configs/teacher.py --workdir=runs/teacher
Hardware  one GPU; a CPU takes hours
Expected  no published number

Presets
  scenes      the small teacher that comes with the package, made in minutes on a CPU: patches of 8 pixels at 64 pixels
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images), ViT-S/16
  smoke       four steps of a toy model on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections


def scenes(config):
    config.data.num_threads = 2
    config.views.update(image_size=64, min_scale=0.5)
    # a plain ViT with biases of the keys and heads of 64, so that it can be written in the names of timm
    config.model.update(patch_size=8, width=128, depth=4, num_heads=2, mlp_dim=512, qkv_bias="full")
    config.model.param_init = "scaled"
    config.optim.update(betas=(0.9, 0.98), warmup="100 steps")
    config.run.update(batch_size=48, duration="1300 steps", log_every="50 steps")
    config.run.update(checkpoint_every="650 steps", keep_every="1300 steps", eval_every="650 steps")
    config.efficiency.dtype = "float32"


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


PRESETS = {"scenes": scenes, "imagenette": imagenette, "smoke": smoke}


def get_config(arg=""):
    """Return the recipe for the generated scenes with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "finetune",
            "seed": 0,
            # weights to start from: a run directory or a file of any layout, whose sizes the model takes unless they
            # are set here; '': random weights
            "init_from": "",
            "data": sections.data(source="embedded", num_threads=8),
            "views": sections.views(image_size=96, min_scale=0.35),
            "normalization": "imagenet",
            "label_smoothing": 0.1,  # probability moved from the label to all classes
            "augment": sections.augment(),
            "model": sections.backbone(
                width=192,
                depth=6,
                num_heads=3,
                mlp_dim=768,
                position="absolute",
                param_init="normal",  # or 'scaled' by the fan-in, which suits widths far below 768
                drop_path_rate=0.0,
                num_classes=10,  # unless set, that of the source
                pooling="mean",
                layer_scale_init=0.0,  # 0: no layer scale
                head_init_scale=1.0,
            ),
            "optim": sections.optim(peak_lr=1e-3, min_lr=1e-6, warmup="3 epochs", clip_norm=1.0),
            "run": sections.run(
                batch_size=128,
                duration="30 epochs",
                checkpoint_every="5 epochs",
                keep_every="30 epochs",
                eval_every="5 epochs",
            ),
            "mesh": sections.mesh(),
            "efficiency": sections.efficiency(),
        }
    )
    # the weight decay follows a cosine to its end value, and is constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
