"""The whole method in minutes, without a download: extract -> vqkd -> tokenize -> mim -> probe.

Generated pictures with ten kinds of objects and a small teacher that comes with the package, then BEiT v2 in miniature.
It shows every stage and every figure the big runs report; its numbers say nothing about the published ones. The
encoder of the tokenizer starts from the weights of the teacher, because minutes are too short to train one.

Command   sh launch/local.sh --config=configs/quickstart.py --workdir=runs/quickstart
          started again, it continues where it stopped; each stage has its folder in the workdir
Hardware  a laptop CPU

Presets
  from_labels  trains the teacher anew first, by configs/teacher.py:scenes
  imagenette   the same chain on photographs, with a teacher trained on their labels: ten classes of ImageNet at 160
               pixels (9 469 images), a ViT-S, one GPU
  smoke        a few steps of everything, the teacher included, to see that it runs
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, link, load, sections

CHAIN = ("extract", "vqkd", "tokenize", "mim", "probe")
# All numbers of the miniature. Durations are in steps of `batch_size` images.
SOURCE = "embedded"
TEACHER = {"normalization": "imagenet", "grid_match": "resample_features"}  # it sees 64 pixels, as in its training
IMAGE_SIZE = 48  # pixels: a grid of 6 x 6 patches
NUM_VIEWS = 1  # stored views per image, of features and of codes
VIT = {"patch_size": 8, "width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512}
TEACHER_HEADS = 2  # the encoder of the tokenizer starts from the weights of the teacher and is built like it
DECODER = {"width": 128, "depth": 1, "num_heads": 4, "mlp_dim": 512}
CODEBOOK = {"codebook_size": 64, "code_dim": 16}
MASKING = {"num_masked": 14, "min_patches": 3}  # of 36, the published fractions
HEAD = {"early_layer": 3, "head_depth": 2}
VQKD = {"duration": "300 steps", "warmup": "10 steps", "peak_lr": 1e-3, "betas": (0.9, 0.98)}
MIM = {"duration": "2000 steps", "warmup": "50 steps", "peak_lr": 2e-3, "betas": (0.9, 0.98)}
MIM_INIT = "scaled"  # the published initial values suit a width of 768 and learn slowly at 128
PROBE = {"layers": (2, 3, 4), "duration": "1000 steps", "batch_size": 256}
BATCH_SIZE, MIM_BATCH_SIZE = 32, 16  # of the same images, more and smaller steps learn more
LOG_EVERY, CHECKPOINT_EVERY, EVAL_EVERY = "25 steps", "500 steps", "750 steps"


def from_labels(config):
    """Leave all as it is: `get_config` adds the stage that trains the teacher."""


def imagenette(config):
    config.data.source = "tfds:imagenette/320px-v2"
    config.data.num_threads = 16
    config.efficiency.dtype = "bfloat16"
    config.teacher_views.update(image_size=160, min_scale=0.7)
    for views in (config.tokenizer_views, config.mim_views):
        views.update(image_size=160, num_views=8)
    vit = {"patch_size": 16, "width": 384, "depth": 8, "num_heads": 6, "mlp_dim": 1536}
    stages = config.stages
    stages.teacher.model.update(vit)
    for stage in (stages.extract, stages.vqkd):
        stage.teacher.grid_match = "resize_input"
    stages.vqkd.init_from = ""
    stages.vqkd.model.encoder.update(vit)
    stages.vqkd.model.decoder.update(width=384, num_heads=6, mlp_dim=1536)
    stages.vqkd.model.update(codebook_size=1024, code_dim=32)
    stages.mim.model.update(vit, early_layer=6, param_init="clipped")
    stages.mim.masking.update(num_masked=38, min_patches=9)
    stages.probe.probe.layers = (4, 6, 8)
    _set_durations(config, teacher="10000 steps", vqkd="5000 steps", mim="20000 steps", warmup="500 steps")
    _set_rhythm(stages.values(), batch_size=256, log="50 steps", checkpoint="1000 steps", evaluate="2000 steps")


def smoke(config):
    config.data.source = "embedded/tiny"
    vit = {"patch_size": 16, "width": 32, "depth": 3, "num_heads": 2, "mlp_dim": 64}
    stages = config.stages
    for views in (config.tokenizer_views, config.mim_views):
        views.update(image_size=64, num_views=1)
    for stage in (stages.extract, stages.vqkd):
        stage.teacher.grid_match = "resize_input"
    stages.vqkd.init_from = ""
    stages.mim.masking.update(num_masked=6, min_patches=2)
    stages.teacher.model.update(vit)
    stages.vqkd.model.encoder.update(vit)
    stages.vqkd.model.decoder.update(width=32, num_heads=2, mlp_dim=64)
    stages.vqkd.model.update(codebook_size=16, code_dim=8)
    stages.mim.model.update(vit, early_layer=2, head_depth=1)
    stages.probe.probe.update(layers=(2, 3), duration="10 steps", batch_size=16)
    _set_durations(config, teacher="4 steps", vqkd="4 steps", mim="4 steps", warmup="2 steps")
    _set_rhythm(stages.values(), batch_size=8, log="1 step", checkpoint="2 steps", evaluate="4 steps")


PRESETS = {"from_labels": from_labels, "imagenette": imagenette, "smoke": smoke}


def _set_durations(config, *, warmup, **durations):
    for name, duration in durations.items():
        config.stages[name].run.duration = duration
        config.stages[name].optim.warmup = warmup
    config.stages.vqkd.usage_window = warmup


def _set_rhythm(stages, *, batch_size, log, checkpoint, evaluate):
    for stage in stages:
        stage.run.batch_size = batch_size
        if "duration" in stage.run:
            stage.run.update(log_every=log, eval_every=evaluate)
            stage.run.update(checkpoint_every=checkpoint, keep_every=stage.run.duration)


def _build_stages(config, names):
    config.stages = stages = ConfigDict(sort_keys=False)  # they run in this order
    for name in names:
        stages[name] = stage = load("teacher:scenes" if name == "teacher" else name)
        stage.seed = config.get_oneway_ref("seed")
        for section in ("data", "mesh", "efficiency"):
            link(stage[section], config[section])
    for stage in (stages.extract, stages.vqkd):
        link(stage.views, config.tokenizer_views)
        stage.teacher.update(TEACHER)
    stages.extract.teacher.tokenizer_patch_size = stages.vqkd.model.encoder.get_oneway_ref("patch_size")
    for stage in (stages.tokenize, stages.mim):
        link(stage.views, config.mim_views)
    stages.probe.views.image_size = config.mim_views.get_oneway_ref("image_size")
    if "teacher" in stages:
        config.teacher_views = stages.teacher.views.to_dict()
        link(stages.teacher.views, config.teacher_views)
    stages.extract.teacher.weights = "{workdir}/teacher" if "teacher" in stages else sections.SCENES_TEACHER
    stages.vqkd.init_from = stages.extract.teacher.weights
    stages.vqkd.teacher.features = "{workdir}/extract"
    stages.tokenize.tokenizer.run = "{workdir}/vqkd"
    stages.mim.tokenizer.codes = "{workdir}/tokenize"
    stages.mim.model.codebook_size = stages.vqkd.model.get_oneway_ref("codebook_size")
    stages.probe.backbone.run = "{workdir}/mim"
    return stages


def get_config(arg=""):
    """Return the miniature with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "pipeline",
            "seed": 0,
            "data": sections.data(source=SOURCE, num_threads=4),
            "tokenizer_views": sections.views(image_size=IMAGE_SIZE, min_scale=0.5, num_views=NUM_VIEWS),
            "mim_views": sections.views(image_size=IMAGE_SIZE, min_scale=0.5, num_views=NUM_VIEWS),
            "mesh": sections.mesh(),
            "efficiency": sections.efficiency(dtype="float32", **sections.lookup(), **sections.output_layer()),
        }
    )
    # every preset trains its teacher
    stages = _build_stages(config, ("teacher", *CHAIN) if arg else CHAIN)
    stages.vqkd.model.encoder.update(VIT, num_heads=TEACHER_HEADS)
    stages.vqkd.model.decoder.update(DECODER)
    stages.vqkd.model.update(CODEBOOK)
    stages.mim.model.update(VIT, drop_path_rate=0.0, param_init=MIM_INIT, **HEAD)
    stages.mim.masking.update(MASKING)
    stages.probe.probe.update(PROBE)
    for name, schedule in (("vqkd", VQKD), ("mim", MIM)):
        stages[name].run.duration = schedule["duration"]
        stages[name].optim.update({key: value for key, value in schedule.items() if key != "duration"})
    stages.vqkd.usage_window = "50 steps"
    rhythm = {"log": LOG_EVERY, "checkpoint": CHECKPOINT_EVERY, "evaluate": EVAL_EVERY}
    _set_rhythm([stages[name] for name in CHAIN], batch_size=BATCH_SIZE, **rhythm)
    stages.mim.run.batch_size = MIM_BATCH_SIZE
    return apply_presets(config.lock(), arg, PRESETS)
