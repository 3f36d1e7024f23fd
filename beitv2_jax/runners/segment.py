"""Run the segmentation stages: train, then draw predictions beside the true label maps."""

from collections.abc import Callable

import jax

from beitv2_jax.convert.runs import Run, read_run
from beitv2_jax.report.segmentation import draw_segmentations
from beitv2_jax.runtime.buckets import as_path
from beitv2_jax.tasks import dense, inputs, segment, segment_linear
from beitv2_jax.tasks.api import Batch, Task
from beitv2_jax.training import loop


def run(task: Task, config, workdir: str) -> dict[str, float]:
    """Train as every other stage does, then draw `segmentation.png` from what was learned."""

    def predictor(trained: Run) -> Callable[[Batch], jax.Array]:
        model = segment.make_model(config, inputs.compute(config))
        predict = segment.label_map_predictor(model, config.normalization, segment.sliding_of(config))
        return lambda batch: predict(trained.params, trained.model_state, batch)

    return _train_and_draw(task, config, workdir, predictor)


def run_linear(task: Task, config, workdir: str) -> dict[str, float]:
    """Do what `run` does for a linear layer on a frozen backbone."""

    def predictor(trained: Run) -> Callable[[Batch], jax.Array]:
        predict_all = segment_linear.predictor(segment_linear.make_model(config), dense.read_frozen(config), config)
        predict = jax.jit(lambda *arguments: predict_all(*arguments).label_maps)
        return lambda batch: predict(trained.params, trained.model_state, task.frozen, batch)

    return _train_and_draw(task, config, workdir, predictor)


def _train_and_draw(task: Task, config, workdir: str, predictor: Callable) -> dict[str, float]:
    metrics = loop.train(task, config, workdir)
    path = as_path(workdir) / "segmentation.png"
    if jax.process_index() == 0 and not path.exists():
        names = task.sources[0].class_names
        draw_segmentations(
            task.eval_batches.rows,
            predictor(read_run(workdir)),
            path,
            iou=segment.iou_of_classes(metrics, "eval/"),
            names=names if len(names) == config.model.num_classes else (),
        )
    return metrics
