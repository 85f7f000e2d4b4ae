"""Which caption stands for a cluster: examples that can be counted by hand."""

import pytest
import torch

from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.backbones.stable_diffusion_xl import StableDiffusionXL
from mgd3.backbones.toy import Toy
from mgd3.data.class_lists import ClassInfo
from mgd3.modes.finders import Modes
from mgd3.modes.mode_captions import CaptionPrompts, members, prompt_rows, representative
from mgd3.runtime.errors import UserError

DOG = ClassInfo("n1", "Border collie, sheep dog")


def test_the_caption_with_most_of_its_clusters_own_words_is_chosen():
    """collie and dog are the class's, animal is in all captions: grass 3, red 2, ball 2 remain."""
    first = [
        "dog animal with ball",
        "red grass animal",  # red 2 + grass 3 = 5
        "animal dog grass dog dog",  # grass 3
        "collie animal red ball grass snow",  # red 2 + ball 2 + grass 3 + snow 1 = 8
    ]
    second = ["animal asleep", "animal, asleep, indoors", "animal indoors sofa"]
    captions = [*first, *second]
    assert representative(captions, [[0, 1, 2, 3], [4, 5, 6]], DOG) == [first[3], second[1]]


def test_words_of_most_captions_count_once_they_may_be_common():
    captions = ["white sheep", "white wall", "wall", "white"]  # white in 3 of 4; sheep is a name
    assert representative(captions, [[0, 1, 2, 3]], DOG, common=0.7) == ["white wall"]
    assert representative(captions[:3], [[0, 2, 1]], DOG, common=0.7) == ["white wall"]
    assert representative(captions, [[0, 3, 2]], DOG, common=1.0) == ["white sheep"]


def test_only_the_most_frequent_words_count():
    captions = ["rain", "rain", "sun snow hail"]  # rain 2; the others 1 each, 3 in all
    assert representative(captions, [[0, 1, 2]], DOG) == ["sun snow hail"]
    assert representative(captions, [[0, 1, 2]], DOG, words=1) == ["rain"]


def test_a_frequent_word_is_found_inside_others_and_as_it_is_written():
    captions = ["car", "car", "scarf carpet plain", "Car"]
    assert representative(captions, [[2, 0, 1, 3]], DOG, common=1) == ["scarf carpet plain"]
    assert representative(captions, [[3, 0, 1], [2]], DOG, common=1) == ["car", captions[2]]


def test_without_words_of_its_own_a_cluster_takes_its_first_caption():
    assert representative(["the dog", "a collie"], [[0], [1]], DOG) == ["the dog", "a collie"]


def test_outliers_lend_no_caption_and_an_empty_mode_takes_its_nearest_image():
    modes = Modes(
        centers=torch.zeros(3, 1, 1, 1),
        counts=torch.tensor([2, 1, 0]),
        assignment=torch.tensor([0, -1, 1, 0]),
        nearest=torch.tensor([3, 2, 2]),
    )
    assert members(modes) == [[0, 3], [2], [2]]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_text("")
    return CaptionPrompts(str(path), 0.7, 30)


def test_a_backbone_that_takes_no_text_is_refused_by_name(prompts):
    prompts.check(StableDiffusion)
    prompts.check(StableDiffusionXL)
    with pytest.raises(UserError, match="takes text, which Toy does not: choose backbone=sd15"):
        prompts.check(Toy(image_size=8, mean=0.5, shift=0.2, std=0.3))


@pytest.mark.parametrize("values", [(1.5, 30), (0.7, 0)])
def test_wrong_options_are_named(values):
    with pytest.raises(UserError, match=r"prompts\.(common|words)"):
        CaptionPrompts("captions.jsonl", *values)


def test_classes_without_prompts_ask_the_backbone_for_nothing():
    assert prompt_rows(Toy(image_size=8, mean=0.5, shift=0.2, std=0.3), {}) == {}
