"""Which token comes next: greedy, or temperature, then top-k, top-p, min-p, in the order and with the meaning of transformers.

Before that come the penalties, also for greedy decoding: repetition as transformers has it, of every token of prompt and answer, then
frequency and presence as vLLM has them, of the answer's tokens alone.

A row's draw depends on the seed, the row's stream number and the step, and on nothing else: each draw is one block of a
counter-based generator (Philox) keyed by (seed, stream). So a prompt gives the same answer alone and in any batch, at any
batch size, whatever the other rows do. The price is one generator object per draw (about 15 microseconds).

Filtering looks at float32 values; the weights of what is kept, their sum and the draw are float64. Nothing sorts the whole
vocabulary: top-k partitions, and top-p first drops every token that is too unlikely to matter, which is exact (see `_likely`).
Shapes: V vocabulary, B rows of this call, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.text.params import GenerationParams


class Sampler:
    """Picks the next token of each row and counts the steps of each.

    `params`: for all rows, or one for each. `streams` names each row's random stream (default 0 .. num_rows - 1): with its number in the
    request, how a request is cut into batches does not change the answer. Errors number the rows from `first` on. Penalties need the
    `prompts`, and to be told of each token that is written (`note`).
    """

    def __init__(
        self,
        params: GenerationParams | Sequence[GenerationParams],
        num_rows: int,
        streams: Sequence[int] | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
        first: int = 0,
    ) -> None:
        self.first = first
        self.params = [params] * num_rows if isinstance(params, GenerationParams) else list(params)
        self.streams = tuple(range(num_rows) if streams is None else streams)
        assert len(self.streams) == num_rows, (len(self.streams), num_rows)
        self._steps = [0] * num_rows
        assert prompts is not None or not any(one.has_penalties for one in self.params)
        read = zip(self.params, prompts or [()] * num_rows, strict=True)
        self._counts = [dict.fromkeys(prompt if one.repetition_penalty != 1 else (), 0) for one, prompt in read]

    def note(self, row: int, token: int) -> None:
        """The row has written `token`, whether it was picked or not."""
        if self.params[row].has_penalties:
            self._counts[row][token] = self._counts[row].get(token, 0) + 1

    def pick(self, logits: np.ndarray, rows: Sequence[int] | None = None) -> np.ndarray:
        """int64[B] from float[B, V]; of equal logits the greedy choice is the lowest id.

        `rows` says which rows of this sampler the B rows are (default: all, in order). E123 names a row that is not finite.
        """
        rows = range(len(self.streams)) if rows is None else rows
        assert logits.ndim == 2 and logits.shape[0] == len(rows) and logits.shape[1] > 0, (logits.shape, len(rows))
        logits = np.asarray(logits, dtype=np.float32)
        for row, values in zip(rows, logits, strict=True):
            if not np.isfinite(values).all():
                raise _nonfinite(self.first + row, self._steps[row], values)
        chosen = np.array([self._choose(row, values) for row, values in zip(rows, logits, strict=True)], np.int64)
        for row in rows:
            self._steps[row] += 1
        return chosen

    def guess(self, row: int, ahead: Sequence[int], logits: np.ndarray) -> int:
        """What `pick` would give for float[V] once the row has written the tokens `ahead`. Nothing advances; any values are taken."""
        if not np.isfinite(logits).all():
            return int(logits.argmax())
        return self._choose(row, np.asarray(logits, np.float32), ahead)

    def _choose(self, row: int, logits: np.ndarray, ahead: Sequence[int] = ()) -> int:
        params = self.params[row]
        if params.has_penalties:
            counts = self._counts[row]
            if ahead:
                counts = dict(counts)
                for token in ahead:
                    counts[token] = counts.get(token, 0) + 1
            logits = penalized(logits, counts, params)
        if params.is_greedy:
            return int(logits.argmax())
        ids, probs = distribution(logits, params)
        sums = probs.cumsum()
        number = uniform(params.seed, self.streams[row], self._steps[row] + len(ahead))
        place = sums.searchsorted(number * sums[-1], side="right")
        return int(ids[min(int(place), len(ids) - 1)])


def penalized(logits: np.ndarray, counts: Mapping[int, int], params: GenerationParams) -> np.ndarray:
    """float32[V] with the penalties of the tokens in `counts`: how often the answer has each, 0 for those of the prompt alone."""
    if not counts:
        return logits
    ids, nums = np.fromiter(counts.keys(), np.int64), np.fromiter(counts.values(), np.int64)
    values, penalty = logits[ids], np.float32(params.repetition_penalty)
    with np.errstate(over="ignore"):
        values = np.where(values < 0, values * penalty, values / penalty)
        values -= np.float32(params.frequency_penalty) * nums.astype(np.float32)
        values -= np.float32(params.presence_penalty) * (nums > 0)
    out = logits.copy()
    out[ids] = np.clip(values, np.finfo(np.float32).min, np.finfo(np.float32).max)
    return out


def distribution(logits: np.ndarray, params: GenerationParams) -> tuple[np.ndarray, np.ndarray]:
    """What a draw from finite float32[V] may give: ids int64[K] in rising order, and their probabilities float64[K].

    Tokens that tie with the k-th are kept, as in transformers. At the edge of top-p, where transformers leaves ties to its
    sort, the lowest ids stay.
    """
    if params.is_greedy:
        return np.array([logits.argmax()], np.int64), np.ones(1)
    temperature = max(params.temperature, 1e-30)  # below, float32 would divide by zero; the result is the same
    top, size = float(logits.max()), logits.size
    tail = 0.0
    if 0 < params.top_k < size:
        ids = np.flatnonzero(logits >= np.partition(logits, size - params.top_k)[size - params.top_k])
    elif params.top_p < 1:
        ids, tail = _likely(logits, temperature, 1 - params.top_p)
    else:
        weights = _weights(logits, top, temperature)
        ids = np.arange(size) if not params.min_p else np.flatnonzero(weights >= params.min_p)
        weights = weights[ids] if params.min_p else weights
        weights /= weights.sum()
        return ids, weights
    if params.top_p < 1:
        values = logits[ids]
        rising = np.sort(values)
        sums = tail + np.cumsum(_weights(rising, top, temperature))
        first = min(int(sums.searchsorted((1 - params.top_p) * sums[-1], side="right")), len(ids) - 1)
        above, equal = ids[values > rising[first]], ids[values == rising[first]]
        ids = np.sort(np.concatenate([above, equal[: len(ids) - first - len(above)]]))
    weights = _weights(logits[ids], top, temperature)
    if params.min_p:  # of the likeliest token, whose weight is 1
        ids, weights = ids[weights >= params.min_p], weights[weights >= params.min_p]
    return ids, weights / weights.sum()


def uniform(seed: int, stream: int, step: int) -> float:
    """A number in [0, 1), a pure function of its arguments (each below 2**64)."""
    key, counter = np.array([seed, stream], np.uint64), np.array([0, step, 0, 0], np.uint64)
    return (int(np.random.Philox(key=key, counter=counter).random_raw()) >> 11) * 2.0**-53


def _weights(logits: np.ndarray, top: float, temperature: float) -> np.ndarray:
    """Unnormalised softmax, float64; the largest is 1."""
    weights = logits.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        weights -= top
        weights /= temperature
        return np.exp(weights, out=weights)


def _likely(logits: np.ndarray, temperature: float, cut: float) -> tuple[np.ndarray, float]:
    """The ids that top-p may keep, and the summed weight of the others.

    Top-p removes the least likely tokens while their sum is at most `cut` of the total. All tokens whose weight is below
    cut * total / V together weigh less than that, so each of them is removed, and only the rest need sorting. float32 is
    enough to say so with the 0.999 as margin.
    """
    with np.errstate(over="ignore", under="ignore"):
        rough = logits - logits.max()
        rough /= np.float32(temperature)
        np.exp(rough, out=rough)
    total = float(rough.sum(dtype=np.float64))
    ids = np.flatnonzero(rough > np.float32(0.999 * cut * total / logits.size))
    return ids, max(0.0, total - float(rough[ids].sum(dtype=np.float64)))


def _nonfinite(row: int, step: int, values: np.ndarray) -> ThoughtxError:
    bad = np.flatnonzero(~np.isfinite(values))
    return ThoughtxError(
        "E123",
        f"row {row}: {len(bad)} of {values.size} logits are not finite (first: id {bad[0]} is {values[bad[0]]})",
        where=f"row {row}, new token {step}",
        why="the numbers left the range of the engine's type (float16 ends at 65504), or the weights are damaged",
        fix="build the engine with more range (thoughtx-build --dtype float32) and compare it with its checkpoint (thoughtx-validate)",
    )
