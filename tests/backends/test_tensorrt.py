"""The TensorRT backends: real TensorRT-RTX builds of tiny graphs (no GPU needed), and the runner against a stand-in for a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from plan_jobs import CONFIG, job
from tiny import write_tiny

from trtllm_thoughtx.backends import tensorrt, trt_builder, trt_module, trt_runner
from trtllm_thoughtx.build.build import build
from trtllm_thoughtx.config import BuildConfig
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.progress import Progress
from trtllm_thoughtx.runtime.generation import Generation
from trtllm_thoughtx.runtime.row import Request
from trtllm_thoughtx.runtime.session import Session
from trtllm_thoughtx.text.params import GenerationParams

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
rtx = [pytest.mark.rtx, pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed")]


def script(expression: str) -> str:
    """Source of another process that evaluates `expression` with plan_jobs.py as `t`."""
    return f"import sys; sys.path[:0] = {sys.path!r}\nimport plan_jobs as t\nfrom pathlib import Path\nprint({expression})"


@pytest.mark.slow
class TestBuild:
    pytestmark = rtx

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_plan_is_whole_and_its_facts_are_true(self, tmp_path: Path, dtype: str) -> None:
        path = tmp_path / "a.engine"
        info = tensorrt.build_plan(**job(path, dtype))
        plan = path.read_bytes()
        assert (info.num_bytes, info.sha256) == (len(plan), hashlib.sha256(plan).hexdigest())
        assert info.num_attention == 2 and info.layer_counts["KV_CACHE_UPDATE"] == 4 and info.errors == []
        assert sum(info.layer_counts.values()) == info.num_layers and info.peak_bytes > 1 << 20 and info.seconds_build > 0

    def test_same_inputs_same_bytes(self, tmp_path: Path) -> None:
        """Twice in this process, with other paths and other open files, and once from another process and directory."""
        first = tensorrt.build_plan(**job(tmp_path / "a.engine"))
        if not first.fixed_addresses:
            pytest.skip("address randomization cannot be turned off here")
        with (tmp_path / "open").open("w"):
            second = tensorrt.build_plan(**job(tmp_path / "another-name.engine"))
        code = script(f"t.tensorrt.build_plan(**t.job(Path({str(tmp_path / 'c')!r}))).sha256")
        env = os.environ | {"UNRELATED": "y" * 99}
        third = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True, env=env)
        assert first.sha256 == second.sha256 == third.stdout.strip()

    def test_several_targets_in_one_plan(self, tmp_path: Path) -> None:
        one = tensorrt.build_plan(**job(tmp_path / "one"))
        two = tensorrt.build_plan(**job(tmp_path / "two", compute_capabilities=("8.9", "12.0"), optimization_level=1))
        assert two.num_bytes > one.num_bytes

    def test_unknown_target_lists_the_known_ones(self, tmp_path: Path) -> None:
        with pytest.raises(ThoughtxError, match=r"9\.0") as caught:
            tensorrt.build_plan(**job(tmp_path / "a", compute_capabilities=("8.9", "9.0")))
        assert caught.value.code == "E103" and "8.9, 12.0" in caught.value.why
        assert list(tmp_path.iterdir()) == []

    def test_wrong_number_of_attention_layers(self, tmp_path: Path) -> None:
        with pytest.raises(ThoughtxError, match="made 2 attention layers of a graph that has 3") as caught:
            tensorrt.build_plan(**job(tmp_path / "a", num_attention=3))
        assert caught.value.code == "E205" and not (tmp_path / "a").exists()

    @pytest.mark.parametrize(
        ("changes", "wanted"),
        [
            ({"model": b"\x08\x0bnot a model"}, "parse"),
            ({"initializers": lambda: [("transformer.ln_f.weight", np.zeros(3, np.float16))]}, "ln_f.weight"),
            ({"initializers": lambda: []}, "parse"),  # the file that the graph names does not exist
        ],
    )
    def test_bad_model(self, tmp_path: Path, changes: dict[str, Any], wanted: str) -> None:
        with pytest.raises(ThoughtxError, match=wanted) as caught:
            tensorrt.build_plan(**job(tmp_path / "a", **changes))
        assert caught.value.code == "E205" and caught.value.why != "no message"
        assert [x.name for x in tmp_path.iterdir()] == ["a.log"]

    def test_impossible_shapes(self, tmp_path: Path) -> None:
        arguments = job(tmp_path / "a")
        arguments["profiles"][0]["positions"] = ((1, 9), (1, 4), (2, 2))
        with pytest.raises(ThoughtxError) as caught:
            tensorrt.build_plan(**arguments)
        assert caught.value.code == "E205" and not (tmp_path / "a").exists()

    def test_log_has_everything_and_the_screen_one_line(self, tmp_path: Path) -> None:
        screen = io.StringIO()
        info = tensorrt.build_plan(**job(tmp_path / "a.engine", progress=Progress(stream=screen)))
        log = (tmp_path / "a.log").read_text()
        assert log.count("\nWARNING: ") == info.num_warnings >= 2 and "\nVERBOSE: " in log
        assert 0 < info.num_distinct_warnings < info.num_warnings
        line = f"a.engine: {info.num_warnings} warnings ({info.num_distinct_warnings} distinct), see {tmp_path / 'a.log'}"
        assert screen.getvalue().count(line) == 1 and "WARNING" not in screen.getvalue() and "CUDA" not in screen.getvalue()

    def test_existing_plan_is_not_overwritten(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("mine")
        with pytest.raises(ThoughtxError) as caught:
            tensorrt.build_plan(**job(tmp_path / "a"))
        assert caught.value.code == "E130" and (tmp_path / "a").read_text() == "mine"

    def test_interrupt_ends_the_builder_and_leaves_nothing(self, tmp_path: Path) -> None:
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += script(f"t.tensorrt.build_plan(**t.job(Path({str(tmp_path / 'a.engine')!r})))")
        with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
            builder = 0
            while not builder and process.poll() is None:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                builder = next((int(x) for x in children if b"trt_builder" in Path(f"/proc/{x}/cmdline").read_bytes()), 0)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate()
            assert "KeyboardInterrupt" in errors
        assert not (tmp_path / "a.engine").exists()
        while Path(f"/proc/{builder}").exists():  # ends with its parent, whenever this machine comes to it
            time.sleep(0.01)

    @pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, "E204"), (signal.SIGSEGV, "E205")])
    def test_builder_that_dies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals, code: str) -> None:
        script = tmp_path / "dies.py"
        script.write_text(f"import os; os.kill(os.getpid(), {int(how)})")
        monkeypatch.setattr(trt_builder, "__file__", str(script))
        with pytest.raises(ThoughtxError) as caught:
            tensorrt.build_plan(**job(tmp_path / "a"))
        assert caught.value.code == code and not (tmp_path / "a").exists()

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
    def test_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        popen = subprocess.Popen

        def to_full(command: list[str], **kwargs: Any) -> Any:
            return popen([*command[:-1], str(full)], **{**kwargs, "pass_fds": [full]})

        monkeypatch.setattr(tensorrt.subprocess, "Popen", to_full)
        with pytest.raises(ThoughtxError) as caught:
            tensorrt.build_plan(**job(tmp_path / "a"))
        os.close(full)
        assert caught.value.code == "E203" and not (tmp_path / "a").exists()


def test_too_little_memory_is_refused_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "BUILDER_FACTOR", 1e12)
    monkeypatch.setattr(tensorrt, "load_module", lambda backend: SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7"))
    monkeypatch.setattr(tensorrt, "targets", lambda *_: ("SM89",))
    with pytest.raises(ThoughtxError) as caught:
        tensorrt.build_plan(**job(tmp_path / "a"))
    assert caught.value.code == "E204" and "num_stages" in caught.value.fix and list(tmp_path.iterdir()) == []


class TestModule:
    @pytest.mark.parametrize(("backend", "extra"), [("tensorrt-rtx", "[rtx]"), ("tensorrt", "[tensorrt]")])
    def test_absent(self, monkeypatch: pytest.MonkeyPatch, backend: str, extra: str) -> None:
        monkeypatch.setitem(sys.modules, trt_module.BACKENDS[backend].module, None)  # what makes `import` fail
        with pytest.raises(ThoughtxError) as caught:
            trt_module.load_module(backend)
        assert caught.value.code == "E201" and f'pip install "trtllm-thoughtx{extra}"' in caught.value.fix

    def test_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
        with pytest.raises(ThoughtxError, match=r"10\.15") as caught:
            trt_module.load_module("tensorrt")
        assert caught.value.code == "E201" and "--upgrade" in caught.value.fix

    def test_plain_tensorrt_needs_a_gpu_to_build(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.106"))
        monkeypatch.setattr(trt_module, "num_gpus", lambda: 0)
        with pytest.raises(ThoughtxError, match="also to build") as caught:
            trt_module.load_module("tensorrt")
        assert caught.value.code == "E202"
        assert trt_module.targets(SimpleNamespace(), "tensorrt", ()) == ()


def test_messages_are_counted_by_what_they_say(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        messages = trt_builder.Messages(log.fileno())
        for text in ("A node named node_of_x_1 already exists", "A node named node_of_y already exists", "Input 'positions' has 12 values"):
            messages.add("WARNING", text)
        messages.add("INTERNAL_ERROR", "In getCurrentCC (cudaError 35: CUDA driver version is insufficient for CUDA runtime version)")
        messages.add("VERBOSE", "text that is not \ud800 text")
        assert "driver" in messages.reason()
        messages.add("ERROR", "a real one")
        assert messages.reason() == "a real one"
    assert (messages.num_warnings, len(messages.patterns), [*messages.errors.values()]) == (3, 2, ["a real one"])
    assert len((tmp_path / "log").read_text().splitlines()) == 6


# --- the runner, with host memory for device memory and NumPy for engines ---


class FakeCuda:
    """The functions of `cuda.bindings.runtime` that the runner calls, on host memory."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaError_t = SimpleNamespace(cudaErrorMemoryAllocation=2)

    def __init__(self) -> None:
        self.alive: dict[int, Any] = {}
        self.limit = 1 << 30

    def cudaStreamCreate(self) -> tuple[int, int]:
        return 0, 7

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"out of memory"

    def cudaMalloc(self, num_bytes: int) -> tuple[int, int | None]:
        if num_bytes > self.limit:
            return 2, None
        block = (ctypes.c_char * num_bytes)()
        self.alive[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaFree(self, address: int) -> tuple[int]:
        del self.alive[address]
        return (0,)

    def cudaMemsetAsync(self, address: int, value: int, num_bytes: int, stream: int) -> tuple[int]:
        ctypes.memset(address, value, num_bytes)
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, num_bytes: int, kind: int, stream: int) -> tuple[int]:
        ctypes.memmove(to, source, num_bytes)
        return (0,)


