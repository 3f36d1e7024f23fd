"""Extract: write the teacher's features of every image's fixed views, so that VQ-KD need not run the teacher."""

from beitv2_jax.convert.teachers.load import load_teacher
from beitv2_jax.data.target_cache.encoding import FeatureEncoding
from beitv2_jax.tasks import inputs, targets
from beitv2_jax.tasks.api import TargetCacheTask


def build(config) -> TargetCacheTask:
    """Build the stage that writes features for the `num_views` views of the train split and one centre crop of eval.

    Raises:
        UserError: the data set or the teacher's weights are missing, or leave a choice open that they do not settle.
    """
    teacher, params = load_teacher(**targets.teacher_arguments(config, config.teacher.tokenizer_patch_size))
    sources = inputs.open_sources(config)
    encoding = FeatureEncoding(config.output.dtype, teacher.grid[0] * teacher.grid[1], teacher.width)
    return TargetCacheTask(
        name="extract",
        frozen=params,
        apply=lambda frozen, batch: teacher.features(frozen, batch["images"]),
        encoding=encoding,
        manifest={
            **targets.teacher_manifest(teacher),
            **targets.teacher_terms(config),
            "target": encoding.target,
            "dtype": encoding.dtype,
            "compute_dtype": config.efficiency.dtype,
        },
        sources=sources,
    )
