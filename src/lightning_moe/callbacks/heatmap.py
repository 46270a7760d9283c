"""The pictures that callbacks log, with colour scales that never move, so that those of different steps compare."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from lightning_moe.canvas import Canvas
from lightning_moe.heatmap import RELATIVE, SHARE, draw_legend, heatmap


def load_heatmap(load: Float[Tensor, "L E"], layer_labels: list[str]) -> UInt8[np.ndarray, "H W 3"]:
    """Draws the load of each expert of each layer, relative to the layer's mean.

    White is the mean, blue less, red more, dark red twice the mean or beyond.

    Args:
        load: tokens per expert, one row per layer; nan where a layer has fewer experts.
        layer_labels: what to write beside the rows.

    Returns:
        An RGB picture, rows from top to bottom.
    """
    relative = load / load.nanmean(-1, keepdim=True).clamp(min=1e-30)
    title = "Expert load / mean load of the layer"
    canvas = heatmap(
        relative.tolist(), layer_labels, title=title, row_title="layer", column_title="expert", scale=RELATIVE
    )
    return np.asarray(canvas.image)


def coactivation_heatmaps(shares: Mapping[str, Float[Tensor, "E E"]]) -> UInt8[np.ndarray, "H W 3"]:
    """Draws which experts come together, one panel for each layer, in a size that does not grow with the experts.

    A cell is the share of the tokens of the row's expert that also have the column's: white is none, dark blue all.

    Args:
        shares: of each layer, by the label to write above its panel, see `ExpertCoactivation`.

    Returns:
        An RGB picture.
    """
    columns = min(3, len(shares))
    side, gap, left, top = 150, 62, 44, 88
    canvas = Canvas(max(left + columns * (side + gap) + 60, 520), top + -(-len(shares) // columns) * (side + gap))
    # large letters: TensorBoard shows the picture at half its size
    canvas.text(left, 16, "Of the tokens of the row's expert, the share that", size=18)
    canvas.text(left, 40, "also have the column's expert", size=18)
    for number, (label, share) in enumerate(shares.items()):
        x, y = left + number % columns * (side + gap), top + number // columns * (side + gap)
        canvas.text(x, y - 14, f"layer {label}", size=18)
        canvas.cells(x, y, side, side, SHARE.rgb(share.double().cpu().numpy()))
        for expert in range(0, len(share), max(1, -(-40 * len(share) // side))):
            place = (expert + 0.5) * side / len(share)
            canvas.text(x - 5, y + place, str(expert), anchor="rm", size=18)
            canvas.text(x + place, y + side + 13, str(expert), anchor="mm", size=18)
    draw_legend(canvas, SHARE, left + columns * (side + gap) - 26, top, 110)
    return np.asarray(canvas.image)
