"""How files of a run, a set or a user are spoilt before a command meets them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import ROOT, image
from safetensors.torch import load_file, save_file

SHIPPED = ROOT / "mgd3/backbones/weights/dit_digits.safetensors"
CANARY = "canary"


def first(here: Path, pattern: str) -> Path:
    return next(iter(sorted(here.rglob(pattern))))


def content(pattern: str, text: str | bytes) -> Callable[[Path], None]:
    """The file has this content."""

    def spoil(here: Path) -> None:
        data = text.encode() if isinstance(text, str) else text
        first(here, pattern).write_bytes(data)

    return spoil


def altered(pattern: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """The file's JSON is changed, or replaced by what `change` returns."""

    def spoil(here: Path) -> None:
        path = first(here, pattern)
        value = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl"
                           else path.read_text())  # fmt: skip
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed) + "\n")

    return spoil


def row_with(**values: object) -> Callable[[Path], None]:
    return altered("results.jsonl", lambda row: row.update(values))


def entry_with(**values: object) -> Callable[[Path], None]:
    return altered("manifest.json", lambda m: m["images"][0].update(values))


def as_folder(pattern: str) -> Callable[[Path], None]:
    """A folder stands where the file was."""

    def spoil(here: Path) -> None:
        path = first(here, pattern)
        path.unlink()
        path.mkdir()

    return spoil


def replace_image(here: Path) -> None:
    image(9, (8, 8)).save(first(here, "images/*/*.png"))


def link_image_out(here: Path) -> None:
    path = first(here, "images/*/*.png")
    shutil.copy(path, here / "elsewhere.png")
    path.unlink()
    path.symlink_to(here / "elsewhere.png")


def link_scores(here: Path) -> None:
    scores = first(here, "hard_label*")
    scores.rename(here / "elsewhere")
    scores.symlink_to(here / "elsewhere")


def link_rows(here: Path) -> None:
    rows = first(here, "results.jsonl")
    rows.rename(here / "rows")
    rows.symlink_to(here / "rows")


def as_fifo(pattern: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        path = first(here, pattern)
        path.unlink()
        os.mkfifo(path)

    return spoil


def previews(shape: tuple[int, ...], kind: torch.dtype) -> Callable[[Path], None]:
    """Pictures of modes of another shape or kind."""

    def spoil(here: Path) -> None:
        from mgd3.storage.tensors import save_tensors

        tensors = {f"0.{n}": torch.zeros(shape, dtype=kind) for n in ("centroids", "nearest")}
        save_tensors(first(here, "previews.safetensors"), tensors, {})

    return spoil


def users_folder(here: Path) -> None:
    (here / "mine").mkdir()
    for name in ("README.md", "report.html", "notes.log"):
        (here / "mine" / name).write_text("mine\n")
    image().save(here / "mine/photo.png")


def only_logs(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine/run.log").write_text("mine\n")


def linked_run(here: Path) -> None:
    (here / "there").mkdir()
    (here / "link").symlink_to(here / "there")


def fifo_at(place: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        path = here / place
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)

    return spoil


def pixel_bomb(here: Path) -> None:
    """A PNG of 400 megapixels in a few kilobytes."""
    from PIL import Image

    Image.new("1", (40000, 10000)).save(here / "train/cat/1.png")


def weights(change: Callable[[dict, dict], None]) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        from safetensors import safe_open

        with safe_open(SHIPPED, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(SHIPPED)
        change(tensors, metadata)
        save_file(tensors, here / "w.safetensors", metadata)

    return spoil


def to_int8(tensors: dict, metadata: dict) -> None:
    for name in tensors:
        tensors[name] = tensors[name].to(torch.int8)


def no_tokens(tensors: dict, metadata: dict) -> None:
    tensors["pos_embed"] = tensors["pos_embed"][:, :0].clone()


def program_at(name: str, more: bytes = b"") -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(here / name))
        (here / name).write_bytes((here / name).read_bytes() + more)

    return spoil


def pickle_at(name: str) -> Callable[[Path], None]:
    return lambda here: (here / name).write_bytes(f"cos\nsystem\n(S'touch {CANARY}'\ntR.".encode())


def read_only_target(here: Path) -> None:
    (here / "closed").mkdir(mode=0o555)


def shared_cache(here: Path) -> None:
    """The cache belongs to somebody else; the runs are still to be made."""
    shutil.rmtree(here / "runs")
    (here / "cache").rename(here / "shared")
    _close(here / "shared")


def shared_teacher(here: Path) -> None:
    teacher = first(here, "cache/students/*.safetensors")
    (here / "shared").mkdir()
    shutil.copy(teacher, here / "shared/teacher.safetensors")
    for path in ("runs", "cache"):
        shutil.rmtree(here / path)
    _close(here / "shared")


def _close(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


def own_images(*files: str) -> Callable[[Path], None]:
    """A folder made elsewhere, with a class of each digit and these files besides."""

    def spoil(here: Path) -> None:
        for name in ("0", "1"):
            (here / "own" / name).mkdir(parents=True)
            image(int(name), (8, 8)).save(here / "own" / name / "a.png")
        for file in files:
            (here / "own" / file).write_bytes(b"no image")

    return spoil


def own_link(here: Path) -> None:
    own_images()(here)
    image().save(here / "private.png")
    (here / "own/0/b.png").symlink_to(here / "private.png")


def checkpoint(content: dict) -> Callable[[Path], None]:
    """A student's checkpoint of another structure, whole by its own checksum."""

    def spoil(here: Path) -> None:
        from mgd3.storage.tensors import save_tensors

        results = first(here, "results.jsonl")
        results.unlink()
        save_tensors(results.parent / ".convnet2_w8-0.checkpoint", content, {})

    return spoil


def removed(*patterns: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        for pattern in patterns:
            for path in here.rglob(pattern):
                path.unlink()

    return spoil


def in_turn(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        for step in steps:
            step(here)

    return spoil