class FakeEngine:
    """A plan of JSON: {inputs, outputs, dtypes}. Running it adds 1 to the hidden states, and copies input ids into the logits."""

    num_optimization_profiles = 2

    def __init__(self, layers: range, first: bool, head: bool) -> None:
        cache = [f"{kind}_{i}" for i in layers for kind in ("key", "value")]
        self.inputs = ["input_ids" if first else "hidden_states", *(["positions", "kv_positions", "write_indices"] if cache else [])]
        self.inputs += [f"past_{x}" for x in cache] + (["logit_indices"] if head else [])
        self.outputs = [f"present_{x}" for x in cache] + ["logits" if head else "hidden_states_out"]
        self.num_io_tensors = len(self.inputs) + len(self.outputs)
        self.runs: list[tuple[int, dict[str, tuple[int, ...]], dict[str, int]]] = []

    def get_tensor_name(self, i: int) -> str:
        return [*self.inputs, *self.outputs][i]

    def get_tensor_mode(self, name: str) -> int:
        return 1 if name in self.inputs else 2

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="FLOAT" if name == "logits" else "BF16" if name.startswith(("past", "present", "hidden")) else "INT64")

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, int]]:
        assert (name, profile) == ("logit_indices", 0)
        return [(1, 1), (1, 1), (2, 8)]

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.profile = engine, -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self.engine.inputs
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7 and set(self.addresses) == {*self.engine.inputs, *self.engine.outputs} and all(self.addresses.values())
        self.engine.runs.append((self.profile, dict(self.shapes), dict(self.addresses)))

        def view(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            block = ctypes.c_char * (int(np.prod(shape)) * np.dtype(dtype).itemsize)
            return np.frombuffer(block.from_address(self.addresses[name]), dtype).reshape(shape)

        if "hidden_states_out" in self.engine.outputs:
            if "input_ids" in self.engine.inputs:
                batch, width = self.shapes["input_ids"]
                value = np.broadcast_to(view("input_ids", (batch, width), np.int64)[:, :, None], (batch, width, 64))
            else:
                batch, width, _ = self.shapes["hidden_states"]
                value = view("hidden_states", (batch, width, 64), ml_dtypes.bfloat16)
            view("hidden_states_out", (batch, width, 64), ml_dtypes.bfloat16)[...] = value.astype(np.float32) + 1
        else:
            batch, width, _ = self.shapes["hidden_states"]
            rows = view("logit_indices", self.shapes["logit_indices"], np.int64)
            hidden = view("hidden_states", (batch, width, 64), ml_dtypes.bfloat16)[:, :, 0].astype(np.float32)
            view("logits", (*rows.shape, 97), np.float32)[...] = np.take_along_axis(hidden, rows, 1)[:, :, None]
        return True


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A host with a GPU, as far as the runner can tell; .engines: what its three plans (two stages, head) deserialize to."""
    engines = [FakeEngine(range(0, 1), True, False), FakeEngine(range(1, 2), False, False), FakeEngine(range(0), False, True)]
    cuda, plans = FakeCuda(), iter(engines)
    fake = SimpleNamespace(
        __version__="1.7.1",
        __name__="tensorrt_rtx",
        ILogger=type("ILogger", (), {"__init__": lambda self: None}),
        TensorIOMode=SimpleNamespace(INPUT=1, OUTPUT=2),
    )

    def deserialize(plan: Any) -> FakeEngine | None:
        assert bytes(plan) == b"plan"
        return next(plans, None)

    fake.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=deserialize)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setattr(trt_runner, "num_gpus", lambda: 1)
    parts = []
    for name in ("stage0", "stage1", "head"):
        (tmp_path / f"rank0.{name}.engine").write_bytes(b"plan")
        parts.append(SimpleNamespace(plans={"tensorrt-rtx": SimpleNamespace(file=f"rank0.{name}.engine")}))
    return SimpleNamespace(root=tmp_path, parts=parts, engines=engines, cuda=cuda, plans=plans)


RUN = BuildConfig(dtype="bfloat16", max_batch_size=2, max_input_len=16, max_seq_len=64, stages=(1,))


def feeds(width: int, num_rows: int) -> dict[str, np.ndarray]:
    ids = np.arange(2 * width, dtype=np.int64).reshape(2, width)
    rows = np.zeros((2, num_rows), np.int64) + width - 1
    return {
        "input_ids": ids,
        "positions": ids,
        "kv_positions": np.zeros((2, 16), np.int64),
        "write_indices": np.zeros(2, np.int64),
        "logit_indices": rows,
    }


class TestRunner:
    def test_steps_through_the_parts(self, gpu: Any) -> None:
        runner = trt_runner.TensorRTRunner(gpu.root, gpu.parts, CONFIG, RUN, backend="tensorrt-rtx")
        assert runner.max_logit_rows == 8
        runner.start(2)
        for width, num_rows, profile in ((5, 3, 0), (1, 1, 1), (1, 2, 0), (7, 1, 0)):
            logits = runner.run(feeds(width, num_rows), 0, 3)["logits"]
            assert logits.shape == (2, num_rows, 97) and logits.dtype == np.float32
            last = feeds(width, num_rows)["input_ids"][:, -1]
            assert (logits == (last + 2)[:, None, None]).all()  # two stages, each adds 1
            for engine in gpu.engines:
                used, shapes, _ = engine.runs[-1]
                assert used == profile and shapes.get("hidden_states", (2, width, 64)) == (2, width, 64)
                assert all(shape == (2, 2, 64, 16) for name, shape in shapes.items() if name.startswith("past_"))
        first, second, head = (engine.runs[-1][2] for engine in gpu.engines)
        assert first["past_key_0"] == first["present_key_0"] != first["past_value_0"] == first["present_value_0"]
        assert first["hidden_states_out"] == second["hidden_states"] != second["hidden_states_out"] == head["hidden_states"]
        assert first["positions"] == second["positions"]
        runner.close()
        assert gpu.cuda.alive == {}

    def test_parts_run_alone(self, gpu: Any) -> None:
        """Stages hand hidden states over through the host, as drafts need it: the same numbers as in one call."""
        runner = trt_runner.TensorRTRunner(gpu.root, gpu.parts, CONFIG, RUN, backend="tensorrt-rtx")
        runner.start(2)
        fed = feeds(5, 3)
        first = runner.run({name: value for name, value in fed.items() if name != "logit_indices"}, 0, 1)
        assert set(first) == {"hidden_states_out"} and first["hidden_states_out"].dtype == ml_dtypes.bfloat16
        rest = runner.run({**fed, "hidden_states": first["hidden_states_out"]}, 1, 3)
        assert (rest["logits"] == runner.run(fed, 0, 3)["logits"]).all()
        alone = runner.run({"hidden_states": first["hidden_states_out"], "logit_indices": fed["logit_indices"]}, 2, 3)
        assert (alone["logits"] == rest["logits"] - 1).all()

    def test_kv_buffers_are_made_once_per_batch_size(self, gpu: Any) -> None:
        runner = trt_runner.TensorRTRunner(gpu.root, gpu.parts, CONFIG, RUN, backend="tensorrt-rtx")
        runner.start(2)
        blocks = dict(gpu.cuda.alive)
        assert sorted(map(len, blocks.values())) == [2 * 2 * 64 * 16 * 2] * 4  # B, KV heads, slots, head_dim, bytes of BF16
        runner.start(2)
        assert gpu.cuda.alive.keys() == blocks.keys()
        runner.start(1)
        assert sorted(len(x) for x in gpu.cuda.alive.values()) == [1 * 2 * 64 * 16 * 2] * 4

    def test_rows_are_copied_and_exchanged(self, gpu: Any) -> None:
        runner = trt_runner.TensorRTRunner(gpu.root, gpu.parts, CONFIG, RUN, backend="tensorrt-rtx")
        runner.start(2)
        blocks = list(gpu.cuda.alive.values())
        half = len(blocks[0]) // 2
        for number, block in enumerate(blocks):
            block[:half], block[half:] = bytes([2 * number]) * half, bytes([2 * number + 1]) * half
        runner.exchange(0, 1, 64)
        assert [(block[0][0], block[half][0]) for block in blocks] == [(2 * number + 1, 2 * number) for number in range(4)]
        runner.copy(1, 0, 5)
        assert all(bytes(block) == bytes([2 * number]) * (2 * half) for number, block in enumerate(blocks))
        runner.close()
        assert gpu.cuda.alive == {}

    def test_slots_run_within_the_profiles(self, gpu: Any) -> None:
        """Prompts alone in prefill, rows together in decode; each call is bound to the rows of the cache that are its own."""
        runner = trt_runner.TensorRTRunner(gpu.root, gpu.parts, CONFIG, RUN, backend="tensorrt-rtx")
        layers = ((0, 1, False), (1, 2, False), (2, 2, True))
        parts = [SimpleNamespace(first_layer=first, last_layer=last, head=head) for first, last, head in layers]
        session = Session(SimpleNamespace(config=CONFIG, build=RUN, parts=parts, root=gpu.root), runner)
        generation = Generation(session, None, (), 2)
        prompts = [list(range(num)) for num in (40, 5, 33, 20)]
        for index, prompt in enumerate(prompts):
            generation.add(Request(prompt, GenerationParams(max_new_tokens=4 + 3 * index, ignore_eos=True), index, 0))
        ended: dict[int, Any] = {}
        while not generation.is_idle:
            ended |= dict(generation.tick())
        assert [len(ended[i].output_ids) for i in range(4)] == [4, 7, 10, 13] and sum(one.num_reused_tokens for one in ended.values())
        row_bytes = 2 * 64 * 16 * 2  # KV heads, slots, head_dim, bytes of BF16
        seen = set()
        for profile, shapes, addresses in gpu.engines[0].runs:
            batch, width = shapes["positions"]
            assert profile == (1 if width == 1 else 0) and width <= RUN.max_input_len
            row, rest = divmod(addresses["past_key_0"] - runner.cache["key_0"], row_bytes)
            assert rest == 0 and row >= 0 and row + batch <= 2 and addresses["past_key_0"] == addresses["present_key_0"]
            assert batch == 1 if width > 1 else row == 0
            seen.add((profile, row, batch))
        assert {(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 0, 2)} <= seen
        runner.close()

    def test_plan_that_does_not_load(self, gpu: Any) -> None:
        list(gpu.plans)
        with pytest.raises(ThoughtxError) as caught:
            trt_runner.TensorRTRunner(gpu.root, gpu.parts, CONFIG, RUN, backend="tensorrt-rtx")
        assert caught.value.code == "E202" and "onnxruntime" in caught.value.fix

    def test_gpu_memory_runs_out(self, gpu: Any) -> None:
        runner = trt_runner.TensorRTRunner(gpu.root, gpu.parts, CONFIG, RUN, backend="tensorrt-rtx")
        gpu.cuda.limit = 16
        with pytest.raises(ThoughtxError, match="cudaMalloc") as caught:
            runner.start(2)
        assert caught.value.code == "E204"

    def test_no_gpu(self, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trt_runner, "num_gpus", lambda: 0)
        with pytest.raises(ThoughtxError) as caught:
            trt_runner.TensorRTRunner(gpu.root, gpu.parts, CONFIG, RUN, backend="tensorrt-rtx")
        assert caught.value.code == "E202" and "--backend onnxruntime" in caught.value.fix

    def test_no_cuda_python(self, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
        with pytest.raises(ThoughtxError) as caught:
            trt_runner.TensorRTRunner(gpu.root, gpu.parts, CONFIG, RUN, backend="tensorrt-rtx")
        assert caught.value.code == "E201" and "cuda-python" in caught.value.fix


@pytest.mark.rtx
@pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed")
@pytest.mark.slow
def test_a_stage_that_fails_takes_the_whole_build_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next stage's weights are being read by then: they are let go of, and nothing is left."""
    write_tiny(tmp_path / "m", num_layers=4, dtype="bfloat16")
    built = []

    def fails_at_the_second(**arguments: Any) -> tensorrt.PlanInfo:
        built.append(arguments["initializers"])
        if len(built) == 2:
            raise ThoughtxError("E205", "the builder crashed", where="log", why="a test", fix="none")
        return real(**arguments)

    real = tensorrt.build_plan
    monkeypatch.setattr(tensorrt, "build_plan", fails_at_the_second)
    options = {"backend": ("tensorrt-rtx",), "dtype": "float16", "num_stages": 4, "max_seq_len": 64}
    with pytest.raises(ThoughtxError, match="crashed"):
        build(tmp_path / "m", tmp_path / "e", options)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "e.tensorrt-rtx.log"}
    assert len(built) == 2 and all(held.fd == -1 for held in built)
    held = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and "thoughtx-weights" in os.readlink(fd)]
    assert held == []
    monkeypatch.setattr(tensorrt, "build_plan", real)
    summary = build(tmp_path / "m", tmp_path / "e", options)
    assert [part["name"] for part in summary["parts"]] == [*(f"rank0.stage{k}" for k in range(4)), "rank0.head"]
