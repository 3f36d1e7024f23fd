"""Array aliases with the shape letters used everywhere.

`b` batch, `n` patches, `l` sequence (`[CLS]` + patches), `d` width, `nh` heads, `hd` head width, `k` codes, `c` code
width, `t` teacher width, `m` masked patches, `gh gw` grid, `H W` pixels.
"""

import sys

# `python beitv2_jax/main.py` puts this folder first on the path, where this file hides Python's own module
if __name__ == "typing":
    sys.stderr.write(
        "Error: A file of the package beitv2_jax was started as a script.\n"
        "  Did you mean a module of the package?\n"
        "  Write python -m beitv2_jax.main with the same flags, in the folder that holds the package.\n"
    )
    sys.exit(2)

from typing import Any

from jaxtyping import Array, Bool, Float, Int, Num, UInt8

Images = Num[Array, "b H W ch"]
ByteImages = UInt8[Array, "b H W 3"]
Tokens = Float[Array, "b l d"]
Mask = Bool[Array, "b n"]
CodeIds = Int[Array, "b n"]
Codes = Float[Array, "b n c"]
TeacherFeatures = Float[Array, "b n t"]
AttentionBias = Float[Array, "nh l l"]
Codebook = Float[Array, "k c"]
Scalar = Float[Array, ""]
PyTree = Any
