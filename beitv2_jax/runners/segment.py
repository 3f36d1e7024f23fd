"""Run the segmentation stage: train, then draw predictions beside the true label maps."""

import jax

from beitv2_jax.convert.runs import read_run
from beitv2_jax.report.segmentation import draw_segmentations
from beitv2_jax.runtime.buckets import as_path
from beitv2_jax.tasks import inputs, segment
from beitv2_jax.tasks.api import Task
from beitv2_jax.training import loop


def run(task: Task, config, workdir: str) -> dict[str, float]:
    """Train as every other stage does, then draw `segmentation.png` from what was learned."""
    metrics = loop.train(task, config, workdir)
    path = as_path(workdir) / "segmentation.png"
    if jax.process_index() == 0 and not path.exists():
        trained, model = read_run(workdir), segment.make_model(config, inputs.compute(config))
        predict = segment.label_map_predictor(model, config.normalization, segment.sliding_of(config))
        draw_segmentations(
            task.eval_batches.rows,
            lambda batch: predict(trained.params, trained.model_state, batch),
            path,
            iou=segment.iou_of_classes(metrics, "eval/"),
        )
    return metrics
