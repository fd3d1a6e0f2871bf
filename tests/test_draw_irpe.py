"""iRPE.png, drawn by tools/draw_irpe.py."""

import math

import draw_irpe
import pytest
import torch

from conftest import ROOT
from irpe import get_bucket_ids_2d, piecewise_index

PUBLISHED = {
    "Euclidean": ("euc", 20),
    "Quantization": ("quant", 33),
    "Product": ("product", 1.9),
    "Cross, rows": ("cross_rows", 20),
    "Cross, columns": ("cross_cols", 20),
}


@pytest.mark.parametrize("position", [(5, 8), (0, 13)])
def test_every_number_and_colour_drawn_is_the_bucket_of_its_key(position):
    axes = {panel.get_title().partition(":")[0]: panel for panel in draw_irpe.draw(position).axes}
    for name, (method, ratio) in PUBLISHED.items():
        ids, _ = get_bucket_ids_2d(method, 14, 14, 0, ratio, 2 * ratio, 8 * ratio)
        expected = {
            (column, row): ids[position[0] * 14 + position[1], row * 14 + column].item()
            for row in range(14)
            for column in range(14)
        }
        assert {text.get_position(): int(text.get_text()) for text in axes[name].texts} == expected
        pixels = axes[name].images[0].get_array()
        colors = {
            (expected[column, row], tuple(pixels[row, column].tolist())) for row in range(14) for column in range(14)
        }
        assert len(colors) == len(set(expected.values())) == len({color for _, color in colors})
        for frame in axes[name].lines:
            middle = [sum(values[:4]) / 4 for values in frame.get_data()]
            assert middle == [position[1], position[0]]


def test_the_curves_are_g_and_the_clipped_offset():
    panel = draw_irpe.draw((5, 8)).axes[-1]
    curves = {
        line.get_label(): dict(zip(*(values.tolist() for values in line.get_data(orig=True)), strict=True))
        for line in panel.lines
        if not line.get_label().startswith("_")
    }
    assert curves["clip"] == {x: max(-8, min(8, x)) for x in range(-40, 41)}
    assert curves["g (Eq. 18)"] == {
        x: piecewise_index(torch.tensor(x), 4, 8, 32, torch.long).item() for x in range(-40, 41)
    }
    # Eq. 18 by hand
    assert all(curves["g (Eq. 18)"][x] == round(4 + math.log(x / 4) / math.log(8) * 4) for x in range(5, 33))


def test_the_figure_in_the_repository_is_small_enough_for_a_web_page():
    assert 20_000 < (ROOT / "iRPE.png").stat().st_size < 300_000
