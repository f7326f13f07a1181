"""What cluster.yaml and examples/kubernetes deploy is what Ray and KubeRay take, and what there is here.

Neither a cloud nor Kubernetes is at hand: Ray's own schema and parsers stand in, and models of what the CRDs
of KubeRay require (ray-operator/apis/ray/v1 in its sources), which refuse any field that is not named here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

import pytest
import ray
import yaml  # type: ignore[import-untyped]
from jsonschema import ValidationError  # type: ignore[import-untyped]
from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

import fsm_ray
from fsm_ray import BotOptions, Storage
from tests.conftest import DEADLINE_S, RayCluster

ROOT = Path(__file__).parent.parent
CLUSTER = (ROOT / "cluster.yaml").read_text()
KUBERNETES = ROOT / "examples" / "kubernetes"
DOCKERFILE = (KUBERNETES / "Dockerfile").read_text()


# cluster.yaml


def on_premise() -> str:
    """The text with its AWS part taken out, and the part for machines of one's own put in."""
    without_aws = re.sub(r"^# >>> AWS\n.*^# <<< AWS\n", "", CLUSTER, flags=re.MULTILINE | re.DOTALL)
    (commented,) = re.findall(
        r"^# >>> on premise\n(.*)^# <<< on premise\n", without_aws, flags=re.MULTILINE | re.DOTALL
    )
    return without_aws.replace(commented, re.sub(r"^# ?", "", commented, flags=re.MULTILINE))


@pytest.mark.parametrize(("text", "kind"), [(CLUSTER, "aws"), (on_premise(), "local")])
def test_the_cluster_is_valid_under_rays_own_schema(text: str, kind: str) -> None:
    config = yaml.safe_load(text)
    prepared = prepare_config(config)
    validate_config(prepared)

    assert config["provider"]["type"] == kind
    workers = [
        node["min_workers"]
        for name, node in prepared["available_node_types"].items()
        if kind == "local" or name != prepared["head_node_type"]
    ]
    assert workers == [config["max_workers"]]  # a fixed number, see there


def test_rays_schema_refuses_what_it_does_not_know() -> None:
    config = prepare_config(yaml.safe_load(CLUSTER) | {"initial_workers": 2})

    with pytest.raises(ValidationError, match="initial_workers"):
        validate_config(config)


def test_what_the_nodes_of_the_cluster_get_is_here() -> None:
    config = yaml.safe_load(CLUSTER)
    (setup,) = config["setup_commands"]
    path, extras = re.fullmatch(r"pip install '(.*)\[(.*)\]'", setup).groups()  # type: ignore[union-attr]

    assert config["file_mounts"][path] == "."
    assert set(extras.split(",")) <= extras_of_the_project()
    assert BotOptions(store=environment(config)["FSM_RAY_STORE"]).store_scheme == "s3"
    assert environment(config)["AWS_REGION"] == config["provider"]["region"]


@pytest.mark.ray
@pytest.mark.slow
def test_the_command_that_makes_the_bot_on_the_head_node_makes_it(
    cluster: RayCluster, tmp_path: Path
) -> None:
    command = yaml.safe_load(CLUSTER)["head_start_ray_commands"][-1]
    # The command's `python` is this one, whatever else is installed.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    settings = {"FSM_RAY_STORE": f"file://{tmp_path}", "RAY_ADDRESS": cluster.address, "PATH": path}

    with Storage(timeout_s=DEADLINE_S) as storage:
        try:
            subprocess.run(["bash", "-c", command], env=os.environ | settings, check=True, timeout=DEADLINE_S)
            assert len(storage.describe("my_bot").shards) == 2
        finally:
            storage.drop("my_bot")


def environment(config: dict[str, Any]) -> dict[str, str]:
    """What all processes in the containers of the cluster have."""
    options = config["docker"]["run_options"]
    return dict(
        option.removeprefix("--env ").split("=", 1) for option in options if option.startswith("--env")
    )


def extras_of_the_project() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


# examples/kubernetes


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class KeyOfSecret(Strict):
    name: str
    key: str
    optional: bool = False


class ValueFrom(Strict):
    secretKeyRef: KeyOfSecret  # noqa: N815  # Kubernetes' names, here and below


class Variable(Strict):
    name: str
    value: str | None = None
    valueFrom: ValueFrom | None = None  # noqa: N815


class Port(Strict):
    containerPort: int  # noqa: N815
    name: str = Field(max_length=15)


class Resources(Strict):
    requests: dict[str, str]
    limits: dict[str, str]


class Container(Strict):
    name: str
    image: str
    ports: list[Port] = []
    env: list[Variable] = []
    resources: Resources | None = None


class PodSpec(Strict):
    containers: list[Container] = Field(min_length=1)
    serviceAccountName: str | None = None  # noqa: N815
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None  # noqa: N815


class PodTemplate(Strict):
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: dict[str, str]  # noqa: N815
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: str  # noqa: N815
    replicas: int
    minReplicas: int  # noqa: N815
    maxReplicas: int  # noqa: N815


class AuthOptions(Strict):
    mode: Literal["token", "disabled"]


class ClusterSpec(Strict):
    rayVersion: str  # noqa: N815
    authOptions: AuthOptions  # noqa: N815
    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup]  # noqa: N815


