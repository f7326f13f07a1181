"""TLS between nodes, with a real Ray that runs with RAY_USE_TLS."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import ray.util

from fsm_ray.bench.servers import temporary_directory

from .certificates import Authority
from .conftest import DEADLINE_S

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_ray_that_runs_with_tls_has_the_channel_between_its_nodes_use_it() -> None:
    """In a process of its own: a process attaches to one Ray, with TLS or without."""
    with temporary_directory() as directory:
        hosts = ("localhost", "127.0.0.1", ray.util.get_node_ip_address())
        variables = Authority(directory / "authority").environment("node", hosts)
        done = subprocess.run(
            [sys.executable, "-m", "tests.tls_cluster"],
            env=os.environ | variables | {"RAY_TMPDIR": str(directory)},
            capture_output=True,
            text=True,
            check=False,
            timeout=2 * DEADLINE_S,
        )

    assert done.stdout.splitlines()[-1:] == ["all as it must be"], done.stderr[-3000:]
