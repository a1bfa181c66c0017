"""Who a request acts for (invariant 2, at the door): a body never widens what the credential gives."""

from __future__ import annotations

import hashlib

import pytest

from memos_vllm.config import IdentityConfig
from memos_vllm.errors import Forbidden, RequestError, Unauthorized
from memos_vllm.integration.identity import UserNotNamed, resolve
from memos_vllm.types import Principal


def bearer(key: str, **headers: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}", **headers}


def config(**values: object) -> IdentityConfig:
    return IdentityConfig.model_validate(values)


def test_unlisted_keys_are_tenants_of_their_own() -> None:
    one, other = (resolve(bearer(key), config()).principal for key in ("k1", "k2"))
    assert one.tenant != other.tenant
    assert "k1" not in one.tenant, "a tenant's name must not reveal the key"


def test_an_application_names_its_users_within_its_tenant() -> None:
    keys = {"app": {"tenant": "shop"}}
    assert resolve(bearer("app"), config(keys=keys), "alice").principal == Principal("shop", "alice")


def test_an_application_that_names_nobody_has_no_user_to_share() -> None:
    keys = config(keys={"app": {"tenant": "shop", "memory": True}, "k": {"tenant": "shop", "user": "carol"}})
    with pytest.raises(UserNotNamed, match=r"'memos.user'.*\?user=.*gateway") as refused:
        resolve(bearer("app"), keys)
    assert refused.value.status == 400 and refused.value.memory_by_default is True
    assert "app" not in refused.value.key.split(), "a key is not logged"
    assert resolve(bearer("k"), keys).principal == Principal("shop", "carol")
    assert resolve(bearer("EMPTY"), keys).principal.user == "default", "an unlisted key is one person's"


def test_a_key_can_be_listed_by_its_digest() -> None:
    digest = hashlib.sha256(b"app").hexdigest()
    keys = config(keys={f"sha256:{digest}": {"tenant": "shop"}})
    assert resolve(bearer("app"), keys, "alice").principal.tenant == "shop"


def test_a_personal_key_acts_for_nobody_else() -> None:
    keys = config(keys={"k": {"tenant": "shop", "user": "alice"}})
    assert resolve(bearer("k"), keys, "alice").principal == Principal("shop", "alice")
    with pytest.raises(Forbidden):
        resolve(bearer("k"), keys, "bob")


def test_the_gateways_header_decides_the_user() -> None:
    gateway = config(keys={"k": {"tenant": "shop"}}, trusted_user_header="x-user")
    assert resolve(bearer("k", **{"x-user": "alice"}), gateway).principal == Principal("shop", "alice")
    with pytest.raises(Forbidden):
        resolve(bearer("k", **{"x-user": "alice"}), gateway, "bob")


def test_the_gateways_header_is_utf_8() -> None:
    gateway = config(
        keys={"k": {"tenant": "shop"}, "j": {"tenant": "shop", "user": "José"}}, trusted_user_header="x-user"
    )
    jose = "José".encode().decode("latin-1")  # as a server reads headers
    for key in ("k", "j"):
        assert resolve(bearer(key, **{"x-user": jose}), gateway, "José").principal == Principal("shop", "José")
    with pytest.raises(RequestError, match="x-user is not in UTF-8"):
        resolve(bearer("k", **{"x-user": "José"}), gateway)


def test_half_of_a_surrogate_pair_is_no_user() -> None:
    with pytest.raises(RequestError, match="'user'"):
        resolve(bearer("k"), config(), "\ud800")


def test_without_configuration_the_header_means_nothing() -> None:
    assert resolve(bearer("k", **{"x-user": "alice"}), config()).principal.user == "default"


def test_no_key_no_memory() -> None:
    with pytest.raises(Unauthorized):
        resolve({}, config())
    with pytest.raises(Unauthorized):
        resolve({"authorization": "Basic abc"}, config())
    with pytest.raises(Unauthorized):
        resolve(bearer("k"), config(unlisted_keys="refuse"))


@pytest.mark.parametrize("user", ["", "x" * 257])
def test_user_names_have_bounds(user: str) -> None:
    with pytest.raises(RequestError):
        resolve(bearer("k"), config(), user)


def test_the_digest_of_a_key_is_not_a_key() -> None:
    """Whoever reads the configuration must not be able to act as the tenants in it."""
    listed = f"sha256:{hashlib.sha256(b'app').hexdigest()}"
    keys = config(keys={listed: {"tenant": "shop"}})
    assert resolve(bearer(listed), keys).principal.tenant != "shop"
    assert resolve(bearer("app"), keys, "alice").principal.tenant == "shop"


def test_where_a_gateway_names_the_user_a_request_without_a_name_has_no_memory() -> None:
    gateway = config(keys={"k": {"tenant": "shop"}}, trusted_user_header="x-user")
    for named in ({}, {"x-user": ""}):
        with pytest.raises(Unauthorized, match="named no user"):
            resolve(bearer("k", **named), gateway, "alice")
