"""The source distributions of what is installed: they have the tests of the frameworks."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

DEADLINE_S = 120.0


def downloaded(project: str, directory: Path) -> Path:
    """The root of the sources of the installed version; the test fails if pip cannot download them."""
    version = importlib.metadata.version(project)
    options = ("--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(directory))
    command = [sys.executable, "-m", "pip", "download", *options, f"{project}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    if done.returncode:
        pytest.fail(
            f"pip could not download the sources of {project} {version} from its index:\n{done.stderr}"
        )
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(directory, filter="data")
    (root,) = (path for path in directory.iterdir() if path.is_dir())
    return root
