"""`thoughtx-export --oci`: a layout that a real registry takes and that other people's clients read back, file for file."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import oracles
import planned
import pytest

from trtllm_thoughtx import report
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.ship.export import contents as module
from trtllm_thoughtx.ship.export import oci as module_oci

REGISTRIES = ("docker-registry", "registry")
VERSIONS = {"tensorrt_rtx": "1.7.1.116"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = planned.cpu_engine(tmp_path_factory.mktemp("engine"))
    (root / "LICENSE").write_text("as you like")
    planned.add_plans(root, {"tensorrt": b"plan"}, VERSIONS, library=b"\x7fELF")
    return root


@pytest.fixture
def engine(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "e"))


def export(*words: object) -> int:
    return run(cli.COMMANDS["export"], "thoughtx-export", [*map(str, words), "-q", "--json"])


def blob(layout: Path, digest: str) -> bytes:
    return (layout / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()


def model_of(layout: Path) -> dict[str, Any]:
    return dict(json.loads(blob(layout, json.loads((layout / "index.json").read_text())["manifests"][0]["digest"])))


# --- the layout ---------------------------------------------------------------------------------------------------------


def test_layers_are_the_files_of_the_manifest(engine: Path, tmp_path: Path, capsys: Any) -> None:
    assert export("--engine_dir", engine, "--oci", tmp_path / "o", "--tag", "v1") == 0
    summary = json.loads(capsys.readouterr().out)
    layout = tmp_path / "o"
    index = json.loads((layout / "index.json").read_text())
    assert json.loads((layout / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = index["manifests"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": "v1"} and entry["digest"] == summary["digest"]
    for path in (layout / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    model = model_of(layout)
    layers = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in model["layers"]}
    sums = {row["name"]: row["sha256"] for row in report.read_manifest(engine)["outputs"]}
    assert {name: layer["digest"] for name, layer in layers.items() if name != "manifest.json"} == {
        n: f"sha256:{s}" for n, s in sums.items()
    }
    assert all(len(blob(layout, layer["digest"])) == layer["size"] for layer in (*layers.values(), model["config"]))
    kinds = {name: layer["mediaType"].removeprefix("application/vnd.cncf.model.").removesuffix(".v1.raw") for name, layer in layers.items()}
    assert kinds["rank0.data"] == kinds["rank0.onnx"] == kinds["rank0.trt.engine"] == "weight"
    assert kinds["config.json"] == kinds["tokenizer.json"] == kinds["manifest.json"] == "weight.config"
    assert kinds["LICENSE"] == "doc" and kinds["libthoughtx_chunked_attention.so"] == "code"
    config = json.loads(blob(layout, model["config"]["digest"]))
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in model["layers"]]
    assert (config["config"]["precision"], config["descriptor"]["family"]) == ("float32", "qwen2")


def test_the_same_directory_gives_the_same_bytes(engine: Path, tmp_path: Path) -> None:
    for name in "ab":
        assert export("--engine_dir", engine, "--oci", tmp_path / name) == 0
    files = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path / "b"): path.read_bytes() for path in (tmp_path / "b").rglob("*") if path.is_file()}


VALIDATE = """
import json, sys, jsonschema
from modelpack_client.schema import CONFIG_SCHEMA
jsonschema.validate(json.load(open(sys.argv[1])), CONFIG_SCHEMA)
"""


def test_the_configuration_validates_against_modelpacks_schema(engine: Path, tmp_path: Path) -> None:
    oracles.need("modelpack_client")
    assert export("--engine_dir", engine, "--oci", tmp_path / "o") == 0
    (tmp_path / "config.json").write_bytes(blob(tmp_path / "o", model_of(tmp_path / "o")["config"]["digest"]))
    done = oracles.run("python", "-c", VALIDATE, tmp_path / "config.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# --- a registry ---------------------------------------------------------------------------------------------------------


class Registry:
    """A registry of this machine's, on a port of its own, whose store outlives it."""

    def __init__(self, program: str, work: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address, self.log = f"127.0.0.1:{self.port}", work / "registry.log"
        storage = {"filesystem": {"rootdirectory": str(work / "store")}}
        settings = {"version": 0.1, "log": {"level": "error"}, "storage": storage, "http": {"addr": self.address}}
        (work / "registry.yml").write_text(json.dumps(settings))
        self.words = [program, "serve", work / "registry.yml"]
        self.start()

    def start(self) -> None:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log)
        while self.process.poll() is None:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    break
            time.sleep(0.05)
        assert self.process.poll() is None, self.log.read_text()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def ask(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        with contextlib.closing(connection):
            connection.request("HEAD", path, headers={"Accept": module_oci.MANIFEST_TYPE})
            return connection.getresponse().status


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    path = f"{oracles.PLACE / 'bin'}{os.pathsep}{os.environ['PATH']}"
    program = next((found for name in REGISTRIES if (found := shutil.which(name, path=path))), None)
    if program is None:
        pytest.skip(f"no registry here: none of {', '.join(REGISTRIES)} is installed (Debian: apt-get install docker-registry)")
    registry = Registry(program, tmp_path)
    yield registry
    registry.stop()


PUSH_AND_PULL = """
import json, os, pathlib, signal, sys, time
import oras.client, oras.provider
from modelpack_client import ModelPackClient
layout, target, work = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
victim = int(sys.argv[4]) if len(sys.argv) > 4 else None  # a registry to be killed behind the third layer
place = lambda digest: layout / "blobs" / "sha256" / digest.removeprefix("sha256:")
entry = json.loads((layout / "index.json").read_text())["manifests"][0]
body = place(entry["digest"]).read_bytes()
model = json.loads(body)
registry = oras.provider.Registry(insecure=True)
container = registry.get_container(target)
for number, one in enumerate((*model["layers"], model["config"])):
    if number == 3 and victim is not None:
        os.kill(victim, signal.SIGKILL)
        time.sleep = lambda seconds: None  # the client tries five times, minutes apart
    assert registry.upload_blob(str(place(one["digest"])), container, one).status_code in (200, 201, 202), one
url = f"http://{container.manifest_url()}"
answer = registry.do_request(url, "PUT", data=body, headers={"Content-Type": entry["mediaType"]})
assert answer.status_code == 201 and answer.headers["Docker-Content-Digest"] == entry["digest"], answer.text
oras.client.OrasClient(insecure=True).pull(target=target, outdir=str(work / "oras"))
ModelPackClient(insecure=True).pull(target, work / "modelpack")
"""


@pytest.mark.slow
def test_a_registry_gives_back_what_was_exported(engine: Path, tmp_path: Path, registry: Registry) -> None:
    oracles.need("modelpack_client")
    assert export("--engine_dir", engine, "--oci", tmp_path / "o", "--tag", "v1") == 0
    done = oracles.run("python", "-c", PUSH_AND_PULL, tmp_path / "o", f"{registry.address}/models/tiny:v1", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in engine.iterdir()}
    for client in ("oras", "modelpack"):
        pulled = tmp_path / client
        assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pulled.iterdir()} == wanted, client
        EngineDir.open(pulled).verify()


