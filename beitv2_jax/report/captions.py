"""Text in pictures."""

from PIL import ImageFont


def fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return the text, cut off with dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
