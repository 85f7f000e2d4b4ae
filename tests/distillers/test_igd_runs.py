"""IGD from the command line on digits: presets, resumption, order, refusals."""

import json
import os
import re

import pytest
from conftest import run

PLAIN = (
    "tracker=none", "report=false", "students=[]", "compute.device=cpu", "dataset.classes=[0,1,7]",
    "ipc=2", "sampler.steps=8",
)  # fmt: skip
TINY = (
    *PLAIN, "surrogate.student=convnet2_w4", "surrogate.lr=0.05", "surrogate.epochs=3",
    "surrogate.snapshots=[0,3]", "surrogate.images=20",
)  # fmt: skip
IGD = ("method=igd", *TINY)


def images(folder):
    files = sorted(folder.rglob("images/*/*.png"))
    return {"/".join(f.parts[-3:]): f.read_bytes() for f in files}


def made(cwd, *overrides):
    cwd.mkdir(exist_ok=True, parents=True)
    done = run(cwd, *overrides)
    assert done.returncode == 0, done.stderr
    (manifest,) = cwd.rglob("manifest.json")
    return images(cwd), manifest


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("whole") / "igd", *IGD)


def test_a_run_makes_a_set_that_says_what_it_reads(whole):
    found, manifest = whole
    assert len(found) == 6 and not list(manifest.parent.rglob(".latents"))
    identity = json.loads(manifest.read_text())["identity"]
    assert (identity["guidance"]["choice"], identity["surrogate"]["choice"]) == (
        "igd", "trajectory",
    )  # fmt: skip
    assert identity["surrogate"]["values"]["snapshots"] == [0, 3] and "modes" not in identity
    cache = manifest.parents[5] / "cache"
    assert len(list(cache.glob("trajectories/*/*.safetensors"))) == 4
    assert len(list(cache.glob("gradients/*/*.safetensors"))) == 2 * 3


@pytest.mark.parametrize(("kind", "number"), [("/gradients/", 4), ("/.latents/", 5)])
def test_a_run_that_dies_at_a_write_ends_with_the_same_bytes(
    whole, tmp_path, monkeypatch, kind, number
):
    replace, writes = os.replace, []

    class KilledError(BaseException):
        """Nothing that the program catches."""

    def counted(source, target, **kwargs):
        if kind in str(target):
            writes.append(target)
            if len(writes) == number:
                raise KilledError
        return replace(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", counted)
    killed = run(tmp_path, *IGD)
    assert killed.returncode == 1 and "KilledError" in killed.stderr, killed.stderr[-800:]
    assert made(tmp_path, *IGD)[0] == whole[0]


def test_the_batch_changes_no_image(whole, tmp_path):
    (tmp_path / "cache").symlink_to(whole[1].parents[5] / "cache")
    found = made(tmp_path, *IGD, "compute.batch_size=1")[0]
    assert found.keys() == whole[0].keys()
    same = sum(found[name] == whole[0][name] for name in found)
    assert same >= 5, "rounding of other batch shapes moves a grey level at most"


def test_without_its_terms_it_is_the_plain_method(whole, tmp_path):
    """Scales of zero give unguided samples; deviation leaves the first image of a class alone."""
    (tmp_path / "cache").symlink_to(whole[1].parents[5] / "cache")
    off = ("guidance.influence.k=0", "guidance.deviation.gamma=0")
    plain = made(tmp_path / "plain", "method=unguided", *PLAIN)[0]
    assert made(tmp_path / "off", *IGD, *off, f"cache={tmp_path / 'cache'}")[0] == plain
    away = made(tmp_path / "away", "method=unguided", *PLAIN, "guidance=deviation")[0]
    same = {name for name in plain if away[name] == plain[name]}
    assert same == {name for name in plain if name.endswith("00000.png")}
    assert not any(whole[0][name] == plain[name] for name in plain)


def test_a_plan_says_what_is_learned_first(whole, tmp_path):
    options = (*IGD, "students=[convnet2_w4]", "plan=true", "guidance.influence.rho=4")
    (tmp_path / "new").mkdir()
    new = run(tmp_path / "new", *options, "surrogate.snapshots=null")
    training = r"trains convnet2_w4 on \d+ real images for 3 epochs"
    assert re.search(rf"to do +{training}: about", new.stdout + new.stderr), new.stderr
    assert re.search("to do +compares the gradients of convnet2_w4", new.stdout + new.stderr)
    (tmp_path / "cache").symlink_to(whole[1].parents[5] / "cache")
    known = run(tmp_path, *options)
    assert re.search(rf"there +{training}", known.stdout + known.stderr), known.stderr


def test_it_joins_mgd3_by_one_line(whole, tmp_path):
    (tmp_path / "cache").symlink_to(whole[1].parents[5] / "cache")
    found, manifest = made(tmp_path, "method=mgd3_igd", *TINY)
    assert len(found) == 6 and not any(found[name] == whole[0][name] for name in found)
    content = json.loads(manifest.read_text())
    assert content["config"]["guidance"]["mode.scale"] == 0.1 and content["method"] == "mgd3_igd"


def test_twins_are_the_same_in_any_batch(whole, tmp_path):
    cache = f"cache={whole[1].parents[5] / 'cache'}"
    strong = (*IGD, cache, "guidance.influence.k=400")
    plain, together, alone = (
        made(tmp_path / str(k), *strong, *options)[0]
        for k, options in enumerate((
            (), ("guidance.influence.twin=true",),
            ("guidance.influence.twin=true", "compute.batch_size=1"),
        ))
    )  # fmt: skip
    assert sum(together[name] == alone[name] for name in together) >= 5
    assert any(together[name] != plain[name] for name in plain)


def test_an_image_is_made_again_from_its_set(whole, tmp_path):
    done = run(
        whole[1].parents[5], f"set={whole[1].parent}", "image=images/7/00001.png",
        f"out={tmp_path / 'again.png'}", "with=['compute.device=cpu']",
        script="scripts/remake_image.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    apart = re.search(r"at most (\d+) of 255 grey levels", done.stdout + done.stderr)
    assert apart and int(apart[1]) <= 2, done.stdout


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=igd", *PLAIN, "surrogate=none"), "add surrogate=trajectory"),
        ((*IGD[:-3], "surrogate.epochs=2", "surrogate.snapshots=[0]"), "raise surrogate.epochs"),
    ],
    ids=["no surrogate", "a guesser"],
)
def test_it_is_refused_before_sampling(tmp_path, overrides, said):
    refused = run(tmp_path, *overrides)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr, refused.stderr[-800:]
    assert said in refused.stderr
    assert not list(tmp_path.rglob("*.png"))
