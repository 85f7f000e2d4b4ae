"""Pictures of a paper table."""

from support import cell

from eval.reports.comparison import PaperComparison
from eval.reports.curves import accuracy_pictures


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
