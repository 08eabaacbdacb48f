"""What a window costs in right answers: the same questions to engines that differ in their window alone.

Engines are built in a folder that goes away: one for each (sinks, chunks behind, anchors), as the chunk size is an input.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.calibrate.chunks.windows import settings
from trtllm_thoughtx.checkpoint.opened import Checkpoint
from trtllm_thoughtx.config import AUTO
from trtllm_thoughtx.evaluate.questions import Question
from trtllm_thoughtx.evaluate.record import Record
from trtllm_thoughtx.evaluate.run import evaluate, prompt_of
from trtllm_thoughtx.evaluate.systems import EngineSystem
from trtllm_thoughtx.progress import SILENT, Progress
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.validate.golden import ChunkSpec

BATCH_SIZE = 16
MAX_NEW_TOKENS = 400


class Asker:
    """Use as a context manager. Greedy answers, onnxruntime, `context` tokens of question and answer at most."""

    def __init__(
        self, model_dir: Path | Checkpoint, context: int, progress: Progress, template: tuple[str | None, str | None] = (None, None)
    ) -> None:
        self.model_dir, self.context, self.progress, self.template = model_dir, context, progress, template
        self.root = Path(tempfile.mkdtemp(prefix="thoughtx-windows-"))
        self.params = GenerationParams(max_new_tokens=min(MAX_NEW_TOKENS, context // 2))

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)

    def fits(self, questions: Sequence[Question]) -> list[Question]:
        """Those that leave room for an answer."""
        with_text = self._open(None, {})
        try:
            room = self.context - self.params.max_new_tokens
            return [asked for asked in questions if len(prompt_of(asked, with_text.text)) <= room]
        finally:
            with_text.close()

    def ask(self, questions: Sequence[Question], window: ChunkSpec | None, chunk_sizes: Sequence[int] | None = None) -> list[Record]:
        """Records in the order of the questions; `window` None: full attention. `chunk_sizes`: of each question, in place of the
        window's, none of them larger."""
        sizes = list(chunk_sizes or [0 if window is None else window.chunk_size] * len(questions))
        found: dict[int, Record] = {}
        for size in sorted(set(sizes)):
            places = [i for i, one in enumerate(sizes) if one == size]
            system = self._open(window, {}, size or None)
            try:
                records = evaluate(system, [questions[i] for i in places], self.params, SILENT).records
            finally:
                system.close()
            found |= dict(zip(places, records, strict=True))
        return [found[i] for i in range(len(questions))]

    def ask_auto(self, questions: Sequence[Question], window: ChunkSpec, thresholds: dict[str, float]) -> list[Record]:
        """The engine chooses, by these thresholds."""
        system = self._open(window, {"chunk_size": AUTO, **thresholds}, AUTO)
        try:
            return list(evaluate(system, questions, self.params, SILENT).records)
        finally:
            system.close()

    def entropies(self, questions: Sequence[Question], window: ChunkSpec) -> list[float]:
        """Of each question's prompt, in nats, as an engine with this window measures it."""
        system = self._open(window, {})
        try:
            return system.engine.prompt_entropy([prompt_of(asked, system.text) for asked in questions])
        finally:
            system.close()

    def _open(self, window: ChunkSpec | None, more: dict[str, Any], chunk_size: int | str | None = None) -> EngineSystem:
        options: dict[str, Any] = {"backend": ("onnxruntime",), "max_seq_len": self.context, "max_batch_size": BATCH_SIZE}
        if window is not None:
            options |= {**settings(window, self.context), **more}
        path = self.root / "-".join(str(value) for value in options.values() if not isinstance(value, tuple))
        if not path.exists():
            build(self.model_dir, path, options)
        system = EngineSystem(path, None, None, BATCH_SIZE, chunk_size)
        system.text.set_template(*self.template)
        return system
