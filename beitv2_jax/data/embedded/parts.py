"""The parts of the objects of the embedded data set, by the number that they have in its part maps."""

PARTS = {
    "bird": ("leg", "tail", "body", "beak", "head", "eye", "wing"),
    "butterfly": ("wing", "feeler", "body"),
    "car": ("body", "window", "lamp", "wheel"),
    "cat": ("ear", "face", "muzzle", "eye", "whisker", "nose"),
    "fish": ("fin", "body", "head", "eye", "mouth"),
    "flower": ("stalk", "leaf", "petal", "disc"),
    "house": ("chimney", "wall", "roof", "door", "window"),
    "mushroom": ("stem", "gills", "ring", "cap"),
    "sailboat": ("mast", "pennant", "sail", "hull"),
    "tree": ("trunk", "crown"),
}
"""Class -> its parts."""
PART_NAMES = ("surroundings", *(f"{name} {part}" for name, parts in PARTS.items() for part in parts))
"""Name of each number in a part map."""
