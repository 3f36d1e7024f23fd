"""Released weights are recognised, and others are not."""

import hashlib

from beitv2_jax.convert import published


def test_classifiers_and_segmenters_by_name():
    found = published.recognise("/a/beitv2_base_patch16_224_pt1k_ft21kto1k.pth", "classifier")
    assert found.metrics["top1"] == 0.86458 and "ImageNet" in found.on
    in_timm = published.recognise("timm/beitv2_large_patch16_224.in1k_ft_in22k_in1k", "classifier")
    assert in_timm.metrics == {"top1": 0.88406} and in_timm.on.endswith("--crop_fraction=0.95")
    assert published.recognise("beitv2_large_patch16_224_pt1k_ftade20k.pth", "segmenter").metrics == {"mean_iou": 0.567}
    for path, kind in (
        ("beitv2_base_patch16_224_pt1k_ft1k.pth", "segmenter"),
        ("beitv2_base_patch16_224_pt1k.pth", "mim"),
        ("beitv2_base_patch16_224.in1k_ft_in22k", "classifier"),
        ("runs/finetune", "classifier"),
    ):
        assert published.recognise(path, kind) is None


def test_tokenizers_by_their_bytes(tmp_path, monkeypatch):
    file = tmp_path / "renamed.pth"
    file.write_bytes(b"weights")
    assert published.recognise(str(file), "vqkd") is None
    name = f"vqkd_{hashlib.sha256(b'weights').hexdigest()[:8]}"
    monkeypatch.setitem(published._TOKENIZERS, name, {"codebook_usage": 0.97})
    assert published.recognise(str(file), "vqkd").name == name
    assert published.recognise(str(tmp_path), "vqkd") is None
