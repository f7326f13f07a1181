"""aiogram's own tests of storages, isolation, scenes and the FSM middleware pass, unmodified, over fsm_ray.

They are taken from aiogram's source distribution of the installed version, for which pip needs its index.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import RayCluster
from tests.upstream import downloaded, environment_of, passed

PLUGIN = Path(__file__).with_name("aiogram_upstream.py")
DEADLINE_S = 120.0

STORAGES = "tests/test_fsm/storage"
UPDATES = {
    "test_scene": "tests/test_fsm",
    "test_1317_state_vs_isolation": "tests/test_issues",
    "test_1672_middleware_data_in_scene": "tests/test_issues",
    "test_1687_scene_goto_loses_middleware_data": "tests/test_issues",
    "test_1743_channel_post_with_scenes": "tests/test_issues",
}
"""Module -> its directory."""
OURS = " or ".join(["memory_storage", "lock_isolation", *UPDATES])
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
    return environment_of(PLUGIN, tmp_path, cluster, bot_name) | {"FSM_RAY_UPDATES": " ".join(UPDATES)}


def test_aiogram_s_own_tests_pass_and_those_of_updates_in_turns_too(
    source: Path, environment: dict[str, str]
) -> None:
    chosen = [STORAGES, *(f"{directory}/{name}.py" for name, directory in UPDATES.items())]
    arguments = ("-o", "asyncio_default_fixture_loop_scope=function", "-k", OURS, *chosen)

    passed(PLUGIN, source, environment, *arguments, deadline_s=DEADLINE_S)
