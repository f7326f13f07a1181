"""The frameworks' own tests: from the source distributions of what is installed, run over fsm_ray."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import RayCluster

DOWNLOAD_DEADLINE_S = 120.0


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


def environment_of(plugin: Path, directory: Path, cluster: RayCluster, bot_name: str) -> dict[str, str]:
    """What a process needs that loads this plugin for pytest, and the name of the bot that the plugin makes.

    The plugin is copied to the directory: it must be found, and not what else there is beside it.
    """
    shutil.copy(plugin, directory)
    path = os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))
    return os.environ | {"RAY_ADDRESS": cluster.address, "FSM_RAY_BOT": bot_name, "PYTHONPATH": path}


def passed(
    plugin: Path, source: Path, environment: Mapping[str, str], *arguments: str, deadline_s: float
) -> None:
    """Run pytest in the sources. The test fails if any failed there, or was skipped, or if none ran."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", plugin.stem, "-p", "no:cacheprovider", *arguments],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=deadline_s,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert re.search(r"\b[1-9]\d* passed", summary), summary
    assert "skipped" not in summary, done.stdout


def _download(project: str, version: str, archive: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent) as directory:
        options = ("--quiet", "--no-deps", "--no-binary", ":all:", "--dest", directory)
        command = [sys.executable, "-m", "pip", "download", *options, f"{project}=={version}"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_DEADLINE_S
        )
        if done.returncode:
            pytest.fail(
                f"pip could not download the sources of {project} {version} from its index:\n{done.stderr}"
            )
        (downloaded,) = Path(directory).glob("*.tar.gz")
        downloaded.rename(archive)
