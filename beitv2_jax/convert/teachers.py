"""Find a teacher's weights by path and build the teacher around them: a run of ours, or a file in timm's layout."""

from pathlib import Path

from beitv2_jax.convert.runs import read_run, weights_hash
from beitv2_jax.convert.timm import read_weights, vit_from_timm
from beitv2_jax.errors import UserError
from beitv2_jax.models.preprocess import NORMALIZATIONS
from beitv2_jax.models.teachers import KINDS, Teacher
from beitv2_jax.typing import PyTree


def load_teacher(
    weights: str, *, image_size: int, num_heads: int = 0, normalization: str = "half", dtype: str = "float32"
) -> tuple[Teacher, PyTree]:
    """Return the teacher at path `weights` and its params (NumPy).

    `weights` is the working directory of a 'finetune' run, which knows its heads and its input range, or a timm-format
    .npz or .safetensors file, for which `num_heads` (0: heads of 64) and `normalization` are taken. `dtype` is that of
    its matrix products.

    Raises:
        UserError: nothing usable at `weights`, weights for another image size, or an unknown normalization.
    """
    if not Path(weights).exists():
        raise UserError(
            f"There are no teacher weights at {weights!r}.",
            "the path is mistyped, or the stage that trains the teacher has not run.",
            "--config.teacher.weights=PATH of a finetune run's directory, or of a .npz or .safetensors file.",
        )
    if Path(weights).is_dir():
        kind, name, normalization, arguments, params = _from_run(weights)
    else:
        kind, name = "vit", Path(weights).stem
        arguments, params = vit_from_timm(read_weights(weights), num_heads or None)
    if normalization not in NORMALIZATIONS:
        raise UserError(
            f"Unknown normalization {normalization!r} for the teacher.",
            "a slip in the name.",
            f"one of {', '.join(NORMALIZATIONS)}.",
        )
    if arguments["image_size"] != image_size:
        raise UserError(
            f"The teacher {name} takes {arguments['image_size']} pixel images, this run has {image_size}.",
            "the two belong to different recipes.",
            f"--config.views.image_size={arguments['image_size']}, or another teacher.",
        )
    teacher = KINDS[kind](
        name=name,
        weights_hash=weights_hash(params),
        normalization=normalization,
        arguments={**arguments, "dtype": dtype},
    )
    return teacher, params


def _from_run(workdir: str) -> tuple[str, str, str, dict, PyTree]:
    run = read_run(workdir)
    config = run.config
    if config["stage"] != "finetune":
        raise UserError(
            f"{workdir} holds a run of stage {config['stage']!r}, which is no teacher.",
            "the path of another stage was given.",
            "the working directory of a run of stage 'finetune'.",
        )
    arguments = {**config["model"], "image_size": config["views"]["image_size"], "drop_path_rate": 0.0}
    return "classifier", run.name, config["normalization"], arguments, run.params
