"""Sections that several configs share, written once; keyword arguments replace or add values.

Every function returns a new dict for a section of a `ConfigDict`.
"""

from pathlib import Path
from typing import Any

SCENES_TEACHER = str(Path(__file__).parents[1] / "data" / "embedded" / "teacher" / "vit_scenes.safetensors")
"""Path of the small teacher of the drawn scenes that comes with the package."""


def data(**changes: Any) -> dict[str, Any]:
    """Return where the images come from and how they are read."""
    return {
        "source": "tfds:imagenet2012",  # or 'folder:PATH', 'arrayrecord:GLOB', 'embedded'
        "train_split": "train",
        "eval_split": "validation",
        "data_dir": "",  # where TFDS looks; '' is its default
        "num_threads": 16,
        "num_workers": 0,  # processes that prepare batches; 0: threads only
        "max_bad_fraction": 0.001,  # largest fraction of unreadable records; above it the run stops
        **changes,
    }


def labelled_data(**changes: Any) -> dict[str, Any]:
    """Return `data` of a stage that learns labels."""
    return data(
        **{
            # '10%' or '5 shots': part or number of training images of each class, or part of all where they may have
            # several; '': all
            "train_labels": "",
            **changes,
        }
    )


def labels() -> dict[str, Any]:
    """Return what the numbers in the label maps of ADE20K mean."""
    return {
        "offset": 1,  # number of class 0 in the label maps
        "mapping": (),  # pairs (number, class), in place of the offset; several numbers may be one class
        "ignored": (0, 255),  # numbers of pixels without a class
    }


def label_map_crops(**changes: Any) -> dict[str, Any]:
    """Return how images with label maps are cropped, as published for ADE20K; `max_class_fraction` must be given."""
    return {
        "image_size": 512,  # pixels, of the crop to train on and of the windows to evaluate
        "long_side": 2048,  # the image is resized to fit into these two, times a ratio
        "short_side": 512,
        "min_ratio": 0.5,
        "max_ratio": 2.0,
        **changes,  # max_class_fraction: largest fraction of one class in the labelled pixels of a crop; 1: off
    }


def windows() -> dict[str, Any]:
    """Return how whole images are segmented window by window, as published for ADE20K."""
    return {
        "long_side": 2048,
        "short_side": 512,
        "stride": 341,  # pixels between windows
        "scales": (1.0,),  # of long_side and short_side; the probabilities are averaged
        "flip": False,  # mirrored views too
        "batch_size": 16,  # global
    }


def voc(config) -> None:
    """Set the classes of PASCAL VOC: 0 is the background, 255 the border of an object."""
    config.data.source = "folder:VOCdevkit/VOC2012"
    config.labels.update(offset=0, ignored=(255,))
    config.model.num_classes = 21


def cityscapes(config) -> None:
    """Set the 19 classes of Cityscapes that its benchmark counts, by the numbers of its *_labelIds.png.

    Source: labels.py of the data set's scripts, `trainId` of each `id`.
    """
    numbers = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)
    config.data.source = "folder:cityscapes"
    config.labels.mapping = tuple((number, label) for label, number in enumerate(numbers))
    config.labels.ignored = tuple(number for number in range(34) if number not in numbers)
    config.model.num_classes = len(numbers)


def views(**changes: Any) -> dict[str, Any]:
    """Return how views are cut out of images; `min_scale` must be given."""
    return {
        "image_size": 224,  # pixels
        "num_views": 0,  # 0: a new view each epoch; otherwise the number of stored views per image
        "interpolation": "bicubic",
        "color_jitter": 0.0,
        **changes,  # min_scale: smallest fraction of the image's area in a crop
    }


def teacher(**changes: Any) -> dict[str, Any]:
    """Return which network gives the features, and how it is used."""
    return {
        "weights": "",  # weights of a published network, or a run directory; 'pixels': those of the patches, no network
        "state_dict": "",  # of a file with several: 'teacher', 'model_ema'; '' takes the usual one
        "num_heads": 0,  # this and '' below: as the weights say; an error names what they leave open
        "normalization": "",  # of its input: 'half', 'imagenet', 'clip' or 'unit'
        "output": "",  # 'projected' or 'tokens'
        "activation": "",
        "grid_match": "resize_input",  # or 'resample_features': how its grid becomes that of the tokenizer
        "position_resize": "",  # how its position embeddings are resized to another grid
        "license": "",  # kept with what is made from it, such as 'mit'; '': what the files beside its weights state
        "origin": "",  # where its weights were published; '' likewise
        **changes,
    }


