"""A study of the method on real images of 32 pixels: each run of it by name, for two CPU cores (docs/study.md).

A run is a pipeline in a folder of its own, named by its presets; it finds what it shares with other runs, features
and tokenizers, in the folders beside its own. Without a preset it is MIM on VQ-KD codes, in the folder vqkd. The first
presets choose another run, the others change it and what it uses. `python -m benchmarks.study` runs all in order.

Command   python -m benchmarks.study run --workdir=runs/study --teacher=FILE; or one run after the other:
          python -m beitv2_jax.main --config=configs/study.py:tokenizer --workdir=runs/study/tokenizer
          --config.teacher.weights=FILE
          python -m beitv2_jax.main --config=configs/study.py --workdir=runs/study/vqkd
Hardware  two CPU cores
Sizes     the constants below

Presets
  smoke               a few steps of everything on drawn pictures, to see that it runs
  features            run: the teacher's features of every training image
  classifier          run: a classifier trained here, to be a teacher
  tokenizer           run: the VQ-KD tokenizer, of seed 0, as all tokenizers
  tokenizer_cluster   run: k-means of teacher features
  tokenizer_pixels    run: k-means of raw patches
  random              run: random weights, evaluated, as all the next ones
  teacher             run: the teacher itself
  cluster             run: MIM on the codes of tokenizer_cluster
  pixel_codes         run: MIM on the codes of tokenizer_pixels
  pixels              run: regression of normalised pixels
  regress             run: regression of teacher features
  seed1               another seed of views, masks, initial weights and order
  seed2               a third one
  images1k            1 000 training images
  images50k           50 000
  teacher_classifier  the run classifier is the teacher
  teacher_random      the run random is the teacher
  views4              4 stored views per image
  views10             10 stored views per image
  features_float32    stored features are float32
  live                teacher and tokenizer run inside the step
  dim8                codes of 8 dimensions
  dim192              codes of 192 dimensions
  codes2048           2 048 codes
  codes8192           8 192 codes
  decoder3            the decoder of the tokenizer has three blocks
  no_kmeans           the codebook starts at random
  kmeans_once         k-means starts the codebook, and only once
  long                the tokenizer is trained for 900 steps: a code is not dead before step 459
  revive              dead codes are revived, and k-means starts only once
  low_rate            the learning rate of the tokenizer is a fifth
  rotation            gradients pass the lookup by the rotation trick
  fsq                 finite scalar quantization
  simvq               SimVQ
  no_head             MIM without the patch-aggregation head
  early3              the head reads block 3 of 6
  early5              the head reads block 5 of 6
  blocks2             the head has two blocks
  blocks3             the head has three blocks
  own_head            the head has a norm and an output layer of its own
  bfloat16            matrix products in bfloat16
  devices8            eight devices share a batch
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, flatten, link, load, sections

# All numbers of the study. Durations are in steps of `BATCH_SIZE` images.
SOURCE, NUM_IMAGES, TEST = "tfds:cifar10_6bit", 10000, "test"
WATCHED = "test[:1000]"  # what the stages before the evaluation watch themselves on
LABELLED = f"train[:{NUM_IMAGES}]"  # what every evaluation learns from, however many images there are without labels
CURVE_IMAGES, CURVE_TEST = 4000, "test[:2000]"  # of the probes during pre-training
IMAGE_SIZE, TEACHER_SIZE = 32, 128  # pixels: 8 x 8 patches of 4 for the student, of 16 for the teacher
VIEWS = {"image_size": IMAGE_SIZE, "min_scale": 0.4, "num_views": 1, "color_jitter": 0.0}
VIT = {"patch_size": 4, "width": 128, "depth": 6, "num_heads": 4, "mlp_dim": 512}
# of ViT-Ti/16: the encoder of the tokenizer is built like its teacher, sees as many pixels and starts from its weights
TEACHER_VIT = {"patch_size": 16, "width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768}
DECODER = {"width": 128, "depth": 1, "num_heads": 4, "mlp_dim": 512}
CODEBOOK = {"codebook_size": 512, "code_dim": 32}
MASKING = {"num_masked": 26, "min_patches": 5}  # of 64: 40 %
HEAD = {"early_layer": 4, "head_depth": 1}
# so small and so short, students learn faster with a convolutional stem, absolute positions and larger initial values
START = {"stem": "conv", "position": "absolute", "layer_scale_init": 1.0}
BATCH_SIZE = 32
SHARD = 1024  # stored images that an interrupted stage loses at most
VQKD = {"duration": "300 steps", "warmup": "10 steps", "peak_lr": 5e-4, "betas": (0.9, 0.98)}
KMEANS_AGAIN, LONG = "100 steps", "900 steps"
PRETRAINING = {"duration": "1500 steps", "warmup": "75 steps", "peak_lr": 1.5e-3, "betas": (0.9, 0.98)}
POINTS = (300, 600, 900, 1200)  # steps after which a checkpoint is probed, beside the last one
FINETUNING = {"warmup": "20 steps", "peak_lr": 1e-3, "betas": (0.9, 0.999), "layer_decay": 0.75}
LABELS = {"finetune1": ("1%", "100 steps"), "finetune10": ("10%", "200 steps"), "finetune100": ("", "450 steps")}
CLASSIFIER = {**FINETUNING, "duration": "2000 steps", "peak_lr": 3e-4, "layer_decay": 1.0}
PROBE = {"protocol": "dinov3", "duration": "2000 steps", "batch_size": 1024}

RUNS = (
    *("features", "classifier", "tokenizer", "tokenizer_cluster", "tokenizer_pixels"),
    *("random", "teacher", "cluster", "pixel_codes", "pixels", "regress"),
)
"""Presets that choose a run."""
PLAIN = ("smoke", "seed1", "seed2")
"""Presets with which a run still has its whole evaluation."""
_OF_IMAGES, _OF_TEACHER = ("smoke", "images1k", "images50k"), ("teacher_classifier", "teacher_random")
_OF_PIXELS = (*_OF_IMAGES, "views4", "views10")
_OF_FEATURES = (*_OF_PIXELS, *_OF_TEACHER, "features_float32")
_OF_TOKENIZER = (
    *(*_OF_IMAGES, *_OF_TEACHER, "dim8", "dim192", "codes2048", "codes8192", "decoder3"),
    *("no_kmeans", "kmeans_once", "long", "low_rate", "revive", "rotation", "fsq", "simvq"),
)
_OF_STUDENT = ("no_head", "early3", "early5", "blocks2", "blocks3", "own_head", "bfloat16", "devices8")
CONCERNING = {
    "features": (*_OF_FEATURES, "seed1", "seed2"),
    "tokenizer": _OF_TOKENIZER,
    "tokenizer_cluster": _OF_FEATURES,
    "tokenizer_pixels": _OF_PIXELS,
    "classifier": ("smoke",),
    "random": ("smoke",),
    "vqkd": PLAIN,
}
"""Run that others use -> presets of theirs that are its too; every tokenizer is that of seed 0."""


def folder(run, names):
    """Return the folder of the run that a run with the presets `names` uses."""
    return "{workdir}/../" + "-".join([run, *(name for name in names if name in CONCERNING[run])])


def _as_built(config):
    """Leave the run as `get_config` has built it."""


def _in_stages(**values):
    """Return a preset that sets those of these keys, `section__name`, that a stage has, in every stage."""

    def preset(config):
        for stage in config.stages.values():
            keys = flatten(stage)
            flat = {key.replace("__", "."): value for key, value in values.items()}
            stage.update_from_flattened_dict({key: value for key, value in flat.items() if key in keys})

    return preset


def _images(count):
    def preset(config):
        config.data.train_split = f"train[:{count}]"

    return preset


def _seed(number):
    def preset(config):
        config.seed = number

    return preset


def _views(count):
    def preset(config):
        config.views.num_views = count

    return preset


def _codes(count):
    # k-means needs more tokens than the first batch has
    return _in_stages(model__codebook_size=count, kmeans_tokens=2)


def long(config):
    if "vqkd" in config.stages:
        config.stages.vqkd.run.update(duration=LONG, eval_every=LONG, keep_every=LONG)


def low_rate(config):
    if "vqkd" in config.stages:
        config.stages.vqkd.optim.peak_lr = VQKD["peak_lr"] / 5


def live(config):
    config.views.num_views = 0
    if "tokenize" in config.stages:
        with config.stages.unlocked():
            config.stages.mim.tokenizer.update(codes="", run=config.stages.tokenize.tokenizer.run)
            del config.stages.tokenize


def smoke(config):
    config.data.update(source="embedded/tiny", train_split="train", eval_split="test")
    tiny = {"width": 32, "depth": 6, "num_heads": 2, "mlp_dim": 64, "codebook_size": 16}
    for part in ("model", "model.encoder", "model.decoder"):
        _in_stages(**{f"{part}.{key}": value for key, value in tiny.items()})(config)
    for stage in config.stages.values():
        stage.data.update(train_split="train", eval_split="test")
        if "duration" in stage.run:
            stage.run.update(duration="5 steps", checkpoint_every="1 step", keep_every="1 step", eval_every="5 steps")
            stage.run.batch_size = 8  # 1 % of the drawn pictures are 10
            stage.optim.warmup = "1 step"
        if "probe" in stage:
            stage.probe.update(duration="5 steps", batch_size=16)
            run, at, _ = stage.backbone.run.partition("/checkpoints/")
            stage.backbone.run = f"{run}{at}3" if at else run
        if stage.stage == "vqkd":
            stage.update(init_from="", usage_window="1 step", kmeans_again="0 steps")


PRESETS = {
    "smoke": smoke,
    "features": _as_built,
    "classifier": _as_built,
    "tokenizer": _as_built,
    "tokenizer_cluster": _as_built,
    "tokenizer_pixels": _as_built,
    "random": _as_built,
    "teacher": _as_built,
    "cluster": _as_built,
    "pixel_codes": _as_built,
    "pixels": _as_built,
    "regress": _as_built,
    "seed1": _seed(1),
    "seed2": _seed(2),
    "images1k": _images(1000),
    "images50k": _images(50000),
    "teacher_classifier": _as_built,
    "teacher_random": _as_built,
    "views4": _views(4),
    "views10": _views(10),
    "features_float32": _in_stages(output__dtype="float32"),
    "live": live,
    "dim8": _in_stages(model__code_dim=8),
    "dim192": _in_stages(model__code_dim=192),
    "codes2048": _codes(2048),
    "codes8192": _codes(8192),
    "decoder3": _in_stages(model__decoder__depth=3),
    "no_kmeans": _in_stages(kmeans_start=False, kmeans_again="0 steps"),
    "kmeans_once": _in_stages(kmeans_again="0 steps"),
    "long": long,
    "low_rate": low_rate,
    "revive": _in_stages(revive=True, kmeans_again="0 steps"),
    "rotation": _in_stages(model__quantizer_gradient="rotation"),
    "fsq": _in_stages(model__quantizer="fsq", model__fsq_levels=(8, 8, 8), model__code_dim=3, kmeans_again="0 steps"),
    "simvq": _in_stages(model__quantizer="simvq", kmeans_again="0 steps"),
    "no_head": _in_stages(model__patch_aggregation=False),
    "early3": _in_stages(model__early_layer=3),
    "early5": _in_stages(model__early_layer=5),
    "blocks2": _in_stages(model__head_depth=2),
    "blocks3": _in_stages(model__head_depth=3),
    "own_head": _in_stages(model__shared_head=False),
    "bfloat16": _in_stages(efficiency__dtype="bfloat16"),
    "devices8": _in_stages(mesh__data=8),
}


def _schedule(stage, schedule, **changes):
    stage.run.duration = stage.run.eval_every = stage.run.keep_every = schedule["duration"]
    stage.run.update(batch_size=BATCH_SIZE, log_every="50 steps", checkpoint_every="300 steps", **changes)
    stage.optim.update({key: value for key, value in schedule.items() if key != "duration"})


def _teacher(stage, config, names):
    stage.teacher.weights = config.teacher.get_oneway_ref("weights")
    for name, run in (("teacher_classifier", "classifier/finetune"), ("teacher_random", "random/regress")):
        if name in names:
            run, _, inside = run.partition("/")
            stage.teacher.weights = f"{folder(run, names)}/{inside}"


def _extract():
    stage = load("extract")
    stage.teacher.tokenizer_patch_size = VIT["patch_size"]
    stage.run.batch_size, stage.output.shard_examples = 64, SHARD
    return stage


def _classifier():
    stage = load("finetune")
    stage.model.update(VIT, num_classes=10, drop_path_rate=0.0, **START)
    stage.augment.update(randaugment_ops=0, mixup=0.0, cutmix=0.0, erasing=0.0)
    stage.data.update(train_split=LABELLED, eval_split=TEST)
    stage.views.update(image_size=IMAGE_SIZE, min_scale=VIEWS["min_scale"])
    return stage


def _tokenizer(config, names):
    stage = load("vqkd")
    _teacher(stage, config, names)
    stage.model.encoder.update({**VIT, "stem": START["stem"]} if _trained_here(names) else TEACHER_VIT)
    if "teacher_random" not in names:
        stage.init_from = stage.teacher.get_oneway_ref("weights")
    stage.model.decoder.update(DECODER)
    stage.model.update(CODEBOOK)
    stage.update(usage_window="50 steps", kmeans_again=KMEANS_AGAIN)
    _schedule(stage, VQKD)
    return stage


def _trained_here(names):
    """Return whether the teacher is a run of this study."""
    return any(name in names for name in _OF_TEACHER)


def _let_tokenizer_see(stages, image_size):
    """Give the VQ-KD tokenizer so many pixels of the boxes whose small views the student sees."""
    if "vqkd" in stages:  # the teacher runs beside it, so that nothing is stored
        stages.vqkd.views.update(image_size=image_size, num_views=0)
    if "tokenize" in stages:
        stages.tokenize.views.image_size = image_size
    if "mim" in stages:
        stages.mim.views.tokenizer_image_size = image_size


def _cluster(features):
    stage = load("cluster")
    stage.model.update(patch_size=VIT["patch_size"], codebook_size=CODEBOOK["codebook_size"])
    stage.teacher.features = features
    return stage


def _student(stage):
    stage.model.update(VIT, drop_path_rate=0.0, param_init="scaled", **HEAD, **START)
    stage.masking.update(MASKING)
    # equal checkpoints of all students, to be probed
    _schedule(stage, PRETRAINING)
    stage.run.keep_every = f"{POINTS[0]} steps"
    return stage


def _pretrained(run, names):
    """Return the stages that train a student."""
    if run in ("random", "pixels", "regress"):
        stage = _student(load("regress"))
        if run == "random":
            stage.run.duration, stage.optim.warmup = "1 step", "0 steps"
            stage.optim.update(peak_lr=0.0, min_lr=0.0, weight_decay=0.0)
        if run == "regress":
            stage.teacher.features = f"{folder('features', names)}/extract"
        return {"regress": stage}
    tokenize, stage = load("tokenize"), _student(load("mim"))
    stage.model.codebook_size = CODEBOOK["codebook_size"]
    changes = set(names).difference(PLAIN)
    if run == "vqkd" and changes and changes <= set(_OF_STUDENT):  # the codes are those of vqkd
        stage.tokenizer.codes = f"{folder('vqkd', names)}/tokenize"
        return {"mim": stage}
    source = {"cluster": ("tokenizer_cluster", "cluster"), "pixel_codes": ("tokenizer_pixels", "cluster")}
    tokenizer, inside = source.get(run, ("tokenizer", "vqkd"))
    tokenize.tokenizer.run = f"{folder(tokenizer, names)}/{inside}"
    stage.tokenizer.codes = "{workdir}/tokenize"
    tokenize.output.shard_examples = SHARD
    return {"tokenize": tokenize, "mim": stage}


def _probe(backbone, image_size, depth):
    stage = load("probe")
    stage.backbone.run, stage.views.image_size = backbone, image_size
    stage.probe.update(PROBE, layers=(depth,))
    stage.data.update(train_split=LABELLED, eval_split=TEST)
    stage.run.batch_size = 256
    return stage


def _evaluated(student, name, run, names):
    """Return the stages that evaluate a student, the whole evaluation only of runs with nothing but a seed changed."""
    found = {"probe": _probe(f"{{workdir}}/{name}", IMAGE_SIZE, VIT["depth"])}
    if any(other not in PLAIN for other in names):
        return found
    for label, (amount, duration) in LABELS.items():
        found[label] = stage = _classifier()
        stage.init_from, stage.data.train_labels = f"{{workdir}}/{name}", amount
        _schedule(stage, {**FINETUNING, "duration": duration})
    for point in POINTS if run != "random" else ():
        found[f"probe{point}"] = stage = _probe(f"{{workdir}}/{name}/checkpoints/{point}", IMAGE_SIZE, VIT["depth"])
        stage.data.update(train_split=f"train[:{CURVE_IMAGES}]", eval_split=CURVE_TEST)
    if run != "random":  # the last point, on as few images as the others
        found["probe_last"] = stage = _probe(f"{{workdir}}/{name}", IMAGE_SIZE, VIT["depth"])
        stage.data.update(train_split=f"train[:{CURVE_IMAGES}]", eval_split=CURVE_TEST)
    return found


def _stages(run, names, config):
    if run == "features":
        stage = _extract()
        _teacher(stage, config, names)
        return {"extract": stage}
    if run == "classifier":
        stage = _classifier()
        stage.model.layer_scale_init = 0.0  # the encoder of a tokenizer, which starts from it, has none
        _schedule(stage, CLASSIFIER)
        return {"finetune": stage}
    if run == "tokenizer":
        return {"vqkd": _tokenizer(config, names)}
    if run == "tokenizer_cluster":
        return {"cluster": _cluster(f"{folder('features', names)}/extract")}
    if run == "tokenizer_pixels":
        stage = _extract()
        stage.teacher.weights = "pixels"
        return {"extract": stage, "cluster": _cluster("{workdir}/extract")}
    if run == "teacher":
        return {"probe": _probe(config.teacher.get_oneway_ref("weights"), TEACHER_SIZE, 12)}
    stages = _pretrained(run, names)
    *_, (name, student) = stages.items()
    return stages | _evaluated(student, name, run, names)


def get_config(arg=""):
    """Return the run that the presets named in `arg` choose and change."""
    names = [name.strip() for name in arg.split(",") if name.strip()]
    run = next((name for name in names if name in RUNS), "vqkd")
    changes = [name for name in PRESETS if name in names and name not in RUNS]
    config = ConfigDict(
        {
            "stage": "pipeline",
            "seed": 0,
            "data": sections.data(source=SOURCE, train_split=LABELLED, eval_split=WATCHED, num_threads=2),
            "teacher": {"weights": ""},  # of the runs features, teacher and tokenizer,live
            "views": sections.views(**VIEWS),
            "mesh": sections.mesh(),
            "efficiency": sections.efficiency(dtype="float32", **sections.lookup(), **sections.output_layer()),
        }
    )
    config.stages = ConfigDict(sort_keys=False)  # they run in this order
    for name, stage in _stages(run, changes, config).items():
        config.stages[name] = stage
        stage.seed = config.get_oneway_ref("seed")
        stage.run.hang_timeout = 3600  # seconds: beside other work a core compiles for minutes
        own = stage.data.to_dict()
        for section in ("data", "mesh", "efficiency"):
            if section in stage:
                link(stage[section], config[section])
        if stage.stage in ("probe", "finetune"):
            stage.data.update({key: own[key] for key in ("train_split", "eval_split")})
        elif "min_scale" in stage.views:
            link(stage.views, config.views)
    if run in ("tokenizer", "vqkd"):
        _let_tokenizer_see(config.stages, IMAGE_SIZE if _trained_here(changes) else TEACHER_SIZE)
    return apply_presets(config.lock(), arg, PRESETS)
