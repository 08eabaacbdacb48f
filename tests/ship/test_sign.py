"""Signatures: ours are right for model-signing and its are right for us; whatever was done to a signed directory is refused by name."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracles
import planned
import pytest
from places import ROOT

pytest.importorskip("cryptography", reason='signatures need it: pip install ".[sign]"')
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat

from trtllm_thoughtx import Engine, report
from trtllm_thoughtx.backends import open_runner
from trtllm_thoughtx.build.engine_dir import EngineDir
from trtllm_thoughtx.cli import commands as cli
from trtllm_thoughtx.cli.params import run
from trtllm_thoughtx.errors import ThoughtxError
from trtllm_thoughtx.runtime import engine as engine_module
from trtllm_thoughtx.ship import envelope
from trtllm_thoughtx.ship import sign as sign_module
from trtllm_thoughtx.ship.sign import BOM, PROVENANCE, sign
from trtllm_thoughtx.ship.signature import SIGNATURE, verify, verify_signature

STORED = Path(__file__).parent / "signed"  # by model-signing 1.1.1, over the engine of tests/build/engines/schema0.zip
KINDS = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


def write_key(folder: Path, name: str, key: Any) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    private.chmod(0o600)
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_key(folder, name, make()) for name, make in {**KINDS, "other": KINDS["p256"]}.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planned.cpu_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def plain(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "e"))


@pytest.fixture
def signed(plain: Path, keys: dict) -> Path:
    sign(plain, keys["p256"][0])
    return plain


def statement(path: Path) -> dict[str, Any]:
    return json.loads(base64.b64decode(json.loads(path.read_text())["dsseEnvelope"]["payload"]))


# --- beside model-signing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["p256", "p384", "p521"])
def test_model_signing_reads_ours(kind: str, plain: Path, keys: dict) -> None:
    oracles.need("model_signing")
    sign(plain, keys[kind][0])
    words = ("model_signing", "verify", "key", plain, "--signature", plain / SIGNATURE, "--public_key", keys[kind][1])
    done = oracles.run(*words)
    assert done.returncode == 0, done.stderr
    (plain / "more.txt").write_text("more")
    assert oracles.run(*words).returncode != 0


@pytest.mark.parametrize("kind", ["p256", "p384", "p521"])
def test_we_read_model_signing(kind: str, plain: Path, keys: dict) -> None:
    oracles.need("model_signing")
    done = oracles.run("model_signing", "sign", "key", plain, "--signature", plain / SIGNATURE, "--private_key", keys[kind][0])
    assert done.returncode == 0, done.stderr
    assert verify(EngineDir.open(plain), keys[kind][1])
    (plain / "more.txt").write_text("more")
    refused(plain, keys[kind][1], r"more\.txt: added")


@pytest.mark.parametrize("kind", ["p256", "p384"])
def test_we_read_what_model_signing_wrote_once(kind: str, tmp_path: Path) -> None:
    """The same without that package."""
    with zipfile.ZipFile(ROOT / "tests" / "build" / "engines" / "schema0.zip") as archive:
        archive.extractall(tmp_path / "e")
    (tmp_path / "e" / "expected.json").unlink()
    shutil.copy(STORED / f"schema0-{kind}.sig", tmp_path / "e" / SIGNATURE)
    assert verify(EngineDir.open(tmp_path / "e"), STORED / f"{kind}.pem")
    with (tmp_path / "e" / "rank0.head.data").open("r+b") as file:
        file.write(b"x")
    with pytest.raises(ThoughtxError, match="do not match"):
        verify(EngineDir.open(tmp_path / "e"), STORED / f"{kind}.pem")
    refused(tmp_path / "e", STORED / f"{'p384' if kind == 'p256' else 'p256'}.pem", "another key")


# --- what was done to a signed directory --------------------------------------------------------------------------------


def refused(root: Path, key: Path, says: str, code: str = "E124") -> None:
    with pytest.raises(ThoughtxError) as caught:
        Engine.load(root, verify_key=key)
    assert caught.value.code == code
    assert re.search(says, f"{caught.value.what}: {caught.value.why}"), caught.value.render()


def edit(name: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        data = bytearray((root / name).read_bytes())
        data[len(data) // 2] ^= 1
        (root / name).write_bytes(data)

    return change


def swap_manifest(root: Path) -> None:
    """As an attacker does: another plan, and a manifest that lists it."""
    edit("rank0.data")(root)
    planned.again(root)


def two_signatures(root: Path) -> None:
    bundle = json.loads((root / SIGNATURE).read_text())
    bundle["dsseEnvelope"]["signatures"] *= 2
    (root / SIGNATURE).write_text(json.dumps(bundle))


def in_bundle(*path: str, value: object) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        bundle = node = json.loads((root / SIGNATURE).read_text())
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        (root / SIGNATURE).write_text(json.dumps(bundle))

    return change


def payload(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """The statement changed, and the old signature kept."""

    def made(root: Path) -> None:
        body = statement(root / SIGNATURE)
        change(body)
        in_bundle("dsseEnvelope", "payload", value=base64.b64encode(json.dumps(body).encode()).decode())(root)

    return made


CHANGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "changed": (edit("rank0.data"), "E120", r"rank0\.data: its content changed"),
    "changed bill": (edit(BOM), "E124", r"bom\.cdx\.json: changed since"),
    "changed provenance": (edit(PROVENANCE), "E124", r"provenance\.sigstore\.json: changed since"),
    "added": (lambda root: (root / "notes.txt").write_text("x"), "E124", r"notes\.txt: added"),
    "added folder": (lambda root: (root / "more").mkdir(), "E124", "more: added"),
    "removed": (lambda root: (root / "tokenizer.json").unlink(), "E124", r"tokenizer\.json: removed"),
    "renamed": (lambda root: (root / "rank0.data").rename(root / "weights.bin"), "E124", r"rank0\.data: renamed to weights\.bin"),
    "swapped manifest": (swap_manifest, "E124", r"(?s)manifest\.json: changed.*rank0\.data: manifest\.json has another sha256"),
    "no signature": (lambda root: (root / SIGNATURE).unlink(), "E124", "is not signed"),
    "empty signature": (lambda root: (root / SIGNATURE).write_text(""), "E124", "JSON"),
    "signature of something": (lambda root: (root / SIGNATURE).write_text("[]"), "E124", "malformed"),
    "two signatures": (two_signatures, "E124", "2 signatures"),
    "a keyless bundle": (in_bundle("verificationMaterial", value={"certificate": {}}), "E124", "holds certificate"),
    "another bundle": (in_bundle("mediaType", value="application/x"), "E124", "another form"),
    "no base64": (in_bundle("dsseEnvelope", "payload", value="?"), "E124", "not base64"),
    "another payload type": (in_bundle("dsseEnvelope", "payloadType", value="text/plain"), "E124", "something else"),
    "edited statement": (payload(lambda body: body["predicate"]["resources"].pop()), "E124", "the signature is wrong"),
    "a hint removed": (in_bundle("verificationMaterial", "publicKey", "hint", value=""), "", ""),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_done_is_named(name: str, signed: Path, keys: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    change, code, says = CHANGES[name]
    change(signed)
    if not code:
        assert verify(EngineDir.open(signed), keys["p256"][1])
        return
    monkeypatch.setattr(engine_module, "open_runner", lambda *a, **k: pytest.fail("an engine file was opened"))
    refused(signed, keys["p256"][1], says, code)


def test_without_a_key_the_manifest_alone_counts(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swap_manifest(signed)
    opened: list[object] = []
    monkeypatch.setattr(engine_module, "open_runner", lambda *a, **k: opened.append(open_runner(*a, **k)) or opened[-1])
    Engine.load(signed).close()
    assert opened


def resealed(root: Path, private: Path, change: Callable[[dict], object]) -> None:
    """A statement that was changed and signed again: the key is right, what it says is not."""
    body = statement(root / SIGNATURE)
    change(body)
    data = envelope.seal(body["subject"], body["predicateType"], body["predicate"], envelope.read_private_key(private))
    (root / SIGNATURE).write_bytes(data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.update(predicateType="https://slsa.dev/provenance/v1"), "predicateType"),
        (lambda body: body["predicate"]["serialization"].update(method="shards"), "sha256 of whole files"),
        (lambda body: body["predicate"]["serialization"].update(hash_type="blake3"), "sha256 of whole files"),
        (lambda body: body["predicate"]["resources"][0].update(name="../e"), "plain file name"),
        (lambda body: body["predicate"]["resources"].append(body["predicate"]["resources"][0]), "plain file name of its own"),
        (lambda body: body["predicate"]["resources"][0].update(digest="0" * 64), "digest of its subject"),
        (lambda body: body["subject"].append({}), "one subject"),
        (lambda body: body.update(predicate=None), "one subject"),
    ],
)
def test_a_signed_statement_is_read_strictly(change: Callable, says: str, signed: Path, keys: dict) -> None:
    resealed(signed, keys["p256"][0], change)
    refused(signed, keys["p256"][1], says)


def test_provenance_is_no_signature_of_the_files(signed: Path, keys: dict) -> None:
    """The same key signed it, and it names the same files."""
    (signed / SIGNATURE).write_bytes((signed / PROVENANCE).read_bytes())
    refused(signed, keys["p256"][1], "predicateType")


# --- every command ------------------------------------------------------------------------------------------------------


def ways(root: Path) -> dict[str, list[str]]:
    engine = ["--engine_dir", str(root), "--json", "--quiet"]
    (root.parent / "questions.jsonl").write_text(json.dumps({"prompt": "1 + 1", "answer": "2"}))
    return {
        "run": [*engine, "--input_ids", "1,2,3", "--max_new_tokens", "1"],
        "eval": [*engine, "--dataset", str(root.parent / "questions.jsonl"), "--max_new_tokens", "1"],
        "bench": [*engine, "--prompt_len", "2", "--max_new_tokens", "2", "--repeats", "1", "--warmup", "0"],
        "serve": [*engine, "--port", "0", "--max_num_seqs", "99"],
        "inspect": [str(root), "--json"],
    }


def test_every_command_that_loads_an_engine_asks_for_the_key(signed: Path, keys: dict, capsys: Any) -> None:
    loads = {name for name, command in cli.COMMANDS.items() if any(one.name == "engine_dir" for one in command.params)}
    assert loads - {"sign"} <= {name for name, command in cli.COMMANDS.items() if any(one.name == "verify_key" for one in command.params)}
    for command, words in ways(signed).items():
        for key, code in (("p256", None), ("other", "E124")):
            capsys.readouterr()
            status = run(cli.COMMANDS[command], f"thoughtx-{command}", [*words, "--verify_key", str(keys[key][1])])
            document = json.loads(capsys.readouterr().out)
            if code:
                assert (status, document["error"]["code"]) == (3, code), command
            elif command == "serve":  # refused behind the signature, for another reason
                assert document["error"]["code"] == "E122"
            else:
                assert status == 0, document


def test_validate_and_preflight_have_a_check_of_it(signed: Path, keys: dict, capsys: Any) -> None:
    for key, status in (("p256", "passed"), ("other", "failed")):
        words = [str(signed), "--preflight", "--verify_key", str(keys[key][1]), "--json"]
        assert run(cli.COMMANDS["inspect"], "thoughtx-inspect", words) == (status == "failed")
        check = json.loads(capsys.readouterr().out)["checks"][0]
        assert (check["name"], check["status"]) == ("signature", status)
    words = ["--engine_dir", str(signed), "--golden", "none", "--verify_key", str(keys["other"][1]), "--json", "-q"]
    assert run(cli.COMMANDS["validate"], "thoughtx-validate", words) == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["signature"]["status"] == "failed" and "nothing was loaded" in checks["onnxruntime: runs"]["reason"]
    assert run(cli.COMMANDS["inspect"], "thoughtx-inspect", [str(signed), "--preflight", "--json"]) == 4  # signed, and no key given
    capsys.readouterr()


def test_eval_asks_both_systems(signed: Path, keys: dict, built: Path, capsys: Any) -> None:
    words = [*ways(signed)["eval"], "--compare", str(built), "--verify_key", str(keys["p256"][1])]
    assert run(cli.COMMANDS["eval"], "thoughtx-eval", words) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "E124" and error["where"] == str(built)


# --- keys ---------------------------------------------------------------------------------------------------------------


def test_ed25519_signs_and_verifies(plain: Path, keys: dict) -> None:
    sign(plain, keys["ed25519"][0])
    assert verify(EngineDir.open(plain), keys["ed25519"][1])
    edit(BOM)(plain)
    refused(plain, keys["ed25519"][1], "changed since")


def bad_keys(folder: Path) -> dict[str, tuple[Path, str]]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = write_key(folder, "good", key)
    shared, encrypted, old = (
        folder / "shared.pem",
        folder / "encrypted.pem",
        write_key(folder, "k1", ec.generate_private_key(ec.SECP256K1())),
    )
    shutil.copy(private, shared)
    shared.chmod(0o640)
    encrypted.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    encrypted.chmod(0o600)
    text = folder / "text.pem"
    text.write_text("-----BEGIN PRIVATE KEY-----\nnot one\n-----END PRIVATE KEY-----\n")
    text.chmod(0o600)
    large = folder / "large.pem"
    large.write_bytes(b"-" * 100_000)
    large.chmod(0o600)
    return {
        "public": (public, "this is a public key"),
        "shared": (shared, "others may read"),
        "encrypted": (encrypted, "encrypted"),
        "no key": (text, "cannot be read"),
        "RSA": (write_key(folder, "rsa", rsa.generate_private_key(65537, 2048))[0], "not taken: RSA"),
        "another curve": (old[0], "not taken: secp256k1"),
        "large": (large, "too large"),
    }


def test_bad_keys_are_refused_and_leave_nothing(plain: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in plain.iterdir()}
    for name, (path, says) in bad_keys(tmp_path).items():
        with pytest.raises(ThoughtxError) as caught:
            sign(plain, path)
        assert caught.value.code == "E125" and says in caught.value.what + caught.value.why, name
    with pytest.raises(ThoughtxError) as caught:
        sign(plain, tmp_path / "none.pem")
    assert caught.value.code == "E101"
    assert {path.name: path.read_bytes() for path in plain.iterdir()} == before


def test_a_private_key_does_not_verify(signed: Path, keys: dict) -> None:
    refused(signed, keys["p256"][0], "this is a private key", "E125")


def advised(root: Path, words: list[str], capsys: Any) -> str:
    """The fix of a refused `thoughtx-...`, up to the end of its command."""
    capsys.readouterr()
    assert run(cli.COMMANDS[words[0]], f"thoughtx-{words[0]}", [*words[1:], "--json"]) == 3
    return str(json.loads(capsys.readouterr().out)["error"]["fix"])


def test_what_is_advised_works(plain: Path, keys: dict, capsys: Any, tmp_path: Path) -> None:
    private, public = (Path(shutil.copy(path, tmp_path)) for path in keys["p256"])
    private.chmod(0o644)
    signing = ["sign", "--engine_dir", str(plain), "--key", str(private)]
    verifying = ["inspect", str(plain), "--verify_key"]
    assert "thoughtx-sign --engine_dir ENGINE --key KEY.pem. Nothing" in advised(plain, [*verifying, str(public)], capsys)
    assert subprocess.run(advised(plain, signing, capsys), shell=True, check=True).returncode == 0  # chmod
    assert run(cli.COMMANDS["sign"], "thoughtx-sign", signing[1:]) == 0
    capsys.readouterr()
    if shutil.which("openssl"):
        line = advised(plain, [*verifying, str(private)], capsys).partition(",")[0]
        subprocess.run(line.replace("KEY.pem", str(private)).replace("PUB.pem", str(tmp_path / "new.pub")), shell=True, check=True)
        assert run(cli.COMMANDS["inspect"], "thoughtx-inspect", [*verifying[1:], str(tmp_path / "new.pub")]) == 0
    assert "--force" in advised(plain, signing, capsys)
    assert run(cli.COMMANDS["sign"], "thoughtx-sign", [*signing[1:], "--force"]) == 0


def test_without_cryptography_the_extra_is_named(plain: Path, keys: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtllm_thoughtx.process.outside.importlib.util.find_spec", lambda name: None)
    for use in (lambda: sign(plain, keys["p256"][0]), lambda: Engine.load(plain, verify_key=keys["p256"][1])):
        with pytest.raises(ThoughtxError) as caught:
            use()
        assert caught.value.code == "E201" and "[sign]" in caught.value.fix


# --- signing ------------------------------------------------------------------------------------------------------------


def test_a_directory_that_is_not_as_it_was_built_is_not_signed(plain: Path, keys: dict) -> None:
    (plain / "notes.txt").write_text("x")
    with pytest.raises(ThoughtxError) as caught:
        sign(plain, keys["p256"][0])
    assert caught.value.code == "E130" and "notes.txt" in caught.value.why
    (plain / "notes.txt").unlink()
    edit("rank0.data")(plain)
    with pytest.raises(ThoughtxError) as caught:
        sign(plain, keys["p256"][0])
    assert caught.value.code == "E120" and not (plain / SIGNATURE).exists()


def test_a_signature_is_replaced_when_asked(signed: Path, keys: dict) -> None:
    with pytest.raises(ThoughtxError) as caught:
        sign(signed, keys["other"][0])
    assert caught.value.code == "E130" and "--force" in caught.value.fix
    sign(signed, keys["other"][0], force=True)
    assert verify(EngineDir.open(signed), keys["other"][1])


def test_a_write_that_fails_leaves_no_part(plain: Path, keys: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real, count = sorted(os.listdir(plain)), sign_module.atomic_file, iter(range(9))

    def full(path: Path) -> Any:
        if next(count) == 1:
            raise ThoughtxError("E203", "the disk is full", where=str(path), why="x", fix="x")
        return real(path)

    monkeypatch.setattr(sign_module, "atomic_file", full)
    with pytest.raises(ThoughtxError, match="full"):
        sign(plain, keys["p256"][0])
    assert sorted(os.listdir(plain)) == before


def test_a_directory_that_cannot_be_written_is_refused(plain: Path, keys: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ThoughtxError) as caught:
        sign(plain, keys["p256"][0])
    assert caught.value.code == "E130" and "cannot be written" in caught.value.what


def test_files_are_read_once_for_hash_and_signature(signed: Path, keys: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = report.sha256_of
    monkeypatch.setattr(report, "sha256_of", lambda path, *more: read.append(Path(path).name) or real(path, *more))
    monkeypatch.setattr("trtllm_thoughtx.ship.signature.sha256_inside", lambda root, name: read.append(name) or _own_sum(root, name))
    assert verify(EngineDir.open(signed), keys["p256"][1])
    assert len(read) == len(set(read)) and set(read) == {path.name for path in signed.iterdir()} - {SIGNATURE}


def _own_sum(root: Path, name: str) -> str:
    import hashlib

    return hashlib.sha256((root / name).read_bytes()).hexdigest()


def test_inspect_says_whether_it_is_signed(signed: Path, keys: dict, capsys: Any) -> None:
    run(cli.COMMANDS["inspect"], "thoughtx-inspect", [str(signed), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["signature"], found["unlisted_files"]) == ("not verified (--verify_key)", [])
    run(cli.COMMANDS["inspect"], "thoughtx-inspect", [str(signed), "--json", "--verify_key", str(keys["p256"][1])])
    assert json.loads(capsys.readouterr().out)["signature"].startswith("by the key ")
    words = [str(signed.parent / "e" / "rank0.onnx"), "--json", "--verify_key", str(keys["p256"][1])]
    assert run(cli.COMMANDS["inspect"], "thoughtx-inspect", words) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "E001"


# --- provenance and bill of materials -----------------------------------------------------------------------------------


def test_provenance_is_that_of_the_manifest(signed: Path, keys: dict) -> None:
    body = envelope.unseal((signed / PROVENANCE).read_bytes(), envelope.read_public_key(keys["p256"][1]), "here")
    manifest = report.read_manifest(signed)
    assert body["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {one["name"]: one["digest"]["sha256"] for one in body["subject"]} == {row["name"]: row["sha256"] for row in manifest["outputs"]}
    definition, details = body["predicate"]["buildDefinition"], body["predicate"]["runDetails"]
    assert definition["externalParameters"] == {"command": manifest["command"]}
    assert definition["internalParameters"]["config"] == manifest["config"]
    sums = {one["name"]: one["digest"]["sha256"] for one in definition["resolvedDependencies"] if "digest" in one}
    assert sums == {row["name"]: row["sha256"] for row in manifest["inputs"]}
    assert {"name": "onnx", "uri": f"pkg:pypi/onnx@{manifest['environment']['onnx']}"} in definition["resolvedDependencies"]
    assert details["builder"]["id"] and details["metadata"]["finishedOn"].endswith("Z")


def test_the_bill_names_every_file_and_repeats(signed: Path, keys: dict) -> None:
    bom = json.loads((signed / BOM).read_text())
    manifest = report.read_manifest(signed)
    files = {one["name"]: one["hashes"][0]["content"] for one in bom["components"] if one["bom-ref"].startswith("file:")}
    assert files == {row["name"]: row["sha256"] for row in manifest["outputs"]}
    refs = [one["bom-ref"] for one in bom["components"]]
    assert len(refs) == len(set(refs)) and {one["ref"] for one in bom["dependencies"]} <= {*refs, "engine"}
    assert bom["metadata"]["component"]["type"] == "machine-learning-model"
    before = (signed / BOM).read_bytes()
    sign(signed, keys["p256"][0], force=True)
    assert (signed / BOM).read_bytes() == before


VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1]).read())
sys.exit(str(wrong) if wrong else 0)
"""


def test_the_bill_validates_against_its_schema(signed: Path) -> None:
    oracles.need("cyclonedx.validation.json")
    done = oracles.run("python", "-c", VALIDATE, signed / BOM)
    assert done.returncode == 0, done.stderr
    bom = json.loads((signed / BOM).read_text())
    bom["metadata"]["component"]["type"] = "engine"
    (signed / "wrong.json").write_text(json.dumps(bom))
    assert oracles.run("python", "-c", VALIDATE, signed / "wrong.json").returncode == 1


def test_verify_signature_needs_no_hash_of_a_listed_file(signed: Path, keys: dict) -> None:
    """What it compares is the manifest's sums: a changed file is the manifest's to find."""
    edit("rank0.data")(signed)
    assert verify_signature(signed, keys["p256"][1], report.read_manifest(signed))
