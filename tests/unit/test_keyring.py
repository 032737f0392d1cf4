from __future__ import annotations

import copy
import hashlib
import hmac
import pickle
import traceback
from threading import Thread
from typing import Any

import pytest

from kq import errors
from kq.keyring import Keyring

#: Looks like a key id too, so that it can stand in the wrong place.
CANARY = "canary-5b1e0d9a7c3f4f0c8e2a6d4b1f7e9c35"
OTHER = b"\x00\xff" * 16


def shown(error: BaseException) -> str:
    """Return everything that a log could show of an error, its causes included."""
    chain = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    # The line of the test itself is not what a user would see of it.
    return f"{error!s} {error!r} {error.args!r} {getattr(error, 'details', '')!r} {chain}"


def test_a_mac_is_hmac_sha256() -> None:
    """Text secrets are taken as UTF-8, and every key makes its own MAC, again and again."""
    ring = Keyring({"k1": CANARY, "k2": OTHER})
    for _ in range(3):
        assert ring.mac("k1", b"data") == hmac.digest(CANARY.encode(), b"data", hashlib.sha256)
        assert ring.mac("k2", b"data") == hmac.digest(OTHER, b"data", hashlib.sha256)
    assert Keyring({"k": "é" * 16}).mac("k", b"") == hmac.digest("é".encode() * 16, b"", hashlib.sha256)


def test_threads_share_a_keyring() -> None:
    """MACs made at the same time in several threads do not disturb each other."""
    ring = Keyring({"k1": CANARY})
    wrong: list[bytes] = []

    def work(data: bytes) -> None:
        expected = hmac.digest(CANARY.encode(), data, hashlib.sha256)
        wrong.extend(data for _ in range(500) if ring.mac("k1", data) != expected)

    threads = [Thread(target=work, args=(bytes([i]) * 5000,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_ids() -> None:
    """A keyring knows its keys by id, and which of them signs."""
    ring = Keyring({"k1": CANARY, "2026-11.b_c": OTHER, "x" * 64: OTHER}, sign_with="k1")
    assert ring.key_ids == ("k1", "2026-11.b_c", "x" * 64)
    assert "k1" in ring
    assert "k2" not in ring
    assert ring.sign_with == "k1"
    assert Keyring({"k1": CANARY}).sign_with is None
    with pytest.raises(KeyError, match="k9"):
        ring.mac("k9", b"")


@pytest.mark.parametrize("key_id", ["", "x" * 65, "a b", "é", "k\n", "k/1", 1, None, b"k"])
def test_ids_that_are_refused(key_id: Any) -> None:
    """An id that does not fit into a signature is refused, and not shown: it may be the secret."""
    with pytest.raises(errors.Invalid, match="signing key 2 of 2: expected an id of 1 to 64 letters"):
        Keyring({"k1": CANARY, key_id: OTHER})


@pytest.mark.parametrize("secret", ["", "x" * 31, b"x" * 31, "é" * 15])
def test_short_secrets_are_refused(secret: Any) -> None:
    """A secret of fewer than 32 bytes is refused, with a command that makes a good one."""
    with pytest.raises(errors.Invalid, match=rf"signing key 1 of 1: .* at least 32 bytes, got {len(secret.encode()) if isinstance(secret, str) else 31}; make one with: python -c \"import secrets; print\(secrets\.token_urlsafe\(32\)\)\""):  # fmt: skip # noqa: E501
        Keyring({"k1": secret})
    assert Keyring({"k1": b"x" * 32}).key_ids == ("k1",)


@pytest.mark.parametrize("secret", [None, 17, ["x"], bytearray(32), "\ud800" * 32], ids=repr)
def test_secrets_of_other_types_are_refused(secret: Any) -> None:
    """What is neither bytes nor text is refused with its type."""
    with pytest.raises(errors.Invalid, match=f"as a secret; got {type(secret).__name__}; make one"):
        Keyring({"k1": secret})


@pytest.mark.parametrize(("keys", "got"), [({}, "an empty one"), (None, "NoneType"), (CANARY, "str"), ([CANARY], "list")])  # fmt: skip # noqa: E501
def test_keys_are_a_mapping(keys: Any, got: str) -> None:
    """No keys at all are a mistake, and so is a secret without an id."""
    with pytest.raises(errors.Invalid, match=f"expected a mapping of key ids to secrets, got {got}"):
        Keyring(keys)


@pytest.mark.parametrize("sign_with", ["k2", "", CANARY, 1, ["k1"]])
def test_the_key_that_signs_is_one_of_them(sign_with: Any) -> None:
    """``sign_with`` names one of the keys."""
    with pytest.raises(errors.Invalid, match="sign_with: expected the id of one of the 1 signing keys"):
        Keyring({"k1": CANARY}, sign_with=sign_with)


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_keyring_is_not_copied(how: Any) -> None:
    """A keyring goes nowhere: neither pickled nor copied."""
    with pytest.raises(TypeError, match="a keyring cannot be pickled or copied"):
        how(Keyring({"k1": CANARY}))


def test_a_keyring_shows_ids_only() -> None:
    """Neither repr nor str nor any attribute holds a secret."""
    ring = Keyring({"k1": CANARY, "k2": OTHER}, sign_with="k2")
    assert repr(ring) == str(ring) == "<Keyring of k1, k2; signs with k2>"
    assert repr(Keyring({"k1": CANARY})) == "<Keyring of k1; verifies only>"
    attributes = " ".join(repr(getattr(ring, name)) for name in dir(ring))
    assert CANARY not in attributes
    assert repr(OTHER)[2:-1] not in attributes


@pytest.mark.parametrize(
    "arguments",
    [
        ({"k1": CANARY[:31]},),
        ({CANARY: "k1"},),
        ({CANARY + " ": OTHER},),
        ({"": CANARY},),
        ({"k1": [CANARY]},),
        ({"k1": CANARY + "\ud800"},),
        (CANARY,),
        ([CANARY],),
        ({"k1": OTHER}, CANARY),
        ({"k1": OTHER}, [CANARY]),
    ],
    ids=[
        "short",
        "swapped",
        "swapped and long",
        "no id",
        "list",
        "surrogate",
        "bare",
        "bare list",
        "sign_with",
        "signs",
    ],
)
def test_no_error_shows_a_secret(arguments: Any) -> None:
    """Whatever is wrong with a keyring, the error, its text and its traceback hold no secret."""
    with pytest.raises(errors.Invalid) as caught:
        Keyring(*arguments)
    assert CANARY[:31] not in shown(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
