"""Stage 1, VQ-KD: learn a semantic visual tokenizer by reconstructing a teacher's patch features from discrete codes.

Paper     Peng et al., BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers (arXiv 2208.06366), 2.2
Command   python -m beitv2_jax.main --config=configs/vqkd.py --workdir=runs/vqkd --config.teacher.weights=PATH
          with precomputed targets: --config.teacher.features=DIR, the workdir of configs/extract.py
Published 8 x V100-32G, fp16, ImageNet-1k, 100 epochs = 250 200 steps of 512 images; time not published
Expected  fraction of codes used on the validation set: 97 % (this file), 100 % (decoder1), 100 % (dino)

The learning rate is absolute: the released command's 5e-5 x 512 / 128 = 2e-4.

Presets
  tiny        encoder and decoder of ViT-Ti/16; unpublished, like small and large
  small       ... of ViT-S/16
  large       ... of ViT-L/16
  patch14     patches of 14 pixels: a grid of 16 x 16, for students of that patch size and teachers such as CLIP L/14
  decoder1    decoder of one block instead of three
  dino        the published DINO tokenizer: one decoder block, teacher fed with ImageNet statistics
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images) with 1 024 codes; unpublished, for one GPU
  own_data    for a few thousand to 30 000 images of your own: 1 024 codes, and what keeps them in use on little data
              (dead codes revived, k-means over 50 tokens a code, peak rate 3e-4, ema_decay 0.9); unpublished, like the
              next two. Codes in use are not better codes: in the quickstart revival made the student weaker
              (docs/results.md), so compare the probe with --config.revive=False. The number of codes is the power of
              two nearest to 8 sqrt(images), which gives the published 8 192 for ImageNet-1k
  own_1k      ... for fewer images: 256 codes, half as many steps
  own_100k    ... for more: 2 048 codes, four times as many steps
  fsq         codes by rounding to levels, for comparison: 8 000 codes of (8, 8, 5, 5, 5) levels; unpublished, like the
              next one
  simvq       8 192 codes that are learned together as one linear map, for comparison
  smoke       four steps of a toy model on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, sections
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


def own_data(config):
    config.model.update(codebook_size=1024, ema_decay=0.9)
    config.update(revive=True, kmeans_tokens=50)
    config.optim.update(peak_lr=3e-4, warmup="1000 steps")
    config.run.update(batch_size=128, duration="20000 steps")
    config.run.update(checkpoint_every="1000 steps", keep_every="10000 steps", eval_every="1000 steps")


def own_1k(config):
    own_data(config)
    config.model.codebook_size = 256
    config.run.duration = "10000 steps"


def own_100k(config):
    own_data(config)
    config.model.codebook_size = 2048
    config.run.duration = "80000 steps"


def fsq(config):
    _without_average(config, "fsq")
    config.model.update(fsq_levels=(8, 8, 5, 5, 5), codebook_size=8000, code_dim=5)


def simvq(config):
    _without_average(config, "simvq")


def _without_average(config, quantizer):
    config.model.update(quantizer=quantizer, ema_decay=0.99)
    config.update(revive=False, kmeans_tokens=0)  # which own_data sets


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
    "own_data": own_data,
    "own_1k": own_1k,
    "own_100k": own_100k,
    "fsq": fsq,
    "simvq": simvq,
    "smoke": smoke,
}


def get_config(arg=""):
    """Return the published ImageNet-1k recipe with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "vqkd",
            "seed": 0,
            # weights to start from: a run directory or a file of any layout, whose sizes the model takes unless they
            # are set here; '': random weights
            "init_from": "",
            "data": sections.data(),
            "views": sections.views(min_scale=0.08),
            "teacher": sections.teacher(features=""),  # features: workdir of the extract stage; give it or weights
            "model": {
                "encoder": sections.vit(),
                "decoder": {"width": 768, "depth": 3, "num_heads": 12, "mlp_dim": 3072},
                "codebook_size": 8192,
                "code_dim": 32,
                "ema_decay": 0.99,  # of the codebook
                "commitment_weight": 1.0,
                "quantizer": "ema",  # published; fsq and simvq are for comparison and leave out k-means and revival
                # how gradients pass the lookup: straight_through (published) or rotation, with ema_decay >= 0.99
                "quantizer_gradient": "straight_through",
                "fsq_levels": (),  # of each dimension for fsq: code_dim numbers whose product is codebook_size
            },
            "kmeans_start": True,  # start the codebook by k-means over the first global batch, unless init_from has one
            # tokens a code that k-means starts from, over as many batches as hold them, such as 50; 0: the first batch
            "kmeans_tokens": 0,
            "kmeans_again": "0 steps",  # run k-means once more after so many steps, on the encoder as it is then; 0: no
            "revive": False,  # give codes that are hardly used the place of badly coded tokens of the batch
            # training codes are counted over this window, or 50 tokens a code where it has fewer and an epoch has them
            "usage_window": "1 epoch",
            "optim": sections.optim(
                peak_lr=2e-4, min_lr=1e-5, warmup="10 epochs", betas=(0.9, 0.99), weight_decay=1e-4
            ),
            "run": sections.run(
                batch_size=512,
                duration="100 epochs",
                checkpoint_every="1 epoch",
                keep_every="20 epochs",
                eval_every="1 epoch",
            ),
            "mesh": sections.mesh(),
            "efficiency": sections.efficiency(**sections.lookup()),
        }
    )
    # the weight decay follows a cosine to its end value, and is constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
