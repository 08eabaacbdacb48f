"""Would this engine load and run on this machine? Every fact that its directory states, beside what the machine has.

    files            hashes of the manifest, and the signature
    platform         a plan is for one operating system and one kind of CPU
    runtime version  a TensorRT plan runs on the release that built it; a graph on any onnxruntime from the oldest supported on
    plan header      what TensorRT-RTX says of the first bytes of each plan
    capability       of the GPU that plans run on, among those they were built for
    driver           at least of the CUDA that the runtime was made for
    plugin library   for this CPU, and for the TensorRT that is installed
    memory           weights, KV cache at full batch, and what a call needs beside them

No plan is loaded, and nothing is needed but this package: what a missing runtime, driver or GPU would have to say is reported as not
judged, never as passed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_thoughtx import files, report
from trtllm_thoughtx.backends import BACKENDS
from trtllm_thoughtx.backends.gpu import NATIVE, Gpu, driver_version, gpus
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.checkpoint.outputs import environment
from trtllm_thoughtx.config import PLUGIN_LIBRARY
from trtllm_thoughtx.errors import Exit, ThoughtxError, shown
from trtllm_thoughtx.files import human_bytes
from trtllm_thoughtx.process.machine import available_bytes
from trtllm_thoughtx.report import Check
from trtllm_thoughtx.ship.signature import SIGNATURE, file_checks

MISSING = "not installed"
ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
LOGIT_ROWS = 32  # of a sequence in one call
VERDICTS = {Exit.OK: "READY", Exit.NO: "NOT READY", Exit.ENVIRONMENT: "NOT JUDGED IN FULL"}


@dataclass(frozen=True)
class Preflight:
    """The checks of one engine on this machine."""

    engine_dir: str
    backends: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def exit(self) -> Exit:
        """NO when something failed; ENVIRONMENT when something could not be judged here; else OK."""
        count = report.count(self.checks)
        return Exit.NO if count["failed"] else Exit.ENVIRONMENT if count["skipped"] else Exit.OK

    def document(self) -> dict[str, Any]:
        return {
            "engine_dir": self.engine_dir,
            "backends": self.backends,
            "checks": self.checks,
            "count": report.count(self.checks),
            "verdict": VERDICTS[self.exit].lower(),
        }

    def tables(self) -> list[Any]:
        names = {"skipped": "cannot be judged here"}
        rows = [[names.get(one.status, one.status), one.name, one.reason or report.brief(one.evidence)] for one in self.checks]
        count = report.count(self.checks)
        said = f"{VERDICTS[self.exit]}: {count['passed']} passed, {count['failed']} failed, {count['skipped']} cannot be judged here"
        return [report.table(f"preflight of {self.engine_dir}", ["status", "check", "evidence or reason"], rows), said]


def preflight(engine_dir: Path, backend: str | None = None, verify_key: Path | None = None) -> Preflight:
    """Judge `backend`, or every one of the directory, and whether `verify_key` signed it. E101 and E121 for what is no engine directory,
    E125 for what is no key."""
    directory = EngineDir.open(Path(engine_dir))
    backends = directory.backends if backend is None else (directory.choose(backend),)
    made_with = directory.manifest["environment"]
    checks = file_checks(directory, verify_key)
    intact = not any(check.status == "failed" for check in checks)
    if verify_key is None and os.path.lexists(directory.root / SIGNATURE):
        checks.append(Check("signature", "skipped", "no public key was given: --verify_key PUB.pem"))
    found = gpus() if any(BACKENDS[name].builds_plans for name in backends) else []
    for name in backends:
        checks += _of_backend(directory, name, made_with, found, intact=intact)
    return Preflight(str(engine_dir), tuple(backends), tuple(checks))


def _of_backend(directory: EngineDir, name: str, made_with: Mapping[str, Any], found: list[Gpu], *, intact: bool) -> Iterator[Check]:
    record = BACKENDS[name]
    here = environment((record.module,))
    version = _version(name, str(made_with.get(record.module, MISSING)), here[record.module])
    yield version
    if record.builds_plans:
        yield _platform(name, made_with)
        if record.has_targets:
            yield from _headers(directory, name, is_installed=here[record.module] != MISSING, intact=intact)
        yield from _capability(directory, name, found)
        yield _driver(name)
        if record.takes_plugins and directory.build.plugin == "cpp":
            yield _library(directory, name, here[record.module], intact=intact)
    yield from _memory(directory, name, found)


def _version(name: str, built: str, here: str) -> Check:
    record, label = BACKENDS[name], f"{name}: runtime version"
    evidence = {"built with": built, "here": here}
    if here == MISSING:
        return Check(label, "skipped", f"{record.module} is not installed; the engine was built with {shown(built)}", evidence)
    oldest, bound = ".".join(map(str, record.oldest)), record.bound_to
    if bound and _numbers(here)[:bound] != _numbers(built)[:bound]:
        why = f"built with {record.module} {shown(built)}, here is {here}: a plan runs on the release that built it"
        return Check(label, "failed", f"{why}; install that one, or build the engine again", evidence)
    if _numbers(here) < record.oldest:
        return Check(label, "failed", f"{record.module} {here} is older than {oldest}, which lacks operators of the graph", evidence)
    return Check(label, "passed", evidence=evidence)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _platform(name: str, made_with: Mapping[str, Any]) -> Check:
    here = {"system": platform.system(), "machine": platform.machine()}
    built = {key: str(made_with.get(key)) for key in here}
    evidence = {"built for": " ".join(map(shown, built.values())), "here": " ".join(here.values())}
    why = "" if built == here else f"built on {evidence['built for']}, this is {evidence['here']}: build the engine again here"
    return Check(f"{name}: platform", "failed" if why else "passed", why, evidence)


def _headers(directory: EngineDir, name: str, *, is_installed: bool, intact: bool) -> Iterator[Check]:
    plans = [part.plans[name].file for part in directory.parts]
    why = "" if intact else "the files do not match their manifest, so nothing of them is given to the runtime"
    module: Any = None
    if not why:
        from trtllm_thoughtx.backends.trt_module import header_bytes, load_module, plan_header

        try:
            module = load_module(name) if is_installed else None
            why = "" if is_installed else f"{BACKENDS[name].module} is not installed"
        except ThoughtxError as error:
            why = f"{error.what}: {error.why}"
    for plan in plans:
        label = f"{name}: plan header of {shown(plan)}"
        if why:
            yield Check(label, "skipped", why)
        elif not hasattr(module.Runtime, "get_engine_validity"):
            yield Check(label, "skipped", f"{module.__name__} {shown(module.__version__)} has no call that reads it")
        else:
            with files.open_inside(directory.root, plan) as file:
                status, reason = plan_header(module, file.read(header_bytes(module)))
            yield Check(label, status, reason)


def _capability(directory: EngineDir, name: str, found: list[Gpu]) -> Iterator[Check]:
    """One for each visible GPU: a process runs on the first that it sees, and CUDA_VISIBLE_DEVICES may make that any of them."""
    label = f"{name}: compute capability"
    each = [set(part.plans[name].compute_capabilities) for part in directory.parts]
    built = sorted(set.intersection(*each), key=lambda one: (_numbers(one), one))
    wanted = ", ".join(map(shown, built))
    if not found:
        yield Check(label, "skipped", f"no NVIDIA driver, or no GPU that it can see; built for {wanted}", {"built for": wanted, "here": ""})
    for gpu, of_gpu in zip(found, _places(found), strict=True):
        here, evidence = gpu.compute_capability, {"built for": wanted, "here": f"{gpu.name} ({gpu.compute_capability})"}
        if built == [NATIVE]:
            yield Check(f"{label}{of_gpu}", "skipped", "the engine does not say for which GPU it was built", evidence)
        elif here in built:
            yield Check(f"{label}{of_gpu}", "passed", evidence=evidence)
        else:
            fix = "thoughtx-build --compute_capabilities, or hide that GPU (CUDA_VISIBLE_DEVICES)"
            yield Check(f"{label}{of_gpu}", "failed", f"{shown(gpu.name)} has {here}, the plans are for {wanted}: {fix}", evidence)


def _places(found: list[Gpu]) -> list[str]:
    """What a check's name says of its GPU, where there are several."""
    return [f" of GPU {place}" for place in range(len(found))] if len(found) > 1 else [""] * len(found)


