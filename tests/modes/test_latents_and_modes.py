"""Encoding once, remembering by content, and finding modes."""

import json
import logging
import shutil
import time
from dataclasses import replace
from time import sleep
from typing import ClassVar

import pytest
import torch
from networks import small_vae
from safetensors import safe_open
from sklearn.cluster import KMeans

from mgd3.backbones.codecs import PixelCodec, make_codec
from mgd3.data.digits import Digits
from mgd3.data.inventory import take_inventory
from mgd3.data.pixels import from_pil, to_pixels, to_unit
from mgd3.modes.discovery import ModeFile, discover_modes
from mgd3.modes.finders import KMeansModes
from mgd3.modes.latents import LatentCache
from mgd3.runtime.compute import Compute, Work
from mgd3.runtime.errors import CorruptFileError, UserError
from mgd3.storage.tensors import load_tensors, save_tensors

KMEANS = KMeansModes()


class CountingCodec(PixelCodec):
    calls = 0

    def encode(self, images, keys):
        type(self).calls += 1
        assert len(images) <= 16  # one batch of pixels at a time
        return super().encode(images, keys)


@pytest.fixture
def digits(tmp_path):
    dataset = Digits(8)
    return dataset, take_inventory(dataset, "train", 1, tmp_path, 1)


def test_a_class_is_encoded_once(digits, tmp_path):
    dataset, inventory = digits
    CountingCodec.calls = 0
    cache = LatentCache(tmp_path, CountingCodec(8), "none")
    latents = cache.latents(dataset.classes[3], inventory[3])
    calls = CountingCodec.calls
    assert latents.shape == (len(inventory[3].images), 1, 8, 8)
    expected = to_unit(from_pil(inventory[3].images[5].decode()))[:1]
    assert torch.allclose(latents[5], expected)
    assert torch.equal(cache.latents(dataset.classes[3], inventory[3]), latents)
    assert calls == CountingCodec.calls == 7
    mean, std = cache.moments(dataset.classes[3], inventory[3])  # a codec without a posterior
    assert torch.equal(mean, latents) and not std.any()
    assert len(list(cache.folder.rglob("*.safetensors"))) == 1


@pytest.mark.parametrize("damage", ["truncate", "flip a byte"])
def test_a_damaged_cache_file_is_made_again(digits, tmp_path, damage):
    dataset, inventory = digits
    cache = LatentCache(tmp_path, PixelCodec(8), "none")
    latents = cache.latents(dataset.classes[0], inventory[0])
    (path,) = tmp_path.rglob("0-*.safetensors")
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    else:
        data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptFileError):
        load_tensors(path)
    assert torch.equal(cache.latents(dataset.classes[0], inventory[0]), latents)
    assert torch.equal(load_tensors(path)["latents"], latents)


def test_random_flip_depends_on_the_image_alone(digits, tmp_path):
    dataset, inventory = digits
    plain, mirrored, random = (
        LatentCache(tmp_path, PixelCodec(8), flip).latents(dataset.classes[7], inventory[7])
        for flip in ("none", "all", "random")
    )
    assert torch.equal(mirrored, plain.flip(-1))
    is_plain = (random == plain).flatten(1).all(1)
    is_mirrored = (random == mirrored).flatten(1).all(1)
    assert (is_plain | is_mirrored).all()
    assert 0.3 < is_mirrored.float().mean() < 0.7


class BadCodec(PixelCodec):
    def encode(self, images, keys):
        latents = super().encode(images, keys).clone()
        latents[2, 0, 0, 0] = float("nan")
        return latents


class Counted:
    """A real image that says when it is decoded."""

    begun: ClassVar[set] = set()

    def __init__(self, image):
        self.image, self.key = image, image.key

    def decode(self):
        self.begun.add(self.key)
        return self.image.decode()


