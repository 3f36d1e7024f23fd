"""Parts of Markdown pages that programs write: between `<!-- name -->` and the next `<!-- end -->`."""

from pathlib import Path

from beitv2_jax.runtime.atomic_files import write_text

END = "<!-- end -->"


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what stands between the markers `<!-- name -->` and `<!-- end -->` of a Markdown file, or print it."""
    page, marker = path.read_text(), f"<!-- {name} -->"
    if marker not in page:
        print(f"{name}\n\n{text}\n")
        return
    before, after = page.split(marker, 1)
    write_text(path, f"{before}{marker}\n\n{text}\n\n{END}{after.split(END, 1)[1]}")
