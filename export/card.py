"""The bundle's README.md: what it is, how well it answers, how to use it."""

from __future__ import annotations

from typing import Any

__all__ = ["render"]


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _long(manifest: dict[str, Any]) -> str:
    """Return the sentences about longer inputs, or nothing."""
    long = manifest.get("long")
    if long is None:
        return ""
    heads = "all states" if long["top_k"] is None else f"its {long['top_k']} best states"
    learnt = {
        "never": "The student was not trained on such inputs.",
        "full": "It was trained on such inputs with all states.",
        "random": "It was trained on such inputs with states drawn at random.",
    }[long["trained"]]
    return (
        f"Longer inputs, up to {long['max_tokens']} tokens, are read in chunks of {long['chunk']}, of which each "
        f"attention head of the decoder reads {heads}. {learnt} "
    )


def render(manifest: dict[str, Any]) -> str:
    """Return the model card as Markdown."""
    task, labels, training = manifest["task"], manifest["labels"], manifest["training"]
    lines = [
        f"# {manifest['name']}",
        "",
        f"A distilled {manifest['model']['family']} student with {manifest['model']['parameters']:,} parameters, "
        f"trained in mode `{training['mode']}` (rationale weight {training['rationale_weight']}), exported by "
        f"sbs-edge {manifest['versions']['sbs-edge']} on {manifest['created']}.",
        "",
        f"Task `{task['name']}`, labels {labels['kind']}"
        + (f": {', '.join(f'`{label}`' for label in labels['labels'])}." if labels["labels"] else "."),
        f"Labels are scored by the method `{labels['method']}`.",
        "",
        "| target | validation rows | accuracy float32 | accuracy | drop, points (95 % bound) | same label | "
        "same next token of a rationale |",
        "|---|---|---|---|---|---|---|",
        *(_target_row(name, entry["accuracy"]) for name, entry in manifest["targets"].items()),
        *_losses(manifest),
        *_unmeasured(manifest),
        *_calibration(manifest["calibration"]),
        "",
        "```python",
        "from sbs_edge import Student",
        "",
        'with Student.from_pretrained("this-directory") as student:',
        '    print(student.predict("..."))',
        "```",
        "",
        f"Inputs up to {manifest['limits']['max_source_tokens']} tokens, prefix included. {_long(manifest)}"
        "Every file's SHA-256 is in "
        "`manifest.json` and checked when the bundle is loaded.",
        "",
    ]
    return "\n".join(lines)


def _target_row(name: str, figures: dict[str, Any] | None) -> str:
    if figures is None:
        return f"| {name} | 0 " + "| not measured " * 5 + "|"
    rationales = "no rationales"
    if "rationale_next_token_agreement" in figures:
        rationales = _percent(figures["rationale_next_token_agreement"])
    return (
        f"| {name} | {figures['n']} | {_percent(figures['before'])} | {_percent(figures['after'])} | "
        f"{figures['drop_points']:.2f} ({figures['drop_bound']:.2f}) | "
        f"{_percent(figures['label_agreement'])} | {rationales} |"
    )


def _losses(manifest: dict[str, Any]) -> list[str]:
    """Say what a smaller vocabulary cost, and what padding changes."""
    lines = []
    if pruning := manifest.get("pruning"):
        changed = "."
        if "rationale_token_agreement" in pruning:
            changed = (
                f", {_percent(1 - pruning['rationale_token_agreement'])} of the rationales' tokens changed."
            )
        lines += [
            "",
            f"The smaller vocabulary alone, in float32: {pruning['drop_points']:.2f} points of accuracy lost on "
            f"{pruning['n']} rows{changed}",
        ]
    for name, entry in manifest["targets"].items():
        if padding := (entry["accuracy"] or {}).get("padding"):
            exact = entry["accuracy"]["padding_float32"]
            lines += [
                "",
                f"Padding to twice the length moves the scores of {name} by at most {padding['largest_move']:.1e} of "
                f"the largest one (float32: {exact['largest_move']:.1e}) and changes {padding['flips']} of "
                f"{padding['rows']} labels.",
            ]
    return lines


def _unmeasured(manifest: dict[str, Any]) -> list[str]:
    reasons = {n: e.get("unmeasured") for n, e in manifest["targets"].items() if e["accuracy"] is None}
    lines = [
        "",
        *(f"The accuracy of {name} was not measured: {why}." for name, why in reasons.items() if why),
    ]
    if any(why is None for why in reasons.values()):
        lines.append("Exported without labelled rows: no accuracy was measured for this bundle.")
    return lines


def _calibration(calibration: dict[str, Any]) -> list[str]:
    if not calibration.get("n"):
        return []
    after = "; too few rows to measure it after."
    if calibration["ece_after"] is not None:
        after = (
            f", {calibration['ece_after']:.4f} after (each half of the rows at the other half's temperature)."
        )
    return [
        "",
        f"Probabilities: temperature {calibration['temperature']:.3f} fitted on {calibration['n']} rows; expected "
        f"calibration error {calibration['ece_before']:.4f} before{after}",
    ]
