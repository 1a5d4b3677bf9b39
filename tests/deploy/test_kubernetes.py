"""deploy/kubernetes: what the API would take, names that line up, and configs and commands that ours take."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from shared.config import load_run, load_site
from site_agent.tasks.byte_lm import ByteLM
from tests.support.command_line import parse, parse_torchrun

ROOT = Path(__file__).parents[2]
DIRECTORIES = ("coordinator", "site", "site-of-several-nodes")
SITES = ("site", "site-of-several-nodes")
USER = 10001
"""That of the images."""

Document = dict[str, Any]


def kustomization(name: str) -> Document:
    path = ROOT / "deploy" / "kubernetes" / name / "kustomization.yaml"
    document: Document = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


def documents(name: str) -> list[Document]:
    """What `kubectl apply -k` would send, as far as these kustomizations go: resources, patches, images, namespace."""
    directory, wanted = ROOT / "deploy" / "kubernetes" / name, kustomization(name)
    found: list[Document] = []
    for resource in wanted["resources"]:
        path = directory / resource
        if path.is_dir():
            found += documents(path.resolve().name)
        else:
            found += list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    for patch in wanted.get("patches", []):
        target = patch["target"]
        (document,) = [d for d in found if (d["kind"], d["metadata"]["name"]) == (target["kind"], target["name"])]
        for operation in yaml.safe_load(patch["patch"]):
            apply(document, operation)
    for document in found:
        document["metadata"]["namespace"] = wanted["namespace"]
        for container in pod(document)["containers"] if "template" in document.get("spec", {}) else []:
            for image in wanted.get("images", []):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}:{image['newTag']}"
    return found


def apply(document: Document, operation: Document) -> None:
    """RFC 6902, `add` and `replace`."""
    *way, last = [int(part) if part.isdigit() else part for part in operation["path"].strip("/").split("/")]
    at: Any = document
    for part in way:
        at = at[part]
    if operation["op"] == "replace":
        assert last in at, operation["path"]
    else:
        assert operation["op"] == "add"
        assert last not in at, operation["path"]
    at[last] = operation["value"]


def pod(document: Document) -> Document:
    spec: Document = document["spec"]["template"]["spec"]
    return spec


def one(name: str, kind: str) -> Document:
    (document,) = [document for document in documents(name) if document["kind"] == kind]
    return document


def workload(name: str) -> Document:
    return one(name, "StatefulSet" if name == "coordinator" else "Job")


def container(name: str) -> Document:
    (found,) = pod(workload(name))["containers"]
    return dict(found)


def toml(name: str, tmp_path: Path) -> Path:
    """The config in the directory's ConfigMap, as the container sees it."""
    ((file, text),) = one(name, "ConfigMap")["data"].items()
    (tmp_path / file).write_text(text, encoding="utf-8")
    return tmp_path / file


def mount_paths(name: str) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container(name)["volumeMounts"]}


# -- the API


@pytest.mark.parametrize("name", DIRECTORIES)
def test_the_api_takes_every_manifest_and_knows_every_key(name: str) -> None:
    found = documents(name)
    assert len(found) >= 3
    for document in found:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", DIRECTORIES)
def test_these_kustomizations_are_built_as_kubectl_builds_them(name: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here: what these tests build themselves is not compared with it")
    directory = ROOT / "deploy" / "kubernetes" / name
    built = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True, check=True).stdout

    def order(document: Document) -> tuple[str, str]:
        return document["kind"], document["metadata"]["name"]

    assert sorted(yaml.safe_load_all(built), key=order) == sorted(documents(name), key=order)


# -- names


