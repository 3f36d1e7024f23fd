"""Walk over the files of a tar without holding more than its headers, and see where it breaks off."""

import posixpath
import tarfile
from collections.abc import Iterator

_BLOCK = 512


def tar_files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield every visible file of an open, uncompressed tar, its name normalised.

    Raises:
      tarfile.TarError: it breaks off. Python takes a tar that is cut between two files for a whole one, so its end
        mark is looked for here.
    """
    end = 0
    for member in tar:
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
        member.name = posixpath.normpath(member.name)
        # tarfile would keep every header that it has seen
        tar.members = []
        if member.isfile() and not posixpath.basename(member.name).startswith("."):
            yield member
    tar.fileobj.seek(end)
    if tar.fileobj.read(_BLOCK) != bytes(_BLOCK):
        raise tarfile.ReadError("it does not end as a tar does")
