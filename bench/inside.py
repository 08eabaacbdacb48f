"""What of a run is the engine's and what the runtime's own."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from trtllm_thoughtx import Engine


class Inside:
    """Counts the seconds that are spent in the engine's calls."""

    def __init__(self, engine: Engine) -> None:
        self.seconds, self._run = 0.0, engine.runner.run
        engine.runner.run = self.run  # type: ignore[method-assign]

    def run(self, feeds: Mapping[str, np.ndarray], first: int, last: int, row: int = 0) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        try:
            return self._run(feeds, first, last, row)
        finally:
            self.seconds += time.perf_counter() - began
