"""What a part of the network costs in one step, and the formulas of a stack of transformer blocks.

Only matrix products and convolutions are counted, 2 FLOPs a multiply-add; the rest of a transformer's arithmetic is
some per cent and never what binds it.
"""

import dataclasses

FLOAT32, HALF = 4, 2


@dataclasses.dataclass(frozen=True)
class Component:
    """One part of the network in one step, for one image.

    Attributes:
        name: as the plan prints it.
        params: its numbers; those of frozen parts are not trained. A part used twice counts them at its first place.
        flops: of one image in one step, forward and backward.
        exact: float32 products in full precision, for which chips are slower.
        kept: bytes that the forward pass keeps for the backward pass.
        held: bytes that are there for a while only, while this part is computed.
        frozen: not trained.
        passed: bytes of all that the forward pass makes, kept or not, weighted by how often a step runs through it:
            1 for a forward and a backward pass. 0 means `kept` and `held`.
    """

    name: str
    params: int
    flops: int
    exact: bool = False
    kept: int = 0
    held: int = 0
    frozen: bool = False
    passed: int = 0


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The sizes of a stack of blocks; `tokens` counts [CLS]. `itemsize` is that of a number in its matrix products."""

    tokens: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    itemsize: int = HALF
    layer_scale: bool = False
    gated: bool = False
    remat: str = "none"

    def block_flops(self) -> dict[str, int]:
        """Return the forward FLOPs of one block's matrix products by name."""
        length, width = self.tokens, self.width
        return {
            "qkv": 2 * length * width * 3 * width,
            "attention": 2 * (2 * length * length * width),
            "proj": 2 * length * width * width,
            "fc1": 2 * length * width * self.mlp_dim * (2 if self.gated else 1),
            "fc2": 2 * length * self.mlp_dim * width,
        }

    def flops(self, *, frozen: bool = False) -> int:
        """Return the FLOPs of all blocks in a step.

        The backward pass costs twice the forward pass. With remat "full" the forward pass runs again, but for the last
        product where nothing needs its result: only the gradient of a layer scale does. "dots" keeps what the linear
        maps give, and runs the attention's products again.
        """
        block = self.block_flops()
        forward = sum(block.values())
        if frozen:
            return self.depth * forward
        full = forward - (0 if self.layer_scale else block["fc2"])
        again = {"none": 0, "dots": block["attention"], "full": full}
        return self.depth * (3 * forward + again[self.remat])

    def block_params(self, *, qkv_biases: int = 2) -> int:
        """Return the numbers of one block: two norms, attention, MLP, layer scale."""
        width, mlp_dim = self.width, self.mlp_dim
        fan_out = mlp_dim * (2 if self.gated else 1)
        attention = 3 * width * width + qkv_biases * width + width * width + width
        mlp = width * fan_out + fan_out + mlp_dim * width + width
        return 4 * width + attention + mlp + (2 * width if self.layer_scale else 0)

    def kept(self) -> int:
        """Return the bytes that all blocks keep for the backward pass, for one image.

        A block keeps the residual stream twice in float32, what enters its matrix products, what leaves the attention
        and the MLP, and the attention weights in float32. With remat it keeps the residual stream once, and "dots" also
        what the linear maps give.
        """
        if self.remat == "none":
            return self.depth * self.block_bytes()
        products = self.itemsize * self.tokens * (5 * self.width + (2 if self.gated else 1) * self.mlp_dim)
        return self.depth * (FLOAT32 * self.tokens * self.width + (products if self.remat == "dots" else 0))

    def held(self) -> int:
        """Return the bytes of one block's all where remat makes them again while that block is differentiated."""
        return 0 if self.remat == "none" else self.block_bytes()

    def passed(self, *, frozen: bool = False) -> int:
        """Return the bytes of all that the blocks make, a third of them where frozen.

        What remat makes again counts nothing: the compiler fuses it with what needs it, and moves even less than
        without.
        """
        return self.depth * self.block_bytes() // (3 if frozen else 1)

    def block_bytes(self) -> int:
        """Return the bytes that the forward pass of one block makes and the backward pass needs, for one image."""
        stream = FLOAT32 * self.tokens * self.width
        entered = self.itemsize * self.tokens * (8 * self.width + (4 if self.gated else 2) * self.mlp_dim)
        weights = FLOAT32 * self.num_heads * self.tokens**2
        return 2 * stream + entered + weights


def join(name: str, *parts: Component) -> Component:
    """Return several parts as one; of what they hold for a while the widest counts."""
    return Component(
        name,
        sum(part.params for part in parts),
        sum(part.flops for part in parts),
        parts[0].exact,
        sum(part.kept for part in parts),
        max(part.held for part in parts),
    )


def total_flops(parts: list[Component], *, exact: bool | None = None) -> int:
    """Return the FLOPs of one image in a step, of all parts or of those that are `exact` or not."""
    return sum(part.flops for part in parts if exact is None or part.exact == exact)