class Watching(PixelCodec):
    """Notes how many images are begun when a batch arrives."""

    def __init__(self):
        super().__init__(8)
        self.encoded, self.ahead = 0, []

    def encode(self, images, keys):
        assert Counted.begun.issuperset(keys)
        self.encoded += len(keys)
        self.ahead.append(len(Counted.begun) - self.encoded)
        return super().encode(images, keys)


def test_files_are_decoded_ahead_of_the_codec_and_never_far(digits, tmp_path):
    dataset, inventory = digits
    pairs = [
        (info, replace(found, images=tuple(map(Counted, found.images))))
        for info, found in zip(dataset.classes[:3], inventory, strict=False)
    ]
    expected = LatentCache(tmp_path / "one", PixelCodec(8), "none", 1)
    codec, Counted.begun = Watching(), set()
    cache = LatentCache(tmp_path / "two", codec, "none", 3)
    with cache.encoding(pairs):
        first = cache.latents(*pairs[0])
        expected_middle = expected.latents(*pairs[1])  # as if another process had encoded it
        path = cache.folder / f"{cache.key(*pairs[1])}.safetensors"
        shutil.copy(expected.folder / f"{expected.key(*pairs[1])}.safetensors", path)
        codec.encoded += len(pairs[1][1].images)
        assert torch.equal(cache.latents(*pairs[1]), expected_middle)
        last = cache.latents(*pairs[2])
    assert torch.equal(first, expected.latents(*pairs[0]))
    assert torch.equal(last, expected.latents(*pairs[2]))
    assert max(codec.ahead) <= 32 and codec.ahead[-1] == 0
    of_first = codec.ahead[: -(-len(first) // 16)]
    assert of_first[-1] > 0, "the next class waits for this one"


def test_every_precision_of_encoding_has_latents_of_its_own(digits, tmp_path):
    dataset, inventory = digits
    small_vae(tmp_path / "vae")
    found, files = {}, {}
    for precision in ("float32", "bfloat16"):
        compute = Compute(device="cpu", encoding_precision=precision)
        codec = make_codec(str(tmp_path / "vae"), 16, compute=compute)
        cache = LatentCache(tmp_path / "latents", codec, "none")
        found[precision] = cache.latents(dataset.classes[2], inventory[2])
        cache.moments(dataset.classes[2], inventory[2])
        files |= {path: path.read_bytes() for path in cache.folder.rglob("*.safetensors")}
    assert len(files) == 4 and all(path.read_bytes() == old for path, old in files.items())
    difference = (found["float32"] - found["bfloat16"]).abs().max()
    assert 0 < difference < 0.05 * found["float32"].abs().max()


def test_a_precision_of_encoding_is_refused_where_nothing_encodes():
    with pytest.raises(UserError, match="encoding_precision=tf32: this backbone's latents are pix"):
        make_codec(None, 8, compute=Compute(device="cpu", encoding_precision="tf32"))
    with pytest.raises(UserError, match="encoding_precision='float16' is unknown"):
        Compute(device="cpu", encoding_precision="float16")


def test_nan_in_a_latent_names_the_image(digits, tmp_path):
    dataset, inventory = digits
    cache = LatentCache(tmp_path, BadCodec(8), "none")
    with pytest.raises(UserError, match=inventory[1].images[2].key):
        cache.latents(dataset.classes[1], inventory[1])
    assert not list(tmp_path.rglob("1-*.safetensors"))


def test_kmeans_modes_are_scikit_learns():
    latents = torch.randn(60, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    modes = KMEANS(latents, 5)
    reference = KMeans(5, random_state=0, n_init="auto").fit(latents.flatten(1).numpy())
    assert torch.equal(modes.centers.flatten(1), torch.tensor(reference.cluster_centers_))
    assert modes.assignment.tolist() == reference.labels_.tolist()
    assert modes.counts.sum() == 60
    distance = (latents[None] - modes.centers[:, None]).flatten(2).norm(dim=2)
    assert modes.nearest.tolist() == distance.argmin(dim=1).tolist()


def test_one_mode_is_the_mean_and_n_modes_are_the_images():
    latents = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(KMEANS(latents, 1).centers[0], latents.mean(0), atol=1e-6)
    every = KMEANS(latents, 6)
    assert sorted(every.nearest.tolist()) == list(range(6))
    assert torch.allclose(every.centers, latents[every.nearest], atol=1e-6)


def test_modes_are_kept_by_wnid_with_their_nearest_image(tmp_path):
    dataset, work = Digits(8), Work(cache=tmp_path / "c", batch_size=64, workers=1, flip="none")
    found = discover_modes(dataset, PixelCodec(8), KMEANS, 4, work, tmp_path / "out")
    path = tmp_path / "out/modes/5.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    key = {"latents": metadata["latents"]}
    assert torch.equal(ModeFile().read(path, key).centers, found["5"].modes.centers)
    with pytest.raises(CorruptFileError, match="other latents"):
        ModeFile().read(path, {"latents": "of another codec"})
    assert json.loads(metadata["nearest"]) == [i.key for i in found["5"].nearest]
    path.write_bytes(path.read_bytes()[:100])
    again = discover_modes(dataset, PixelCodec(8), KMEANS, 4, work, tmp_path / "out")
    assert torch.equal(again["5"].modes.centers, found["5"].modes.centers)


def test_tensors_survive_a_round_trip(tmp_path):
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.randn(3, 3).T}
    save_tensors(tmp_path / "deep/er/t.safetensors", tensors, {})
    assert all(
        torch.equal(load_tensors(tmp_path / "deep/er/t.safetensors")[k], tensors[k])
        for k in tensors
    )


def test_pixels_round_as_the_released_code():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit(levels)), levels)
    assert to_pixels(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_modes_are_shared_by_runs_of_one_finder_alone(tmp_path):
    """A function has no class and no settings to tell it from another one: nothing is shared."""
    calls = []

    def counted(latents, num_modes):
        calls.append(num_modes)
        return KMEANS(latents, num_modes)

    work = Work(cache=tmp_path / "cache", batch_size=8, workers=1, flip="none")
    dataset = Digits(8)
    for out in ("one", "two"):
        discover_modes(dataset, PixelCodec(8), counted, 2, work, tmp_path / out)
    assert len(calls) == 20 and not (tmp_path / "cache/modes").exists()
    for out in ("three", "four"):
        discover_modes(dataset, PixelCodec(8), KMEANS, 2, work, tmp_path / out)
    (shared,) = (tmp_path / "cache/modes").iterdir()
    assert len(list(shared.rglob("*.safetensors"))) == 10
    ours, theirs = (tmp_path / out / "modes/3.safetensors" for out in ("three", "four"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_modes_count_as_they_are_found_however_many_threads_there_are(
    tmp_path, monkeypatch, caplog
):
    """With a thread for each class they would else count once the last one is encoded."""
    caplog.set_level(logging.INFO)
    dataset, now, encoded = Digits(8), [1000.0], set()
    labels = {i.key: label for label in range(10) for i in dataset.images("train", label)}
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(PixelCodec):
        """A class takes ten seconds, in which the modes of those before are found."""

        def encode(self, images, keys):
            label = labels[keys[0]]
            if label not in encoded:
                for _ in range(500):
                    if len(list((tmp_path / "out/modes").glob("*.safetensors"))) >= len(encoded):
                        break
                    sleep(0.01)
                encoded.add(label)
                now[0] += 10
            return super().encode(images, keys)

    work = Work(cache=tmp_path / "cache", batch_size=64, workers=16, flip="none")
    discover_modes(dataset, Slow(8), KMEANS, 2, work, tmp_path / "out")
    said = [m for m in caplog.messages if m.startswith("finding modes: ") and "/10 classes" in m]
    assert len(encoded) == 10 and len(said) >= 2, caplog.messages
