"""Signed tokens: what verifies, and all that does not."""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import jwt
import pytest

from control import tokens
from control.tokens import InvalidToken, Tokens, derive_key, key_id

SECRET, OTHER = b"a secret of the tests" * 2, b"another secret of the tests" * 2
NOW = datetime(2026, 5, 1, tzinfo=UTC)
USER, SESSION, KEY, ORGANIZATION = (uuid4() for _ in range(4))


class Clock:
    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


def make(*secrets: bytes, clock: Callable[[], float] | None = None) -> Tokens:
    return Tokens(secrets or (SECRET,), clock=clock or Clock())


def session(issuer: Tokens, lifetime: timedelta = timedelta(hours=1)) -> str:
    return issuer.issue_session(session_id=SESSION, user_id=USER, expires_at=NOW + lifetime)


def api_key(issuer: Tokens) -> str:
    return issuer.issue_api_key(
        api_key_id=KEY,
        user_id=USER,
        organization_id=ORGANIZATION,
        scopes=["read", "write"],
        key_prefix="rg_abcdefgh",
        expires_at=NOW + timedelta(days=1),
    )


def forged(changes: dict[str, object], *, key: bytes | None = None, drop: str | None = None, **options: object) -> str:
    """A session token as somebody with the key would make it, but for some changes."""
    secret = derive_key(SECRET, "session")
    claims: dict[str, object] = {
        "sub": str(USER),
        "sid": str(SESSION),
        "iss": "redisgate",
        "aud": "redisgate:session",
        "iat": int(NOW.timestamp()),
        "exp": int(NOW.timestamp()) + 60,
    }
    claims |= changes
    claims.pop(drop or "", None)
    headers = {"kid": key_id(secret)} | options.pop("headers", {})  # type: ignore[operator]
    return jwt.encode(claims, key if key is not None else secret, headers=headers, **options)  # type: ignore[arg-type]


def test_a_session_says_who_and_which() -> None:
    claims = make().verify_session(session(make()))
    assert (claims.session_id, claims.user_id) == (SESSION, USER)
    assert claims.expires_at - claims.issued_at == 3600


def test_an_api_key_has_the_claims_of_the_original() -> None:
    key = api_key(make())
    payload = key.split(".")[1]
    shown = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    assert {"api_key_id", "user_id", "organization_id", "scopes", "key_prefix", "iat", "exp"} <= shown.keys()
    claims = make().verify_api_key(key)
    assert (claims.api_key_id, claims.user_id, claims.organization_id) == (KEY, USER, ORGANIZATION)
    assert claims.scopes == ("read", "write")
    assert claims.key_prefix == "rg_abcdefgh"


def test_bytes_verify_like_text() -> None:
    assert make().verify_session(session(make()).encode()).user_id == USER


def test_a_forgery_of_the_tests_would_verify_without_its_change() -> None:
    assert make().verify_session(forged({})).user_id == USER


def test_sessions_and_api_keys_are_not_mistaken_for_each_other() -> None:
    with pytest.raises(InvalidToken):
        make().verify_api_key(session(make()))
    with pytest.raises(InvalidToken):
        make().verify_session(api_key(make()))


def test_a_session_signed_with_the_api_keys_key_is_refused() -> None:
    key = derive_key(SECRET, "api-key")
    with pytest.raises(InvalidToken):
        make().verify_session(forged({}, key=key, headers={"kid": key_id(key)}))
    with pytest.raises(InvalidToken):
        make().verify_session(forged({}, key=key))


def test_an_expired_token_is_refused_at_its_second() -> None:
    clock = Clock()
    issuer = make(clock=clock)
    token = session(issuer, timedelta(seconds=10))
    clock.now += 9
    issuer.verify_session(token)
    clock.now += 1
    with pytest.raises(InvalidToken, match="expired"):
        issuer.verify_session(token)


