"""`--plugin`: what is refused, what the graph states, that every parser still takes it, and that what a parser made is counted."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from places import ROOT
from plan_jobs import CONFIG, job
from tiny import write_tiny

from trtllm_thoughtx import Engine
from trtllm_thoughtx.backends import tensorrt, trt_builder
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.build.options import resolve
from trtllm_thoughtx.checkpoint.weights import open_weights
from trtllm_thoughtx.config import PLUGIN_LIBRARY, BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.graph.decoder import decoder_graph, parts_of

CHUNKED = {"use_chunked_attention": True, "chunk_size": 16, "sink_tokens": 2, "left_chunks": 1, "max_seq_len": 128}
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
rtx = [pytest.mark.rtx, pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("forms") / "model"
    write_tiny(path, num_layers=2, max_position=512)
    return path


def graph_of(model, **options):
    with open_weights(model) as source:
        settings = BuildConfig(**{**CHUNKED, "max_chunk_size": 16, "dtype": "float16", **options})
        return decoder_graph(source.config, settings, parts_of(source.config, ())[0])


@pytest.mark.parametrize("anchors", [0, 2])
@pytest.mark.parametrize("form", ["function", "aot", "cpp"])
def test_nodes_state_everything_that_a_plugin_needs(model, form, anchors):
    graph = graph_of(model, plugin=form, num_anchors=anchors).model
    nodes = [node for node in graph.graph.node if node.op_type == "ChunkedAttention"]
    assert len(nodes) == 2
    named = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in nodes[0].attribute}
    own = {"scale", "sink", "left"} | ({"anchors"} if anchors else set())
    if form == "function":
        assert set(named) == own
    else:
        assert set(named) - {"aot"} == own | {"anchors", "head_dim", "groups", "plugin_namespace", "plugin_version"}
        assert (named["plugin_namespace"], named["plugin_version"], named["anchors"]) == (b"thoughtx", b"1", anchors)
        assert ("aot" in named) == (form == "aot") and (form == "cpp" or named["aot"] == 1)
    assert set(graph.functions[0].attribute) == set(named)


@pytest.mark.parametrize("form", ["aot", "cpp"])
def test_onnxruntime_takes_the_function_of_such_a_graph(model, tmp_path, form, monkeypatch):
    """The same graph with and without the attributes of a plugin: the same logits, bit for bit."""
    options = {**CHUNKED, "backend": ("onnxruntime",), "dtype": "float16", "num_anchors": 1}
    build(model, tmp_path / "plain", options)
    from trtllm_thoughtx.build import build as module

    monkeypatch.setattr(module, "resolve", lambda config, given: BuildConfig(**{**resolve(config, given).__dict__, "plugin": form}))
    monkeypatch.setattr(module, "_check_library", lambda *_: None)
    build(model, tmp_path / "plugin", options)
    assert b"plugin_namespace" in (tmp_path / "plugin" / "rank0.onnx").read_bytes()
    rows = [np.random.default_rng(0).integers(0, 50, 90).tolist()]
    logits = []
    for name in ("plain", "plugin"):
        engine = Engine.load(tmp_path / name)
        logits.append(engine.forward(rows)[0])
        engine.close()
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"plugin": "cuda"}, "one of function, aot, cpp"),
        ({"plugin": "aot", "backend": ("onnxruntime",)}, "add --backend tensorrt"),
        ({"plugin": "cpp", "backend": ("tensorrt-rtx", "onnxruntime")}, "only tensorrt engines hold plugins"),
        ({"plugin": "aot", "backend": ("tensorrt",), "dtype": "float32"}, "--dtype float16 or bfloat16"),
        ({"plugin": "cpp", "backend": ("tensorrt",), "dtype": "float16"}, "--plugin_library"),
        ({"plugin": "function", "use_chunked_attention": False}, "add --use_chunked_attention"),
        ({"plugin_library": Path("x.so")}, "add --plugin cpp"),
    ],
)
def test_what_cannot_be_is_refused_by_name(model, tmp_path, options, text):
    given = {**CHUNKED, "backend": ("onnxruntime",), **options}
    if not given["use_chunked_attention"]:
        given = {key: value for key, value in given.items() if key not in CHUNKED}
    with pytest.raises(ThoughtxError) as caught:
        build(model, tmp_path / "e", given)
    assert caught.value.code == "E001" and "--plugin" in caught.value.where
    assert text in f"{caught.value.why} {caught.value.fix}" and not (tmp_path / "e").exists()


def test_a_library_that_is_none_is_refused(model, tmp_path):
    (tmp_path / "x.so").write_text("not a library")
    options = {**CHUNKED, "backend": ("tensorrt",), "dtype": "float16", "plugin": "cpp"}
    for name, code in (("x.so", "E101"), ("absent.so", "E101")):
        with pytest.raises(ThoughtxError) as caught:
            build(model, tmp_path / "e", {**options, "plugin_library": tmp_path / name})
        assert caught.value.code == code and name in caught.value.where


@pytest.mark.parametrize(
    ("form", "counts", "fits"),
    [
        ("function", {"ATTENTION": 3}, True),
        ("function", {"ATTENTION_INPUT": 3, "ATTENTION_OUTPUT": 3}, True),
        ("function", {"PLUGIN_V3": 3}, False),
        ("aot", {"PLUGIN_V3": 3, "KV_CACHE_UPDATE": 6}, True),
        ("cpp", {"PLUGIN_V3": 2, "ATTENTION": 1}, False),
        ("cpp", {"PLUGIN_V3": 3, "ATTENTION": 1}, False),
        ("aot", {"ATTENTION": 3}, False),
    ],
)
def test_layers_of_the_asked_form_are_counted(form, counts, fits):
    request = {"plugin": form, "num_attention": 3}
    if fits:
        assert trt_builder._count_attention(Counter(counts), request) == 3
    else:
        with pytest.raises(trt_builder.BuildError) as caught:
            trt_builder._count_attention(Counter(counts), request)
        assert caught.value.code == "E205" and f"asked for: {form}" in caught.value.why


@pytest.mark.slow
class TestInTheRtxParser:
    """A real parser of the family: without such a plugin it takes the function, and the builder process notices."""

    pytestmark = rtx

    def test_a_plugin_that_nobody_registered_becomes_the_function_and_is_refused(self, model, tmp_path, monkeypatch):
        from trtllm_thoughtx.build.build import profiles_of
        from trtllm_thoughtx.graph import external

        sizes = {"dtype": "float16", "max_chunk_size": 16, "max_batch_size": 2, "max_input_len": 16}
        settings = BuildConfig(**CHUNKED, **sizes, plugin="cpp")
        graph = decoder_graph(CONFIG, settings, parts_of(CONFIG, ())[0])
        given = job(
            tmp_path / "a.engine", model=external.bind(graph, "float16", "absent.data").model, profiles=profiles_of(graph, settings)
        )
        shapes = {entry.name: entry for entry in graph.initializers}
        rng = np.random.default_rng(0)
        values = [(n, (rng.standard_normal(e.shape) * 0.05 if e.array is None else e.array).astype(np.float16)) for n, e in shapes.items()]
        given["initializers"] = lambda: values
        info = tensorrt.build_plan(**given)  # asked for the function: fine
        assert info.num_attention == 2 and not any(kind.startswith("PLUGIN") for kind in info.layer_counts)
        library = tmp_path / "none.so"
        library.write_bytes(b"\x7fELF")
        with pytest.raises(ThoughtxError) as caught:
            tensorrt.build_plan(**{**given, "plan_path": tmp_path / "c.engine", "plugin": "cpp", "plugin_library": library})
        assert caught.value.code == "E205" and "brings no ChunkedAttention" in caught.value.what and not (tmp_path / "c.engine").exists()

    def test_engines_of_the_function_for_three_generations(self, model, tmp_path):
        options = {**CHUNKED, "dtype": "float16", "backend": ("tensorrt-rtx",), "compute_capabilities": ("8.0", "8.9", "12.0")}
        made = build(model, tmp_path / "e", options)
        (check,) = made["checks"]
        assert check["evidence"] == {"expected": 2, "found": 2, "form": "function"} and check["status"] == "passed"


def test_the_library_is_among_what_is_verified_before_loading(model, tmp_path):
    build(model, tmp_path / "e", {**CHUNKED, "backend": ("onnxruntime",), "dtype": "float16"})
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    config["thoughtx"]["build"] |= {"plugin": "cpp", "backends": ["onnxruntime", "tensorrt"]}
    config["thoughtx"]["parts"][0]["plans"]["tensorrt"] = {"file": "rank0.trt.engine"}
    (tmp_path / "e" / "config.json").write_text(json.dumps(config))
    directory = EngineDir.open(tmp_path / "e")
    assert directory.files_of("tensorrt") == [PLUGIN_LIBRARY, "rank0.trt.engine"]
    assert PLUGIN_LIBRARY not in directory.files_of("onnxruntime")


def test_the_smoke_script_says_what_is_missing(tmp_path):
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here: run the script itself")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    module = "trtllm_thoughtx.plugins.chunked_attention.trt.smoke"
    done = subprocess.run([sys.executable, "-m", module, str(tmp_path / "w")], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "fix:" in done.stderr and not (tmp_path / "w").exists()


# Of TensorRT 10's API, gone from 11; what works on both is used instead.
REMOVED = (
    *("EXPLICIT_BATCH", "BuilderFlag.FP16", "BuilderFlag.BF16", "BuilderFlag.INT8", "BuilderFlag.FP8", "PRECISION_CONSTRAINTS"),
    *("set_output_type", "IInt8Calibrator", "IInt8EntropyCalibrator2", "set_dynamic_range", "QuantizationFlag", "plugin_creator_list"),
    *("get_plugin_creator", "supports_model(", "SubGraphCollection", "parse_with_weight_descriptors", "platform_has_fast"),
    *("device_memory_size", "create_execution_context_without_device_memory", "PROFILE_SHARING_0806", "IPluginV2"),
)


def test_nothing_uses_what_tensorrt_11_removed():
    paths = [*(ROOT / "trtllm_thoughtx").rglob("*.py"), *(ROOT / "plugins").rglob("*.*")]
    texts = {path: path.read_text(errors="replace") for path in paths if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh")}
    used = [(path.name, name) for path, text in texts.items() for name in REMOVED if re.search(rf"{re.escape(name)}(?!\w)", text)]
    assert len(texts) > 50 and used == []
