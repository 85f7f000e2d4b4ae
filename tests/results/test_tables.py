"""Text is data in whatever a table is printed as; modules that only read import no drawing."""

import csv
import io
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from rich.console import Console
from support import cell, row

from eval.reports.comparison import PaperComparison
from eval.reports.run_report import template
from eval.results.fitted import shared_out
from eval.results.layout import Layout, Span, csv_text
from eval.results.tables import layout, markdown, terminal

HOSTILE = "a|b\n[red]*x*[/red] & 50%_#${}~^\\ <i>"


@pytest.fixture
def table():
    ours = (Span("1.0", "ours"), Span(" (3) / "), Span("2.0", "paper"))
    return Layout(title=HOSTILE, headers=["method", HOSTILE], lines=[[HOSTILE, ours]])


def printed(renderable, width=200):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    console.print(renderable)
    return console.file.getvalue()


def test_markdown_has_its_lines_and_columns(table):
    title, blank, header, rule, line = table.markdown().splitlines()
    assert (blank, rule) == ("", "| --- | --- |")
    assert line.endswith(" | **1.0** (3) / *2.0* |")
    assert line.startswith(r"| a\|b [red]\*x\*[/red] & 50%\_#${}\~^\\ \<i> | ")
    assert line.replace(r"\|", "").count("|") == header.replace(r"\|", "").count("|") == 3
    assert title.startswith("**a") and title.endswith("**")


def test_marks_that_say_nothing_stay_legible():
    table = Layout(title="hard_label", headers=["std"], lines=[["0.0*"], ["B [1] > 2"]])
    assert "| 0.0* |" in table.markdown() and "| B [1] > 2 |" in table.markdown()
    assert "**hard_label**" in table.markdown()


def test_a_terminal_prints_markup_as_it_is(table):
    text = printed(table.for_terminal())
    assert text.count("[red]*x*[/red]") == 3
    assert "\x1b[1m1.0" in text and "\x1b[3m2.0" in text and "\x1b[31m" not in text
    noted = printed(terminal([row(method="[red]m", dataset_note="[bold]files[/bold]")]))
    assert "[red]m" in noted and "[bold]files[/bold]" in noted


def test_a_narrow_terminal_breaks_lines_between_words():
    names = [f"mgd3 guidance={g} modes=kmeans_closest scale=0.05" for g in ("mode", "ramp")]
    headers = ["method", "mean", "95 % interval", "distillation std", "n"]
    wide = Layout(
        title="t", headers=headers, lines=[[n, "22.6", "[11.8, 33.5]", "–", "3"] for n in names]
    )
    for width in (60, 70, 80):
        text = re.sub(r"\x1b\[\d+m", "", printed(wide.for_terminal(), width))
        assert max(map(len, text.splitlines())) <= width
        words = text.split()
        assert words.count("modes=kmeans_closest") == words.count("scale=0.05") == 2, text
        assert "distillation" in words
    assert "mgd3 guidance=mode modes=kmeans_closest scale=0.05 " in printed(
        wide.for_terminal(), 110
    )
    assert "…" not in printed(wide.for_terminal(), 30)  # folded, not cut


def test_room_goes_to_words_then_to_what_lacks_least():
    needs = [[4, 4, 2], [6, 4, 5], [20, 8, 5]]
    assert shared_out(9, needs) is None
    assert shared_out(12, needs) == [6, 4, 2]
    assert shared_out(20, needs) == [7, 8, 5]
    assert shared_out(99, needs) == [20, 8, 5]


def test_latex_escapes_every_special_character(table):
    *_, line, _, _ = table.latex().splitlines()
    assert line == (
        r"a|b [red]*x*[/red] \& 50\%\_\#\$\{\}\textasciitilde{}\textasciicircum{}"
        r"\textbackslash{} $<$i$>$ & \textbf{1.0} (3) / \textit{2.0} \\"
    )
    bracket = Layout(title="", headers=["m"], lines=[["[1]"]])
    assert r"\midrule" "\n" r"{}[1] \\" in bracket.latex(), "no option of the rule"
    noted = PaperComparison(title="T", cells=[cell("A", [1])], remarks=["two\nlines"]).latex()
    assert "% two lines\n" in noted


def test_html_escapes_text_and_tags_spans(table):
    source = "{% import 'parts.html' as parts %}{{ parts.grid(table) }}"
    html = template("parts.html").environment.from_string(source).render(table=table)
    assert "<td><b>1.0</b> (3) / <i>2.0</i></td>" in html
    assert html.count("&lt;i&gt;") == 2 and "<i>2.0" in html and "<i>x" not in html


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("=SUM(A1)", "'=SUM(A1)"), ("+ stop guidance", "'+ stop guidance"), ("-x", "'-x"),
        ("@x", "'@x"), ("-1.5", "-1.5"), (-1.5, "-1.5"), ("+3", "+3"), ("a=b", "a=b"),
        ("", ""), (None, ""),
    ],
)  # fmt: skip
def test_no_value_is_a_spreadsheets_formula(value, written):
    (line,) = csv.DictReader(io.StringIO(csv_text([{"name": "x", "value": value}])))
    assert line["value"] == written


def test_columns_are_kept_and_added():
    table = Layout.of_columns("t", {"a": ["1", "2"], "b": [(Span("3", "ours"),), "4"]})
    assert table.texts() == [["1", "3"], ["2", "4"]]
    assert table.kept([1]).texts() == [["3"], ["4"]]
    assert table.with_column("c", ["5", "6"]).texts()[1] == ["2", "4", "6"]


def test_users_words_reach_the_table_as_they_are():
    rows = [replace(row(), method="a|b"), row("unguided")]
    assert [line[0] for line in layout(rows).lines] == ["a|b", "unguided"]
    assert r"| a\|b | 50.0 ± – |" in markdown(rows)


HEAVY = ("matplotlib", "jinja2", "sklearn", "scipy", "torchvision", "pandas")


def test_reading_results_imports_no_drawing():
    modules = ("results.tables", "results.rows", "metrics.planes", "reports.run_report",
               "reports.paper_report", "metrics.measuring")  # fmt: skip
    code = "; ".join(f"import eval.{m}" for m in modules)
    code += f"; import sys; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
