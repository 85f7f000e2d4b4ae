"""Figures as bytes: the same drawing twice is the same file, and text stands as it is."""

import io

from PIL import Image

from eval.reports.drawings.figures import as_png, as_svg, drawing, panels


def drawn(form, **options):
    with drawing():
        figure, axes = panels(1, 2, (4, 2), sharey=True)
        axes[0, 0].plot([0, 1], [1, 3])
        axes[0, 1].set_title("costs $5 and $6")
        return form(figure, **options)


def test_the_same_drawing_gives_the_same_bytes():
    assert drawn(as_svg) == drawn(as_svg)
    assert drawn(as_png, dpi=50) == drawn(as_png, dpi=50)


def test_an_svg_is_one_element_without_a_date_and_dollars_are_no_formula():
    svg = drawn(as_svg)
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")
    assert "<dc:date>" not in svg
    assert "costs $5 and $6" in svg  # the comment that names the text; a formula has another


def test_a_png_has_the_size_that_was_asked_for():
    with Image.open(io.BytesIO(drawn(as_png, dpi=50))) as picture:
        assert picture.size == (200, 100)
