"""The pages' commands compose, their links lead somewhere; nothing is run."""

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from mgd3.config.arguments import understood
from mgd3.config.grid import Experiment, paper_files, read_request
from mgd3.config.identity import register
from mgd3.config.schema import CONFIGS, plain
from mgd3.config.scripts import SCRIPTS

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("results/**/README.md")),
]
MOST_LINES = 120  # of the README

_STARTS = re.compile(r"(python|torchrun|make)\s")
_SETS = r"([A-Z_]\w*=\S*\s+)+"  # leading variables of the shell
_LEFT_OUT = ("...", "…")
_OF_HYDRA = {"--cfg": 1, "--info": 1, "-m": 0, "--multirun": 0, "--help": 0}  # arguments of each


@dataclass(frozen=True)
class Command:
    """What a page tells its reader to type."""

    page: Path
    line: int
    words: tuple[str, ...]

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def commands(page: Path) -> list[Command]:
    """Of every sh block: lines continued by a backslash are one, those joined by && several."""
    found, inside, start, text = [], False, 0, ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            inside, text = line == "```sh", ""
        elif inside:
            start = start if text else number
            text += line.removesuffix("\\")
            if line.endswith("\\"):
                continue
            for part in text.split("&&"):
                bare = re.sub(rf"^{_SETS}", "", part.strip())
                if _STARTS.match(bare):
                    found.append(Command(page, start, tuple(shlex.split(bare, comments=True))))
            text = ""
    return found


def each(program: str, *others: str) -> list:
    wanted = [c for page in PAGES for c in commands(page) if c.words[0] in (program, *others)]
    return [pytest.param(c, id=f"{c.place} {' '.join(c.words[1:3])}") for c in wanted]


@pytest.mark.parametrize("command", each("python", "torchrun"))
def test_a_command_composes(command: Command):
    script, arguments = _script(command.words)
    assert (ROOT / script).is_file(), f"{command.place}: there is no {script}"
    if "--config-dir" in arguments:
        pytest.skip("needs a folder of the reader's own (tests/test_extending.py)")
    whole = not set(arguments) & {*_LEFT_OUT, "--help"}
    arguments = [a for a in arguments if a not in _LEFT_OUT]
    register()
    overrides, multirun = _overrides(understood(arguments, SCRIPTS[Path(script).stem]))
    name = "config" if script == "run.py" else Path(script).stem
    jobs = _jobs(overrides)
    for job in jobs:
        cfg = _composed(name, job)
        swept = len(jobs) > 1 and not multirun and cfg.hydra.mode is None
        assert not swept, f"{command.place}: several values need -m"
        missing = _missing(cfg)
        assert not (whole and missing), f"{command.place}: {', '.join(missing)} not given"
    if "paper_table" in cfg:
        _require_cells(cfg, overrides)


@pytest.mark.parametrize("command", each("make"))
def test_a_target_of_make_exists(command: Command):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.M))
    targets |= {f"table{n}" for n in re.search(r"addprefix table,([\d ]+)", makefile)[1].split()}
    wanted = {word for word in command.words[1:] if "=" not in word}
    assert wanted and wanted <= targets, f"{command.place}: the Makefile has no {wanted - targets}"
    for word in command.words[1:]:  # what a table's target hands to scripts/reproduce.py
        if word.startswith("ARGS="):
            arguments = [*shlex.split(word.removeprefix("ARGS=")), "table=1"]
            register()
            overrides, _ = _overrides(understood(arguments, SCRIPTS["reproduce"]))
            for job in _jobs(overrides):
                cfg = _composed("reproduce", job)
            _require_cells(cfg, overrides)


def _links() -> list:
    found = []
    for page in PAGES:
        inside = False
        for number, line in enumerate(page.read_text().splitlines(), start=1):
            inside ^= line.startswith("```")
            for target in [] if inside else re.findall(r"\]\(([^()\s]+)\)", line):
                if "://" not in target:
                    place = f"{page.relative_to(ROOT)}:{number}"
                    found.append(pytest.param(page, target, id=f"{place} {target}"))
    return found


@pytest.mark.parametrize(("page", "target"), _links())
def test_a_link_leads_somewhere(page: Path, target: str):
    name, _, heading = target.partition("#")
    path = page.parent / name if name else page
    assert path.exists()
    if heading:
        assert heading in _anchors(path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_heading_stands_alone(page: Path):
    text = re.sub(r"^```.*?^```", "```", page.read_text(), flags=re.M | re.S)
    lines = [line for line in text.splitlines() if line.strip()]
    for line, below in zip(lines, [*lines[1:], "#"], strict=True):
        level = re.match(r"#+ ", line)
        if level and (following := re.match(r"#+ ?", below)):
            assert len(following[0].strip()) > len(level[0].strip()), f"nothing below «{line}»"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


@cache
def _anchors(page: Path) -> set[str]:
    """How GitHub names a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _script(words: tuple[str, ...]) -> tuple[str, list[str]]:
    """The file that is run, and what it is given."""
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[place], list(words[place + 1 :])


def _overrides(arguments: list[str]) -> tuple[list[str], bool]:
    """Arguments without Hydra's own options; is it a sweep?"""
    found, skipped = [], 0
    for argument in arguments:
        if skipped:
            skipped -= 1
        elif argument in _OF_HYDRA:
            skipped = _OF_HYDRA[argument]
        else:
            found.append(argument)
    return found, bool({"-m", "--multirun"} & set(arguments))


def _jobs(overrides: list[str]) -> list[list[str]]:
    """Enough jobs for every value of a sweep to be in one of them."""
    parser = OverridesParser.create()
    values = []
    for text in overrides:
        override = parser.parse_override(text)
        if override.is_sweep_override():
            key = override.get_key_element()
            values.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            values.append([text])
    most = max(map(len, values), default=1)
    return [[own[min(n, len(own) - 1)] for own in values] for n in range(most)]


def _composed(name: str, overrides: list[str]) -> DictConfig:
    """The configuration with Hydra's node, all that it takes from elsewhere resolved."""
    with initialize_config_dir(CONFIGS, version_base="1.3", job_name="run"):
        cfg = compose(name, overrides, return_hydra_config=True)
        for key in cfg:
            if key != "hydra" and not OmegaConf.is_missing(cfg, key):
                plain(cfg[key])
        return cfg


def _missing(cfg: DictConfig) -> list[str]:
    """Keys that need a value and have none."""
    found = []
    for key in cfg:
        if OmegaConf.is_missing(cfg, key):
            found.append(str(key))
        elif key != "hydra" and OmegaConf.is_config(cfg[key]):
            found += [f"{key}.{inner}" for inner in OmegaConf.missing_keys(cfg[key])]
    return found


def _require_cells(cfg: DictConfig, overrides: list[str]) -> None:
    """The table is there, has the cells that are asked for, and takes the overrides."""
    request = read_request(cfg, [o for o in overrides if not o.startswith(("hydra.", "hydra/"))])
    if request.name in paper_files():
        Experiment(request.name, request.overrides, request.only, cfg.rehearsal)
