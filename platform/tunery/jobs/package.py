"""Build the folder that is shipped to the cluster: tunery's source and the code next to the experiment.

    tunery/          the source of this tunery, so that the cluster runs the code of this machine
    experiment/      the experiment file, and the Python and YAML files of its folder

Data, models, secrets, environments and stores are not shipped: they must be visible on the nodes of the cluster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import RequestError

SUFFIXES = (".py", ".yaml", ".yml", ".toml", ".jinja")
"""Files of the experiment's folder that are shipped: code and configs."""
SECRET_NAMES = ("secret", "credential", "password", "token", "netrc", "id_rsa", "id_ed25519")
"""A file whose name contains one of these is not shipped."""
SKIPPED_FOLDERS = ("__pycache__", "node_modules", "venv", "wandb", "site-packages")
"""Folders that are not searched, besides hidden ones (.venv, .git, .tunery) and virtual environments of other names."""
MAX_FILE_BYTES = 1_000_000
MAX_BYTES = 20_000_000
MAX_FILES = 2000
EXPERIMENT = "experiment"
SOURCE = Path(__file__).resolve().parents[1]
"""The folder of the package tunery."""


@dataclass(frozen=True)
class ShippedFile:
    path: Path
    """Path on this machine."""
    destination: Path
    """Path in the shipped folder."""
    size: int
    """Bytes."""


def find_files(experiment_file: Path, store: Path) -> list[ShippedFile]:
    """Return the files to ship, sorted by destination.

    Raises RequestError if the experiment's folder has so much code that it is probably not only the experiment's.
    """
    files = [_shipped(path, SOURCE, Path("tunery")) for path in _source_files()]
    folder = experiment_file.resolve().parent
    own = [_shipped(path, folder, Path(EXPERIMENT)) for path in _code_files(folder, store.resolve())]
    if not any(file.path == experiment_file.resolve() for file in own):
        own.append(_shipped(experiment_file.resolve(), folder, Path(EXPERIMENT)))
    total = sum(file.size for file in own)
    if total > MAX_BYTES or len(own) > MAX_FILES:
        raise RequestError(
            f"{folder} has {len(own):,} code files of {total / 1e6:.0f} MB, too many to ship",
            cause=f"at most {MAX_FILES:,} files and {MAX_BYTES / 1e6:.0f} MB are shipped to the cluster",
            remedy="move the experiment to a folder of its own, with the Python files that it uses",
        )
    return sorted(files + own, key=lambda file: file.destination)


def write_package(files: list[ShippedFile], out: Path) -> None:
    """Copy `files` to the folder `out`."""
    for file in files:
        path = out / file.destination
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file.path, path)


def _shipped(path: Path, root: Path, destination: Path) -> ShippedFile:
    return ShippedFile(path, destination / path.relative_to(root), path.stat().st_size)


def _source_files() -> Iterator[Path]:
    for path in SOURCE.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            yield path


def _code_files(folder: Path, store: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder):
        here = Path(root)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in SKIPPED_FOLDERS
            and here / name != store
            and not (here / name / "pyvenv.cfg").exists()
            and here / name != SOURCE
        )
        for name in names:
            path = here / name
            is_code = path.suffix in SUFFIXES and not name.startswith(".") and not _is_secret(name)
            if is_code and path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_FILE_BYTES:
                yield path


def _is_secret(name: str) -> bool:
    return any(word in name.lower() for word in SECRET_NAMES)