@pytest.mark.slow
def test_a_registry_that_closes_in_mid_push_holds_nothing_yet(engine: Path, tmp_path: Path, registry: Registry) -> None:
    """What arrived stays, no tag points to it, and the same push ends the work."""
    oracles.need("modelpack_client")
    assert export("--engine_dir", engine, "--oci", tmp_path / "o", "--tag", "v1") == 0
    words = ("python", "-c", PUSH_AND_PULL, tmp_path / "o", f"{registry.address}/models/tiny:v1", tmp_path)
    cut = oracles.run(*words, registry.process.pid, cwd=tmp_path)
    assert cut.returncode == 1 and "onnection" in cut.stderr, cut.stderr[-3000:]
    registry.process.wait()
    registry.start()
    layers = [layer["digest"] for layer in model_of(tmp_path / "o")["layers"]]
    assert registry.ask("/v2/models/tiny/manifests/v1") == 404
    assert [registry.ask(f"/v2/models/tiny/blobs/{digest}") for digest in layers[:4]] == [200, 200, 200, 404]
    again = oracles.run(*words, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert registry.ask("/v2/models/tiny/manifests/v1") == 200
    EngineDir.open(tmp_path / "oras").verify()


def test_a_signature_travels_along(engine: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("cryptography", reason='signatures need it: pip install ".[sign]"')
    from trtllm_thoughtx.ship.sign import MADE

    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", tmp_path / "k.pem"], check=True)
    (tmp_path / "k.pem").chmod(0o600)
    for name in ("k", "other"):
        made = subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout"], capture_output=True, check=True).stdout
        (tmp_path / f"{name}.pem").write_bytes(made)
        subprocess.run(["openssl", "pkey", "-in", tmp_path / f"{name}.pem", "-pubout", "-out", tmp_path / f"{name}.pub"], check=True)
    assert run(cli.COMMANDS["sign"], "thoughtx-sign", ["--engine_dir", str(engine), "--key", str(tmp_path / "k.pem")]) == 0
    words = ("--engine_dir", engine, "--oci", tmp_path / "o", "--verify_key")
    assert export(*words, tmp_path / "other.pub") == 3 and not (tmp_path / "o").exists()
    assert export(*words, tmp_path / "k.pub") == 0
    names = {layer["annotations"]["org.opencontainers.image.title"] for layer in model_of(tmp_path / "o")["layers"]}
    assert set(MADE) <= names == {path.name for path in engine.iterdir()}


# --- refusals -----------------------------------------------------------------------------------------------------------


def test_refusals_leave_nothing(engine: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")

    def refused(code: str, *words: object) -> dict[str, str]:
        capsys.readouterr()
        assert export(*words) in (2, 3)
        error = dict(json.loads(capsys.readouterr().out)["error"])
        assert error["code"] == code and all(error[part] for part in ("what", "where", "why", "fix")), error
        assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".o.*"))
        return error

    refused("E101", "--engine_dir", tmp_path / "none", "--oci", tmp_path / "o")
    for target in (tmp_path / "taken", engine / "o", tmp_path / "none" / "o"):
        refused("E130", "--engine_dir", engine, "--oci", target)
    refused("E001", "--engine_dir", engine, "--oci", tmp_path / "o", "--tag", "a b")
    refused("E124", "--engine_dir", engine, "--oci", tmp_path / "o", "--verify_key", unsigned_key(tmp_path))
    (engine / "notes.txt").write_text("x")
    assert "notes.txt" in refused("E130", "--engine_dir", engine, "--oci", tmp_path / "o")["why"]
    (engine / "notes.txt").unlink()
    (engine / "rank0.data").write_bytes(b"another")
    refused("E120", "--engine_dir", engine, "--oci", tmp_path / "o")


def unsigned_key(folder: Path) -> Path:
    pytest.importorskip("cryptography", reason='signatures need it: pip install ".[sign]"')
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    path = folder / "some.pub"
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    path.write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def test_a_file_that_changes_meanwhile_is_refused(engine: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.verify

    def verify(directory: EngineDir, key: Path | None) -> None:
        real(directory, key)
        (engine / "rank0.data").write_bytes(b"another")

    monkeypatch.setattr(module, "verify", verify)
    assert export("--engine_dir", engine, "--oci", tmp_path / "o") == 3
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "E111" and not (tmp_path / "o").exists()
