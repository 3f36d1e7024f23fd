"""Weights on the Hugging Face hub: hf:OWNER/NAME[@REVISION][/FILE] stands for a path wherever weights are read.

What is fetched lies in the cache of the library `huggingface_hub` (the extra "hub"), which also has the offline mode
(HF_HUB_OFFLINE=1) and the access token.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from beitv2_jax.config.paths import HUB, HubAddress, parse_hub
from beitv2_jax.errors import UserError

FILES_IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weights in a folder of transformers or timm, in the order in which they are looked for."""
_BESIDE = ["*.json", "checkpoints/*", "README.md", "LICENSE*"]
"""What belongs to weights: settings and terms beside a file, and the checkpoints of a run directory."""
_SUFFIXES = (("*.safetensors",), ("*.bin", "*.pth", "*.pt", "*.npz", "*.ckpt", "*.tar"))
"""Weights that are fetched, the second ones where there are none of the first."""


def local_path(source: str) -> str:
    """Return a path as it is; for an address of the hub, fetch what is not in the cache and return where it lies there.

    That is the file, or a folder in the layout of transformers, timm or a run. An address without a file takes the
    usual one of these layouts, else the first weights file, and the log says which.

    Raises:
        UserError: the address is not valid, huggingface_hub is not installed, or what is asked for cannot be fetched.
    """
    return _fetched(source) if source.startswith(HUB) else source


@functools.cache  # asked for again and again, and 'main' must not change between
def _fetched(source: str) -> str:
    address = parse_hub("WEIGHTS", source)
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{source} cannot be fetched: the library huggingface_hub is not installed.",
            "Did you install the package without its extra for the hub?",
            'Run pip install "beitv2_jax[hub]".',
        ) from error

    def fetch(*patterns: str) -> Path:
        with _named_errors(source, address):
            return Path(
                huggingface_hub.snapshot_download(
                    address.repo, revision=address.revision, allow_patterns=[*patterns, *_BESIDE]
                )
            )

    if address.file:
        path = fetch(address.file) / address.file
        if not path.is_file():
            there = sorted(file.name for file in path.parent.glob("*")) if path.parent.is_dir() else []
            raise UserError(
                f"The repository {address.repo} has no file {address.file}, or it is not in the cache.",
                f"Did you mistype the name? Beside it the cache has {', '.join(there) or 'nothing'}.",
                f"Write hf:{address.repo}/FILE with a file of the repository, or hf:{address.repo}.",
            )
        logging.info("%s is %s", source, path)
        return str(path)
    for patterns in _SUFFIXES:
        folder = fetch(*patterns)
        if (folder / "checkpoints").is_dir():
            logging.info("%s is a run directory, %s", source, folder)
            return str(folder)
        found = sorted(file for pattern in patterns for file in folder.rglob(pattern) if file.is_file())
        if found:
            return str(_chosen(source, folder, found))
    raise UserError(
        f"The repository {address.repo} has no weights file, or none is in the cache.",
        "Did you mean another repository, or one whose weights are of Flax or TensorFlow?",
        f"Write hf:OWNER/NAME of a repository with a file {', '.join(name for part in _SUFFIXES for name in part)}.",
    )


def _chosen(source: str, folder: Path, found: list[Path]) -> Path:
    """Return the folder if it has weights under a usual name, else the first file; log which, and what others."""
    usual = next((name for name in FILES_IN_FOLDER if (folder / name).is_file()), None)
    file = folder / usual if usual else found[0]
    others = [str(other.relative_to(folder)) for other in found if other != file]
    logging.info(
        "%s: weights of %s%s", source, file, f"; not read: {', '.join(others)}; hf:.../FILE chooses" if others else ""
    )
    return folder if usual else file


@contextlib.contextmanager
def _named_errors(source: str, address: HubAddress) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"The repository {address.repo} gives its files only to users who have asked for access.",
            "Did you accept its conditions on its page, and log in on this machine?",
            "Accept them there and run hf auth login, or set HF_TOKEN.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"The Hugging Face hub has no repository {address.repo} that you may read.",
            "Did you mistype the owner or the name, or is it private?",
            "Write hf:OWNER/NAME as its page shows it, or run hf auth login for a private one.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"The repository {address.repo} has no revision {address.revision!r}.",
            "Did you mean a branch, a tag or a commit of it?",
            f"Write hf:{address.repo}@REVISION with one that its page shows, or leave @{address.revision} out.",
        ) from error
    except Exception as error:  # of the network, which depends on the library beneath, or the file is not in the cache
        raise UserError(
            f"{source} is not in the cache, and the Hugging Face hub cannot be reached: "
            f"{str(error).split(chr(10))[0].rstrip('.')}.",
            "Is this machine offline, or is HF_HUB_OFFLINE set?",
            f"Run hf download {address.repo} where there is a network, copy the cache, and set HF_HUB_CACHE to it.",
        ) from error
