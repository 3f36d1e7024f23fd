"""Ten optimizer steps of each stage against the released loops: the stage's own task, optimizer and train step.

Only the data comes from the fixture. Its images are inputs of the networks, so they are brought back to pixels.
"""

import jax
import jax.numpy as jnp
import numpy as np
from golden_files import Golden, channels_last
from golden_models import classifier_arguments, mim_arguments
from golden_schedules import num_warmup_steps
from golden_vqkd import vqkd_arguments
from paths import CONFIGS
from without_data import no_data

from beitv2_jax import config as config_lib
from beitv2_jax.convert.beit.official import from_official, to_official
from beitv2_jax.models.preprocess import NORMALIZATIONS, to_unit_range
from beitv2_jax.models.vqkd import VQKD
from beitv2_jax.tasks import finetune, inputs, mim, vqkd
from beitv2_jax.training import optim
from beitv2_jax.training.state import TrainState
from beitv2_jax.training.step import make_train_step

DEAD_BUFFERS = tuple(f"quantize.embedding.{name}" for name in ("cluster_size", "embed_avg", "initted"))


def check_train10(golden: Golden):
    config = stage_config("mim", golden)
    model = mim_arguments(golden.config["model"], patch_aggregation=golden.config["cls_head"])
    config.views.image_size = model.pop("image_size")
    config.model.update(drop_path_rate=0.0, **model)
    config.masking.num_masked = golden.config["num_mask"]
    config.tokenizer.codes = "somewhere"
    batches = {
        "images": to_pixels(golden.arrays["in/images"], config.normalization),
        "mask": golden.arrays["in/masks"].reshape(*golden.arrays["in/masks"].shape[:2], -1),
        "code_ids": golden.arrays["in/target_ids"],
    }
    with no_data(teacher_width=0):
        run = Run("mim", golden, mim.build(config), config, from_official("mim", golden.state))
    metrics = run.steps(batches)
    for theirs, ours in (
        ("loss", "loss"),
        ("loss_1", "final_loss"),
        ("loss_2", "aggregation_loss"),
        ("mlm_acc_1", "final_accuracy"),
        ("mlm_acc_2", "aggregation_accuracy"),
    ):
        golden.check(f"per_step/{theirs}", metrics[ours])
    run.check_final()


def check_train10_finetune(golden: Golden):
    config = stage_config("teacher", golden)
    model = classifier_arguments(golden.config["model"])
    config.views.image_size = model.pop("image_size")
    config.model.update(drop_path_rate=0.0, **model)
    config.label_smoothing = 0.1
    batches = {
        "images": to_pixels(golden.arrays["in/images"], config.normalization),
        "labels": golden.arrays["in/labels"],
    }
    with no_data(teacher_width=0):
        task = finetune.build(config)
    run = Run("classifier", golden, task, config, from_official("classifier", golden.state))
    metrics = run.steps(batches)
    golden.check("per_step/loss", metrics["loss"])
    # the released log names the rate of the lowest layer beside that of the head
    lowest = optim.layer_scale(0, layer_decay=config.optim.layer_decay, num_layers=task.num_layers)
    golden.check("per_step/min_lr", metrics["learning_rate"] * lowest)
    run.check_final()


def check_train10_vqkd(golden: Golden):
    config = stage_config("vqkd", golden)
    config.views.image_size = golden.config["encoder"]["img_size"]
    config.model.update(vqkd_arguments(golden.config))
    config.teacher.features = "somewhere"
    images = channels_last(golden.arrays["in/images"]) * 255.0
    with no_data(teacher_width=golden.config["decoder_out_dim"]):
        task = vqkd.build(config)
    variables = from_official("vqkd", golden.state)
    # as the released loop does at the start of an epoch
    variables["codebook"]["quantizer"]["cluster_counts"] = np.zeros(config.model.codebook_size, np.float32)
    run = Run("vqkd", golden, task, config, variables)
    model = vqkd.make_model(config, inputs.compute(config), teacher_width=golden.config["decoder_out_dim"])
    encode = jax.jit(lambda variables, images: model.apply(variables, to_unit_range(images), method=VQKD.encode))
    ids = []
    # a step looks its codes up before it moves the codebook
    run.before_step = lambda state, batch: ids.append(
        encode({"params": state.params, "codebook": state.model_state}, batch["images"])
    )
    metrics = run.steps({"images": images, "teacher_features": golden.arrays["in/targets"]})
    golden.check("per_step/token_ids", np.stack(ids).reshape(golden.arrays["out/per_step/token_ids"].shape))
    for theirs, ours in (
        ("total_loss", "loss"),
        ("quant_loss", "commitment_loss"),
        ("rec_loss", "reconstruction_loss"),
    ):
        golden.check(f"per_step/{theirs}", metrics[ours])
    for name in DEAD_BUFFERS:
        golden.check_unmoved(f"final/{name}", golden.state[name])
    run.check_final(skip=DEAD_BUFFERS)


