"""The sequences that attention is looked at on, and the questions that cost is counted on: generated, or from the user's file."""

from __future__ import annotations

from pathlib import Path

from trtllm_thoughtx.distill.traces import read_traces
from trtllm_thoughtx.evaluate.questions import Question, generated
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.tasks import TASKS
from trtllm_thoughtx.text.text import Text, trace_ids

SPLIT = "validation"  # neither trained on nor asked in an evaluation
LENGTHS = (0, 128, 256, 512, 1000)  # words of context of generated lookups


def questions_of(data: Path | None, num_items: int, seed: int, progress: Progress) -> list[Question]:
    """`num_items` of each generated task, or as many rows of a file of traces (E161 for rows that cannot be used)."""
    if data is None:
        return generated(tuple(TASKS), SPLIT, num_items=num_items, seed=seed, lengths=LENGTHS) if num_items else []
    traces = read_traces(data, progress.note)[:num_items]
    return [Question(id=trace.id, task="file", prompt=trace.prompt, expected=trace.answer) for trace in traces]


def sequences_of(text: Text, data: Path | None, num_samples: int, context: int, seed: int) -> list[list[int]]:
    """Token ids of whole traces, question, thought and answer, cut behind `context` tokens; without thinking tags none are written."""
    if data is None:
        drawn = generated(tuple(TASKS), SPLIT, num_items=-(-num_samples // len(TASKS)), seed=seed, lengths=LENGTHS[::-1], sizes=(4,))
        told = [(one.prompt, one.item.steps if one.item else (), one.expected) for one in drawn]
    else:
        told = [(trace.prompt, trace.steps, trace.answer) for trace in read_traces(data)]
    return [trace_ids(text, *one)[:context] for one in told[:num_samples]]
