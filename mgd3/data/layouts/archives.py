"""Public archives of ImageNette and ImageWoof: fetched once, unpacked safely, found again."""

from __future__ import annotations

import logging
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mgd3.runtime import checks
from mgd3.runtime.errors import UserError, reading
from mgd3.runtime.progress import progress
from mgd3.storage.files import waiting, writing
from mgd3.storage.transfers import fetch_url, trust

log = logging.getLogger(__name__)

_HOST = "https://s3.amazonaws.com/fast-ai-imageclas"
_PROJECT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Archive:
    """What fast.ai publishes of a dataset."""

    name: str  # of the file without .tgz, and of the folder in it
    md5: str
    gigabytes: float  # of the file; unpacked it is as large again
    confirmed: bool  # does torchvision publish the same MD5?
    note: str | None = None  # what its images are, if not ImageNet's files

    @property
    def url(self) -> str:
        """Where it is fetched from; MGD3_ARCHIVES names a mirror."""
        host = os.environ.get("MGD3_ARCHIVES") or _HOST
        return f"{host.rstrip('/')}/{self.name}.tgz"


_SMALL = "shrunk to 320 px a side by fast.ai: not ImageNet's files"
ARCHIVES = {
    "imagenette": Archive("imagenette2", "fe2fc210e6bb7c5664d602c3cd71e612", 1.5, True),
    "imagewoof": Archive("imagewoof2", "9aafe18bcdb1632c4249a76c458465ba", 1.3, False),
    "imagenette_320": Archive(
        "imagenette2-320", "3df6f0d01a2c9592104656642f5e78a3", 0.33, True, _SMALL
    ),
    "imagewoof_320": Archive(
        "imagewoof2-320", "0f46d997ec2264e97609196c95897a44", 0.33, False, _SMALL
    ),
}


def data_folder(given: Path | str | None = None) -> Path:
    """Where archives are unpacked, for all projects: as given, MGD3_DATA, or data/ here."""
    return Path(given or os.environ.get("MGD3_DATA") or _PROJECT / "data").expanduser()


def may_fetch() -> bool:
    """MGD3_ARCHIVES=none keeps archives from being fetched."""
    return os.environ.get("MGD3_ARCHIVES") != "none"


def find_archive(name: str, place: Path) -> Path | None:
    """The unpacked archive's folder in `place`, if it is there and whole."""
    folder = place / ARCHIVES[name].name
    return folder if folder.is_dir() else None


def note_of(folder: Path) -> str | None:
    """What the images of an unpacked archive are, if not ImageNet's files."""
    return next((a.note for a in ARCHIVES.values() if a.name == folder.resolve().name), None)


def fetch_archive(name: str, root: Path, md5: str | None = None, patience: float = 1.0) -> Path:
    """The folder of an archive below `root`, fetched and unpacked unless it is there.

    `md5` replaces the digest that is known, which for ImageWoof its maker does not publish.
    Raises `UserError` for too little space, a transfer that fails, another digest, and an archive
    that would write outside its folder.
    """
    archive = ARCHIVES[checks.choice("the name of an archive", name, ARCHIVES)]
    folder, file = root / archive.name, root / f"{archive.name}.tgz"
    with waiting(root, archive.name):
        if folder.is_dir():
            return folder
        require_space(root, 2.1e9 * archive.gigabytes, archive.name)
        log.info(
            "fetching %s, %.2f GB, to %s (a broken transfer goes on where it stopped)",
            *(archive.url, archive.gigabytes, root),
        )
        try:
            fetch_url(f"{archive.url}#md5={md5 or archive.md5}", file, patience)
        except UserError as error:
            if "has the MD5" not in str(error) or archive.confirmed:
                raise
            raise UserError(
                f"{error}. The known MD5 comes from a public loader, not from the maker: if "
                f"you trust what came, give its own: python scripts/fetch_data.py {name} md5=HEX"
            ) from error
        trust(f"{archive.url}#md5={archive.md5}", file)
        _unpack(file, folder)
        file.unlink()
    return folder


def require_space(root: Path, needed: float, name: str) -> None:
    """`UserError` if fewer than `needed` bytes are free in `root`, which is made."""
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{name} needs {needed / 1e9:.1f} GB in {root} while it is unpacked, and "
            f"{free / 1e9:.1f} GB are free: make room, or name another folder with data=FOLDER or "
            "MGD3_DATA"
        )


def _unpack(file: Path, folder: Path) -> None:
    """All of an archive into `folder`, or nothing."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        with reading(file, "delete it and fetch it again"), tarfile.open(file) as archive:
            members = archive.getmembers()
            with progress(f"unpacking {file.name}", len(members), "files") as advance:
                for member in members:
                    _extract(archive, member, part, folder.name)
                    advance()
        with writing(folder):
            os.replace(part / folder.name, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, part: Path, name: str) -> None:
    """One plain file or folder of the archive's own folder; `UserError` for anything else."""
    path = PurePosixPath(member.name)
    inside = not path.is_absolute() and ".." not in path.parts and path.parts[:1] == (name,)
    if not inside or not (member.isfile() or member.isdir()):
        raise UserError(
            f"the archive holds {member.name!r}, which is no file or folder below {name}/: "
            "nothing of it was kept"
        )
    target = part / path
    with writing(target):
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        content = archive.extractfile(member)
        assert content is not None, "a plain file has content"
        with content, target.open("wb") as file:
            shutil.copyfileobj(content, file)
