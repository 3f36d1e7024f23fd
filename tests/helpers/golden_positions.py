"""Position tables and embeddings resized to another grid against the released fine-tuning loader."""

from golden_files import Golden

from beitv2_jax.convert.positions import resize_position_embedding, resize_relative_table
from beitv2_jax.models.layers import relative_position_index

TABLE, INDEX = "relative_position_bias_table", "relative_position_index"


def check_relpos_interp(golden: Golden):
    for case, settings in golden.config["cases"].items():
        grid = (settings["dst"],) * 2
        given = golden.section(f"in/{case}/")
        if settings.get("pos"):
            golden.check(f"{case}/pos_embed", resize_position_embedding(given["pos_embed"], grid))
            continue
        for block in range(settings["depth"]):
            source = f"rel_pos_bias.{TABLE}" if settings["shared"] else f"blocks.{block}.attn.{TABLE}"
            golden.check(f"{case}/blocks.{block}.attn.{TABLE}", resize_relative_table(given[source], grid))
        golden.check(f"{case}/blocks.0.attn.{INDEX}", relative_position_index(grid))
