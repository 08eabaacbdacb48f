"""The command `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.build.flags import COUNT, PATH, POSITIVE, Count, FiniteFloat, OneOf
from trtllm_thoughtx.cli.framework import Named, command, exact_option, verify_key_option
from trtllm_thoughtx.cli.params import emit
from trtllm_thoughtx.progress import Progress

SECONDS = FiniteFloat(0, 1e6, min_open=True)


@command(
    "serve",
    "thoughtx-serve --engine_dir ./engine --port 8000",
    "thoughtx-serve --engine_dir ./engine --lora_modules sql=./adapter-sql --lora_modules law=./adapter-law",
    "thoughtx-serve --engine_dir ./engine --host 0.0.0.0 --api_key_file keys.txt --max_num_seqs 8",
)
@click.option("--engine_dir", type=PATH, required=True, help="Engine directory to serve.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=Count(0, 65535), default=8000, help="Port to listen on; 0: any free one.")
@click.option("--served_model_name", multiple=True, help="Name of the model for clients; may be given several times.  [default: directory]")
@click.option(
    "--lora_modules",
    type=Named(),
    multiple=True,
    help="LoRA adapter (PEFT directory) that clients pick as model NAME; may be given several times.",
)
@click.option("--max_num_seqs", type=POSITIVE, help="Answers that are generated at the same time.  [default: the engine's max_batch_size]")
@click.option("--prefill_segment", type=POSITIVE, default=512, help="Most prompt tokens between two decode steps.")
@click.option("--prompt_lookup", type=COUNT, default=0, help="Draft up to so many tokens from the request's own text; 0: off.")
@click.option("--max_queued_requests", type=COUNT, default=64, help="Answers that may wait for a slot; more get status 429.")
@click.option("--max_queued_tokens", type=POSITIVE, default=1 << 20, help="Prompt tokens of answers that may wait.")
@click.option("--max_body_bytes", type=POSITIVE, default=4 << 20, help="Largest body of a request.")
@click.option("--body_timeout", type=SECONDS, default=30.0, help="Seconds until the body of a request must have arrived.")
@click.option("--queue_timeout", type=SECONDS, default=600.0, help="Seconds until an answer must have begun.")
@click.option("--request_timeout", type=SECONDS, default=3600.0, help="Seconds until an answer must have ended.")
@click.option("--drain_timeout", type=SECONDS, default=30.0, help="Seconds that running requests get when the server is told to stop.")
@click.option("--api_key_file", type=PATH, help="File with one key a line; clients must send one of them.")
@click.option("--reasoning_efforts", metavar="LIST", help="Thinking tokens of reasoning_effort, e.g. low=256,high=unlimited.")
@click.option("--backend", type=OneOf(tuple(BACKENDS)), help="Which of the engine's plans to run.  [default: onnxruntime, if built]")
@exact_option
@verify_key_option
@click.option("--num_threads", type=Count(1, 1024), help="CPU threads.")
@click.option("--no_access_log", is_flag=True, help="Do not write a line for each request on stderr.")
def serve_command(
    engine_dir: Path,
    max_queued_requests: int,
    max_queued_tokens: int,
    max_body_bytes: int,
    body_timeout: float,
    queue_timeout: float,
    request_timeout: float,
    drain_timeout: float,
    no_access_log: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Serve an engine over HTTP: OpenAI's API, metrics, and a page at /."""
    from trtllm_thoughtx.serve.answering import Limits
    from trtllm_thoughtx.serve.serve import serve

    limits = Limits(
        num_queued=max_queued_requests,
        num_queued_tokens=max_queued_tokens,
        body_bytes=max_body_bytes,
        body_seconds=body_timeout,
        queue_seconds=queue_timeout,
        answer_seconds=request_timeout,
    )

    def ready(port: int) -> None:
        if as_json:
            emit("serve", {"engine_dir": str(engine_dir), "host": options["host"], "port": port}, as_json=True)

    progress = Progress(quiet=quiet)
    serve(engine_dir, limits=limits, drain_seconds=drain_timeout, access_log=not no_access_log, progress=progress, ready=ready, **options)
