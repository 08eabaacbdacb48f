"""Log-probabilities and what is computed from them, against the definitions in exact sums."""

from __future__ import annotations

import math

import numpy as np

from trtllm_thoughtx.runtime.logits import kl_divergence, log_probability, log_softmax, top_logprobs


def test_against_the_definitions():
    p, q = np.array([[3.0, -1.0, 0.5], [800.0, 799.0, -800.0]], np.float32), np.array([[0.0, 2.0, 1.0], [1.0, 1.0, 1.0]], np.float32)
    wanted = []
    for row, other in zip(p.tolist(), q.tolist(), strict=True):
        own, theirs = ([x - max(z) - math.log(math.fsum(math.exp(y - max(z)) for y in z)) for x in z] for z in (row, other))
        np.testing.assert_allclose(log_softmax(np.array(row)), own, rtol=1e-14)
        wanted.append(math.fsum(math.exp(a) * (a - b) for a, b in zip(own, theirs, strict=True)))
        assert log_probability(np.array(row), 1) == log_softmax(np.array(row))[1]
    np.testing.assert_allclose(kl_divergence(log_softmax(p), log_softmax(q)), wanted, rtol=1e-12)
    assert (kl_divergence(log_softmax(p), log_softmax(p)) == 0).all()


def test_the_likeliest_tokens():
    logits = np.array([1.0, 5.0, 5.0, -2.0], np.float32)
    assert [token for token, _ in top_logprobs(logits, 3)] == [1, 2, 0]
    assert [token for token, _ in top_logprobs(logits, 1)] == [1]
    assert [value for _, value in top_logprobs(logits, 9)] == [log_softmax(logits)[i] for i in (1, 2, 0, 3)]
    assert top_logprobs(logits, 0) == []
