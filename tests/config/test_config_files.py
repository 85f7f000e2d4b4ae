"""Configuration files are parsed once, and again when they have changed."""

import copy
import pickle

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins import file_config_source as hydras
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from mgd3.config.identity import register


@pytest.fixture
def here(tmp_path):
    """An own folder of configurations, as Hydra reads them."""
    register()
    GlobalHydra.instance().clear()
    (tmp_path / "main.yaml").write_text("a: 1\nb: {c: [2]}\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield tmp_path


def test_a_file_is_parsed_once_and_nobody_writes_into_what_others_get(here, monkeypatch):
    parsed, load = [], OmegaConf.load
    monkeypatch.setattr(OmegaConf, "load", lambda file: parsed.append(file) or load(file))
    first = compose("main", ["b.c=[3]", "+d=4"])
    assert compose("main") == {"a": 1, "b": {"c": [2]}} != first
    assert len([file for file in parsed if file.name.endswith("main.yaml")]) == 1


def test_a_file_that_has_changed_is_parsed_again(here):
    assert compose("main").a == 1
    (here / "main.yaml").write_text("a: 1000\n")
    assert compose("main") == {"a": 1000}
    (here / "main.yaml").unlink()
    with pytest.raises(MissingConfigException):
        compose("main")


def test_another_process_gets_hydras_own_reader(here):
    """A launcher's, which need not know where ours lies; a copy for a composition is ours."""
    sources = GlobalHydra.instance().config_loader().get_sources()
    (ours,) = (source for source in sources if source.provider == "main")
    assert type(ours) is not hydras.FileConfigSource and copy.deepcopy(ours) is ours
    theirs = pickle.loads(pickle.dumps(ours))
    assert type(theirs) is hydras.FileConfigSource and str(theirs) == str(ours)
