"""The files under ``deploy/`` name flags, routes and metrics that exist, with numbers that agree."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sbs_edge.cli import serve as serve_command
from sbs_edge.runtime.student import Student
from sbs_edge.serve.escalate import Escalation
from sbs_edge.serve.openapi import openapi_document
from sbs_edge.serve.settings import ServeSettings


def flags():
    app = typer.Typer()
    serve_command.register(app)
    command = typer.main.get_command(app)
    return {option for parameter in command.params for option in parameter.opts}


def containers(document):
    spec = document["spec"]
    if "containers" in spec:
        return spec["containers"]
    return spec.get("template", {}).get("spec", {}).get("containers", [])


def documents(repository):
    for name in ("kubernetes.yaml", "kserve.yaml"):
        yield from yaml.safe_load_all((repository / "deploy" / name).read_text())


def test_manifests_use_real_flags_routes_and_variables(repository):
    known, routes = flags(), openapi_document(ServeSettings())["paths"]
    seen = 0
    for document in documents(repository):
        for container in containers(document):
            seen += 1
            given = [a for a in container["args"] if a.startswith("--")]
            assert set(given) <= known
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe in container:
                    assert container[probe]["httpGet"]["path"] in routes
            for variable in container.get("env", []):
                flag = "--" + variable["name"].removeprefix("SBS_EDGE_SERVE_").lower().replace("_", "-")
                assert flag in known
    assert seen == 2


def test_grace_covers_pre_stop_and_drain(repository):
    deployment = next(d for d in documents(repository) if d["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    drain = float(container["args"][container["args"].index("--drain-timeout") + 1])
    pre_stop = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pre_stop + drain + 5
    service = next(d for d in documents(repository) if d["kind"] == "InferenceService")
    assert service["spec"]["predictor"]["terminationGracePeriodSeconds"] > drain


def test_dockerfile_sets_variables_the_command_reads(repository):
    text = (repository / "deploy" / "Dockerfile").read_text()
    for name in re.findall(r"SBS_EDGE_SERVE_(\w+)=", text):
        assert "--" + name.lower().replace("_", "-") in flags()
    assert "torch" not in text.split("FROM", 1)[1]


def every_document(repository):
    for document in documents(repository):
        if document["kind"] not in ("ServingRuntime", "InferenceService"):
            yield document
            continue
        # KServe puts these into pods: their parts are held to the schema of a pod.
        if document["kind"] == "ServingRuntime":
            spec = {"containers": document["spec"]["containers"]}
        else:
            grace = document["spec"]["predictor"]["terminationGracePeriodSeconds"]
            spec = {"containers": [{"name": "c"}], "terminationGracePeriodSeconds": grace}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": document["metadata"], "spec": spec}


def test_manifests_fit_the_schemas_of_kubernetes(repository):
    """Kubernetes' own OpenAPI schemas, in which an unknown or misplaced field is an error."""
    judge = pytest.importorskip("kubernetes_validate")
    version = judge.latest_version()
    kinds = []
    for document in every_document(repository):
        judge.validate(document, version, strict=True)
        kinds.append(document["kind"])
        broken = json.loads(json.dumps(document))
        broken["spec"]["replicaz"] = 1
        with pytest.raises(judge.ValidationError):  # the judge does look
            judge.validate(broken, version, strict=True)
    assert kinds == ["Deployment", "Service", "PodDisruptionBudget", "Pod", "Pod"]