@pytest.mark.parametrize("claim", ["exp", "iat", "iss", "aud", "sub", "sid"])
def test_every_claim_is_required(claim: str) -> None:
    with pytest.raises(InvalidToken):
        make().verify_session(forged({}, drop=claim))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"iss": "somebody"}, id="another issuer"),
        pytest.param({"aud": "redisgate:api-key"}, id="another audience"),
        pytest.param({"aud": ["redisgate:session", "more"]}, id="several audiences"),
        pytest.param({"exp": "never"}, id="expiry as text"),
        pytest.param({"exp": True}, id="expiry as truth"),
        pytest.param({"exp": 10**30 * 1.0}, id="expiry as a float"),
        pytest.param({"iat": int(NOW.timestamp()) + 60}, id="from the future"),
        pytest.param({"sid": "1"}, id="no session id"),
        pytest.param({"sid": ["x"]}, id="session id as a list"),
        pytest.param({"sub": ""}, id="no user id"),
    ],
)
def test_claims_that_are_not_ours_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidToken):
        make().verify_session(forged(changes))


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
def test_other_algorithms_are_refused(algorithm: str) -> None:
    key = derive_key(SECRET, "session")
    with pytest.warns(jwt.warnings.InsecureKeyLengthWarning):
        token = forged({}, key=key, algorithm=algorithm)
    with pytest.raises(InvalidToken):
        make().verify_session(token)


def test_unsigned_tokens_are_refused() -> None:
    head, payload, _ = session(make()).split(".")
    kid = jwt.get_unverified_header(session(make()))["kid"]
    unsigned = base64.urlsafe_b64encode(json.dumps({"alg": "none", "kid": kid}).encode()).rstrip(b"=").decode()
    with pytest.raises(InvalidToken):
        make().verify_session(f"{unsigned}.{payload}.")
    with pytest.raises(InvalidToken):
        make().verify_session(f"{head}.{payload}.")


@pytest.mark.parametrize("kid", [None, "", "unknown", 7, ["x"]], ids=str)
def test_an_unknown_key_id_is_refused(kid: object) -> None:
    secret = derive_key(SECRET, "session")
    header = base64.urlsafe_b64encode(json.dumps({"alg": "HS256", "kid": kid}).encode()).rstrip(b"=").decode()
    _, payload, _ = forged({}).split(".")
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(
        f"{header}.{payload}".encode(), secret
    )
    token = f"{header}.{payload}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"
    with pytest.raises(InvalidToken):
        make().verify_session(token)


def test_a_changed_payload_is_refused() -> None:
    head, _, signature = session(make()).split(".")
    other = api_key(make()).split(".")[1]
    with pytest.raises(InvalidToken):
        make().verify_session(f"{head}.{other}.{signature}")


@pytest.mark.parametrize(
    "text",
    [b"", b"x", b"a.b.c", b"...", b"\xff\xfe", "é.é.é", b"e30.e30.", b"." * 100, b"x" * (tokens.MAX_TOKEN_BYTES + 1)],
    ids=lambda text: repr(text[:10]),
)
def test_garbage_is_refused_and_nothing_worse(text: str | bytes) -> None:
    for verify in (make().verify_session, make().verify_api_key):
        with pytest.raises(InvalidToken):
            verify(text)


def test_rotation_signs_with_the_new_secret_and_takes_the_old() -> None:
    old, both, new = make(OTHER), make(SECRET, OTHER), make(SECRET)
    assert both.verify_session(session(old)).user_id == USER
    assert new.verify_session(session(both)).user_id == USER
    with pytest.raises(InvalidToken):
        new.verify_session(session(old))
    assert both.verify_api_key(api_key(old)).api_key_id == KEY
    with pytest.raises(InvalidToken):
        new.verify_api_key(api_key(old))


def test_derived_keys_differ_by_purpose_and_by_secret() -> None:
    keys = {derive_key(secret, purpose) for secret in (SECRET, OTHER) for purpose in ("session", "api-key", "audit")}
    assert len(keys) == 6
    assert all(len(key) == 32 for key in keys)


def test_no_secret_is_no_secret() -> None:
    for nothing in ([], [b""], [SECRET, b""]):
        with pytest.raises(ValueError, match="secret key"):
            Tokens(nothing)


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        make().issue_session(session_id=SESSION, user_id=USER, expires_at=datetime(2026, 5, 2))
