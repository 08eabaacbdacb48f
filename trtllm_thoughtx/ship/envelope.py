"""A signed statement as OpenSSF Model Signing, Sigstore and in-toto have it: a statement in JSON, in a DSSE envelope, in a Sigstore bundle.

The signature is over `DSSEv1 LENGTH TYPE LENGTH PAYLOAD`. Keys are PEM files: EC P-256 (with SHA-256), P-384 (SHA-384), P-521 (SHA-512), or
Ed25519. The bundle names the key by the sha256 of its public PEM text, so that a wrong key is told from a wrong signature. No network, no
certificate, no time stamp: whoever has the public key can verify, for ever. `model-signing` reads the EC ones.

A bundle is hostile until `unseal` returns: it is read strictly, and nothing of its payload is believed before the signature is right.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_thoughtx.errors import ThoughtxError, shown
from trtllm_thoughtx.files import read_named
from trtllm_thoughtx.process.outside import need
from trtllm_thoughtx.strictjson import parse_json

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
HASH_OF = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
KEY_BYTES = 1 << 16
KINDS = "EC P-256, P-384, P-521 and Ed25519"


def read_private_key(path: Path) -> Any:
    """The key to sign with. E125 for a file that is none, that is encrypted, or that others may read."""
    text = _pem(path)
    if b"PUBLIC KEY" in text:
        raise _bad_key(path, "this is a public key", "signing takes the private one", "give the private key's PEM file")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise _bad_key(path, "others may read the private key", "its permission bits say so", f"chmod 600 {shown(str(path))}")
    if b"ENCRYPTED" in text:
        fix = "openssl pkey -in KEY.pem -out PLAIN.pem, in a place that only you read; remove it after signing"
        raise _bad_key(path, "the private key is encrypted", "there is nobody to ask for its password", fix)
    return _loaded(path, text, "load_pem_private_key", None)


def read_public_key(path: Path) -> Any:
    """The key to verify with. E125 for a file that is none."""
    text = _pem(path)
    if b"PRIVATE KEY" in text:
        fix = "openssl pkey -in KEY.pem -pubout -out PUB.pem, and give PUB.pem"
        raise _bad_key(path, "this is a private key", "verifying takes the public one, and the private one should stay at home", fix)
    return _loaded(path, text, "load_pem_public_key")


def fingerprint(public: Any) -> str:
    """sha256 of the public key's PEM text, by which a bundle names its key."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def seal(subjects: list[dict[str, Any]], predicate_type: str, predicate: Mapping[str, Any], private: Any) -> bytes:
    """A bundle, as the content of a file."""
    statement = {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": predicate_type, "predicate": predicate}
    payload = json.dumps(statement, sort_keys=True, separators=(",", ":")).encode()
    bundle = {
        "mediaType": BUNDLE_TYPE,
        "verificationMaterial": {"publicKey": {"hint": fingerprint(private.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(private.sign(_signed_text(payload), *_algorithm(private))).decode(), "keyid": ""}],
        },
    }
    return (json.dumps(bundle, indent=2) + "\n").encode()


def unseal(data: bytes, public: Any, where: str) -> dict[str, Any]:
    """The statement of a bundle that `public` signed. E124 for any other, and for what is no bundle."""
    from cryptography.exceptions import InvalidSignature

    bundle = parse_json(data, where, "E124")
    material, envelope = (_get(bundle, key, dict, where) for key in ("verificationMaterial", "dsseEnvelope"))
    if (kind := _get(bundle, "mediaType", str, where)) != BUNDLE_TYPE:
        raise refused(where, "the signature has another form", f"its mediaType is {shown(kind)}, not {BUNDLE_TYPE}")
    if "publicKey" not in material:
        others = ", ".join(map(shown, sorted(material))) or "nothing"
        raise refused(where, "the signature was not made with a key", f"its verificationMaterial holds {others}: sign with a key")
    signatures = _get(envelope, "signatures", list, where)
    if len(signatures) != 1:
        raise refused(where, f"the bundle has {len(signatures)} signatures", "exactly one is taken: any one of several could be forged")
    hint = _get(_get(material, "publicKey", dict, where), "hint", str, where)
    if hint and hint != (ours := fingerprint(public)):
        raise refused(where, "it was signed with another key", f"with the key {shown(hint, 64)}, the given one is {ours}")
    payload = _base64(envelope, "payload", where)
    try:
        public.verify(_base64(signatures[0], "sig", where), _signed_text(payload), *_algorithm(public))
    except InvalidSignature:
        why = "the signature does not fit the given key and what was signed: it is another's, or was changed"
        raise refused(where, "the signature is wrong", why) from None
    if (kind := _get(envelope, "payloadType", str, where)) != PAYLOAD_TYPE:
        raise refused(where, "something else was signed", f"the payloadType is {shown(kind)}, not {PAYLOAD_TYPE}")
    statement = parse_json(payload, where, "E124")
    if (kind := _get(statement, "_type", str, where)) != STATEMENT_TYPE:
        raise refused(where, "something else was signed", f"the statement's _type is {shown(kind)}, not {STATEMENT_TYPE}")
    return dict(statement)


def refused(where: str, what: str, why: str, fix: str = "") -> ThoughtxError:
    """E124. Nothing of the directory is loaded then."""
    fix = fix or "get the directory and its signature again from who signed it, and the public key from somebody you trust"
    return ThoughtxError("E124", what, where=where, why=why, fix=f"{fix}. Nothing was loaded.")


def _signed_text(payload: bytes) -> bytes:
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _algorithm(key: Any) -> tuple[Any, ...]:
    """What `sign` and `verify` of this key take beside the text: its curve's hash; Ed25519 has its own."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    curve = getattr(key, "curve", None)
    return () if curve is None else (ec.ECDSA(getattr(hashes, HASH_OF[curve.name])()),)


def _pem(path: Path) -> bytes:
    fix = 'pip install "trtllm-thoughtx[sign]"'
    need(("cryptography",), "signatures need the package cryptography", where=str(path), fix=fix)
    return read_named(path, KEY_BYTES, code="E125")


def _loaded(path: Path, text: bytes, loader: str, *more: None) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    make = "make one with: openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem"
    try:
        key = getattr(serialization, loader)(text, *more)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _bad_key(path, "the key file cannot be read", shown(str(error)) or "it is no key in PEM form", make) from None
    kind = type(key).__name__.lstrip("_").removesuffix("Key").removesuffix("Private").removesuffix("Public")
    name = getattr(getattr(key, "curve", None), "name", None)
    if name not in HASH_OF if name else kind != "Ed25519":
        raise _bad_key(path, f"keys of this kind are not taken: {shown(name or kind)}", f"these are: {KINDS}", make)
    return key


def _bad_key(path: Path, what: str, why: str, fix: str) -> ThoughtxError:
    return ThoughtxError("E125", what, where=str(path), why=why, fix=fix)


def _get(raw: object, key: str, kind: type, where: str) -> Any:
    value = raw.get(key) if isinstance(raw, dict) else None
    if not isinstance(value, kind):
        raise refused(where, "the signature is malformed", f"{key} is {shown(value)}")
    return value


def _base64(raw: object, key: str, where: str) -> bytes:
    try:
        return base64.b64decode(_get(raw, key, str, where), validate=True)
    except (binascii.Error, ValueError):
        raise refused(where, "the signature is malformed", f"{key} is not base64") from None
