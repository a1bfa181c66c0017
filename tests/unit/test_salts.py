"""Tenant salts (invariant 2): different users, epochs and servers never share one."""

from __future__ import annotations

import itertools

import pytest

from memos_vllm.errors import RequestError
from memos_vllm.integration import salts
from memos_vllm.types import Principal


def test_salts_differ_by_secret_tenant_user_and_epoch() -> None:
    made = [
        salts.salt_of(secret, Principal(tenant, user), epoch)
        for secret, tenant, user, epoch in itertools.product((b"s", b"t"), ("a", "ab"), ("bc", "c"), (0, 1))
    ]
    assert len(set(made)) == len(made), "('a', 'bc') and ('ab', 'c') must differ too"


def test_a_clients_salt_narrows_and_is_forgotten_with_the_users() -> None:
    salt = salts.salt_of(b"s", Principal("t", "u"), 0)
    narrowed = salts.combine(salt, "mine")
    assert salts.combine(salt, None) == salt != narrowed != salts.combine(salt, "other")
    assert salts.is_memory_salt(narrowed)
    assert salts.tag(narrowed) == salts.tag(salt) != salts.tag(salts.salt_of(b"s", Principal("t", "v"), 0))
    assert len(narrowed) <= 128, "vLLM's limit"


def test_an_approximate_store_is_a_salt_of_its_own_under_the_users_tag() -> None:
    salt = salts.salt_of(b"s", Principal("t", "u"), 0)
    approximate = salts.of_store(salt, "fp8")
    assert salts.of_store(salt, "auto") == salt != approximate
    assert salts.is_memory_salt(approximate) and salts.tag(approximate) == salts.tag(salt)
    narrowed = salts.combine(approximate, "mine")
    assert narrowed != salts.combine(salt, "mine") and salts.tag(narrowed) == salts.tag(salt)
    assert len(narrowed) <= 128, "vLLM's limit"


def test_a_client_cannot_claim_a_memory_salt() -> None:
    with pytest.raises(RequestError):
        salts.check_client_salt("memos:" + "0" * 64)
    salts.check_client_salt("anything else")
    salts.check_client_salt(None)


def test_only_the_secret_makes_a_genuine_salt() -> None:
    salt = salts.salt_of(b"s", Principal("t", "u"), 0)
    genuine = [salt, salts.of_store(salt, "fp8"), salts.combine(salts.of_store(salt, "fp8"), "mine")]
    assert all(salts.is_genuine(b"s", each) for each in genuine)
    forged = ["memos:", "memos:x", "memos:" + "0" * 80, "memos::", salt[:-1], "memos:é" + "0" * 79]
    other = salts.salt_of(b"t", Principal("t", "u"), 0)
    mixed = salt[:-16] + other[-16:]
    assert not any(salts.is_genuine(b"s", each) for each in [*forged, other, mixed])
    assert not salts.is_memory_salt(salts.foreign(salt))
