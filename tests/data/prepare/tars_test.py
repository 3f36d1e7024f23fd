"""A tar gives all its files or an error, wherever it was cut."""

import io
import tarfile

import hypothesis
import pytest
from hypothesis import strategies as st
from ilsvrc_archives import pack

from beitv2_jax.data.prepare.tars import tar_files


def _contents(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar_files(tar)}


@hypothesis.given(st.lists(st.integers(0, 1700), min_size=1, max_size=5), st.data())
def test_a_cut_never_passes_for_the_whole(sizes, data):
    files = {f"{i}.JPEG": bytes([i + 1]) * size for i, size in enumerate(sizes)}
    archive = pack(files)
    cut = archive[: data.draw(st.integers(0, len(archive)))]
    try:
        assert _contents(cut) == files
        # all there, and at least one block of the end mark
        assert len(cut) >= sum(512 + -(-size // 512) * 512 for size in sizes) + 512
    except tarfile.TarError:
        pass


def test_hidden_files_and_folders_are_passed_over():
    files = {"./a/b.JPEG": b"1", "./._a.JPEG": b"2", "c.JPEG": b"", ".DS_Store": b"3"}
    assert _contents(pack(files)) == {"a/b.JPEG": b"1", "c.JPEG": b""}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder, link = tarfile.TarInfo("a"), tarfile.TarInfo("link.JPEG")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "c.JPEG"
        tar.addfile(folder)
        tar.addfile(link)
    assert _contents(buffer.getvalue()) == {}


def test_garbage_after_a_file_is_no_end():
    archive = pack({"a.JPEG": b"1"})[:1024]
    with pytest.raises(tarfile.TarError):
        _contents(archive + b"garbage" * 500)
