"""The published method from end to end: extract -> vqkd -> tokenize -> mim -> probe, each in <workdir>/<stage>.

Paper     Peng et al., BEiT v2 (arXiv 2208.06366); recipes, hardware and expected numbers as in the files of the stages
Command   python -m beitv2_jax.main --config=configs/pipeline.py --workdir=runs/base --config.teacher.weights=PATH
          started again, it continues where it stopped

`data`, `mesh`, `efficiency`, `seed`, `teacher`, `tokenizer_views` and `mim_views` are set here once for every stage
they belong to; a key of a stage (--config.stages.mim.efficiency.remat=full) takes precedence.

The released code sees a new crop each epoch because both frozen networks run inside the step. Stored targets mean a
fixed number of views per image instead (4 for the tokenizer: 0.5 TB of features; 16 for MIM: 9 GB of codes). The preset
`live` is the released way.

Presets
  large   ViT-L/16 for MIM; the tokenizer stays ViT-B, as published
  live    teacher and tokenizer inside the training step: no extract and no tokenize stage, a new view each epoch
  mini    a small ViT, 256 codes and a few hundred steps in float32: a folder of a thousand photographs on a CPU;
          --config.data.source=folder:PATH --config.teacher.weights=FILE --config.teacher.normalization=half
"""

from ml_collections import ConfigDict

from beitv2_jax.config import apply_presets, link, load, sections


def large(config):
    model = load("mim:large").model
    config.stages.mim.model.update({key: model[key] for key in model if key != "codebook_size"})
    config.stages.probe.probe.layers = (model.early_layer, model.depth)


def live(config):
    with config.stages.unlocked():
        del config.stages.extract, config.stages.tokenize
    config.tokenizer_views.num_views = config.mim_views.num_views = 0
    config.stages.vqkd.teacher.features = ""
    link(config.stages.vqkd.teacher, config.teacher)
    config.stages.mim.tokenizer.update(codes="", run="{workdir}/vqkd")


def mini(config):
    vit = {"width": 128, "depth": 4, "num_heads": 4, "mlp_dim": 512}
    stages = config.stages
    config.efficiency.dtype = "float32"
    config.tokenizer_views.update(num_views=2, min_scale=0.35)
    config.mim_views.update(num_views=2, min_scale=0.35)
    stages.vqkd.model.encoder.update(vit)
    stages.vqkd.model.decoder.update(vit, depth=1)
    stages.vqkd.model.update(codebook_size=256, code_dim=16, ema_decay=0.9)  # a few hundred steps: codes must follow
    stages.mim.model.update(vit, early_layer=3, drop_path_rate=0.0)
    # so small and so short, it learns faster with a convolutional stem, absolute positions and larger initial values
    stages.mim.model.update(stem="conv", position="absolute", param_init="scaled", layer_scale_init=1.0)
    stages.probe.probe.update(layers=(2, 3, 4), duration="1000 steps", batch_size=256)
    for stage, duration, peak_lr in ((stages.vqkd, "300 steps", 3e-4), (stages.mim, "400 steps", 1.5e-3)):
        stage.optim.update(warmup="30 steps", peak_lr=peak_lr, betas=(0.9, 0.98))
        stage.run.update(duration=duration, log_every="20 steps", checkpoint_every="100 steps", keep_every=duration)
        stage.run.eval_every = duration
    stages.vqkd.usage_window = "30 steps"
    for stage in stages.values():
        stage.run.batch_size = 32


PRESETS = {"large": large, "live": live, "mini": mini}


def get_config(arg=""):
    """Return the chain of published recipes with the presets named in `arg`."""
    config = ConfigDict(
        {
            "stage": "pipeline",
            "seed": 0,
            "data": sections.data(),
            "teacher": sections.teacher(),  # weights are required
            "tokenizer_views": sections.views(min_scale=0.08, num_views=4),
            "mim_views": sections.views(min_scale=0.2, num_views=16, color_jitter=0.4),
            "mesh": sections.mesh(),
            "efficiency": sections.efficiency(**sections.lookup(), **sections.output_layer()),
        }
    )
    config.stages = stages = ConfigDict(sort_keys=False)  # they run in this order
    for name in ("extract", "vqkd", "tokenize", "mim", "probe"):
        stages[name] = stage = load(name)
        stage.seed = config.get_oneway_ref("seed")
        for section in ("data", "mesh", "efficiency"):
            link(stage[section], config[section])
    for stage in (stages.extract, stages.vqkd):
        link(stage.views, config.tokenizer_views)
    for stage in (stages.tokenize, stages.mim):
        link(stage.views, config.mim_views)
    stages.probe.views.image_size = config.mim_views.get_oneway_ref("image_size")
    for stage in (stages.extract, stages.vqkd):
        link(stage.teacher, config.teacher)
    stages.vqkd.teacher.weights = ""
    stages.extract.teacher.tokenizer_patch_size = stages.vqkd.model.encoder.get_oneway_ref("patch_size")
    stages.vqkd.teacher.features = "{workdir}/extract"
    stages.tokenize.tokenizer.run = "{workdir}/vqkd"
    stages.mim.tokenizer.codes = "{workdir}/tokenize"
    stages.mim.model.codebook_size = stages.vqkd.model.get_oneway_ref("codebook_size")
    stages.probe.backbone.run = "{workdir}/mim"
    return apply_presets(config.lock(), arg, PRESETS)
