"""Pictures of a paper table."""

from support import cell

from eval.reports.comparison import PaperComparison
from eval.reports.paper_report import accuracy_pictures, swept_value


def test_only_what_has_been_run_is_drawn():
    run = [cell("A", [60, 62], paper=(66.4, 2.4)), cell("A", [70], ipc="20"), cell("B", [])]
    (picture,) = accuracy_pictures(PaperComparison(title="T", cells=run), sweep=None)
    svg, png, caption = picture
    assert svg.startswith("<svg") and png.startswith(b"\x89PNG") and caption == "accuracy, d, s"
    published = [cell("A", [], paper=(66.4, 2.4))]
    assert accuracy_pictures(PaperComparison(title="T", cells=published), sweep=None) == []


def test_a_sweeps_rows_end_in_their_value():
    assert [swept_value(r) for r in ("t_stop 25", "lambda 0.05", "Random (seeded)")] == [
        25,
        0.05,
        None,
    ]
    rows = [cell("t_stop 25", [60]), cell("t_stop 0", [50]), cell("Random", [40])]
    assert len(accuracy_pictures(PaperComparison(title="T", cells=rows), sweep="stop_t")) == 1
