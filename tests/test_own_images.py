"""docs/own_images.md, command by command, on photographs made from digits."""

import numpy as np
import pytest
from conftest import ROOT, run
from networks import small_tiny_autoencoder
from PIL import Image
from sklearn.datasets import load_digits
from test_docs import commands

from eval.results.rows import read_results

FEW = ("compute.device=cpu", "students=[convnet2_w8]", "protocol.epochs_by_ipc=[[null,2]]",
       "tracker=none")  # fmt: skip
SMALLER = {  # what makes each of the page's commands a matter of seconds
    "run.py": (*FEW, "ipc=2", "sampler.steps=4", "seed=0"),
    "scripts/train_backbone.py": (
        "compute.device=cpu", "judge=convnet2_w8", "protocol.epochs_by_ipc=[[null,2]]",
        "train.steps=4", "train.checkpoint_steps=2", "train.hidden_size=24", "train.depth=1",
    ),
    "scripts/report.py": (),
}  # fmt: skip


@pytest.fixture
def photographs(tmp_path):
    """Three classes of ten coloured JPEGs of 80 x 72 pixels, not split."""
    digits = load_digits()
    draw = np.random.default_rng(0)
    for digit, name in ((0, "ring"), (1, "pole"), (4, "chair")):
        folder = tmp_path / "photographs" / name
        folder.mkdir(parents=True)
        for n, pixels in enumerate(digits.images[digits.target == digit][:10]):
            ink, paper = draw.integers(0, 256, (2, 1, 1, 3))
            picture = paper + (ink - paper) * pixels[..., None] / 16
            Image.fromarray(picture.astype(np.uint8)).resize((80, 72)).save(folder / f"{n}.jpg")
    return tmp_path / "photographs"


def test_the_page_leads_from_a_folder_to_a_table(photographs, tmp_path):
    small_tiny_autoencoder(tmp_path / "taesd")
    page = ROOT / "docs/own_images.md"
    wanted = [c.words[1:] for c in commands(page) if c.words[0] == "python"]
    assert [words[0] for words in wanted] == ["run.py", *list(SMALLER)[1:2], "run.py",
                                              "scripts/report.py"]  # fmt: skip
    for script, *words in wanted:
        given = [word.replace("MY_PHOTOS", str(photographs)) for word in words]
        vae = [] if script == "scripts/report.py" else [f"backbone.vae={tmp_path / 'taesd'}"]
        if "method=random" in words:
            vae = []  # copies of real images need no generator
        done = run(tmp_path, *given, *vae, *SMALLER[script], script=script)
        assert done.returncode == 0, f"{script}: {done.stderr}"
    rows = read_results(tmp_path / "runs")
    assert sorted(row.method for row in rows) == ["mgd3", "random", "unguided"]
    assert {row.test_images for row in rows} == {6}  # a fifth of each class
    assert (tmp_path / "runs/photos/report.html").is_file()
    assert (tmp_path / "weights/photos.training/samples.png").is_file()
    (picture, *_) = (tmp_path / "runs/photos/mgd3").rglob("images/ring/*.png")
    assert Image.open(picture).size == (64, 64)
