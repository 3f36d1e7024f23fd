"""Regress: MIM without a tokenizer, a baseline of configs/mim.py. It predicts pixels or teacher features directly.

The student, its masks and its schedule are those of configs/mim.py. Without `teacher.features` the targets are the
pixels of each hidden patch, minus their mean, over their standard deviation (squared error); with them, the features
that the extract stage stored of the same views (1 - cosine).

Paper     He et al. 2021 (arXiv 2111.06377) for pixels; MVP (arXiv 2203.05175), EVA (arXiv 2211.07636) for features
Command   python -m beitv2_jax.main --config=configs/regress.py --workdir=runs/regress
          of features: --config.teacher.features=DIR, the workdir of configs/extract.py, which decides the views
Published nothing with this student: there the pixels are predicted by a decoder that alone sees mask tokens

Presets
  imagenette  ten classes of ImageNet at 160 pixels (9 469 images), ViT-S/16, as in configs/mim.py
  smoke       four steps of a toy model on generated pictures
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, flatten, load, sections


def imagenette(config):
    _as_in_mim(config, "imagenette")


def smoke(config):
    _as_in_mim(config, "smoke")


def _as_in_mim(config, preset):
    before, after, own = flatten(load("mim")), flatten(load(f"mim:{preset}")), flatten(config)
    config.update_from_flattened_dict(
        {key: value for key, value in after.items() if key in own and value != before[key]}
    )


PRESETS = {"imagenette": imagenette, "smoke": smoke}


def get_config(arg=""):
    """Return the recipe of configs/mim.py with other targets, with the presets named in `arg`."""
    mim = load("mim")
    model = {key: value for key, value in mim.model.items() if key != "codebook_size"}
    config = ConfigDict(
        {
            "stage": "regress",
            "seed": 0,
            # weights to start from: a run directory or a file of any layout, whose sizes the model takes unless they
            # are set here; '': random weights
            "init_from": "",
            "data": sections.data(),
            "views": sections.views(min_scale=0.2),
            "normalization": "imagenet",
            "masking": mim.masking.to_dict(),
            "teacher": {"features": ""},  # workdir of the extract stage; '': the pixels of the patch
            "model": model,
            "optim": mim.optim.to_dict(),
            "run": mim.run.to_dict(),
            "mesh": sections.mesh(),
            "efficiency": sections.efficiency(),
        }
    )
    # the weight decay follows a cosine to its end value, and is constant unless that is set
    config.optim.weight_decay_end = config.optim.get_oneway_ref("weight_decay")
    return apply_presets(config.lock(), arg, PRESETS)
