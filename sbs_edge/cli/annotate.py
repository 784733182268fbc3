"""``sbs-edge annotate``: rationales and labels from a teacher, each answer paid for once."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sbs_edge.cli._annotate import (
    Connection,
    PriceInOption,
    PriceOutOption,
    ask_teacher,
    connection_of,
    emit,
    outcome,
    read_outputs,
    read_rows,
    say_estimate,
    summary,
)
from sbs_edge.cli._common import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    either,
    print_json,
    save_resolved,
    save_resolved_beside,
)
from sbs_edge.cli._data_options import ColumnOption, LeaveOutBadRowsOption

__all__ = ["register"]


class Backend(StrEnum):
    """Who answers."""

    openai = "openai"
    local = "local"


class Engine(StrEnum):
    """What runs the calls."""

    local = "local"
    ray = "ray"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def annotate(
        ctx: typer.Context,
        task: Annotated[str, typer.Option(help="Task file, or a preset: cqa, svamp, anli1, esnli, hvac.")],
        data: Annotated[
            str | None,
            typer.Argument(
                metavar="INPUT",
                help="Rows to annotate: a file, a directory, a pattern, or a data set's name. --input INPUT is the same.",
            ),
        ] = None,
        out: Annotated[
            str,
            typer.Option(
                help="Annotated rows (JSON Lines); failures, report and journal go beside it. "
                "Ray: a folder of shards, or a URI. --output is the same."
            ),
        ] = "annotated.jsonl",
        model: Annotated[
            str,
            typer.Option(
                help="The teacher's model, as the server knows it; a hub name or directory with --backend local."
            ),
        ] = "teacher",
        backend: Annotated[
            Backend,
            typer.Option(
                help="openai: any endpoint of the OpenAI protocol; local: a transformers model in this process."
            ),
        ] = Backend.openai,
        base_url: Annotated[
            str | None,
            typer.Option(
                help="The endpoint up to and including /v1; a query (?api-version=...) is kept. "
                "None: OPENAI_BASE_URL, the preset's, or OpenAI's own."
            ),
        ] = None,
        server: Annotated[
            str | None,
            typer.Option(
                help="Preset of a server: openai, azure, openrouter, anthropic, vllm, llama.cpp, ollama or lmstudio. It "
                "gives the address, the key's variable and the names of parameters; flags win."
            ),
        ] = None,
        api_key_env: Annotated[
            str | None,
            typer.Option(
                help="Environment variable that holds the key; the key itself is never a flag and never written. "
                "None: OPENAI_API_KEY, or the preset's."
            ),
        ] = None,
        header: Annotated[
            list[str] | None,
            typer.Option(
                help="NAME=VALUE, sent with every request; NAME=env:VARIABLE keeps a secret out of the shell."
            ),
        ] = None,
        request: Annotated[
            list[str] | None,
            typer.Option(
                help="NAME=VALUE sets a field of the request. max_completion_tokens, with or without a value, takes "
                "the place of max_tokens."
            ),
        ] = None,
        omit: Annotated[
            list[str] | None, typer.Option(help="Field of the request that is not sent, such as temperature.")
        ] = None,
        extra_body: Annotated[
            str | None, typer.Option(help="JSON object of further fields of the request.")
        ] = None,
        timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait for one answer.")] = 120.0,
        device: Annotated[str | None, typer.Option(help="Device of a local model.")] = None,
        dataset: Annotated[
            str | None, typer.Option(help="Read INPUT in the paper's layout: cqa, svamp, anli1 or esnli.")
        ] = None,
        split: Annotated[
            str, typer.Option(help="Split to annotate, with --dataset or a data set's name.")
        ] = "train",
        column: ColumnOption = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Annotate only the first rows.")] = None,
        skip_bad_rows: LeaveOutBadRowsOption = False,
        samples: Annotated[
            int,
            typer.Option(
                min=1, help="Answers a row; above 1 the label is voted on and costs grow as many times."
            ),
        ] = 1,
        temperature: Annotated[
            float | None, typer.Option(min=0, help="0 is greedy. None: 0 for one sample, 0.7 for several.")
        ] = None,
        top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus sampling.")] = None,
        max_tokens: Annotated[
            int | None,
            typer.Option(min=1, help="Limit of one answer in tokens; answers cut off by it are of no use."),
        ] = None,
        sampling_seed: Annotated[
            int | None, typer.Option(min=0, help="Seed sent with each request, where the server knows one.")
        ] = None,
        concurrency: Annotated[
            int, typer.Option(min=1, help="Requests on their way at once; a kill repeats at most this many.")
        ] = 8,
        max_attempts: Annotated[
            int, typer.Option(min=1, help="How often one call is sent before it is left to the next run.")
        ] = 6,
        price_in: PriceInOption = 0.0,
        price_out: PriceOutOption = 0.0,
        max_cost: Annotated[
            float | None,
            typer.Option(min=0, help="Stop before the journal's calls cost more than this in all."),
        ] = None,
        max_total_tokens: Annotated[
            int | None,
            typer.Option(min=1, help="Stop before the journal's calls take more tokens than this in all."),
        ] = None,
        journal: Annotated[
            Path | None,
            typer.Option(
                help="Where finished calls are kept. None: OUT with .journal.jsonl; Ray: a folder, OUT/journal."
            ),
        ] = None,
        retry_failed: Annotated[
            bool,
            typer.Option(
                "--retry-failed", help="Ask again where an answer was refused, empty, cut off or unreadable."
            ),
        ] = False,
        keep_failed: Annotated[
            bool,
            typer.Option(
                "--keep-failed",
                help="Keep rows without annotation in OUT, without teacher's label and rationale.",
            ),
        ] = False,
        outputs: Annotated[
            list[Path] | None,
            typer.Option(
                help="Ask nobody: read finished outputs (paper's layout .json, or Batch output .jsonl)."
            ),
        ] = None,
        emit_batch: Annotated[
            Path | None,
            typer.Option(help="Ask nobody: write OpenAI Batch input for what is not in the journal."),
        ] = None,
        show_prompt: Annotated[
            bool, typer.Option("--show-prompt", help="Print the first row's prompt and stop.")
        ] = False,
        row: Annotated[int, typer.Option(min=0, help="Which row --show-prompt shows, from 0.")] = 0,
        engine: Annotated[
            Engine,
            typer.Option(
                help="local: this process; ray: Ray Data workers, resumable by shard (extra 'scale')."
            ),
        ] = Engine.local,
        workers: Annotated[
            int, typer.Option(min=1, help="Ray actors, each with --concurrency requests on their way.")
        ] = 2,
        ray_address: Annotated[
            str | None, typer.Option(help="Ray cluster; none starts one on this machine.")
        ] = None,
        input: Annotated[str | None, typer.Option("--input", hidden=True, help="INPUT.")] = None,
        output: Annotated[str | None, typer.Option("--output", hidden=True, help="--out.")] = None,
        config: ConfigOption = None,
        json: JsonOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        """Ask a teacher for labels and rationales. Killed and started again, it repeats no finished call.

        Examples: sbs-edge annotate rows.jsonl --task task.yaml --base-url http://localhost:8080/v1 --model any;
        sbs-edge annotate DIR --dataset svamp --task svamp --outputs 'DIR/svamp/llm/train_CoT_*.json';
        sbs-edge annotate --engine ray --task task.yaml --model any --input 'rows/*.jsonl' --output annotated
        """
        from sbs_edge.chat.endpoint import redacted_headers, redacted_url
        from sbs_edge.errors import UsageError
        from sbs_edge.teacher.annotate import Settings, annotate_outputs, write_annotation
        from sbs_edge.teacher.calls import Sampling
        from sbs_edge.teacher.connect import shown_extra_body, shown_request
        from sbs_edge.teacher.cost import Prices
        from sbs_edge.teacher.presets import load_task
        from sbs_edge.teacher.prompt import render, show
        from sbs_edge.teacher.task import refuse_placeholders

        data = either(ctx, "data", "input", "INPUT and --input")
        out = either(ctx, "out", "output", "--out and --output")
        if data is None:
            raise UsageError("There is nothing to annotate: name the rows as INPUT, or with --input.")
        console = Console(stderr=True, markup=False)
        spec = load_task(task)
        if not (show_prompt or outputs):  # these ask nobody
            refuse_placeholders(spec, task)
        heat = temperature if temperature is not None else (0.7 if samples > 1 else 0.0)
        sampling, connection = connection_of(
            spec,
            Sampling(heat, max_tokens or spec.max_tokens, top_p, sampling_seed),
            Connection(backend.value, base_url, api_key_env, timeout=timeout, device=device),
            server=server,
            header=header or (),
            request=request or (),
            omit=omit or (),
            extra_body=extra_body,
        )
        if samples > 1 and sampling.parameters().get("temperature", 1) == 0:
            raise UsageError(
                "--samples above 1 needs a --temperature above 0: greedy answers are all the same."
            )
        if (max_cost or max_total_tokens) and sampling.limit_name in sampling.omit:
            raise UsageError(
                f"A budget needs a limit on each answer, and --omit {sampling.limit_name} takes it away. Leave out one."
            )
        if backend is Backend.local and (header or request or omit or extra_body or server):
            raise UsageError(
                "--backend local generates in this process: --server, --header, --request, --omit and --extra-body are "
                "for a server behind HTTP."
            )
        asks = not (show_prompt or outputs or emit_batch or dry_run)
        ctx.params["base_url"] = redacted_url(base_url) if base_url else None  # what is saved holds no secret
        ctx.params["header"] = redacted_headers(header or []) or None
        ctx.params["request"] = shown_request(request or []) or None
        ctx.params["extra_body"] = shown_extra_body(extra_body) if extra_body else None
        settings = Settings(
            model=model,
            sampling=sampling,
            samples=samples,
            concurrency=concurrency,
            prices=Prices(price_in, price_out),
            max_cost=max_cost,
            max_total_tokens=max_total_tokens,
            retry_failed=retry_failed,
            max_attempts=max_attempts,
            server=connection.identity() if asks else "",
        )
        if engine is Engine.ray:
            if outputs or emit_batch or show_prompt or dry_run or dataset or limit or keep_failed:
                raise UsageError(
                    "--engine ray asks a teacher for whole files: it takes none of --outputs, --emit-batch, "
                    "--show-prompt, --dry-run, --dataset, --limit, --keep-failed. Leave --engine out for those."
                )
            from sbs_edge.scale.annotate import annotate_with_ray

            report = annotate_with_ray(
                data, out, spec, settings, dataclasses.asdict(connection),
                columns=column or [], workers=workers, ray_address=ray_address, journal=journal,
            )  # fmt: skip
            save_resolved_beside(ctx, out)
            print_json(report) if json else console.print(report)
            return
        place = Path(out)
        journal_path = journal or place.with_suffix(".journal.jsonl")
        rows = read_rows(data, dataset, split, column or [], limit, skip_bad_rows, console)
        if not rows:
            raise UsageError(f"{data} holds no row to annotate.")
        if show_prompt:
            import sys

            if row >= len(rows):
                raise UsageError(f"--row {row} is beyond the last row, {len(rows) - 1}.")
            sys.stdout.write(show(render(spec, rows[row])) + "\n")
            return
        if emit_batch is not None:
            emit(rows, spec, settings, journal_path, emit_batch, console, json)
            return
        if dry_run:
            say_estimate(rows, spec, settings, journal_path, console, json)
            return
        if place.exists() and not any(p.exists() for p in (journal_path, place.with_suffix(".report.json"))):
            raise UsageError(
                f"{place} is there already, and no journal or report beside it says that annotate wrote it. Name "
                "another file with --out, or remove this one. (A teacher's finished answers are --outputs.)"
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        save_resolved(ctx, place.with_suffix(".config.yaml"))
        if outputs:
            annotation = annotate_outputs(rows, spec, read_outputs(outputs, settings), settings)
        else:
            annotation = ask_teacher(rows, spec, settings, connection, journal_path, console)
        report = write_annotation(annotation, spec, place, model=model, keep_failed=keep_failed)
        if json:
            print_json({name: value for name, value in report.items() if name != "samples"})
        summary(report, place, console, settings.prices.known)
        if annotation.skipped_lines:
            console.print(
                f"{annotation.skipped_lines} lines of {journal_path} are not records and were skipped; their calls "
                "are asked again.",
                highlight=False,
            )
        outcome(annotation, report, place, settings.server, [*sampling.parameters(), "stop"])
