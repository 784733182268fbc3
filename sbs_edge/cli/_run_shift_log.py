"""``sbs-edge run shift-log``: the built-in long task, with the options of ``run`` that apply to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from sbs_edge import files
from sbs_edge.cli._common import print_json, resolved, save_resolved
from sbs_edge.cli._fields import parse_fields
from sbs_edge.errors import UsageError
from sbs_edge.lock import held

__all__ = ["run_long_task"]

_TAKEN = (
    "data", "out", "steps", "seed", "target", "training", "max_drop", "min_rationale_agreement", "mode",
    "rationale_weight", "model", "config", "json", "dry_run",
)  # fmt: skip


def run_long_task(ctx: typer.Context) -> None:
    """Train, export and measure; write ``report.json`` and ``report.html``.

    Raises:
        UsageError: an option was given that says something about rows of one's own.
    """
    from sbs_edge.data.shift_log import LATEST_NAME
    from sbs_edge.pipelines.shift_log import TRAINING, ShiftLogConfig, run_shift_log
    from sbs_edge.report.shift_log import shift_log_page, shift_log_table
    from sbs_edge.training.config import TrainConfig, make_config

    values = ctx.params
    given = {
        name for name in values if getattr(ctx.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    }
    if wrong := sorted(given - set(_TAKEN)):
        flag = "--" + wrong[0].replace("_", "-")
        raise UsageError(
            f"{values['data']} is drawn by a program, so {flag} has no effect on it; leave it out."
        )
    own = {
        "mode": values["mode"].value,
        "rationale_weight": values["rationale_weight"],
        "model": values["model"],
    }
    flags = {"max_steps": "--steps", "epochs": "--steps", "seed": "--seed", "mode": "--mode"}
    training = {
        **{name: value for name, value in own.items() if value is not None},
        **parse_fields(values["training"] or (), TrainConfig, flags),
    }
    own_fields: dict[str, Any] = {"steps": values["steps"]} if "steps" in given else {}
    if values["target"]:
        own_fields["targets"] = tuple(values["target"])
    config = ShiftLogConfig(
        latest=values["data"] == LATEST_NAME, seed=values["seed"], training=training,
        max_drop=values["max_drop"], min_rationale_agreement=values["min_rationale_agreement"],
        **own_fields,
    )  # fmt: skip
    trained = make_config(None, {**TRAINING, **training, "max_steps": config.steps, "seed": config.seed})
    if trained.long_settings is None:
        raise UsageError(
            f"{values['data']} needs a student that reads long inputs; leave --training long=off out."
        )
    console = Console(stderr=True)
    if values["dry_run"]:
        plan = {**resolved(ctx), **config.model_dump(mode="json"), "lambda": trained.lambda_}
        print_json(plan) if values["json"] else console.print(plan)
        return
    out: Path = values["out"]
    out.mkdir(parents=True, exist_ok=True)
    with held(out, "run"):
        save_resolved(ctx, out / "config.yaml")
        report: dict[str, Any] = run_shift_log(
            out, config, say=lambda line: console.print(line, style="dim", markup=False)
        )
    files.write_json(out / "report.json", report)
    files.write_text(out / "report.html", shift_log_page(report))
    print_json(report) if values["json"] else Console().print(shift_log_table(report))
    console.print(
        f"Bundle: {report['bundle']['path']}   report: {out / 'report.html'}   {report['seconds']:.0f} s",
        markup=False,
    )
