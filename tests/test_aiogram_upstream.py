"""aiogram's own tests of storages, isolation, scenes and the FSM middleware pass, unmodified, over fsm_ray.

They are taken from aiogram's source distribution of the installed version, for which pip needs its index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fsm_ray import Storage
from tests.conftest import RayCluster
from tests.sources import downloaded

PLUGIN = Path(__file__).with_name("aiogram_upstream.py")
DEADLINE_S = 120.0

STORAGES = "tests/test_fsm/storage"
UPDATES = (
    "tests/test_fsm/test_scene.py",
    "tests/test_issues/test_1317_state_vs_isolation.py",
    "tests/test_issues/test_1672_middleware_data_in_scene.py",
    "tests/test_issues/test_1687_scene_goto_loses_middleware_data.py",
    "tests/test_issues/test_1743_channel_post_with_scenes.py",
)
OURS = " or ".join(["memory_storage", "lock_isolation", *(Path(path).stem for path in UPDATES)])
"""Of the tests of storages, those of the classes that we take the place of; of the others, all."""

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tests of the installed aiogram, and without aiogram itself."""
    root = downloaded("aiogram", tmp_path_factory.mktemp("aiogram"), request.config)
    shutil.rmtree(root / "aiogram")
    return root


@pytest.fixture
def environment(cluster: RayCluster, bot_name: str, tmp_path: Path) -> dict[str, str]:
    """What the plugin needs, and the process to find it."""
    with Storage() as storage:
        storage.init(bot_name)
    shutil.copy(PLUGIN, tmp_path)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    return os.environ | {"FSM_RAY_ADDRESS": cluster.address, "FSM_RAY_BOT": bot_name, "PYTHONPATH": path}


@pytest.mark.parametrize(
    ("chosen", "turns"), [((STORAGES, *UPDATES), ""), (UPDATES, "yes")], ids=["all", "updates-in-turns"]
)
def test_aiogram_s_own_tests_pass(
    source: Path, environment: dict[str, str], chosen: tuple[str, ...], turns: str
) -> None:
    settings = ("-p", "no:cacheprovider", "-o", "asyncio_default_fixture_loop_scope=function")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", PLUGIN.stem, *settings, "-k", OURS, *chosen]
    done = subprocess.run(
        command,
        cwd=source,
        env=environment | {"FSM_RAY_TURNS": turns},
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    assert re.search(r"\b[1-9]\d* passed", summary), summary
    assert "skipped" not in summary, done.stdout
