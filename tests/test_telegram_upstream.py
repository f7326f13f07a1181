"""python-telegram-bot's own tests of persistences in applications pass, unmodified, over fsm_ray.

They are taken from its source distribution of the installed version, for which pip needs its index.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import RayCluster
from tests.upstream import downloaded, environment_of, passed

PLUGIN = Path(__file__).with_name("telegram_upstream.py")
DEADLINE_S = 240.0
SIDE_BY_SIDE = 4
"""They sleep for half a minute altogether."""

TESTS = "tests/ext/test_basepersistence.py"

NOT_FOR_US = (
    # Looks at the slots of the class in the place of which the plugin puts a subclass.
    "test_slot_behaviour",
    # Wants `END` stored until the next start removes it; in a RayPersistence, who has ended is gone at once:
    # test_adapter_telegram, test_a_conversation_that_a_non_blocking_handler_ends_leaves_no_record.
    "test_non_blocking_conversation_ends",
)

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
NO_NETWORK = dict.fromkeys(PROXIES, "http://127.0.0.1:9")
"""A port that nobody listens on."""

WITHOUT_OPTIONAL = {"GITHUB_ACTIONS": "true", "TEST_WITH_OPT_DEPS": "false"}
"""Their conftest wants all that any of their tests needs, unless it is told so."""

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the tests of the installed version, and without the library itself."""
    root = downloaded("python-telegram-bot", tmp_path_factory.mktemp("telegram"), request.config)
    shutil.rmtree(root / "src")
    return root


@pytest.fixture
def environment(cluster: RayCluster, bot_name: str, tmp_path: Path) -> dict[str, str]:
    return environment_of(PLUGIN, tmp_path, cluster, bot_name) | NO_NETWORK | WITHOUT_OPTIONAL


def test_python_telegram_bot_s_own_tests_pass(source: Path, environment: dict[str, str]) -> None:
    loops = [f"asyncio_default_{kind}_loop_scope=session" for kind in ("fixture", "test")]
    settings = [part for setting in ("addopts=", *loops) for part in ("-o", setting)]
    markers = ("-W", "ignore::pytest.PytestUnknownMarkWarning")
    deselected = [f"--deselect={TESTS}::TestBasePersistence::{name}" for name in NOT_FOR_US]
    arguments = ("-n", str(SIDE_BY_SIDE), *settings, *markers, *deselected, TESTS)

    theirs = (source / TESTS).read_text()
    assert all(f"def {name}(" in theirs for name in NOT_FOR_US)
    passed(PLUGIN, source, environment, *arguments, deadline_s=DEADLINE_S)
