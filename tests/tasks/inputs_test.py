"""What the stages share: a data set that leaves nothing to classify is refused before anything is built."""

import pytest
from paths import CONFIGS

from beitv2_jax import config as config_lib
from beitv2_jax.errors import UserError
from beitv2_jax.tasks import finetune, probe


@pytest.mark.parametrize(
    ("files", "num_classes"),
    [(["train/x.png", "val/x.png"], 0), (["train/owl/x.png", "val/owl/x.png"], 1), (["train/owl/x.png"], 1)],
)
@pytest.mark.parametrize("stage", ["finetune", "probe"])
def test_fewer_than_two_classes_are_nothing_to_classify(files, num_classes, stage, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"not decoded here")
    if len(files) == 1:  # two folders, one of them without images
        (tmp_path / "train" / "wren").mkdir()
    config = config_lib.load(str(CONFIGS / f"{stage}.py")).unlock()
    config.data.update(source=f"folder:{tmp_path}", eval_split="val" if len(files) > 1 else "train")
    with pytest.raises(UserError, match=f"has {num_classes} classes with images in its split train"):
        {"finetune": finetune, "probe": probe}[stage].build(config)
