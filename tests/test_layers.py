"""Who may import whom: the order of the packages, annotations counted as imports."""

import ast
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT

MGD3 = (
    "runtime / storage / data / backbones / modes / sampling finetuning / distillers / api config"
)
EVAL = (
    "pixel_files / students results images tracking external hub / protocols / metrics / reports / "
    "scoring"
)
RANK = {
    f"{top}.{name}": rank
    for top, levels in (("mgd3", MGD3), ("eval", EVAL))
    for rank, names in enumerate(levels.split(" / "))
    for name in names.split()
}
FILES = sorted([*(ROOT / "mgd3").rglob("*.py"), *(ROOT / "eval").rglob("*.py")])


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    top, name = (*path.relative_to(ROOT).with_suffix("").parts, "__init__")[:2]
    package = f"{top}.{name}"
    for module in imported(path):
        there = ".".join(module.split(".")[:2])
        if module.startswith("eval."):
            assert top == "eval" and (there == package or RANK[there] < RANK[package]), module
        if module.startswith("mgd3."):
            below = there == package or RANK[there] < RANK.get(package, 99)
            shared = there in ("mgd3.runtime", "mgd3.storage", "mgd3.data")
            assert shared if top == "eval" else below, module
        if module.split(".")[0] in ("hydra", "omegaconf"):
            assert package == "mgd3.config", module
        if module.split(".")[0] == "wandb":
            assert package == "eval.tracking", module


def test_names_tell_modules_apart():
    scripts = list((ROOT / "scripts").rglob("*.py"))
    names = [p.stem for p in (*FILES, *scripts) if p.stem != "__init__"]
    assert sorted(names) == sorted(set(names))
    assert not [n for n in names if n + "s" in names or n.startswith("test_")]
    folders = {p.parent for p in FILES}
    assert max(len(list(folder.glob("*.py"))) for folder in folders) <= 14


def test_there_is_no_circle():
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in FILES}
    graph = {
        name: {
            there
            for module in imported(path)
            for there in (module, module.rsplit(".", 1)[0])
            if there in modules and there != name
        }
        for name, path in modules.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(modules)
