"""The protocol of the released linear evaluation of BEiT: a linear head on every block, trained at once.

Each head reads [CLS] beside the mean patch of its block, not normalised.

Differs from the released script, which crops and flips the training images at random, in that features are those of
centre crops; and the accuracies are those after the last step, where the script takes the best epoch too.

Source: the released linear evaluation script of BEiT; BEiT v2 has none of its own.
"""

import numpy as np
import optax

from beitv2_jax.evaluation import heads
from beitv2_jax.evaluation.features import Features, OnMove, ProbeSettings, Result
from beitv2_jax.evaluation.saved import Saved, SavedParts

RATE = 1e-3
"""Learning rate for a batch of 256, scaled with the batch: 4e-3 at the documented one of 1024."""
DECAY = 1e-4


def evaluate(train: Features, test: Features, settings: ProbeSettings, on_move: OnMove, parts: SavedParts) -> Result:
    """Return the accuracy on `test` of the head of each block, and the best of them, as published.

    AdamW with decay 1e-4, cosine to zero by epoch. The best block is chosen on `test` itself: it is not held out.
    """

    def reader(features: Features) -> heads.Read:
        token, mean = features.arrays["cls"], features.arrays["mean"]
        return lambda rows: np.concatenate([token[rows], mean[rows]], axis=2).swapaxes(0, 1).astype(np.float32)

    per_epoch = max(1, len(train.labels) // settings.batch_size)
    num_epochs = max(1, settings.num_steps // per_epoch)
    cosine = optax.cosine_decay_schedule(RATE * settings.batch_size / 256, num_epochs)
    optimizer = optax.adamw(lambda step: cosine(step // per_epoch), weight_decay=DECAY)

    def fit(saved: Saved) -> list[float]:
        return heads.linear_accuracies(
            train, test, reader, optimizer, len(train.layers), settings, on_move, saved
        ).tolist()

    found = parts("cls_mean/linear", fit)
    accuracies = {f"cls_mean/linear_{layer}": value for layer, value in zip(train.layers, found, strict=True)}
    best = int(np.argmax(found))
    accuracies["cls_mean/linear_best"] = found[best]
    return Result(accuracies, {"cls_mean/linear_best_layer": train.layers[best]})
