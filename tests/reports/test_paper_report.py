"""Pictures of a paper table."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support import cell

from eval.reports.comparison import PaperComparison
from eval.reports.drawings.curves import accuracy_pictures, diversity_picture
from eval.reports.drawings.step_pictures import Trail, steps_picture
from eval.reports.paper_report import Picture


def test_only_what_has_been_run_is_drawn():
    run = [cell("A", [60, 62], paper=(66.4, 2.4)), cell("A", [70], ipc="20"), cell("B", [])]
    (picture,) = accuracy_pictures(PaperComparison(title="T", cells=run))
    svg, png, caption = picture
    assert svg.startswith("<svg") and png.startswith(b"\x89PNG") and caption == "accuracy, d, s"
    published = [cell("A", [], paper=(66.4, 2.4))]
    assert accuracy_pictures(PaperComparison(title="T", cells=published)) == []


def test_a_sweep_draws_the_rows_that_have_a_value():
    rows = [cell("late", [60]), cell("early", [50]), cell("ends in 7", [40])]
    swept = PaperComparison(title="T", cells=rows, swept={"stop_t": {"late": 25, "early": 0.05}})
    ((svg, _, _),) = accuracy_pictures(swept)
    assert all(f"<!-- {text} -->" in svg for text in ("25", "0.05", "stop_t"))
    assert "<!-- 7 -->" not in svg


def test_names_are_no_formulas_in_pictures():
    rows = [cell(r"A $\frac{1$", [60]), cell("B $x$", [50])]
    ((svg, _, _),) = accuracy_pictures(PaperComparison(title="T", cells=rows))
    assert "<!-- B $x$ -->" in svg


def test_a_cloud_of_points_has_a_mean_and_a_single_one_has_not():
    svg, png = diversity_picture({"A": [(0, 0), (1, 0.5), (0.5, 1)], "B": [(0.2, 0.3)]}, "T")
    assert "<!-- A, mean of 3 -->" in svg and "<!-- B -->" in svg
    assert png.startswith(b"\x89PNG")


def red(png):
    with Image.open(io.BytesIO(png)) as picture:
        return red_of(picture)


def red_of(picture):
    pixels = np.asarray(picture.convert("RGB"), int)
    return ((pixels[..., 0] > 180) & (pixels[..., 1] < 90)).sum()


def test_a_line_shows_where_guidance_ends():
    images = torch.full((3, 3, 8, 8), 128, dtype=torch.uint8)
    plain = Trail(title="T", steps=[49, 25, 0], rows={"late": images, "never": images})
    assert red(steps_picture([plain])) == 0
    assert red(steps_picture([replace(plain, stops={"late": 49, "never": 50})])) == 0
    one, both = (
        red(steps_picture([replace(plain, stops=stops)]))
        for stops in ({"late": 0}, {"late": 0, "never": 25})
    )
    assert both == 2 * one > 0


def test_the_mode_stands_last():
    images, mode = torch.zeros((2, 3, 8, 8), dtype=torch.uint8), torch.zeros(3, 8, 8).byte()
    mode[0] = 255
    plain = Trail(title="T", steps=[49, 0], rows={"a": images, "b": images})
    shown = steps_picture([replace(plain, modes={"a": mode, "b": mode})])
    half = steps_picture([replace(plain, modes={"a": mode})])
    assert red(steps_picture([plain])) == 0
    assert red(shown) == pytest.approx(2 * red(half), rel=0.05) and red(half) > 500
    with Image.open(io.BytesIO(shown)) as picture:
        left = picture.convert("RGB").crop((0, 0, picture.width // 2, picture.height))
    assert red_of(left) == 0


def test_captions_become_names_of_files():
    names = [Picture(c, b"", None).file for c in ("diversity, digits, ipc 10", "../A+B: «c»")]
    assert names == ["diversity-digits-ipc-10.png", "a-b-c.png"]


def test_a_table_that_does_not_fit_is_broken_between_datasets_then_between_columns():
    cells = [replace(cell("mgd3", [50.0], ipc=ipc), dataset=d) for d in "ab" for ipc in ("1", "10")]
    cells.append(replace(cell("full", [90.0], ipc="10"), dataset="b"))
    table = PaperComparison(title="t", cells=cells)

    def shape(most):
        parts = table.matrices(lambda layout: len(layout.headers) <= most)
        return [(part.title, part.headers[1:], len(part.lines)) for part in parts]

    assert shape(5) == [("t, s", ["a ipc 1", "a ipc 10", "b ipc 1", "b ipc 10"], 2)]
    assert shape(3) == [("t, a, s", ["ipc 1", "ipc 10"], 1), ("t, b, s", ["ipc 1", "ipc 10"], 2)]
    assert [title for title, *_ in shape(1)] == [
        "t, a, ipc 1, s", "t, a, ipc 10, s", "t, b, ipc 1, s", "t, b, ipc 10, s",
    ]  # fmt: skip