def _driver(name: str) -> Check:
    label = f"{name}: CUDA driver"
    driver, wanted = driver_version(), _cuda_of(BACKENDS[name].module)
    evidence = {"driver runs": driver and f"CUDA {driver[0]}.{driver[1]}", "runtime is for": wanted and f"CUDA {wanted}"}
    if driver is None:
        return Check(label, "skipped", f"no NVIDIA driver{f'; the runtime is for CUDA {wanted}' if wanted else ''}", evidence)
    if wanted is None:
        return Check(label, "skipped", "the package of the runtime does not say for which CUDA it is", evidence)
    if driver[0] < wanted:
        return Check(label, "failed", f"it runs CUDA up to {driver[0]}.{driver[1]}, the runtime is for CUDA {wanted}", evidence)
    return Check(label, "passed", evidence=evidence)


def _cuda_of(module: str) -> int | None:
    """The CUDA that the installed package was made for: its wheel requires one whose name ends in it."""
    try:
        found = re.search(r"_cu(\d+)\b", " ".join(importlib.metadata.requires(module) or ()).replace("-", "_"))
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(found[1]) if found else None


def _library(directory: EngineDir, name: str, here: str, *, intact: bool) -> Check:
    """By its ELF header, and the TensorRT library that it asks for; it is not loaded."""
    label = f"{name}: plugin library"
    if not intact:
        return Check(label, "skipped", "the files do not match their manifest")
    data = files.read_inside(directory.root, PLUGIN_LIBRARY, 256 << 20)
    machine = struct.unpack_from("<H", data, 18)[0] if data[:4] == b"\x7fELF" and len(data) > 20 else None
    needs = re.search(rb"\0libnvinfer\.so\.(\d+)\0", data)
    evidence = {"for": ELF_MACHINES.get(machine or 0, f"machine {machine}"), "needs": needs and needs[0].strip(b"\0").decode()}
    if evidence["for"] != platform.machine():
        return Check(label, "failed", f"it is for {evidence['for']}, this is {platform.machine()}", evidence)
    if needs and here != MISSING and int(needs[1]) != _numbers(here)[0]:
        return Check(label, "failed", f"it needs {evidence['needs']}, here is TensorRT {here}", evidence)
    if needs and here == MISSING:
        return Check(label, "skipped", f"it needs {evidence['needs']}, and tensorrt is not installed", evidence)
    return Check(label, "passed", evidence=evidence)


