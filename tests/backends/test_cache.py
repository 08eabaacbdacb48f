"""The KV cache in memory: how many bytes it has, and which of them are touched."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny import write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.text.params import GenerationParams
from trtllm_thoughtx.validate.validate import validate

SIZES = {"backend": ("onnxruntime",), "dtype": "float32", "max_batch_size": 4, "max_seq_len": 64, "max_input_len": 16}
CHUNKED = {"use_chunked_attention": True, "chunk_size": 16, "sink_tokens": 2, "left_chunks": 1, "num_anchors": 1}
ROWS = [list(range(1, 41)), [7, 8, 9], [3] * 30]


@pytest.mark.parametrize("chunks", [{}, CHUNKED], ids=["full", "chunked"])
def test_a_float16_cache_has_half_of_the_bytes_and_passes_validation(tmp_path, chunks):
    write_tiny(tmp_path / "m")
    plans = {
        name: build(tmp_path / "m", tmp_path / name, {**SIZES, **chunks, **more})
        for name, more in (("wide", {}), ("half", {"kv_cache_dtype": "float16"}))
    }
    assert plans["half"]["kv_bytes"] * 2 == plans["wide"]["kv_bytes"]
    wide, half = (Engine.load(tmp_path / name, num_threads=1) for name in ("wide", "half"))
    for mine, wanted in zip(half.forward(ROWS), wide.forward(ROWS), strict=True):
        np.testing.assert_allclose(mine, wanted, atol=2e-2)
        assert not np.array_equal(mine, wanted)
    assert half.runner.cache["key_0"].data_type() == "tensor(float16)"
    params = GenerationParams(max_new_tokens=20, ignore_eos=True)
    alone = [half.generate([row], params)[0].output_ids for row in ROWS]
    assert [one.output_ids for one in half.generate(ROWS, params)] == alone
    found = validate(tmp_path / "half", reference=tmp_path / "m")
    assert {check.status for check in found.checks} <= {"passed", "skipped"} and len(found.checks) > 15
    wide.close()
    half.close()


def test_where_a_float16_cache_means_nothing(tmp_path):
    write_tiny(tmp_path / "m")
    for more in ({"dtype": "float16"}, {"backend": ("tensorrt-rtx", "onnxruntime")}):
        with pytest.raises(ThoughtxError, match="kv_cache_dtype") as caught:
            build(tmp_path / "m", tmp_path / "e", {**SIZES, "kv_cache_dtype": "float16", **more})
        assert caught.value.code == "E001" and not (tmp_path / "e").exists()


TOUCH = """
import json, sys
from pathlib import Path
from trtllm_thoughtx import Engine
from trtllm_thoughtx.runtime.front import Front

def resident():
    return int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))) << 10

engine = Engine.load(sys.argv[1], num_threads=1)
before = resident()
front = Front(engine)
begun = resident()
for ticket in [front.submit(list(range(1, 30)), engine.default_params(max_new_tokens=8, ignore_eos=True)) for _ in range(70)]:
    list(ticket)
front.close()
print(json.dumps([begun - before, resident() - before, sum(value.numpy().nbytes for value in engine.runner.cache.values())]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_slots_take_memory_as_they_are_used(tmp_path):
    """64 slots of 8,192 tokens: pages that no token was written to are not resident, neither at load nor behind 70 short answers."""
    write_tiny(tmp_path / "m", max_position=8192)
    build(tmp_path / "m", tmp_path / "e", {**SIZES, "max_batch_size": 64, "max_seq_len": 8192})
    ran = subprocess.run([sys.executable, "-c", TOUCH, str(tmp_path / "e")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    begun, ended, capacity = json.loads(ran.stdout)
    assert capacity == 64 * 8192 * 512 and begun < capacity / 16 and ended < capacity / 4
