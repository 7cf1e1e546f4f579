"""Colours and cloth patterns that fill the surfaces of a drawing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RGB = tuple[int, int, int]
Field = NDArray[np.float32]

CLOTH_COLOURS: dict[str, RGB] = {
    "black": (40, 40, 45),
    "white": (243, 243, 240),
    "grey": (139, 142, 148),
    "red": (206, 36, 40),
    "orange": (242, 130, 28),
    "yellow": (246, 209, 44),
    "green": (40, 142, 68),
    "blue": (44, 118, 214),
    "navy": (28, 42, 98),
    "purple": (122, 52, 158),
    "pink": (246, 142, 184),
    "brown": (118, 72, 40),
}
HAIR_COLOURS: dict[str, RGB] = {
    "black": (34, 29, 30),
    "brown": (94, 58, 36),
    "blond": (226, 190, 112),
    "ginger": (186, 84, 34),
    "grey": (176, 176, 178),
}
SKIN_TONES: tuple[RGB, ...] = (
    (244, 208, 180), (234, 190, 158), (218, 168, 130), (190, 136, 98), (146, 98, 68), (104, 68, 48),
)  # fmt: skip

# Colour of a pattern on a cloth of each colour; white on all others. It is black or white, because another hue could be
# mistaken for the colour of the cloth.
_ACCENT_ON = {"white": "black", "yellow": "black", "pink": "white", "grey": "black", "orange": "black"}


@dataclass(frozen=True, slots=True)
class Paint:
    """Filling of a shape.

    Attributes:
        colour: base colour.
        pattern: key of PATTERNS, or any other name for a plain colour.
        accent: colour of the pattern.
        volume: strength of the shade at the edges of the shape, 0 (flat) to 1.
    """

    colour: RGB
    pattern: str = "plain"
    accent: RGB = (255, 255, 255)
    volume: float = 0.5

    def texture(self, x: Field, y: Field) -> NDArray[np.uint8]:
        """Return the colours at points of the figure.

        Args:
            x: columns in figure units, [width].
            y: rows in figure units, [height].

        Returns:
            uint8 [height, width, 3].
        """
        out = np.empty((len(y), len(x), 3), np.uint8)
        out[:] = self.colour
        if self.pattern in PATTERNS:
            weight = PATTERNS[self.pattern](x[None, :], y[:, None])
            weight = np.broadcast_to(weight, out.shape[:2])[..., None]
            base, accent = np.array(self.colour, np.float32), np.array(self.accent, np.float32)
            out[:] = base + (accent - base) * weight
        return out


def cloth(colour: str, pattern: str = "plain") -> Paint:
    """Return the paint of a garment, given a colour and a pattern of the vocabulary."""
    base = CLOTH_COLOURS[colour]
    if pattern == "zebra":  # black stripes, or white ones on dark cloth
        dark = colour in ("black", "navy", "brown", "purple")
        accent = CLOTH_COLOURS["white" if dark else "black"]
    elif pattern == "camouflage":
        accent = darker(base, 0.45) if colour not in ("black", "navy") else lighter(base, 0.45)
    else:
        accent = CLOTH_COLOURS[_ACCENT_ON.get(colour, "white")]
    return Paint(base, pattern, accent)


def darker(colour: RGB, share: float) -> RGB:
    """Mix the colour with black: share 0 keeps it, 1 gives black."""
    red, green, blue = (round(value * (1 - share)) for value in colour)
    return red, green, blue


def lighter(colour: RGB, share: float) -> RGB:
    """Mix the colour with white: share 0 keeps it, 1 gives white."""
    red, green, blue = (round(value + (255 - value) * share) for value in colour)
    return red, green, blue


def _striped(x: Field, y: Field) -> Field:
    return _step(np.abs(y % 5.0 - 2.5), 0.95)


def _pinstriped(x: Field, y: Field) -> Field:
    return _step(np.abs(x % 3.2 - 1.6), 0.55)


def _checked(x: Field, y: Field) -> Field:
    across = _step(np.abs(x % 5.6 - 2.8), 1.25) * np.float32(0.5)
    down = _step(np.abs(y % 5.6 - 2.8), 1.25) * np.float32(0.5)
    return across + down


def _dotted(x: Field, y: Field) -> Field:
    row = np.floor(y / 3.6)
    u = (x + row % 2 * 2.1) % 4.2 - 2.1
    return _step(np.hypot(u, y % 3.6 - 1.8), 1.05)


def _zebra(x: Field, y: Field) -> Field:
    wave = y * 1.35 + 1.7 * np.sin(x * 0.42 + 0.9 * np.sin(y * 0.21)) + 0.7 * np.sin(x * 1.1 + y * 0.33)
    return np.clip(np.sin(wave) * 5 + 0.3, 0, 1)


def _floral(x: Field, y: Field) -> Field:
    row = np.floor(y / 5.4)
    u = (x + row % 2 * 3.0) % 6.0 - 3.0
    v = y % 5.4 - 2.7
    radius = np.hypot(u, v)
    petals = 1.55 + 0.75 * np.cos(5 * np.arctan2(v, u) + row)
    return _step(radius, petals) * (1 - _step(radius, 0.55))


def _camouflage(x: Field, y: Field) -> Field:
    patches = np.sin(x * 0.75 + 1.9 * np.sin(y * 0.31)) + np.sin(y * 0.62 + 1.6 * np.sin(x * 0.47 + 1))
    return np.clip(patches * 5, 0, 1)


def _step(distance: Field, edge: Field | float) -> Field:
    """Return 1 where `distance` is below `edge` and 0 above, with a soft border a third of a unit wide."""
    weight: Field = np.clip((edge - distance) * 3 + 0.5, 0, 1)
    return weight


# Weight of the accent colour at points of the figure. "logo" is missing: it is a print that the garment draws.
PATTERNS = {
    "striped": _striped,
    "pinstriped": _pinstriped,
    "checked": _checked,
    "dotted": _dotted,
    "zebra": _zebra,
    "floral": _floral,
    "camouflage": _camouflage,
}
