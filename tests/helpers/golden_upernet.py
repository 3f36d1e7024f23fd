"""The segmentation model against the released one: feature maps, windows, losses, gradients, running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
from golden_files import Golden, channels_last

from beitv2_jax.convert.beit.official import from_official, to_official
from beitv2_jax.data.segmentation.windows import window_starts
from beitv2_jax.models.sliding_window import merged_logits
from beitv2_jax.models.upernet import Segmenter, moved_statistics, resize
from beitv2_jax.tasks.losses import segmentation_loss

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# they only reach a batch norm, so their gradient in training is zero up to rounding
ZERO_GRADIENTS = ("backbone.fpn1.0.bias", "backbone.fpn1.3.bias", "backbone.fpn2.0.bias")


def build(golden):
    config = golden.config["model"]
    backbone, decode, auxiliary = config["backbone"], config["decode_head"], config["auxiliary_head"]
    arguments = dict(
        image_size=backbone["img_size"],
        patch_size=backbone["patch_size"],
        width=backbone["embed_dim"],
        depth=backbone["depth"],
        num_heads=backbone["num_heads"],
        mlp_dim=backbone["mlp_ratio"] * backbone["embed_dim"],
        num_classes=decode["num_classes"],
        out_layers=tuple(index + 1 for index in backbone["out_indices"]),
        channels=decode["channels"],
        aux_channels=auxiliary["channels"],
        layer_scale_init=backbone["init_values"],
        dropout_rate=decode["dropout_ratio"],
    )
    return Segmenter.from_arguments(arguments)


def channels_first(maps):
    return np.moveaxis(np.asarray(maps), -1, 1)


def check_upernet(golden: Golden):
    model = build(golden)
    variables = from_official("segmenter", golden.state)
    check_inference(golden, model, variables)
    check_training(golden, model, variables)


def check_inference(golden, model, variables):
    config = golden.config["test_cfg"]
    (crop, _), (stride, _) = config["crop_size"], config["stride"]
    large = channels_last(golden.arrays["in/image_slide"])
    size = large.shape[1:3]
    corners = np.array(
        [(y, x) for y in window_starts(size[0], crop, stride) for x in window_starts(size[1], crop, stride)]
    )

    @jax.jit
    def compute(images, large):
        output = model.apply(variables, images)
        cut = [large[:, y : y + crop, x : x + crop] for y, x in corners]
        cells = jnp.stack([model.apply(variables, window).logits for window in cut], axis=1)
        view = {
            "corners": jnp.broadcast_to(corners, (len(large), *corners.shape)),
            "num_windows": jnp.full(len(large), len(corners)),
            "view_sizes": jnp.broadcast_to(jnp.array(size), (len(large), 2)),
        }
        places = (jnp.arange(size[0]), jnp.arange(size[1]))
        windows = merged_logits(cells, view, view["view_sizes"], places, crop, False)
        return output, resize(output.logits, images.shape[1:3]), windows

    output, whole, windows = compute(golden.images, large)
    for index, features in enumerate(output.features):
        golden.check(f"eval/feature_{index}", channels_first(features))
    golden.check("eval/decode_logits", channels_first(output.logits))
    golden.check("eval/aux_logits", channels_first(output.auxiliary_logits))
    golden.check("eval/whole_logits", channels_first(whole))
    golden.check("eval/slide_logits", channels_first(windows))
    golden.check("eval/slide_prob", channels_first(jax.nn.softmax(windows)))
    golden.check("eval/slide_argmax", jnp.argmax(windows, axis=-1))


def check_training(golden, model, variables):
    labels = jnp.asarray(golden.arrays["in/labels"][:, 0])
    weight = golden.config["model"]["auxiliary_head"]["loss_decode"]["loss_weight"]

    def loss(params):
        output, updated = model.apply(
            {**variables, "params": params}, golden.images, train=True, mutable=["batch_stats"]
        )
        total, pixels, sums = segmentation_loss(
            output.logits, output.auxiliary_logits, labels, jnp.ones(len(labels)), auxiliary_weight=weight
        )
        metrics = {name: value / pixels for name, value in sums.items()}
        return total / pixels, (metrics, moved_statistics(variables["batch_stats"], updated["batch_stats"]))

    (total, (metrics, batch_stats)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    golden.check("train/total", total)
    for theirs, ours in (("decode", "decode"), ("aux", "auxiliary")):
        golden.check(f"train/{theirs}.loss_seg", metrics[f"{ours}_loss"])
        golden.check(f"train/{theirs}.acc_seg", 100.0 * metrics[f"{ours}_accuracy"][None])

    statistics = to_official("segmenter", {"params": variables["params"], "batch_stats": batch_stats})
    for name in (name for name in statistics if name.endswith(BUFFERS[:2])):
        golden.check(f"train/after1/{name}", statistics[name])
    gradients = to_official("segmenter", {"params": gradients, "batch_stats": batch_stats})
    for name in ZERO_GRADIENTS:
        golden.check_absolute(f"train/grad/{name}", gradients.pop(name), 1e-6)
    gradients = {name: value for name, value in gradients.items() if not name.endswith(BUFFERS)}
    golden.check_gradients(gradients, "train/grad/")
