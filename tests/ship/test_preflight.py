"""`thoughtx-inspect --preflight`: each fact of an engine directory beside a machine that has it, lacks it, or does not say."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import planned
import pytest

from trtllm_thoughtx.backends import gpu
from trtllm_thoughtx.backends.gpu import Gpu
from trtllm_thoughtx.checkpoint import outputs
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.ship import preflight as module
from trtllm_thoughtx.ship.preflight import memory_need, preflight

VERSIONS = {"tensorrt_rtx": "1.7.1.116", "tensorrt": "10.15.1.29"}
L4 = Gpu("NVIDIA L4", "8.9", 24 << 30, 22 << 30)
LIBRARY = b"\x7fELF\2\1\1".ljust(18, b"\0") + struct.pack("<H", 62) + b"\0" * 44 + b"\0libnvinfer.so.10\0"


@pytest.fixture(scope="module")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planned.cpu_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def root(cpu: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cpu, tmp_path / "e"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with an L4, the runtimes of `VERSIONS` and a driver for CUDA 13.1; what a test sets is what preflight finds."""
    has = SimpleNamespace(gpus=[L4], driver=(13, 1), cuda=13, versions=dict(VERSIONS), header=("passed", ""))
    monkeypatch.setattr(module, "gpus", lambda: has.gpus)
    monkeypatch.setattr(module, "driver_version", lambda: has.driver)
    monkeypatch.setattr(module, "_cuda_of", lambda name: has.cuda)
    own = outputs.environment
    monkeypatch.setattr(module, "environment", lambda names: {**own(names), **{n: has.versions[n] for n in names if n in has.versions}})
    rtx = SimpleNamespace(Runtime=SimpleNamespace(get_engine_validity=None), __name__="tensorrt_rtx", __version__="1.7.1")
    monkeypatch.setattr("trtllm_thoughtx.backends.trt_module.load_module", lambda name: rtx)
    monkeypatch.setattr("trtllm_thoughtx.backends.trt_module.header_bytes", lambda found: 64)
    monkeypatch.setattr("trtllm_thoughtx.backends.trt_module.plan_header", lambda found, header: has.header)
    return has


def statuses(root: Path, backend: str) -> dict[str, str]:
    found = preflight(root, backend)
    return {check.name.removeprefix(f"{backend}: "): check.status for check in found.checks}


def reason(root: Path, backend: str, name: str) -> str:
    return next(check.reason for check in preflight(root, backend).checks if name in check.name)


# --- on a machine with nothing ----------------------------------------------------------------------------------------

BARE = """
import json, sys
for name in ("torch", "tensorrt", "tensorrt_rtx", "cuda", "transformers"):
    sys.modules[name] = None  # importing it raises
from trtllm_thoughtx.cli import commands
from trtllm_thoughtx.cli.params import run
status = run(commands.COMMANDS["inspect"], "thoughtx-inspect", sys.argv[1:])
assert all(sys.modules.get(name) is None for name in ("torch", "tensorrt", "tensorrt_rtx", "cuda", "transformers"))
assert "onnxruntime" not in sys.modules
sys.exit(status)
"""


def bare(*words: object) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([sys.executable, "-c", BARE, *map(str, words), "--json"], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_no_torch_no_tensorrt_and_no_gpu_is_needed(root: Path, tmp_path: Path) -> None:
    status, document = bare(root, "--preflight", "--junit", tmp_path / "p.xml")
    assert (status, document["ok"], document["verdict"]) == (0, True, "ready")
    assert [check["name"] for check in document["checks"]] == [
        "files match the manifest",
        "onnxruntime: runtime version",
        "onnxruntime: memory at batch 4",
    ]
    suite = ElementTree.fromstring((tmp_path / "p.xml").read_bytes())
    assert (suite.get("name"), suite.get("tests"), suite.get("skipped")) == ("thoughtx-inspect-preflight", "3", "0")


def test_what_a_plan_needs_cannot_be_judged_there(root: Path) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"vtrt" + b"\0" * 60}, VERSIONS)
    status, document = bare(root, "--preflight")
    assert (status, document["ok"]) == (4, False)
    found = {check["name"]: check for check in document["checks"]}
    for name in ("plan header of rank0.engine", "compute capability", "CUDA driver", "memory at batch 4"):
        assert found[f"tensorrt-rtx: {name}"]["status"] == "skipped" and found[f"tensorrt-rtx: {name}"]["reason"]
    assert bare(root, "--preflight", "--backend", "onnxruntime")[0] == 0


def test_a_changed_file_fails(root: Path) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"vtrt" + b"\0" * 60}, VERSIONS)
    (root / "rank0.engine").write_bytes(b"vtrt" + b"\1" * 60)
    status, document = bare(root, "--preflight")
    assert status == 1 and "rank0.engine" in document["checks"][0]["reason"]
    header = next(check for check in document["checks"] if "header" in check["name"])
    assert header["status"] == "skipped" and "do not match" in header["reason"]


# --- beside a machine with a GPU --------------------------------------------------------------------------------------


