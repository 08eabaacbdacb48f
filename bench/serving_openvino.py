"""OpenVINO GenAI's continuous batching behind the one path that bench/serving_http.py asks: streamed greedy completions.

    OV/bin/python bench/serving_openvino.py MODEL --port 8000 [--max_num_seqs 8] [--num_threads 2] [--cache_gb 1]

Its venv holds openvino-genai, starlette and uvicorn. MODEL is an OpenVINO directory or a GGUF file. One thread steps the pipeline, as
its documentation has it; tokens go to their readers after each step. A prompt is fed as it is, without a chat template.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import queue
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openvino_genai as genai
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class Stepper:
    """Owns the pipeline. `put` gives a request and what is called with each token list, and with None at the end."""

    def __init__(self, args: argparse.Namespace) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs, scheduler.cache_size = args.max_num_seqs, args.cache_gb
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": args.num_threads}
        self.pipeline = genai.ContinuousBatchingPipeline(str(args.model), scheduler, "CPU", properties)
        self.tokenizer = self.pipeline.get_tokenizer()
        self.new: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, prompt: str, num_new: int, give: Any) -> None:
        self.new.put((prompt, num_new, give))

    def _run(self) -> None:
        live: dict[int, tuple[Any, Any]] = {}
        for number in itertools.count():
            while not live or not self.new.empty():
                prompt, num_new, give = self.new.get()
                config = genai.GenerationConfig()
                config.max_new_tokens, config.min_new_tokens, config.ignore_eos = num_new, num_new, True
                key = 1 + max(live, default=number)
                ids = self.tokenizer.encode(prompt).input_ids
                give(("prompt", ids.shape[1]))
                live[key] = self.pipeline.add_request(key, ids, config), give
            self.pipeline.step()
            time.sleep(0.0005)  # it holds Python's lock: now the event loop has its turn
            for key, (handle, give) in list(live.items()):
                while handle.can_read():
                    for output in handle.read().values():
                        give(("tokens", list(output.generated_ids)))
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    give(("end", None))
                    del live[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--max_num_seqs", type=int, default=8)
    parser.add_argument("--num_threads", type=int, default=2)
    parser.add_argument("--cache_gb", type=int, default=1)
    args = parser.parse_args()
    stepper = Stepper(args)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": args.model.name, "object": "model"}]})

    async def complete(request: Request) -> Response:
        body = json.loads(await request.body())
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Any]()
        stepper.put(body["prompt"], body["max_tokens"], lambda said: loop.call_soon_threadsafe(events.put_nowait, said))

        async def stream() -> AsyncIterator[bytes]:
            num_prompt, ids, shown = 0, list[int](), ""
            while (said := await events.get())[0] != "end":
                if said[0] == "prompt":
                    num_prompt = said[1]
                    continue
                ids += said[1]
                text = stepper.tokenizer.decode(ids)
                if not text.endswith("\ufffd"):
                    yield event({"choices": [{"index": 0, "text": text[len(shown) :] or " "}]})
                    shown = text
            usage = {"prompt_tokens": num_prompt, "completion_tokens": len(ids)}
            yield event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    routes = [Route("/v1/models", models), Route("/v1/completions", complete, methods=["POST"])]
    uvicorn.run(Starlette(routes=routes), port=args.port, log_level="warning")


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


if __name__ == "__main__":
    main()
