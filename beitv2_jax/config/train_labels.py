"""How much of a training split is learnt from: '10%' or '5 shots'."""

import re


def parse_train_labels(text: str) -> dict[str, float]:
    """Return {"fraction": f} of '10%' or {"shots": n} of '5 shots', images of every class; {} if it is neither."""
    if match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text):
        fraction = float(match[1]) / 100
        return {"fraction": fraction} if 0 < fraction <= 1 else {}
    if match := re.fullmatch(r"\s*(\d+)\s+shots?\s*", text):
        return {"shots": int(match[1])} if int(match[1]) else {}
    return {}