def test_a_machine_that_has_it_all_is_ready(root: Path, machine: Any) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"plan", "tensorrt": b"plan"}, VERSIONS, library=LIBRARY)
    found = preflight(root)
    assert found.exit == 0 and len(found.checks) == 15, found.checks
    assert {check.status for check in found.checks} == {"passed"}


@pytest.mark.parametrize(
    ("backend", "here", "status", "says"),
    [
        ("tensorrt-rtx", "1.8.0.10", "failed", "a plan runs on the release that built it"),
        ("tensorrt-rtx", "1.7.1.120", "passed", ""),
        ("tensorrt", "10.15.1.30", "failed", "install that one"),
        ("tensorrt", "not installed", "skipped", "is not installed"),
        ("onnxruntime", "1.20.1", "failed", "older than 1.24"),
        ("onnxruntime", "1.99.0", "passed", ""),
    ],
)
def test_runtime_versions(backend: str, here: str, status: str, says: str, root: Path, machine: Any) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"plan", "tensorrt": b"plan"}, VERSIONS)
    machine.versions[backend.replace("-", "_")] = here
    assert statuses(root, backend)["runtime version"] == status
    assert says in reason(root, backend, "runtime version")


def test_every_visible_gpu_is_judged(root: Path, machine: Any) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"plan"}, VERSIONS)
    machine.gpus = [L4, Gpu("NVIDIA H100", "9.0", 80 << 30, 79 << 30), Gpu("NVIDIA A10", "8.6", 24 << 30, 1)]
    found = statuses(root, "tensorrt-rtx")
    assert [found[f"compute capability of GPU {place}"] for place in range(3)] == ["passed", "failed", "passed"]
    assert [found[f"memory at batch 4 of GPU {place}"] for place in range(3)] == ["passed", "passed", "failed"]
    said = reason(root, "tensorrt-rtx", "capability of GPU 1")
    assert "NVIDIA H100 has 9.0, the plans are for 8.6, 8.9" in said and "CUDA_VISIBLE_DEVICES" in said
    machine.gpus = machine.gpus[1:2]
    assert statuses(root, "tensorrt-rtx")["compute capability"] == "failed"


def test_capabilities_are_in_the_order_of_their_numbers(root: Path, machine: Any) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"plan"}, VERSIONS, compute_capabilities=("12.0", "8.9", "10.0", "8.6"))
    machine.gpus = [Gpu("NVIDIA H100", "9.0", 80 << 30, 79 << 30)]
    assert "the plans are for 8.6, 8.9, 10.0, 12.0:" in reason(root, "tensorrt-rtx", "capability")


def test_a_plan_of_an_unknown_gpu_is_not_judged(root: Path, machine: Any) -> None:
    planned.add_plans(root, {"tensorrt": b"plan"}, VERSIONS, compute_capabilities=("native",))
    assert statuses(root, "tensorrt")["compute capability"] == "skipped"


@pytest.mark.parametrize(("driver", "cuda", "status"), [((12, 8), 13, "failed"), ((13, 0), 13, "passed"), ((13, 0), None, "skipped")])
def test_the_driver_must_run_the_cuda_of_the_runtime(driver: tuple, cuda: int | None, status: str, root: Path, machine: Any) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"plan"}, VERSIONS)
    machine.driver, machine.cuda = driver, cuda
    assert statuses(root, "tensorrt-rtx")["CUDA driver"] == status


def test_a_plan_is_for_one_platform(root: Path, machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"plan"}, VERSIONS)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert statuses(root, "tensorrt-rtx")["platform"] == "failed"
    assert "riscv64" in reason(root, "tensorrt-rtx", "platform")


@pytest.mark.parametrize(("answer", "status"), [(("failed", "VERSION_MISMATCH"), 1), (("skipped", "no driver"), 4), (("passed", ""), 0)])
def test_the_header_is_judged_by_the_runtime(answer: tuple[str, str], status: int, root: Path, machine: Any) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"plan"}, VERSIONS)
    machine.header = answer
    assert statuses(root, "tensorrt-rtx")["plan header of rank0.engine"] == answer[0]
    assert preflight(root).exit == status


def arm(library: bytes) -> bytes:
    return library[:18] + struct.pack("<H", 183) + library[20:]


