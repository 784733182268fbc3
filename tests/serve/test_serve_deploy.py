"""The files under ``deploy/`` name flags, routes and metrics that exist, with numbers that agree."""

from __future__ import annotations

import json
import re

import typer
import yaml

from sbs_edge.commands import serve as serve_command
from sbs_edge.serve.metrics import Metrics
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


def test_every_metric_of_the_dashboard_is_exposed(repository):
    metrics = Metrics()
    exposed = {"process_resident_memory_bytes"}
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        exposed |= {family.name + suffix for suffix in suffixes}
    dashboard = json.loads((repository / "deploy" / "grafana.json").read_text())
    used = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            used |= set(re.findall(r"\b(?:sbs_edge|process)_\w+", target["expr"]))
    assert used <= exposed
    own = {name for name in exposed if name.startswith("sbs_edge")}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in used}
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in own} <= families
    boxes = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(boxes)) == len(boxes)
