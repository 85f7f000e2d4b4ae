"""Claims: the same command on other photographs is refused by number; nothing goes on with them."""

import json
import shutil

import pytest
from conftest import QUICK, image, run

from eval.results.rows import read_results
from eval.results.tables import cells
from mgd3.data.claims import claim
from mgd3.runtime.errors import UserError


@pytest.mark.parametrize(
    ("name", "there"), [("identity.json", "manifest.json"), ("protocol.json", "results.jsonl")]
)
def test_content_that_nobody_claimed_is_left_alone(tmp_path, name, there):
    (tmp_path / there).write_text("{}")
    with pytest.raises(UserError, match="made by an earlier version of this project"):
        claim(tmp_path / name, {"ipc": 1}, {}, tmp_path, "choose another folder")
    assert not (tmp_path / name).exists()


@pytest.fixture
def here(tree, tmp_path):
    """A project folder, its photographs, and a quick run on them."""
    project = tmp_path / "project"
    project.mkdir()
    tree.rename(project / "base")

    def go(*overrides, cwd=project, root="base"):
        own = ("dataset=folder", f"dataset.root={root}", "dataset.student_size=16", "ipc=2")
        quick = [o for o in QUICK if not o.startswith("backbone")]
        return run(
            cwd, *quick, "backbone=toy", "backbone.image_size=16", "method=random", *own, *overrides
        )

    return project, go


def replace_a_photograph(root, split="train"):
    image(seed=4321).save(root / f"{split}/dog/1.png")


def test_another_photograph_under_the_same_root_is_refused_by_number(here):
    project, go = here
    assert go().returncode == 0
    rows = (next(project.rglob("results.jsonl"))).read_text()
    replace_a_photograph(project / "base")
    refused = go()
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "1 of 8 training images changed since 20" in refused.stderr
    assert (
        "put the old ones back, or name the new data apart with dataset.name=NAME" in refused.stderr
    )
    assert next(project.rglob("results.jsonl")).read_text() == rows
    assert go("dataset.name=newer").returncode == 0
    assert len(list(project.rglob("manifest.json"))) == 2


def test_seeds_before_and_after_a_change_are_two_cells(here):
    project, go = here
    assert go().returncode == 0
    replace_a_photograph(project / "base")
    assert go("seed=1").returncode == 0  # a folder of its own, which nothing was made in before
    rows = read_results(project / "runs")
    assert len({r.train_data for r in rows}) == 2 and len({r.cell_id for r in rows}) == 2
    assert [c.n for c in cells(rows)] == [1, 1]


def test_a_run_that_was_killed_does_not_go_on_with_other_photographs(here):
    project, go = here
    assert go("method=mgd3").returncode == 0
    (manifest,) = project.rglob("manifest.json")
    manifest.unlink()  # as a kill before the last image would leave it
    sorted(manifest.parent.rglob("images/*/*.png"))[-1].unlink()
    replace_a_photograph(project / "base")
    refused = go("method=mgd3")
    assert refused.returncode == 1 and "1 of 8 training images changed" in refused.stderr
    assert not manifest.exists()


def test_other_test_images_do_not_keep_the_old_score(here):
    project, go = here
    assert go().returncode == 0
    replace_a_photograph(project / "base", "val")
    refused = go()
    assert refused.returncode == 1
    assert "1 of 4 test images changed since" in refused.stderr


def test_a_root_by_any_name_is_one_run(here):
    project, go = here
    for root in ("base", "base/", "../project/base", str(project / "base")):
        assert go(root=root).returncode == 0
    assert (
        len(list(project.rglob("manifest.json"))) == len(list(project.rglob("results.jsonl"))) == 1
    )
    moved = shutil.move(project / "base", project / "moved")
    assert go(root=moved).returncode == 0
    assert len(list(project.rglob("manifest.json"))) == 1


def test_two_projects_with_one_runs_folder_do_not_share_a_set(here, tmp_path):
    project, go = here
    other = tmp_path / "other"
    shutil.copytree(project / "base", other / "base")
    for k, file in enumerate(sorted((other / "base/train").rglob("*.png"))):
        image(seed=900 + k).save(file)
    runs = f"runs={tmp_path / 'shared_runs'}"
    assert go(runs).returncode == 0
    refused = go(runs, cwd=other)
    assert refused.returncode == 1
    assert "up to 8 of 8 training images changed" in refused.stderr  # its cache has no old list


def test_the_plain_samples_of_a_backbone_do_not_depend_on_photographs(here):
    project, go = here
    assert go("method=unguided").returncode == 0
    replace_a_photograph(project / "base")
    assert go("method=unguided").returncode == 0
    assert len(list(project.rglob("manifest.json"))) == 1


def test_manifests_and_rows_carry_what_the_real_images_are(here):
    project, go = here
    assert go().returncode == 0
    manifest = json.loads(next(project.rglob("manifest.json")).read_text())
    (row,) = read_results(project / "runs")
    assert manifest["data"]["train"] == row.train_data and len(row.test_data) == 16
    assert str(project) not in json.dumps(manifest)


def old_set(folder):
    """What an earlier version of the project left of a set."""
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text('{"dataset": {"name": "folder"}, "ipc": 2}')
    entry = {"file": "images/cat/00000.png", "wnid": "cat", "index": 0, "sha256": "0" * 64}
    manifest = {
        "dataset": "folder", "dataset_note": None, "ipc": 1, "seed": 0, "method": "mgd3",
        "config": {}, "images": [entry],
        "classes": [{"wnid": w, "name": w, "imagenet_id": None} for w in ("cat", "dog")],
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_folders_of_an_earlier_version_are_named_and_left_alone(here):
    project, go = here
    old = project / "runs/folder/random/ipc2/seed0-01234567"
    old_set(old)
    before = {f: f.read_bytes() for f in old.iterdir()}
    made = go()
    assert made.returncode == 0
    assert "1 sets such as runs/folder/random/ipc2/seed0-01234567" in made.stdout
    inside = go(f"hydra.run.dir={old}")
    assert inside.returncode == 1
    assert "was made by an earlier version of this project and is left as it is" in inside.stderr
    assert {f: f.read_bytes() for f in old.iterdir()} == before
    scored = run(
        project, f"images={old}", "dataset=folder", "dataset.root=base", "students=[convnet2_w8]",
        "dataset.student_size=16", script="scripts/evaluate.py",
    )  # fmt: skip
    assert scored.returncode == 1 and "Traceback" not in scored.stderr
    assert "whose manifest does not say what it was made from" in scored.stderr


def test_a_manifest_without_checksums_is_one_message(here):
    project, go = here
    assert go().returncode == 0
    (path,) = project.rglob("manifest.json")
    manifest = json.loads(path.read_text())
    for entry in manifest["images"]:
        del entry["sha256"]
    path.write_text(json.dumps(manifest))
    shutil.rmtree(next(project.rglob("results.jsonl")).parent)
    refused = go()
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "manifest.json: images.0.sha256 is missing" in refused.stderr
