"""Draws heatmaps with labelled axes and fixed colour scales, so that pictures of different steps compare."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# from empty over balanced (white) to overloaded
_LOAD = (
    np.array([0.0, 0.5, 1.0, 1.5, 2.0]),
    np.array([[33, 60, 120], [150, 180, 220], [250, 250, 250], [235, 160, 110], [160, 30, 30]], dtype=float),
)
_SHARE = (
    np.array([0.0, 0.25, 0.5, 1.0]),
    np.array([[255, 255, 255], [180, 215, 225], [70, 150, 180], [10, 50, 90]], dtype=float),
)
_Scale = tuple[NDArray[np.float64], NDArray[np.float64]]
# no expert of that number
_ABSENT = (205, 205, 205)
_MARGIN_LEFT, _MARGIN_TOP, _MARGIN_BOTTOM, _LEGEND = 60, 40, 46, 90


def load_heatmap(load: Float[Tensor, "L E"], layer_labels: list[str]) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the load of each expert of each layer, relative to the layer's mean.

    White is the mean, blue less, red more, dark red twice the mean or beyond.

    Args:
        load: tokens per expert, one row per layer; nan where a layer has fewer experts.
        layer_labels: what to write beside the rows.

    Returns:
        An RGB picture, rows from top to bottom.
    """
    relative = (load / load.nanmean(-1, keepdim=True).clamp(min=1e-30)).double().cpu().numpy()
    num_layers, num_experts = relative.shape
    cell_height, cell_width = max(4, min(26, 640 // num_layers)), max(4, min(60, 720 // num_experts))
    width = max(_MARGIN_LEFT + num_experts * cell_width + _LEGEND, 420)
    height = max(_MARGIN_TOP + num_layers * cell_height + _MARGIN_BOTTOM, 190)
    picture = Image.new("RGB", (width, height), "white")
    cells = Image.fromarray(_colour(relative, _LOAD)).resize(
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
    _draw_legend(picture, _LOAD, (">= 2", "1", "0"), _MARGIN_LEFT + num_experts * cell_width + 20)
    return np.asarray(picture)


def coactivation_heatmaps(shares: Mapping[str, Float[Tensor, "E E"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Draws which experts come together, one panel for each layer.

    A cell is the share of the tokens of the row's expert that also have the column's: white is none, dark blue all.

    Args:
        shares: of each layer, by the label to write above its panel, see `ExpertCoactivation`.

    Returns:
        An RGB picture.
    """
    columns = min(4, len(shares))
    side, gap, left, top = 150, 46, 40, 62
    width = max(left + columns * (side + gap) + _LEGEND, 520)
    picture = Image.new("RGB", (width, top + -(-len(shares) // columns) * (side + gap)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    draw.text((left, 6), "Of the tokens of the row's expert, the share that", fill="black", font=font)
    draw.text((left, 22), "also have the column's expert", fill="black", font=font)
    for number, (label, share) in enumerate(shares.items()):
        x, y = left + number % columns * (side + gap), top + number // columns * (side + gap)
        panel = Image.fromarray(_colour(share.double().cpu().numpy(), _SHARE))
        picture.paste(panel.resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline="gray")
        draw.text((x, y - 16), f"layer {label}", fill="black", font=font)
        cell = side / len(share)
        for expert in range(0, len(share), max(1, -(-24 * len(share) // side))):
            place = (expert + 0.5) * cell
            draw.text((x - 5, y + place), str(expert), fill="black", font=font, anchor="rm")
            draw.text((x + place, y + side + 4), str(expert), fill="black", font=font, anchor="ma")
    _draw_legend(picture, _SHARE, ("1", "0.5", "0"), left + columns * (side + gap) - 10)
    return np.asarray(picture)


def _colour(values: NDArray[np.float64], scale: _Scale) -> NDArray[np.uint8]:
    stops, colours = scale
    channels = [np.interp(values, stops, colours[:, channel]) for channel in range(3)]
    coloured = np.where(np.isnan(values)[..., None], _ABSENT, np.stack(channels, axis=-1))
    result: NDArray[np.uint8] = coloured.round().astype(np.uint8)
    return result


def _draw_legend(picture: Image.Image, scale: _Scale, labels: tuple[str, str, str], left: int) -> None:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    top = _MARGIN_TOP if scale is _LOAD else 62
    steps = _colour(np.linspace(scale[0][-1], 0.0, 100)[:, None], scale)
    picture.paste(Image.fromarray(steps).resize((14, 100)), (left, top))
    draw.rectangle((left, top, left + 14, top + 100), outline="gray")
    for place, label in enumerate(labels):
        draw.text((left + 20, top + 50 * place), label, fill="black", font=font, anchor="lm")
