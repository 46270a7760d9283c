"""Draws an expert-load heatmap with labelled axes and a fixed colour scale."""

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# from empty over balanced (white) to overloaded; the scale never moves, so pictures of different steps compare
_STOPS = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
_COLOURS = np.array([[33, 60, 120], [150, 180, 220], [250, 250, 250], [235, 160, 110], [160, 30, 30]], dtype=float)
_MARGIN_LEFT, _MARGIN_TOP, _MARGIN_BOTTOM, _LEGEND = 60, 40, 46, 90


def load_heatmap(load: Float[Tensor, "L E"], layer_labels: list[str]) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the load of each expert of each layer, relative to the layer's mean.

    White is the mean, blue less, red more, dark red twice the mean or beyond.

    Args:
        load: tokens per expert, one row per layer.
        layer_labels: what to write beside the rows.

    Returns:
        An RGB picture, rows from top to bottom.
    """
    relative = (load / load.mean(-1, keepdim=True).clamp(min=1e-30)).double().cpu().numpy()
    num_layers, num_experts = relative.shape
    cell_height, cell_width = max(4, min(26, 640 // num_layers)), max(4, min(60, 720 // num_experts))
    width = max(_MARGIN_LEFT + num_experts * cell_width + _LEGEND, 420)
    height = max(_MARGIN_TOP + num_layers * cell_height + _MARGIN_BOTTOM, 190)
    picture = Image.new("RGB", (width, height), "white")
    cells = Image.fromarray(_colour(relative)).resize(
        (num_experts * cell_width, num_layers * cell_height), Image.Resampling.NEAREST
    )
    picture.paste(cells, (_MARGIN_LEFT, _MARGIN_TOP))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)
    draw.text((_MARGIN_LEFT, 6), "Expert load / mean load of the layer", fill="black", font=font)
    bottom = _MARGIN_TOP + num_layers * cell_height
    for row in range(0, num_layers, -(-14 // cell_height)):
        centre = _MARGIN_TOP + row * cell_height + cell_height // 2
        draw.text((_MARGIN_LEFT - 8, centre), layer_labels[row], fill="black", font=font, anchor="rm")
    for column in range(0, num_experts, -(-36 // cell_width)):
        centre = _MARGIN_LEFT + column * cell_width + cell_width // 2
        draw.text((centre, bottom + 5), str(column), fill="black", font=font, anchor="ma")
    draw.text((_MARGIN_LEFT, bottom + 22), "expert", fill="black", font=font)
    draw.text((8, _MARGIN_TOP - 18), "layer", fill="black", font=font)
    _draw_legend(picture, draw, font, _MARGIN_LEFT + num_experts * cell_width + 20)
    return np.asarray(picture)


def _colour(relative: NDArray[np.float64]) -> NDArray[np.uint8]:
    channels = [np.interp(relative, _STOPS, _COLOURS[:, channel]) for channel in range(3)]
    colours: NDArray[np.uint8] = np.stack(channels, axis=-1).round().astype(np.uint8)
    return colours


def _draw_legend(
    picture: Image.Image, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, left: int
) -> None:
    steps = _colour(np.linspace(2.0, 0.0, 100)[:, None])
    picture.paste(Image.fromarray(steps).resize((14, 100)), (left, _MARGIN_TOP))
    draw.rectangle((left, _MARGIN_TOP, left + 14, _MARGIN_TOP + 100), outline="gray")
    for value, label in ((2.0, ">= 2"), (1.0, "1"), (0.0, "0")):
        draw.text((left + 20, _MARGIN_TOP + 100 - 50 * value), label, fill="black", font=font, anchor="lm")