def stage_config(name, golden):
    """Return the config of a published stage with the fixture's optimizer and float32 throughout."""
    config = config_lib.load(f"{CONFIGS / name}.py")
    train = golden.config["train"]
    config.optim.update(
        peak_lr=train["lr"],
        min_lr=train["min_lr"],
        betas=tuple(train["betas"]),
        weight_decay=train["weight_decay"],
        clip_norm=train["clip_grad"],
        layer_decay=train.get("layer_decay", 1.0),
    )
    config.optim.weight_decay_end = train["weight_decay_end"]
    config.efficiency.dtype = "float32"
    return config


def to_pixels(images, normalization):
    """Undo `preprocess.normalize`: return pixels 0..255, here of any value, whose normal form is `images`."""
    mean, std = (jnp.asarray(numbers) for numbers in NORMALIZATIONS[normalization])
    return (channels_last(images) * std + mean) * 255.0


class Run:
    """Ten steps of a task; checks what every fixture holds of them."""

    def __init__(self, kind, golden, task, config, variables):
        self.kind, self.golden, self.task, self.config = kind, golden, task, config
        train = golden.config["train"]
        self.warmup_steps, self.num_steps = num_warmup_steps(train), train["epochs"] * train["niter_per_ep"]
        self.optimizer, self.schedule = optim.for_task(task, config.optim, self.warmup_steps, self.num_steps)
        variables = jax.tree.map(jnp.asarray, variables)
        self.state = TrainState(
            jnp.zeros((), jnp.int32),
            variables["params"],
            self.optimizer.init(variables["params"]),
            variables["codebook"],
        )
        self.before_step = lambda state, batch: None

    def steps(self, batches):
        """Take all steps; return the metrics as arrays over the steps."""
        step = jax.jit(make_train_step(self.task, self.optimizer, schedule=self.schedule, seed=0, average_decay=0.0))
        of_steps = []
        for index in range(self.num_steps):
            batch = {key: jnp.asarray(values[index]) for key, values in batches.items()}
            batch["weight"] = jnp.ones(len(batch["images"]))
            self.before_step(self.state, batch)
            self.state, metrics = step(self.state, self.task.frozen, batch)
            of_steps.append(metrics)
            self._check_selection(index + 1)
        metrics = {key: np.stack([of_step[key] for of_step in of_steps]) for key in of_steps[0]}
        assert metrics["nonfinite_steps"].max() == 0
        self._check_schedules(metrics)
        return metrics

    def check_final(self, skip=()):
        final = self._official()
        names = {key for key in final if not key.endswith("relative_position_index")}.difference(skip)
        assert names == set(self.golden.section("out/final/"))
        for name in sorted(names):
            self.golden.check_absolute(f"final/{name}", final[name])

    def _official(self):
        return to_official(self.kind, {"params": self.state.params, "codebook": self.state.model_state})

    def _check_selection(self, num_steps):
        snapshot = self.golden.config["snapshot"]
        if num_steps in snapshot["steps"]:
            official = self._official()
            for name in snapshot["names"]:
                self.golden.check_absolute(f"after{num_steps}/{name}", official[name])

    def _check_schedules(self, metrics):
        config, steps = self.config.optim, np.arange(self.num_steps)
        rates = optim.learning_rate(
            steps,
            peak_lr=config.peak_lr,
            min_lr=config.min_lr,
            warmup_steps=self.warmup_steps,
            num_steps=self.num_steps,
        )
        decays = optim.cosine(steps, start=config.weight_decay, end=config.weight_decay_end, num_steps=self.num_steps)
        self.golden.check("schedule/lr", rates, 1e-12)
        if "out/schedule/wd" in self.golden.arrays:
            self.golden.check("schedule/wd", decays, 1e-12)
        self.golden.check("per_step/lr", metrics["learning_rate"])
        self.golden.check("per_step/weight_decay", decays)
        self.golden.check("per_step/grad_norm", metrics["grad_norm"])