class JobSpec(Strict):
    clusterSelector: dict[Literal["ray.io/cluster"], str]  # noqa: N815
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode"]  # noqa: N815
    entrypoint: str
    runtimeEnvYAML: str  # noqa: N815
    backoffLimit: int = Field(default=0, ge=0)  # noqa: N815
    submitterPodTemplate: PodTemplate  # noqa: N815

    @model_validator(mode="after")
    def _retries_are_on_a_cluster_of_its_own(self) -> Self:
        # A retry deletes the cluster: https://github.com/ray-project/kuberay/pull/4527
        if self.clusterSelector and self.backoffLimit:
            raise ValueError("backoffLimit is incompatible with clusterSelector")
        return self


class Metadata(Strict):
    name: str = Field(max_length=47, pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$")
    annotations: dict[str, str] = {}


class Cluster(Strict):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class Job(Strict):
    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


def ray_cluster() -> Cluster:
    return Cluster(**documents("raycluster.yaml")[1])


def ray_job() -> Job:
    return Job(**documents("rayjob.yaml")[0])


def containers() -> list[Container]:
    spec = ray_cluster().spec
    templates = [spec.headGroupSpec.template, *(group.template for group in spec.workerGroupSpecs)]
    templates.append(ray_job().spec.submitterPodTemplate)
    return [container for template in templates for container in template.spec.containers]


def test_rays_autoscaler_understands_the_cluster_on_kubernetes() -> None:
    cluster = documents("raycluster.yaml")[1]
    cluster["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(cluster)

    assert config["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    assert config["available_node_types"]["workers"]["min_workers"] == 2
    assert config["max_workers"] == 2


def test_pods_of_the_cluster_use_its_service_account_and_have_a_store() -> None:
    account, _ = documents("raycluster.yaml")
    spec = ray_cluster().spec
    for group in [spec.headGroupSpec, *spec.workerGroupSpecs]:
        (container,) = group.template.spec.containers
        store = next(variable.value for variable in container.env if variable.name == "FSM_RAY_STORE")

        assert (account["kind"], account["metadata"]["name"]) == (
            "ServiceAccount",
            group.template.spec.serviceAccountName,
        )
        assert store is not None
        assert BotOptions(store=store).store_scheme == "s3"


def test_the_job_runs_a_bot_that_is_in_the_image_on_the_cluster_that_is_there() -> None:
    job, cluster = ray_job().spec, ray_cluster()
    (script,) = re.findall(r"python (\S+);", job.entrypoint)
    (submitter,) = job.submitterPodTemplate.spec.containers
    token = next(variable.valueFrom for variable in submitter.env if variable.name == "RAY_AUTH_TOKEN")

    assert job.clusterSelector["ray.io/cluster"] == cluster.metadata.name
    assert (ROOT / "examples" / Path(script).relative_to("/home/ray/examples")).exists()
    assert isinstance(yaml.safe_load(job.runtimeEnvYAML)["env_vars"]["WORKERS"], str)
    assert cluster.spec.authOptions.mode == "token"
    assert token is not None
    assert token.secretKeyRef.name == cluster.metadata.name  # of the secret that the operator makes


def test_a_job_on_a_cluster_that_is_there_has_no_retries() -> None:
    spec = documents("rayjob.yaml")[0]["spec"]

    with pytest.raises(ValueError, match="backoffLimit is incompatible with clusterSelector"):
        JobSpec(**spec | {"backoffLimit": 10})


def test_the_poller_of_the_job_is_started_again_when_it_fails(tmp_path: Path) -> None:
    pollers = tmp_path / "pollers"
    programs = {"python": f'echo "$*" >> {pollers}; [ $(wc -l < {pollers}) = 3 ]', "sleep": ":"}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o700)
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))

    subprocess.run(
        ["sh", "-c", submitted(ray_job().spec.entrypoint)],
        env=os.environ | {"PATH": path},
        check=True,
        timeout=DEADLINE_S,
    )

    assert pollers.read_text().splitlines() == ["/home/ray/examples/cluster_bot.py"] * 3


def submitted(entrypoint: str) -> str:
    """What Ray has a shell run: KubeRay writes the entrypoint into a script, behind `ray job submit --`."""
    script = f"if true ; then printf '%s\\0' {entrypoint} ; fi ;"
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, text=True)
    return shlex.join(done.stdout.split("\0")[:-1])


def test_the_image_is_of_this_version_and_made_of_what_is_here() -> None:
    copied = re.findall(r"^COPY --chown=ray:users (.*) \S+$", DOCKERFILE, flags=re.MULTILINE)
    (extras,) = re.findall(r"/home/ray/fsm_ray\[(.*)\]", DOCKERFILE)

    assert {container.image for container in containers()} == {f"fsm-ray-bot:{fsm_ray.__version__}"}
    assert f"-t fsm-ray-bot:{fsm_ray.__version__} ." in DOCKERFILE
    assert set(extras.split(",")) <= extras_of_the_project()
    for pattern in " ".join(copied).split():
        assert list(ROOT.glob(pattern)), pattern


# Both


def test_every_node_has_the_same_ray_and_one_that_is_tested_here() -> None:
    named = {
        yaml.safe_load(CLUSTER)["docker"]["image"].removeprefix("rayproject/ray:").removesuffix("-py311"),
        *re.findall(r"^FROM rayproject/ray:(\S+)-py311$", DOCKERFILE, flags=re.MULTILINE),
        ray_cluster().spec.rayVersion,
    }

    assert len(named) == 1
    # Those who install later have a later one here; what is deployed was tested when it was written.
    assert Version(named.pop()) <= Version(ray.__version__)