def test_a_linter_has_nothing_to_say_about_the_dockerfile(repository):
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("no hadolint in this environment; the extra 'dev' brings it for Linux on x86-64")
    done = subprocess.run(
        [linter, "--no-color", repository / "deploy" / "Dockerfile"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def instructions(repository):
    """(NAME, rest) of every instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (repository / "deploy" / "Dockerfile").read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


@pytest.mark.long
def test_what_the_dockerfile_installs_starts_and_answers(repository, bundles, texts, tmp_path):
    """Its own lines, run in an environment of their own: the files it copies, its pip, its variables."""
    source, opt = tmp_path / "src", tmp_path / "opt"
    source.mkdir()
    ignore = (repository / "deploy" / "Dockerfile.dockerignore").read_text().split()
    for name in (line[1:] for line in ignore if line.startswith("!")):
        whole = repository / name
        if whole.is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(whole, source / name, symlinks=True, ignore=leave)
        else:
            shutil.copy(whole, source / name)
    found = instructions(repository)
    (install,) = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    tools = tmp_path / "bin"  # the image's "python"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SBS_EDGE"))}
    subprocess.run(
        ["bash", "-ec", install.replace("/opt/sbs-edge", str(opt))],
        cwd=source, check=True, capture_output=True, text=True, timeout=500,
        env={**env, "PATH": f"{tools}:{env['PATH']}"},
    )  # fmt: skip
    packages = {p.name.split("-")[0] for p in opt.glob("lib/python3*/site-packages/*.dist-info")}
    assert "sbs_edge" in packages
    assert not packages & {"torch", "transformers", "onnx", "pip"}
    variables = dict(re.findall(r"(\w+)=(\S+)", next(rest for name, rest in found if name == "ENV")))
    variables |= {"SBS_EDGE_SERVE_HOST": "127.0.0.1", "SBS_EDGE_SERVE_PORT": "0"}
    variables["PATH"] = f"{opt / 'bin'}:{env['PATH']}"
    (entry,) = [json.loads(rest) for name, rest in found if name == "ENTRYPOINT"]
    log = tmp_path / "log"
    with log.open("w") as handle:
        server = subprocess.Popen(
            [opt / "bin" / entry[0], *entry[1:], bundles["closed"]], stderr=handle, cwd=tmp_path,
            env={**env, **variables},
        )  # fmt: skip
    try:
        port, end = None, time.monotonic() + 60
        while port is None or '"ready"' not in log.read_text():
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            port = re.search(r'"port": (\d+)', log.read_text())
        url = f"http://127.0.0.1:{port.group(1)}/v1/predict"
        answer = httpx.post(url, json={"texts": texts[:2], "explain": True}, trust_env=False).json()
        with Student.load(bundles["closed"]) as student:
            assert [p["label"] for p in answer["predictions"]] == [
                p.label for p in student.predict(texts[:2])
            ]
        server.terminate()
        assert server.wait(20) == 0
    finally:
        server.kill()
        server.wait()


async def after_traffic(app):
    """Answer, refuse, abstain and escalate; return the exposition text."""
    for texts in (["a b"], ["c"]):
        assert (await app.predict(texts, explain=True)).status_code == 200
    app.service.draining = True
    assert (await app.predict(["a"])).status_code == 503
    app.service.draining = False
    app.service.recorder.close()  # writes what waits
    return (await app.client.get("/metrics")).text


def test_every_metric_of_the_dashboard_has_a_value_after_traffic(repository, hand_bundle, running, tmp_path):
    reply = httpx.Response(200, json={"choices": [{"message": {"content": "none of them"}}]})
    teacher = Escalation("http://teacher/v1", "big", transport=httpx.MockTransport(lambda request: reply))

    async def go():
        record = tmp_path / "doubtful.jsonl"
        async with running(hand_bundle, None, teacher, abstain_below=0.9, record=record) as app:
            return await after_traffic(app)

    exposed: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(asyncio.run(asyncio.wait_for(go(), 30))):
        for sample in family.samples:
            exposed.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads((repository / "deploy" / "grafana.json").read_text())
    used = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            expression = target["expr"]
            names = set(re.findall(r"\b(?:sbs_edge|process)_\w+", expression))
            assert names, expression
            used |= names
            assert names <= set(exposed), (panel["title"], names - set(exposed))
            labels = set().union(*(exposed[name] for name in names))
            grouped = re.findall(r"\bby \(([^)]*)\)", expression)
            matched = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
            asked = {word for group in grouped for word in re.split(r"[,\s]+", group)} | set(matched)
            asked |= set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
            assert asked <= labels | {"instance", "job"}, (panel["title"], asked - labels)
    own = {name for name in exposed if name.startswith("sbs_edge") and not name.endswith("_created")}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in own} <= families
    boxes = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(boxes)) == len(boxes)


def _bytes(quantity):
    units = {"Mi": 2**20, "Gi": 2**30}
    return int(quantity[:-2]) * units[quantity[-2:]]


def test_memory_limits_hold_what_the_server_may_take(repository):
    """A server at rest fits the request; bodies at their budget and every connection's head fit beside it."""
    defaults = ServeSettings()
    bodies = 4 * defaults.max_inside_bytes  # what parsing and the widest characters make of their bytes
    heads = 2 * defaults.max_connections * defaults.max_head_bytes
    for document in documents(repository):
        for container in containers(document):
            assert not {"--max-inside-bytes", "--max-connections", "--max-head-bytes"} & set(
                container["args"]
            )
            memory = {name: _bytes(kind["memory"]) for name, kind in container["resources"].items()}
            assert memory["requests"] + bodies + heads <= memory["limits"]


def test_the_document_names_its_operations_and_its_server():
    document = openapi_document(ServeSettings())
    assert document["servers"] == [{"url": "."}]
    found = [
        op["operationId"] for item in document["paths"].values() for op in item.values() if "responses" in op
    ]
    assert (
        len(found)
        == len(set(found))
        == sum(method in item for item in document["paths"].values() for method in ("get", "post"))
    )
