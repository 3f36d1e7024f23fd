"""Use trained networks from Python: load weights of any layout, give them images, get numbers.

    import beitv2_jax

    classifier = beitv2_jax.load_classifier("runs/finetune")
    print(classifier.predict("photo.jpg", top=5)[0])

Weights are a run directory (`--workdir` of a stage) or one of its checkpoints (RUN/checkpoints/STEP), a released .pth,
.safetensors or .npz file, a folder in the layout of Hugging Face or timm, or hf:OWNER/NAME[@REVISION][/FILE], a
repository of the Hugging Face hub. Images are paths, PIL images or uint8 arrays of any size, one or many; they are
prepared as the evaluation of the stages prepares them. A network is compiled once for each size of batch and image, for
the devices that this process has.
"""

import dataclasses
import functools
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int, UInt8
from PIL import Image

from beitv2_jax.convert.arguments import MODELS
from beitv2_jax.convert.files import located, read_config
from beitv2_jax.convert.weights import MASKED_KINDS, TOKENIZER_STAGES, Weights, read
from beitv2_jax.data.augment import center_crop
from beitv2_jax.data.decode import decode_image
from beitv2_jax.data.segmentation.label_maps import LabelIds
from beitv2_jax.data.segmentation.transforms import window_row
from beitv2_jax.data.segmentation.windows import Sliding
from beitv2_jax.errors import UserError
from beitv2_jax.models.backbone import Backbone as BackboneFields
from beitv2_jax.models.backbone import Compute
from beitv2_jax.models.layers import LayerNorm
from beitv2_jax.models.preprocess import to_unit_range
from beitv2_jax.models.vit import VisionTransformer
from beitv2_jax.tasks import segment
from beitv2_jax.tasks.api import Batch
from beitv2_jax.tasks.common import normalized
from beitv2_jax.tasks.multi_label import THRESHOLD
from beitv2_jax.tasks.tokenize import tokenizer_of
from beitv2_jax.training import sharding
from beitv2_jax.typing import PyTree

ImageLike = str | os.PathLike | Image.Image | np.ndarray
"""A path, a PIL image, or an array 'H W 3' of bytes."""
Images = ImageLike | Sequence[ImageLike] | np.ndarray
"""One image, a sequence of images of any sizes, or an array 'b H W 3' of bytes."""

BATCH_SIZE = 64
"""Most images that are computed at once."""


class Prediction(NamedTuple):
    """A class that a classifier considers, and its probability."""

    name: str
    probability: float


class Features(NamedTuple):
    """The features of images, float32.

    Attributes:
        cls: [CLS] after the last block, 'b d'; None for a network without [CLS].
        patches: patch tokens after the last block, 'b gh gw d'.
        hidden: all tokens, [CLS] first, after each layer that was asked for, 'b l d', by layer (from 1).
        attention: attention weights of each layer that was asked for, 'b nh l l', by layer (from 1).
    """

    cls: Float32[np.ndarray, "b d"] | None
    patches: Float32[np.ndarray, "b gh gw d"]
    hidden: dict[int, Float32[np.ndarray, "b l d"]]
    attention: dict[int, Float32[np.ndarray, "b nh l l"]]


@dataclasses.dataclass(frozen=True, eq=False)
class _Network:
    """Trained weights, where they were read, and the type of their matrix products."""

    weights: Weights
    source: str
    dtype: str

    @property
    def image_size(self) -> int:
        """Side of the square that images are resized and cropped to, in pixels."""
        return self.weights.arguments["image_size"]

    @functools.cached_property
    def _model(self):
        return MODELS[self.weights.kind].from_arguments(self.weights.arguments, Compute(dtype=self.dtype))

    @functools.cached_property
    def _mesh(self):
        return sharding.make_mesh(devices=jax.local_devices())

    @functools.cached_property
    def _variables(self) -> PyTree:
        return sharding.place_weights(self.weights.variables, self._mesh)

    def _run(self, function: Callable[[PyTree, jax.Array], PyTree], images: Images) -> PyTree:
        """Return `function(variables, pixels)` of all images as NumPy arrays; pixels are 'b S S 3' from 0 to 255."""
        return self._apply(function, _pixels(images, self.image_size, self.weights.crop_fraction))

    def _apply(self, function: Callable[[PyTree, jax.Array], PyTree], rows: np.ndarray) -> PyTree:
        found = []
        for start in range(0, len(rows), BATCH_SIZE):
            part = rows[start : start + BATCH_SIZE]
            padded = np.concatenate([part, np.repeat(part[:1], _padding(len(part), self._mesh.size), axis=0)])
            outputs = function(self._variables, jax.device_put(padded, sharding.batch_sharding(self._mesh)))
            found.append(jax.device_get(outputs))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(rows)], *found)


