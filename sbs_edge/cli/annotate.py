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
    ask_teacher,
    connection_of,
    emit,
    outcome,
    read_outputs,
    read_rows,
    say_estimate,
    settle_from_journal,
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
from sbs_edge.cli._teacher_options import (
    ApiKeyEnvOption,
    BaseUrlOption,
    ExtraBodyOption,
    HeaderOption,
    MaxTokensOption,
    OmitOption,
    PriceInOption,
    PriceOutOption,
    RationaleFromOption,
    RequestOption,
    ServerOption,
    StructuredOption,
    TimeoutOption,
    with_rationale_from,
)

__all__ = ["register"]


class Backend(StrEnum):
    """The kinds of teacher."""

    openai = "openai"
    local = "local"


class Engine(StrEnum):
    """The ways to run the calls."""

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
                help="Annotated rows (JSON Lines); failures, report and journal are written beside it. "
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
                help="openai: any endpoint with the OpenAI protocol. local: a transformers model in this process."
            ),
        ] = Backend.openai,
        base_url: BaseUrlOption = None,
        server: ServerOption = None,
        api_key_env: ApiKeyEnvOption = None,
        header: HeaderOption = None,
        request: RequestOption = None,
        omit: OmitOption = None,
        extra_body: ExtraBodyOption = None,
        structured: StructuredOption = None,
        rationale_from: RationaleFromOption = None,
        timeout: TimeoutOption = 120.0,
        device: Annotated[str | None, typer.Option(help="Device of a local model.")] = None,
        dataset: Annotated[
            str | None, typer.Option(help="Read INPUT in the paper's layout: cqa, svamp, anli1 or esnli.")
        ] = None,
        split: Annotated[
            str, typer.Option(help="Split to annotate, with --dataset or the name of a data set.")
        ] = "train",
        column: ColumnOption = None,
        limit: Annotated[
            int | None, typer.Option(min=1, help="Annotate only this many rows, from the first.")
        ] = None,
        skip_bad_rows: LeaveOutBadRowsOption = False,
        samples: Annotated[
            int,
            typer.Option(
                min=1, help="Answers per row. Above 1 the label is a majority vote, and costs multiply."
            ),
        ] = 1,
        logprobs: Annotated[
            int,
            typer.Option(
                min=0,
                max=20,
                help="Ask for this many log-probabilities per token, if the server has them. Rows then have the teacher's "
                "distribution over the labels, for --soft-labels.",
            ),
        ] = 0,
        temperature: Annotated[
            float | None, typer.Option(min=0, help="0 is greedy. Default: 0 for one sample, 0.7 for several.")
        ] = None,
        top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus sampling.")] = None,
        max_tokens: MaxTokensOption = None,
        sampling_seed: Annotated[
            int | None, typer.Option(min=0, help="Seed sent with each request, if the server supports one.")
        ] = None,
        concurrency: Annotated[
            int,
            typer.Option(
                min=1, help="Requests in flight at once; after a kill at most this many are repeated."
            ),
        ] = 8,
        max_attempts: Annotated[
            int, typer.Option(min=1, help="Attempts per call; then it is left to the next run.")
        ] = 6,
        price_in: PriceInOption = 0.0,
        price_out: PriceOutOption = 0.0,
        max_cost: Annotated[
            float | None,
            typer.Option(min=0, help="Stop before all calls in the journal cost more than this."),
        ] = None,
        max_total_tokens: Annotated[
            int | None,
            typer.Option(min=1, help="Stop before all calls in the journal use more tokens than this."),
        ] = None,
        journal: Annotated[
            Path | None,
            typer.Option(
                help="File of finished calls. Default: OUT with .journal.jsonl; Ray: the folder OUT/journal."
            ),
        ] = None,
        retry_failed: Annotated[
            bool,
            typer.Option(
                "--retry-failed",
                help="Ask again for rows whose answer was refused, empty, cut off or unreadable.",
            ),
        ] = False,
        keep_failed: Annotated[
            bool,
            typer.Option(
                "--keep-failed",
                help="Keep failed rows in OUT, without a teacher label and rationale.",
            ),
        ] = False,
        outputs: Annotated[
            list[Path] | None,
            typer.Option(
                help="Read finished outputs instead of asking (the paper's .json files, or OpenAI Batch output .jsonl)."
            ),
        ] = None,
        emit_batch: Annotated[
            Path | None,
            typer.Option(
                help="Write OpenAI Batch input for the calls that the journal lacks, instead of asking."
            ),
        ] = None,
        show_prompt: Annotated[
            bool, typer.Option("--show-prompt", help="Print the first row's prompt and stop.")
        ] = False,
        row: Annotated[int, typer.Option(min=0, help="Row that --show-prompt shows, counted from 0.")] = 0,
        engine: Annotated[
            Engine,
            typer.Option(
                help="local: this process. ray: Ray Data workers, resumed by shard (extra 'scale')."
            ),
        ] = Engine.local,
        workers: Annotated[
            int, typer.Option(min=1, help="Ray actors, each with --concurrency requests in flight.")
        ] = 2,
        ray_address: Annotated[
            str | None, typer.Option(help="Address of a Ray cluster. Default: start one on this machine.")
        ] = None,
        input: Annotated[str | None, typer.Option("--input", hidden=True, help="INPUT.")] = None,
        output: Annotated[str | None, typer.Option("--output", hidden=True, help="--out.")] = None,
        config: ConfigOption = None,
        json: JsonOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        """Ask a teacher for labels and rationales. If it is interrupted, the next run continues where it stopped.

        Examples: sbs-edge annotate rows.jsonl --task task.yaml --base-url http://localhost:8080/v1 --model any;
        sbs-edge annotate DIR --dataset svamp --task svamp --outputs 'DIR/svamp/llm/train_CoT_*.json';
        sbs-edge annotate --engine ray --task task.yaml --model any --input 'rows/*.jsonl' --output annotated
        """
        from sbs_edge.chat.endpoint import redacted_headers, redacted_url
        from sbs_edge.chat.logprobs import logprob_fields
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
            raise UsageError("There is nothing to annotate: give the rows as INPUT, or with --input.")
        console = Console(stderr=True, markup=False)
        spec = with_rationale_from(load_task(task), rationale_from)
        if not (show_prompt or outputs):  # these do not call the teacher
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
            structured=structured,
        )
        if backend is Backend.local and sampling.structured == "auto":
            sampling = dataclasses.replace(sampling, structured="off")
        if logprobs:
            if backend is Backend.local:
                raise UsageError(
                    "--logprobs is for a server behind HTTP; --backend local gives none. Use --samples."
                )
            fields = logprob_fields(logprobs, chat=spec.form == "chat")
            sampling = dataclasses.replace(sampling, extra={**fields, **sampling.extra})
        if samples > 1 and sampling.parameters().get("temperature", 1) == 0:
            raise UsageError(
                "--samples above 1 needs a --temperature above 0: greedy answers are all the same."
            )
        if (max_cost or max_total_tokens) and sampling.limit_name in sampling.omit:
            raise UsageError(
                f"A budget needs a limit on each answer, but --omit {sampling.limit_name} removes it. Leave one out."
            )
        asks_for_object = sampling.structured != "off"
        if backend is Backend.local and (
            header or request or omit or extra_body or server or asks_for_object
        ):
            raise UsageError(
                "--backend local generates in this process: --server, --header, --request, --omit, --extra-body and "
                "--structured are for a server behind HTTP."
            )
        if spec.rationale_from == "summary" and (outputs or emit_batch):
            raise UsageError(
                "A summary takes a second call to the teacher, which --outputs and --emit-batch do not make. Leave out "
                "--rationale-from summary, or ask directly."
            )
        asks = not (show_prompt or outputs or emit_batch or dry_run)
        ctx.params["base_url"] = redacted_url(base_url) if base_url else None  # no secret is saved
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
                    "--engine ray annotates whole files and cannot be combined with --outputs, --emit-batch, "
                    "--show-prompt, --dry-run, --dataset, --limit or --keep-failed. Leave out --engine for those."
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
            raise UsageError(f"{data} has no row to annotate.")
        if show_prompt:
            import sys

            settings, _ = settle_from_journal(settings, journal_path)

            if row >= len(rows):
                raise UsageError(f"--row {row} is beyond the last row, {len(rows) - 1}.")
            sys.stdout.write(show(render(spec, rows[row], settings.sampling.structured)) + "\n")
            return
        if emit_batch is not None:
            emit(rows, spec, settings, journal_path, emit_batch, console, json)
            return
        if dry_run:
            say_estimate(rows, spec, settings, journal_path, console, json)
            return
        if place.exists() and not any(p.exists() for p in (journal_path, place.with_suffix(".report.json"))):
            raise UsageError(
                f"{place} exists, and no journal or report beside it shows that annotate wrote it. Choose "
                "another file with --out, or remove this one. (To read a teacher's finished answers, use --outputs.)"
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        save_resolved(ctx, place.with_suffix(".config.yaml"))
        if outputs:
            settings, _ = settle_from_journal(settings, journal_path)
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
        if logprobs and annotation.records and not any(record.top_logprobs for record in annotation.records):
            console.print(
                "The server sent no log-probabilities, so no row has a distribution from them. --samples gives one by "
                "votes.",
                highlight=False,
            )
        outcome(annotation, report, place, settings.server, annotation.sampling.field_names())
