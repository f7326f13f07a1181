"""The source distributions of what is installed: they have the tests of the frameworks."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

DEADLINE_S = 120.0


def downloaded(project: str, directory: Path, config: pytest.Config) -> Path:
    """The root of the sources of the installed version; the test fails if pip cannot download them.

    Pytest's cache keeps them: to download them, pip installs what would build them, which takes ten seconds.
    """
    version = importlib.metadata.version(project)
    kept = config.cache.mkdir("sources") if hasattr(config, "cache") and config.cache else directory
    archive = kept / f"{project}-{version}.tar.gz"
    if not archive.exists():
        _download(project, version, archive)
    with tarfile.open(archive) as files:
        files.extractall(directory, filter="data")
    (root,) = (path for path in directory.iterdir() if path.is_dir())
    return root


def _download(project: str, version: str, archive: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent) as directory:
        options = ("--quiet", "--no-deps", "--no-binary", ":all:", "--dest", directory)
        command = [sys.executable, "-m", "pip", "download", *options, f"{project}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        if done.returncode:
            pytest.fail(
                f"pip could not download the sources of {project} {version} from its index:\n{done.stderr}"
            )
        (downloaded,) = Path(directory).glob("*.tar.gz")
        downloaded.rename(archive)
