"""The RayService for KubeRay: right by schemas, to the last key, and made of values that the cluster takes."""

from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from manylora.cluster.shape import Shape, shape_of
from manylora.errors import InvalidSettings
from manylora.settings import ENV_PREFIX, Settings

from .files import ROOT, read_yaml

KUBERNETES = "1.33"
CONFIG_MAP, SERVICE = yaml.safe_load_all((ROOT / "deploy" / "ray" / "rayservice.yaml").read_text(encoding="utf-8"))
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
GROUPS = [CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]]
SERVE = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])


def test_every_part_is_right_by_strict_schemas() -> None:
    known = read_yaml(ROOT / "tests" / "deploy" / "crds.yml")["RayService"]

    kubernetes_validate.validate(CONFIG_MAP, KUBERNETES, strict=True)
    assert SERVICE["apiVersion"] == known["apiVersion"]
    jsonschema.validate(SERVICE["spec"], known["spec"])
    for group in GROUPS:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_cluster_takes_its_arguments_and_the_server_its_settings() -> None:
    (application,) = SERVE["applications"]
    module, name = application["import_path"].split(":")
    source = (ROOT / "server" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    shape = shape_of(application["args"])

    assert f"\ndef {name}(" in source
    assert (shape.replicas, shape.max_replicas, shape.gpus) == (2, 8, 1)
    names = {each["name"] for group in GROUPS for each in group["template"]["spec"]["containers"][0]["env"]}
    assert {key.removeprefix(ENV_PREFIX).lower() for key in (*CONFIG_MAP["data"], *names)} <= set(Settings.model_fields)


def test_pods_have_room_for_replicas_and_time_to_stop() -> None:
    shape = shape_of(SERVE["applications"][0]["args"])
    (workers,) = CLUSTER["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]

    assert (workers["minReplicas"], workers["maxReplicas"]) == (shape.replicas, shape.max_replicas)
    assert (float(limits["cpu"]), float(limits["nvidia.com/gpu"])) >= (shape.cpus, shape.gpus)
    assert pod["terminationGracePeriodSeconds"] > float(CONFIG_MAP["data"]["MANYLORA_DRAIN_TIMEOUT_S"]) + 10


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ({"replicas": 0}, "replicas"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas is 2"),
        ({"replica": 3}, "replica:"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_its_name(args: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidSettings, match=named):
        shape_of(args)


def test_the_command_has_a_flag_for_every_field() -> None:
    from manylora.cli.cluster import FLAGS

    assert {*FLAGS, "settings"} - {"address"} == set(Shape.model_fields)