@pytest.mark.parametrize(
    ("library", "says"),
    [
        (LIBRARY, ""),
        (arm(LIBRARY), "it is for aarch64"),
        (LIBRARY.replace(b".so.10", b".so.11"), "needs libnvinfer.so.11"),
        (b"no library", "it is for machine None"),
    ],
)
def test_the_plugin_library_is_for_this_machine(library: bytes, says: str, root: Path, machine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    planned.add_plans(root, {"tensorrt": b"plan"}, {**VERSIONS, "machine": "x86_64"}, library=library)
    assert statuses(root, "tensorrt")["plugin library"] == ("failed" if says else "passed")
    assert says in reason(root, "tensorrt", "plugin library")


def test_memory_is_weights_cache_and_workspace(root: Path, machine: Any) -> None:
    planned.add_plans(root, {"tensorrt-rtx": b"plan" * 1000}, VERSIONS)
    directory = module.EngineDir.open(root)
    need = memory_need(directory, "tensorrt-rtx")
    assert need["weights"] == 4000
    assert need["KV cache"] == 2 * 1 * 2 * 16 * 4 * 64 * 4  # K and V, layers, heads, head size, float32, positions, batch
    assert need["workspace"] > 4 * 64 * 64 * 4  # hidden states of the largest call, in float32
    machine.gpus = [Gpu("NVIDIA L4", "8.9", 24 << 30, sum(need.values()))]
    assert statuses(root, "tensorrt-rtx")["memory at batch 4"] == "passed"
    machine.gpus = [Gpu("NVIDIA L4", "8.9", 24 << 30, sum(need.values()) - 1)]
    assert statuses(root, "tensorrt-rtx")["memory at batch 4"] == "failed"
    machine.gpus = [Gpu("NVIDIA L4", "8.9", 24 << 30, None)]
    assert statuses(root, "tensorrt-rtx")["memory at batch 4"] == "skipped"


def test_who_names_no_backend_beside_a_gpu_is_told(root: Path, monkeypatch: Any, capsys: Any) -> None:
    """onnxruntime is the default also there."""
    planned.add_plans(root, {"tensorrt-rtx": b"plan"}, VERSIONS)
    words = ["--engine_dir", str(root), "--input_ids", "1,2", "--max_new_tokens", "1"]
    for count, more, is_told in ((1, [], True), (1, ["--backend", "onnxruntime"], False), (0, [], False)):
        monkeypatch.setattr("trtllm_thoughtx.runtime.engine.num_gpus", lambda count=count: count)
        assert run(cli.COMMANDS["run"], "thoughtx-run", [*words, *more]) == 0
        assert ("a GPU is visible, and the engine has a plan for tensorrt-rtx" in capsys.readouterr().err) == is_told


# --- the driver and the runtime themselves ----------------------------------------------------------------------------


class Driver:
    """libcuda.so.1 as far as it is called: one GPU, or a failing call."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.calls = failing, []

    def __getattr__(self, name: str) -> Any:
        values = {
            "cuDriverGetVersion": {0: 13010},
            "cuDeviceGetCount": {0: 1},
            "cuDeviceTotalMem_v2": {0: 24 << 30},
            "cuMemGetInfo_v2": {0: 20 << 30, 1: 24 << 30},
        }

        def call(*args: Any) -> int:
            self.calls.append(name)
            if name == self.failing:
                return 100
            for place, value in values.get(name, {}).items():
                args[place]._obj.value = value
            if name == "cuDeviceGetName":
                args[0].value = b"NVIDIA L4"
            if name == "cuDeviceGetAttribute":
                args[0]._obj.value = {75: 8, 76: 9}[args[1]]
            return 0

        return call


def test_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert (gpu.driver_version(), gpu.num_gpus(), gpu.native_capability()) == ((13, 1), 1, "8.9")
    assert gpu.gpus() == [Gpu("NVIDIA L4", "8.9", 24 << 30, 20 << 30)]
    assert driver.calls.count("cuDevicePrimaryCtxRetain") == driver.calls.count("cuDevicePrimaryCtxRelease_v2")


@pytest.mark.parametrize("failing", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuMemGetInfo_v2"])
def test_free_memory_is_unknown_where_a_call_fails(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(failing))
    assert gpu.gpus()[0].free_bytes is None


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert (gpu.driver_version(), gpu.num_gpus(), gpu.gpus(), gpu.native_capability()) == (None, 0, [], "native")


@pytest.mark.rtx
def test_headers_in_the_runtimes_own_words() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX reads its headers itself")
    from trtllm_thoughtx.backends.trt_module import header_bytes, plan_header

    size = header_bytes(rtx)
    version = bytes(int(part) for part in rtx.__version__.split("."))
    good = (b"vtrt" + b"\0" * 4 + b"\2" + b"\0" * 7 + struct.pack("<Q", 4096) + version + b"vtrt\x1c").ljust(size, b"\0")
    has_gpu = bool(gpu.num_gpus())
    assert plan_header(rtx, good)[0] != "failed" or has_gpu
    other = good.replace(version, bytes((version[0], version[1] + 1, *version[2:])))
    status, why = plan_header(rtx, other)
    assert status == "failed" and "version" in why
    status, why = plan_header(rtx, b"\0" * size)
    assert status == "failed" and "MALFORMED_ENGINE" in why


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (["none", "--preflight"], "E101", 3),
        (["m", "--preflight"], "E101", 3),
        (["e", "--preflight", "--backend", "tensorrt"], "E101", 3),
        (["e", "--preflight", "--junit", "none/p.xml"], "E130", 3),
        (["e", "--junit", "p.xml"], "E001", 2),
        (["e", "--backend", "onnxruntime"], "E001", 2),
    ],
)
def test_refusals(words: list[str], code: str, status: int, cpu: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(cpu.parent)
    assert run(cli.COMMANDS["inspect"], "thoughtx-inspect", [*words, "--json"]) == status
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == code and all(error[part] for part in ("what", "where", "why", "fix"))
    assert not (cpu.parent / "p.xml").exists()
