"""What `/metrics` tells, under the names that dashboards for vLLM know, with the prefix `thoughtx_`, and what only this project counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from trtllm_thoughtx.runtime.completion import Completion

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


class Metrics:
    """Call from the event loop's thread only."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"thoughtx_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"thoughtx_{name}", text, buckets=SECONDS, registry=registry)

        self.running = Gauge("thoughtx_num_requests_running", "Answers that have a slot.", registry=registry)
        self.waiting = Gauge("thoughtx_num_requests_waiting", "Answers that wait for a slot.", registry=registry)
        self.kv_usage = Gauge("thoughtx_kv_cache_usage_perc", "Used share of the KV cache, 0 to 1.", registry=registry)
        self.kv_bytes = Gauge("thoughtx_kv_cache_bytes", "Bytes of the KV cache of all slots.", registry=registry)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answers that ended.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.reused_tokens = counter("prefix_cache_hits", "Prompt tokens whose KV was copied, not computed.")
        self.queried_tokens = counter("prefix_cache_queries", "Prompt tokens that were looked for.")
        self.success = counter("request_success", "Answers that ended, by reason.", "finished_reason")
        self.failed = counter("request_failure", "Answers that failed or were given up, by reason.", "reason")
        self.refused = counter("request_refused", "HTTP requests that were refused, by status.", "status")
        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token.")
        self.inter_token = histogram("inter_token_latency_seconds", "Between two tokens of an answer.")
        self.end_to_end = histogram("e2e_request_latency_seconds", "From the request to its last token.")
        self.thinking_tokens = counter("thinking_tokens", "Tokens between the thinking tags.")
        self.thinking_steps = counter("thinking_steps", "Steps of reasoning.")
        self.thinking_stops = counter("thinking_stops", "Why the thinking ended.", "reason")

    def ended(self, done: Completion) -> None:
        self.prompt_tokens.inc(done.num_prompt_tokens)
        self.queried_tokens.inc(done.num_prompt_tokens)
        self.reused_tokens.inc(done.num_reused_tokens)
        self.generation_tokens.inc(len(done.output_ids))
        self.success.labels(done.stop_reason).inc()
        self.thinking_tokens.inc(done.num_thinking_tokens)
        self.thinking_steps.inc(done.num_steps)
        if done.thinking_stop is not None:
            self.thinking_stops.labels(done.thinking_stop).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