@pytest.mark.parametrize("name", ["coordinator", "site-of-several-nodes"])
def test_a_service_finds_its_pods_and_their_ports(name: str) -> None:
    service, template = one(name, "Service"), workload(name)["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    names = {port["name"]: port["containerPort"] for port in container(name)["ports"]}
    for port in service["spec"]["ports"]:
        target = port["targetPort"]
        assert names.get(target, target) == port["port"]


def test_the_stateful_set_selects_its_own_pods_and_names_its_service() -> None:
    document = workload("coordinator")
    assert document["spec"]["selector"]["matchLabels"] == document["spec"]["template"]["metadata"]["labels"]
    assert document["spec"]["serviceName"] == one("coordinator", "Service")["metadata"]["name"]


@pytest.mark.parametrize("name", DIRECTORIES)
def test_volumes_are_mounted_and_what_they_name_is_there_or_its_making_is_told(name: str) -> None:
    made = {(document["kind"], document["metadata"]["name"]) for document in documents(name)}
    told = "".join(
        (ROOT / "deploy" / "kubernetes" / each / "kustomization.yaml").read_text(encoding="utf-8")
        for each in DIRECTORIES
    )
    volumes = {volume["name"]: volume for volume in pod(workload(name))["volumes"]}
    claims = {claim["metadata"]["name"] for claim in workload(name)["spec"].get("volumeClaimTemplates", [])}
    mounted = {mount["name"] for mount in container(name)["volumeMounts"]}
    assert mounted == volumes.keys() | claims
    for volume in volumes.values():
        match volume:
            case {"configMap": {"name": source}}:
                assert ("ConfigMap", source) in made
            case {"secret": {"secretName": source}}:
                assert re.search(rf"create secret (tls|generic) {source} --", told), source
            case {"persistentVolumeClaim": {"claimName": source}}:
                assert ("PersistentVolumeClaim", source) in made or f"claim is {source}." in told, source
            case _:
                assert "emptyDir" in volume


@pytest.mark.parametrize("name", DIRECTORIES)
def test_the_images_are_those_of_docker_and_not_root(name: str) -> None:
    image = "isthmus-coordinator" if name == "coordinator" else "isthmus-site"
    dockerfile = (ROOT / "docker" / f"{image.removeprefix('isthmus-')}.Dockerfile").read_text(encoding="utf-8")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"-t {image} ." in dockerfile
    assert container(name)["image"] == f"registry.example/{image}:{version}"
    context = pod(workload(name))["securityContext"]
    assert context["runAsNonRoot"] is True
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (USER, USER, USER)
    assert f"USER {USER}:{USER}" in dockerfile
    assert f"EXPOSE {container(name)['ports'][0]['containerPort']}" in dockerfile
    assert container(name)["securityContext"]["allowPrivilegeEscalation"] is False


def test_probes_ask_what_the_coordinator_answers() -> None:
    routes = (ROOT / "coordinator" / "api" / "app.py").read_text(encoding="utf-8")
    probes = {
        kind: container("coordinator")[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")
    }
    for probe in probes.values():
        assert f'web.get("{probe["path"]}", ' in routes
        assert probe["scheme"] == "HTTPS"
        assert probe["port"] in {port["name"] for port in container("coordinator")["ports"]}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }


# -- what ours make of it


def test_the_run_is_valid_and_is_what_the_coordinator_serves(tmp_path: Path) -> None:
    path = toml("coordinator", tmp_path)
    ByteLM(load_run(path).task.options())
    served, mounts = parse(container("coordinator")["args"]), mount_paths("coordinator")
    assert served["run"] == Path(mounts["run"]) / path.name
    assert str(served["state"]) == mounts["state"]
    assert (served["host"], served["port"]) == ("0.0.0.0", container("coordinator")["ports"][0]["containerPort"])
    assert served["tls_cert"] == Path(mounts["tls"]) / "tls.crt", "as a Secret of type tls has it"
    assert served["tls_key"] == Path(mounts["tls"]) / "tls.key"
    assert not served["insecure"]


@pytest.mark.parametrize("name", SITES)
def test_the_site_is_valid_and_keeps_its_state_and_finds_its_token(name: str, tmp_path: Path) -> None:
    config, mounts = load_site(toml(name, tmp_path)), mount_paths(name)
    assert config.site.state == mounts["state"]
    assert config.data["paths"] == mounts["data"]
    secret, _, key = config.site.token_file.rpartition("/")
    assert secret == mounts["token"]
    how = (ROOT / "deploy" / "kubernetes" / "site" / "kustomization.yaml").read_text(encoding="utf-8")
    assert f"--from-file={key}=" in how
    assert config.metrics.port == container(name)["ports"][0]["containerPort"]
    assert config.metrics.host == "0.0.0.0"
    assert config.site.coordinator.startswith("https://")


@pytest.mark.parametrize("name", SITES)
def test_a_site_has_the_time_to_leave(name: str, tmp_path: Path) -> None:
    stop = load_site(toml(name, tmp_path)).site.stop_seconds
    (shutdown,) = [v["value"] for v in container(name)["env"] if v["name"] == "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert stop < int(shutdown) < pod(workload(name))["terminationGracePeriodSeconds"]


def test_a_site_that_cannot_work_is_not_tried_again_and_a_drained_node_is_no_failure() -> None:
    refused, drained = one("site", "Job")["spec"]["podFailurePolicy"]["rules"]
    assert refused["action"] == "FailJob"
    assert refused["onExitCodes"] == {"containerName": container("site")["name"], "operator": "In", "values": [2, 3]}
    assert drained == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert pod(one("site", "Job"))["restartPolicy"] == "Never", "podFailurePolicy needs it"


def test_a_site_on_one_node_starts_its_processes_itself(tmp_path: Path) -> None:
    started = container("site")
    assert started["command"] == ["isthmus"]
    assert parse(started["args"])["site"] == Path(mount_paths("site")["site"]) / toml("site", tmp_path).name


def test_the_nodes_of_a_site_meet_at_the_first_pod(tmp_path: Path) -> None:
    document, started = one("site-of-several-nodes", "Job"), container("site-of-several-nodes")
    service = one("site-of-several-nodes", "Service")
    assert started["command"] == ["torchrun"]
    parsed = parse_torchrun(started["args"])
    nodes = document["spec"]["completions"]
    assert nodes > 1
    assert document["spec"]["parallelism"] == nodes, "all at once, or they wait for ever"
    assert parsed.nnodes == str(nodes)
    assert parsed.nproc_per_node == started["resources"]["limits"]["nvidia.com/gpu"]
    assert (parsed.module, parsed.training_script) == (True, "isthmus")
    assert parse(parsed.training_script_args) == parse(container("site")["args"])
    host, port = parsed.rdzv_endpoint.split(":")
    name, subdomain = host.split(".")
    assert parsed.rdzv_backend == "c10d"
    assert name == f"{document['metadata']['name']}-0", "the hostname of an indexed Job's first pod"
    assert subdomain == pod(document)["subdomain"] == service["metadata"]["name"]
    assert int(port) in {each["port"] for each in service["spec"]["ports"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert one("site-of-several-nodes", "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]