class Tokenizer(_Network):
    """A visual tokenizer, trained or of clusters: images to code ids, and code ids to features of the teacher."""

    @functools.cached_property
    def codebook(self) -> Float32[np.ndarray, "k c"]:
        """The codes: unit vectors, or the points of the grid of a tokenizer with `model.quantizer=fsq`."""
        return np.asarray(self._tokenizer.codebook(self.weights.variables))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the code ids of an image."""
        return self._model.grid

    def encode(self, images: Images) -> Int[np.ndarray, "b gh gw"]:
        """Return the code id of every patch of each image."""
        return self._run(self._encode, images)

    def decode(self, code_ids: Int[np.ndarray, "b gh gw"]) -> Float32[np.ndarray, "b gh gw t"]:
        """Return the teacher features that code ids stand for, not normalised.

        A trained tokenizer reconstructs them from the codes of the whole image; in one of clusters each code has its
        own, the mean direction of those it was made from.

        Raises:
            UserError: ids of another grid, or outside of the codebook.
        """
        code_ids = np.asarray(code_ids)
        if code_ids.ndim != 3 or code_ids.shape[1:] != self._tokenizer.grid:
            rows, columns = self._tokenizer.grid
            raise UserError(
                f"The code ids have the shape {code_ids.shape}, which is not (images, {rows}, {columns}).",
                "Did you leave out the first axis, or use the ids of another tokenizer?",
                f"Pass an array of the shape (images, {rows}, {columns}), as encode returns it.",
            )
        if code_ids.size and not 0 <= code_ids.min() <= code_ids.max() < len(self.codebook):
            raise UserError(
                f"The code ids lie between {code_ids.min()} and {code_ids.max()}.",
                "Did you use the ids of another tokenizer?",
                f"Pass ids from 0 to {len(self.codebook) - 1}.",
            )
        return self._apply(self._decode, code_ids)

    @functools.cached_property
    def _tokenizer(self):
        return tokenizer_of(self.weights, Compute(dtype=self.dtype))

    @functools.cached_property
    def _encode(self):
        return jax.jit(lambda *given: self._tokenizer.encode(*given).reshape(-1, *self._tokenizer.grid))

    @functools.cached_property
    def _decode(self):
        def decode(variables, code_ids):
            features = self._tokenizer.features(variables, code_ids.reshape(len(code_ids), -1))
            return features.reshape(*code_ids.shape, -1)

        return jax.jit(decode)


class Backbone(_Network):
    """A vision transformer: images to tokens, hidden layers and attention maps."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self._fields.depth

    def __call__(
        self, images: Images, *, layers: Sequence[int] = (), attention: Sequence[int] = (), norm: bool = False
    ) -> Features:
        """Return the features of images.

        Args:
            images: one or many.
            layers: layers (from 1) of which all tokens are returned.
            attention: layers (from 1) of which the attention weights are returned.
            norm: normalise `cls` and `patches` by the last layer norm of the weights, which frozen features are often
                better without.

        Raises:
            UserError: a layer that the network does not have.
        """
        self._check_layers(*layers, *attention)
        return Features(*self._run(self._function(tuple(layers), tuple(attention), norm), images))

    def token_function(
        self, tokens: Sequence[str], layers: Sequence[int]
    ) -> Callable[[PyTree, Batch], dict[str, jax.Array]]:
        """Return the pure function (variables, batch) -> features, float32, of the crops in `batch["images"]`.

        Args:
            tokens: 'cls' ('b d'), 'mean' of the patches ('b d') and 'patches' ('b l d').
            layers: after which blocks (from 1). If they are several, the names of the features end in theirs: 'cls_9'.

        Raises:
            UserError: a layer that the network does not have.
        """
        self._check_layers(*layers)
        function, first = self._function(tuple(layers), (), False), self._fields.num_prefix_tokens

        def apply(variables, batch):
            _, _, hidden, _ = function(variables, batch["images"])
            found = {}
            for layer in layers:
                patches = hidden[layer][:, first:]
                of_layer = {"cls": hidden[layer][:, 0], "mean": patches.mean(axis=1), "patches": patches}
                ending = f"_{layer}" if len(layers) > 1 else ""
                found |= {f"{name}{ending}": of_layer[name] for name in tokens}
            return found

        return apply

    def _check_layers(self, *layers: int) -> None:
        for layer in layers:
            if not 1 <= layer <= self.depth:
                raise UserError(
                    f"The backbone has no layer {layer}.",
                    f"Did you mean layer {self.depth}, the last one? Layers are counted from 1.",
                    f"Pass layers from 1 to {self.depth}.",
                )

    @property
    def _fields(self) -> BackboneFields:
        return self._model.encoder if self.weights.kind == "vqkd" else self._model.backbone

    @functools.cache  # noqa: B019 the functions live as long as the network
    def _function(self, layers: tuple[int, ...], attention: tuple[int, ...], norm: bool):
        fields, is_tokenizer = self._fields, self.weights.kind == "vqkd"
        vit = VisionTransformer(fields, Compute(dtype=self.dtype))
        final = LayerNorm(fields.norm_eps)
        own, norm_name = ("encoder", "encoder_norm") if is_tokenizer else ("backbone", "")
        names = {"fc_norm", "norm"} & self.weights.variables["params"].keys()
        norm_name = norm_name or next(iter(names), "")

        def features(variables, images):
            params = variables["params"]
            images = to_unit_range(images) if is_tokenizer else normalized(images, self.weights.normalization)
            output, found = vit.apply({"params": params[own]}, images, mutable=["intermediates"])
            tokens = final.apply({"params": params[norm_name]}, output.tokens) if norm and norm_name else output.tokens
            patches = tokens[:, fields.num_prefix_tokens :]
            blocks = found["intermediates"]
            return (
                tokens[:, 0].astype(jnp.float32) if fields.class_token else None,
                patches.reshape(len(patches), *fields.grid, -1).astype(jnp.float32),
                {layer: output.hidden[layer - 1].astype(jnp.float32) for layer in layers},
                {layer: blocks[f"blocks_{layer - 1}"]["attn"]["weights"][0] for layer in attention},
            )

        return jax.jit(features)


