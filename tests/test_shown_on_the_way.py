"""Figures that look at images: a point each, a map for a class, x0_hat on the way."""

import pytest
import torch
from conftest import run

from mgd3.config.grid import Experiment
from mgd3.config.identity import register
from mgd3.config.paper import Denoising
from mgd3.config.remaking import Remaker
from mgd3.config.schema import composed
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.errors import UserError
from mgd3.sampling.watching import StepWatch, spread_steps

MINE = """# @package _global_
students: []
dataset: {classes: [0, 1, 2]}
paper_table:
  caption: on the way
  measure: true
  maps: [digit 1]
  points: image
  denoising: {classes: [digit 2], image: 1, steps: [49, 30, 0]}
  rows:
    never: {method: mgd3, guidance.stop_t: 50}
    always: {method: mgd3, guidance.stop_t: 0}
  grid: {dataset: [digits], ipc: [3], seed: [0]}
report: false
"""
OPTIONS = ("backbone=toy", "metrics=pixels", "tracker=none", "compute.device=cpu")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("shown")
    (cwd / "mine/paper").mkdir(parents=True)
    (cwd / "mine/paper/way.yaml").write_text(MINE)
    done = run(
        cwd, "--config-dir", str(cwd / "mine"), "grid=way", *OPTIONS, script="scripts/reproduce.py"
    )
    assert done.returncode == 0, done.stderr
    return cwd


def tables_of(cwd, grid):
    (folder,) = (cwd / "runs/tables").glob(f"{grid}-*")
    return folder


def test_pictures_lie_beside_the_report(shown):
    folder = tables_of(shown, "way")
    pictures = ("samples", "maps", "maps-of-classes", "diversity", "denoising")
    assert {p.name for p in folder.glob("*.png")} == {f"{w}-digits-ipc-3.png" for w in pictures}
    html = (folder / "report.html").read_text()
    assert "What the network restores on the way" in html
    assert "<!-- digit 1 -->" in html
    assert "<!-- never, mean of 9 -->" in html and "A mark is\nan image" in html


def sets_of(cwd):
    register()
    found = {}
    for path in cwd.glob("runs/digits/mgd3/ipc3/*/manifest.json"):
        distilled = DistilledDataset(path.parent)
        found[distilled.manifest["config"]["guidance"]["stop_t"]] = distilled
    return found


def remaker_of(distilled, stop_t):
    cfg = composed(
        "dataset=digits", "dataset.classes=[0,1,2]", "backbone=toy", "ipc=3", "method=mgd3",
        f"guidance.stop_t={stop_t}", "compute.device=cpu",
    )  # fmt: skip
    return Remaker(distilled, cfg)


def test_settings_start_from_one_noise_and_go_to_one_mode(shown):
    """The first x0_hat is the same under both; guidance then ends nearer to the mode."""
    sets, seen, gaps = sets_of(shown), {}, {}
    modes = []
    for stop_t, distilled in sets.items():
        remaker = remaker_of(distilled, stop_t)
        entry = distilled.manifest["images"][4]
        watch = StepWatch([49, 0])
        latents = remaker.latents(entry, watch)
        assert list(watch.seen) == [49, 0]
        with torch.inference_mode():
            image = remaker.distiller.maker.pixels([(entry["wnid"], 1)], latents)[0]
        file = [image for image, _ in distilled.images()][4]
        read = torch.frombuffer(bytearray(file.tobytes()), dtype=torch.uint8).view(8, 8, 3)
        assert (image.permute(1, 2, 0).int() - read.int()).abs().max() <= 1
        seen[stop_t] = watch.seen
        modes.append(remaker.mode(entry))
        gaps[stop_t] = (watch.seen[0] - modes[-1]).norm()
    assert torch.equal(*modes)
    assert torch.equal(seen[0][49], seen[50][49]) and not torch.equal(seen[0][0], seen[50][0])
    assert gaps[0] < gaps[50]


def test_steps_are_spread_from_the_first_to_the_last():
    assert spread_steps(50, 10) == [49, 44, 39, 34, 29, 24, 19, 14, 9, 4, 0]
    assert spread_steps(4, 10) == [3, 2, 1, 0]


def test_what_is_not_there_is_named_and_the_report_written(shown):
    """A class that the data have not, an image beyond the last, a step beyond the first."""
    text = MINE.replace("  measure: true\n", "")
    for number, (old, new, said) in enumerate(
        [
            ("[digit 2]", "[tench]", "paper_table.denoising.classes='tench' is unknown"),
            ("image: 1", "image: 7", "paper_table.denoising.image=7"),
            ("[49, 30, 0]", "[50, 0]", "paper_table.denoising.steps=50"),
        ]
    ):
        (shown / f"mine/paper/wrong{number}.yaml").write_text(text.replace(old, new))
        done = run(
            shown, "--config-dir", str(shown / "mine"), f"grid=wrong{number}", *OPTIONS,
            script="scripts/make_tables.py",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert said in done.stdout + done.stderr
        assert (tables_of(shown, f"wrong{number}") / "report.html").is_file()


def test_images_that_were_copied_are_not_made_again(shown):
    (distilled, *_) = sets_of(shown).values()
    copied = composed("dataset=digits", "method=random", "backbone=toy")
    with pytest.raises(UserError, match="were copied, not generated"):
        Remaker(distilled, copied)


def test_the_papers_figure_11_is_read():
    register()
    experiment = Experiment("mgd3/figure11", rehearsal=True)
    assert experiment.table.denoising == Denoising(
        classes=["tench", "church"], steps=[49, 40, 30, 25, 20, 10, 0]
    )
    assert experiment.class_names(["tench", "church"]) == ["digit 0", "digit 4"]
