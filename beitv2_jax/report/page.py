"""A page of headings, tables and pictures, written as Markdown and as one HTML file that needs no other file."""

import base64
import os
from collections.abc import Sequence
from html import escape

from beitv2_jax.runtime.atomic_files import write_text
from beitv2_jax.runtime.buckets import AnyPath, as_path

Row = Sequence[str]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111827; max-width: 960px; margin: 2.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.3rem; margin-top: 2.4rem; }
h2 { border-bottom: 1px solid #e5e7eb; padding-bottom: .3rem; } h3 { font-size: 1.05rem; margin-top: 1.6rem; }
table { border-collapse: collapse; margin: .8rem 0; font-size: 14px; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #f0f1f3; vertical-align: top; }
th { color: #6b7280; font-weight: 600; } td { overflow-wrap: anywhere; }
pre { background: #f6f7f9; padding: .7rem .9rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
img, svg { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
summary { cursor: pointer; color: #2563eb; margin: .6rem 0; } .note { color: #6b7280; }
"""


def markdown_table(rows: Sequence[Row]) -> str:
    """Lay out rows (the first one is the header) as an aligned Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


class Page:
    """Collect what a page shows, in reading order; `write` writes it.

    Args:
        title: the first heading.
        folder: where the page will lie; Markdown names pictures relative to it.
    """

    def __init__(self, title: str, folder: str | AnyPath):
        self._title, self._folder = title, as_path(folder)
        self._markdown, self._html = [f"# {title}"], [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str, level: int = 2) -> None:
        """Begin a section."""
        self._add(f"{'#' * level} {text}", f"<h{level}>{escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._add(text, f"<p>{escape(text)}</p>")

    def code(self, text: str) -> None:
        """Add text that is shown as it is written."""
        self._add(f"```\n{text}\n```", f"<pre>{escape(text)}</pre>")

    def table(self, rows: Sequence[Row], summary: str = "") -> None:
        """Add a table, whose first row is the header; with a `summary` HTML shows only that until it is opened."""
        cells = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for row, tag in _with_tags(rows)]
        table = f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
        if summary:
            table = f"<details><summary>{escape(summary)}</summary>{table}</details>"
        self._add("\n\n".join(filter(None, [summary, markdown_table(rows)])), table)

    def picture(self, path: AnyPath, title: str) -> None:
        """Add a PNG or JPEG file; HTML holds its bytes."""
        kind = "jpeg" if path.suffix == ".jpg" else "png"
        data = base64.b64encode(path.read_bytes()).decode()
        self._add(
            f"![{title}]({os.path.relpath(path, self._folder)})",
            f'<img alt="{escape(title)}" src="data:image/{kind};base64,{data}">',
        )

    def drawing(self, svg: str, name: str) -> None:
        """Add an SVG picture, which is written to the file `name` of the folder for Markdown."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._folder / name, svg)
        self._add(f"![{name.partition('.')[0]}]({name})", svg)

    def write(self) -> tuple[AnyPath, AnyPath]:
        """Write report.md and report.html and return their paths."""
        self._folder.mkdir(parents=True, exist_ok=True)
        markdown, html = self._folder / "report.md", self._folder / "report.html"
        write_text(markdown, "\n\n".join(self._markdown) + "\n")
        head = f'<meta charset="utf-8"><title>{escape(self._title)}</title><style>{_STYLE}</style>'
        body = "\n".join(self._html)
        write_text(html, f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n')
        return markdown, html

    def _add(self, markdown: str, html: str) -> None:
        self._markdown.append(markdown)
        self._html.append(html)


def _with_tags(rows: Sequence[Row]):
    return [(row, "td" if number else "th") for number, row in enumerate(rows)]
