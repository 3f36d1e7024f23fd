"""Evaluation protocols on frozen features, a file for each: how a published table measured, step by step."""

from beitv2_jax.evaluation.features import Evaluate
from beitv2_jax.evaluation.protocols import beit, capi, dinov3, ep, ours

PROTOCOLS: dict[str, Evaluate] = {
    "ours": ours.evaluate,
    "dinov3": dinov3.evaluate,
    "capi": capi.evaluate,
    "ep": ep.evaluate,
    "beit": beit.evaluate,
}
"""Value of `probe.protocol` -> the protocol. What it reads of a network is in `tasks.probe.READS`."""