def augment(**changes: Any) -> dict[str, Any]:
    """Return how labelled training images are changed besides the random view; everything is off."""
    return {
        "randaugment_ops": 0,  # operations per image
        "randaugment_magnitude": 9.0,  # their mean magnitude, of 10
        "randaugment_std": 0.5,  # standard deviation of the magnitude
        "mixup": 0.0,  # parameter of its Beta distribution; 0: off
        "cutmix": 0.0,  # likewise
        "mix_probability": 1.0,  # probability that a batch is mixed
        "switch_probability": 0.5,  # probability of CutMix where both are on
        "erasing": 0.0,  # probability that a box of an image is replaced by noise
        **changes,
    }


def vit(**changes: Any) -> dict[str, Any]:
    """Return the sizes of ViT-B/16."""
    return {
        "patch_size": 16,
        "stem": "linear",  # how a patch is embedded; 'conv': small convolutions inside each patch
        "width": 768,
        "depth": 12,
        "num_heads": 12,
        "mlp_dim": 3072,
        **changes,
    }


def backbone(**changes: Any) -> dict[str, Any]:
    """Return what a ViT-B/16 is that may start from weights: its sizes, and what networks of one size differ in."""
    return vit(
        **{
            "qkv_bias": "qv",  # of queries and values, as released; 'full': of the keys too, as in a plain ViT; 'none'
            "norm_eps": 1e-6,  # of every layer norm
            **changes,
        }
    )


def optim(**changes: Any) -> dict[str, Any]:
    """Return AdamW with warm-up and a cosine schedule; `peak_lr`, `min_lr`, `warmup` must be given."""
    return {
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.05,
        "clip_norm": 0.0,  # global l2 norm; 0: off
        "spike_factor": 0.0,  # skip steps whose loss or gradient exceeds this multiple of the running average; 0: off
        "layer_decay": 1.0,  # rate of a block over that of the block above it
        "weight_average": 0.0,  # decay of averaged weights, evaluated beside the raw ones; 0: off
        **changes,
    }


def run(**changes: Any) -> dict[str, Any]:
    """Return length and rhythm of a training run; batch size, duration and intervals must be given."""
    return {
        "log_every": "50 steps",
        "max_nonfinite_steps": 20,  # consecutive steps without a finite loss that stop the run
        "on_failed_save": "continue",  # or 'stop'; the last save must not fail
        "hang_timeout": 600,  # seconds without progress after which the process exits; 0: never
        "keep_best": "",  # metric, such as eval/accuracy, whose best checkpoint is kept beside the newest; '': none
        "wandb": "",  # project of Weights & Biases that gets the metrics too; '': none
        **changes,  # batch_size is the global one
    }


def inference_run(batch_size: int) -> dict[str, Any]:
    """Return the section `run` of a stage that trains nothing."""
    return {
        "batch_size": batch_size,  # global
        "hang_timeout": 600,  # seconds without progress after which the process exits; 0: never
    }


def mesh() -> dict[str, Any]:
    """Return the axes of the device mesh; -1 takes the devices that the others leave."""
    return {"data": -1, "fsdp": 1, "tensor": 1}


def efficiency(**changes: Any) -> dict[str, Any]:
    """Return how a training step computes; nothing here changes a result beyond rounding."""
    return {
        "dtype": "bfloat16",  # of matrix products; parameters, codebook and losses are float32
        "gradient_dtype": "float32",  # in which devices sum the gradients of kernels; or 'bfloat16'
        "accumulation_steps": 1,  # micro-batches per step
        "remat": "none",  # what a block saves for the backward pass: everything, 'dots' products, 'full' its input
        "attention": "auto",  # reference, cudnn (GPU) or pallas (TPU); auto: the default of the platform
        **changes,
    }


def lookup() -> dict[str, Any]:
    """Return the implementation of the codebook lookup, for `efficiency`."""
    return {"nearest_code": "auto"}  # reference, scan or pallas


def output_layer() -> dict[str, Any]:
    """Return the implementation of the loss over code ids, for `efficiency`."""
    return {"cross_entropy": "auto"}  # reference, rounded or tiled