class _WithClasses(_Network):
    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes as the run or the file states them, else their numbers."""
        return self.weights.class_names or tuple(map(str, range(self.weights.arguments["num_classes"])))


class Classifier(_WithClasses):
    """An image classifier; a multi-label one, which says so (`multi_label`), may find several classes or none."""

    @property
    def multi_label(self) -> bool:
        """Whether each class has a probability of its own, the sigmoid of its logit, in place of their softmax."""
        return self.weights.multi_label

    def logits(self, images: Images) -> Float32[np.ndarray, "b k"]:
        """Return the logits of every class."""
        return self._run(self._logits, images)

    def probabilities(self, images: Images) -> Float64[np.ndarray, "b k"]:
        """Return the probability of every class."""
        return self._probabilities(self.logits(images))

    def predict(self, images: Images, top: int | None = None, threshold: float | None = None) -> list[list[Prediction]]:
        """Return, for each image, the most probable classes, the most probable first.

        Args:
            images: one or many.
            top: most classes of an image; None: 5, and all of a multi-label classifier.
            threshold: smallest probability of a class; None: 0, and 0.5 of a multi-label classifier.
        """
        return self.best(self.logits(images), top, threshold)

    def best(
        self, logits: Float32[np.ndarray, "b k"], top: int | None = None, threshold: float | None = None
    ) -> list[list[Prediction]]:
        """Return the most probable classes of each row of logits; the other arguments are those of `predict`."""
        usual_top, usual_threshold = (None, THRESHOLD) if self.multi_label else (5, 0.0)
        least = usual_threshold if threshold is None else threshold
        probabilities = self._probabilities(logits)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : usual_top if top is None else top]
        return [
            [Prediction(self.class_names[k], float(row[k])) for k in best if row[k] >= least]
            for row, best in zip(probabilities, order, strict=True)
        ]

    def _probabilities(self, logits: Float32[np.ndarray, "b k"]) -> Float64[np.ndarray, "b k"]:
        logits = logits.astype(np.float64)
        if self.multi_label:
            return np.exp(-np.logaddexp(0.0, -logits))
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        return probabilities / probabilities.sum(axis=1, keepdims=True)

    def logits_function(self, variables: PyTree, crops: UInt8[jax.Array, "b S S 3"]) -> Float32[jax.Array, "b k"]:
        """Return the logits of images that are cropped already: a pure function, to be compiled by the caller."""
        crops = normalized(crops, self.weights.normalization)
        return self._model.apply({"params": variables["params"]}, crops, train=False)

    @functools.cached_property
    def _logits(self):
        return jax.jit(self.logits_function)


class Segmenter(_WithClasses):
    """A semantic segmentation network."""

    @functools.cached_property
    def sliding(self) -> Sliding:
        """How the network is moved over an image: as the run was evaluated, for a released file as published."""
        config = read_config(self.source) if located(self.source).is_dir() else None
        evaluation = (config or {}).get("evaluation", {})
        published = {"stride": 2 * self.image_size // 3, "long_side": 2048, "short_side": 512, "scales": (1.0,)}
        given = {name: evaluation.get(name, value) for name, value in {**published, "flip": False}.items()}
        return Sliding(crop=self.image_size, **{**given, "scales": tuple(given["scales"])})

    def predict(self, images: Images) -> list[UInt8[np.ndarray, "H W"]]:
        """Return the class of every pixel of each image, at the size of the image."""
        images, found = _listed(images), []
        for start in range(0, len(images), self._mesh.size):
            found += self._label_maps([_bytes(image) for image in images[start : start + self._mesh.size]])
        return found

    def _label_maps(self, images: list[UInt8[np.ndarray, "H W 3"]]) -> list[UInt8[np.ndarray, "H W"]]:
        """Return the label maps of one image for each device, or fewer."""
        examples = [
            {"image": _png(pixels), "label_map": _png(pixels[..., 0] * 0), "label": -1, "example_id": number}
            for number, pixels in enumerate(images)
        ]
        # rows come sorted by windows, so each is asked for by its example
        rows = window_row(examples, LabelIds(num_classes=256 - 1, ignored=()), self.sliding)
        of_example = {int(row["example_ids"]): row for row in map(rows, range(len(images)))}
        filled = [of_example[number % len(images)] for number in range(self._mesh.size)]
        batch = {name: np.stack([row[name] for row in filled]) for name in filled[0] if name != "faults"}
        batch = jax.device_put(batch, sharding.batch_sharding(self._mesh))
        maps = np.asarray(self._predict(self._variables, batch))
        return [maps[number, : len(pixels), : pixels.shape[1]] for number, pixels in enumerate(images)]

    @functools.cached_property
    def _predict(self):
        def predict(variables, batch):
            states = variables["params"], variables["batch_stats"]
            return segment.predict(self._model, self.weights.normalization, self.sliding, *states, batch).label_maps

        return jax.jit(predict)


def load_tokenizer(source: str | os.PathLike, *, image_size: int | None = None, dtype: str = "float32") -> Tokenizer:
    """Load a visual tokenizer.

    Args:
        source: path of a run of stage vqkd or cluster, or of a released tokenizer.
        image_size: positions are resized to it; None keeps the size of the weights.
        dtype: of the matrix products, 'float32' or 'bfloat16'; codes are always computed in float32.

    Raises:
        UserError: nothing readable is there, or no tokenizer.
    """
    return Tokenizer(*_read(source, image_size, None, TOKENIZER_STAGES, "a tokenizer"), dtype)


def load_backbone(
    source: str | os.PathLike,
    *,
    image_size: int | None = None,
    normalization: str | None = None,
    dtype: str = "float32",
) -> Backbone:
    """Load the transformer of a pre-trained, fine-tuned or segmentation model, or the encoder of a tokenizer.

    Arguments as `load_tokenizer`, and `normalization`, the name of the input normalisation ('imagenet', 'half' or
    'clip') of weights that do not state theirs; tokenizers have a fixed one.

    Raises:
        UserError: nothing readable is there.
    """
    return Backbone(*_read(source, image_size, normalization, tuple(MODELS), "a backbone"), dtype)


def load_classifier(
    source: str | os.PathLike,
    *,
    image_size: int | None = None,
    normalization: str | None = None,
    dtype: str = "float32",
) -> Classifier:
    """Load a classifier: a run of teacher or finetune, a released fine-tuned model, or a ViT of timm or Hugging Face.

    Arguments as `load_backbone`.

    Raises:
        UserError: nothing readable is there, or no classifier.
    """
    return Classifier(*_read(source, image_size, normalization, ("classifier",), "a classifier"), dtype)


def load(
    source: str | os.PathLike,
    *,
    image_size: int | None = None,
    normalization: str | None = None,
    dtype: str = "float32",
) -> _Network:
    """Load what the weights are: a tokenizer, a backbone, a classifier or a segmentation network.

    Arguments and errors as `load_backbone`.
    """
    weights, path = _read(source, image_size, normalization, (*MODELS, *TOKENIZER_STAGES), "known")
    kinds = {**dict.fromkeys(MASKED_KINDS, Backbone), "classifier": Classifier, "segmenter": Segmenter}
    return kinds.get(weights.kind, Tokenizer)(weights, path, dtype)


def load_segmenter(
    source: str | os.PathLike,
    *,
    image_size: int | None = None,
    normalization: str | None = None,
    dtype: str = "float32",
) -> Segmenter:
    """Load a semantic segmentation network: a segment run, or a released UPerNet.

    Arguments as `load_backbone`.

    Raises:
        UserError: nothing readable is there, or no segmentation network.
    """
    return Segmenter(*_read(source, image_size, normalization, ("segmenter",), "a segmentation network"), dtype)


def _read(
    source: str | os.PathLike,
    image_size: int | None,
    normalization: str | None,
    kinds: tuple[str, ...],
    wanted: str,
) -> tuple[Weights, str]:
    weights = read(
        os.fspath(source), image_size=image_size, normalization=normalization, plain_vit="classifier" in kinds
    )
    if weights.kind not in kinds:
        raise UserError(
            f"{source} holds weights of kind {weights.kind!r}, which is not {wanted}.",
            "Did you mean the path of another run or file?",
            f"Pass the path of {wanted}, or use load_backbone for the tokens of these weights.",
        )
    return weights, os.fspath(source)


def _pixels(images: Images, image_size: int, crop_fraction: float) -> UInt8[np.ndarray, "b S S 3"]:
    """Return the images as the evaluation of the stages crops them."""
    return np.stack([center_crop(_bytes(image), image_size, crop_fraction) for image in _listed(images)])


def _listed(images: Images) -> Sequence[ImageLike]:
    if isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
        return [images]
    if not len(images):
        raise UserError("There are no images.", "Did a search for files find nothing?", "Pass at least one image.")
    return images


def _bytes(image: ImageLike) -> UInt8[np.ndarray, "H W 3"]:
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        if not path.is_file():
            raise UserError(
                f"There is no image {path}.", "Did you mistype the path?", "Pass the path of an image file."
            )
        return decode_image(path.read_bytes(), str(path))
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(
            f"An image array has the shape {image.shape} and the type {image.dtype}.",
            "Did you pass normalised or grey pixels?",
            "Pass arrays of the shape (height, width, 3) and the type uint8, with values from 0 to 255.",
        )
    return image


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _padding(count: int, devices: int) -> int:
    """Return how many rows to add, so that few sizes of batches are compiled and all devices have as many."""
    size = 1 << (count - 1).bit_length()
    return -(-size // devices) * devices - count
