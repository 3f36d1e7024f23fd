"""Extract: write the teacher's features of every image's fixed views, so that VQ-KD need not run the teacher."""

from beitv2_jax.convert.teachers import load_teacher
from beitv2_jax.tasks import inputs
from beitv2_jax.tasks.api import StoreTask


def build(config) -> StoreTask:
    """Build the stage that writes features for the `num_views` views of the train split and one centre crop of eval.

    Raises:
        UserError: the data set or the teacher's weights are missing, or leave a choice open that they do not settle.
    """
    sources = inputs.open_sources(config)
    teacher, params = load_teacher(**inputs.teacher_arguments(config, config.teacher.tokenizer_patch_size))
    return StoreTask(
        name="extract",
        frozen=params,
        apply=lambda frozen, batch: teacher.features(frozen, batch["images"]),
        target="teacher_features",
        shape=(teacher.grid[0] * teacher.grid[1], teacher.width),
        dtype=config.output.dtype,
        card=inputs.teacher_card(teacher),
        sources=sources,
    )