def memory_need(directory: EngineDir, backend: str) -> dict[str, int]:
    """Bytes of the weights, of the KV cache of `max_batch_size` sequences, and an estimate of what the largest call needs beside them."""
    config, build = directory.config, directory.build
    rows = {row["name"]: row["bytes"] for row in directory.manifest["outputs"]}
    wider = 1 if build.dtype in BACKENDS[backend].dtypes else 2  # a type without kernels is computed, and held, in float32
    item, batch, segment = 4 if build.dtype == "float32" else 2 * wider, build.max_batch_size, build.max_segment
    attention = config.q_size + 2 * config.kv_size
    if not BACKENDS[backend].builds_plans or build.dtype == "float32":  # scores are written out: there is no fused kernel
        attention += config.num_heads * build.kv_capacity
    per_token = 4 * config.hidden_size + max(2 * attention, 3 * config.mlp_width)
    logits = 4 * batch * min(LOGIT_ROWS, segment) * config.vocab_size
    return {
        "weights": wider * sum(rows.get(name, 0) for name in directory.files_of(backend)),
        "KV cache": wider * config.kv_bytes_per_token(build.cache_dtype) * build.kv_capacity * batch,
        "workspace": batch * segment * per_token * item + logits,
    }


def _memory(directory: EngineDir, name: str, found: list[Gpu]) -> Iterator[Check]:
    """Of the machine; for plans, of each visible GPU."""
    label, on_gpu = f"{name}: memory at batch {directory.build.max_batch_size}", BACKENDS[name].builds_plans
    need = memory_need(directory, name)
    total = sum(need.values())
    parts = ", ".join(f"{part} {human_bytes(size)}" for part, size in need.items())
    text = f"{human_bytes(total)} ({parts}, estimated)"
    frees = [gpu.free_bytes for gpu in found] or [None] if on_gpu else [available_bytes()]
    for free, of_gpu in zip(frees, (_places(found) or [""]) if on_gpu else [""], strict=True):
        evidence = {"needed": text, "free": None if free is None else human_bytes(free), "bytes": {**need, "free": free}}
        if free is None:
            why = "no GPU whose free memory could be asked" if on_gpu else "the system does not say what is free"
            yield Check(f"{label}{of_gpu}", "skipped", f"{why}; needed: {text}", evidence)
        elif total > free:
            why = f"needed: {text}; free: {human_bytes(free)}; lower thoughtx-build --max_batch_size"
            yield Check(f"{label}{of_gpu}", "failed", why, evidence)
        else:
            yield Check(f"{label}{of_gpu}", "passed", evidence=evidence)
