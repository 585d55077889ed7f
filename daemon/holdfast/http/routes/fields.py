"""What a request says beside its body: the parameters and headers of several routes, declared and read."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from msgspec import Meta

from holdfast.clock import parse_ms
from holdfast.core.decide import KEY_CHARS_MAX
from holdfast.errors import BadRequest, VersionMismatch
from holdfast.http.request import Request
from holdfast.http.routes.backend import Backend
from holdfast.http.routes.route import Field
from holdfast.ops import ANY_VERSION, Retry, Seconds
from holdfast.settings import LimitSettings, parse_duration

PAGE_DEFAULT = 100
INTEGER_DIGITS_MAX = 18
"""Of versions and generations; more is no number of ours, and Python's own limit is never met."""

CallDurability = Literal["always", "everysec"]
_DURABILITIES = get_args(CallDurability)
_RETRY = re.compile(r"([A-Za-z0-9_-]{8,64})/([0-9]{1,15})")

_LIMITS = LimitSettings()
"""As they are unless an operator has chosen others; the document cannot know."""

_Generation = Annotated[int, Meta(ge=0, lt=10**INTEGER_DIGITS_MAX)]

LIMIT = Field(
    "limit",
    f"Most items of the page; {PAGE_DEFAULT} when absent, `limits.page` ({_LIMITS.page}) at most.",
    Annotated[int, Meta(ge=1, le=_LIMITS.page)],
    "2",
)
CURSOR = Field("cursor", "Where to go on: the `next` of the page before.")
SINCE = Field(
    "since",
    "Only what was active (sessions) or changed (others) at or after this moment, ISO 8601; "
    "without an offset it is read in `stats.timezone`.",
    example="2026-11-21T06:00:00Z",
)
UNTIL = Field("until", "Only what is before this moment, written as for `since`.", example="2026-11-22T06:00:00+01:00")
STATE = Field("state", "Only sessions with this `currentState`, orders with this `status`.", example="pending")
TTL = Field(
    "ttl",
    "Idle time after which this session expires: seconds, or such as `90s`, `12h`. It stays with the session.",
    Annotated[str, Meta(min_length=1)],
    "2h",
)
DURABILITY_QUERY = Field("durability", "The same as the header `Holdfast-Durability`.", CallDurability, "everysec")
LEASE_QUERY = Field("lease", "The same as the header `Holdfast-Lease`.", _Generation)
GENERATION = Field("generation", "Of the lease, as it was granted; here or in the body.", _Generation, "2")

DURABILITY = Field(
    "Holdfast-Durability",
    "When this change is acknowledged: once it is synced, or once it is written. The setting `durability` when absent.",
    CallDurability,
    "everysec",
)
LEASE = Field("Holdfast-Lease", "The generation of the lease under which the caller writes.", _Generation)
IDEMPOTENCY_KEY = Field(
    "Idempotency-Key",
    "A repeat with the same key within 24 hours gets the first answer and changes nothing, also after a restart.",
    Annotated[str, Meta(min_length=1, max_length=KEY_CHARS_MAX, pattern="^[!-~]([ -~]*[!-~])?$")],
    "3f2a-1",
)
RETRY = Field(
    "Holdfast-Retry",
    "CLIENT/NUMBER: which request of which client this is, numbered upwards, so that the last one may be sent again "
    "within an hour when its answer is lost. What our own clients send; an `Idempotency-Key` is for everybody.",
    Annotated[str, Meta(pattern=f"^{_RETRY.pattern}$")],
    "bot-4f0c27/1",
)
IF_MATCH = Field(
    "If-Match",
    "Change it only when it has this version, as its `ETag` says it; `*`: only when it exists. Else 412.",
    example='"1"',
)
IF_NONE_MATCH = Field("If-None-Match", "`*`: only when it does not exist. Else 412.", Literal["*"])
SEEN = Field("If-None-Match", "The `ETag` that the caller has: 304 while it is still that version.", example='"7"')

RETRY_AFTER = Field("Retry-After", "Seconds to wait.", Annotated[int, Meta(ge=1)], "1")
ETAG = Field("ETag", "The version of the record, in quotes.", example='"1"')

WRITE = (IDEMPOTENCY_KEY, DURABILITY, RETRY)
"""The headers of every change."""

CONDITIONAL = (IF_MATCH, IF_NONE_MATCH, *WRITE)
"""Those of a change to one record."""


def durability(request: Request, query: dict[str, str]) -> CallDurability | None:
    """The durability this call asks for; None leaves it to the setting.

    Raises:
        BadRequest: neither ``always`` nor ``everysec``, or one by its header and the other in the query.
    """
    asked = request.headers.get("Holdfast-Durability")
    if "durability" in query:
        asked = _agreed(asked, query["durability"], "Holdfast-Durability and ?durability=")
    if asked is None:
        return None
    for known in _DURABILITIES:
        if asked == known:
            return known  # type: ignore[no-any-return]
    raise BadRequest(f"expected durability {' or '.join(_DURABILITIES)}, found {asked!a:.80}")


def add_conditions(op: dict[str, Any], request: Request, query: dict[str, str], *, takes_lease: bool) -> None:
    """Add to *op*, the fields of an op on one record, what the headers and *query* say.

    Raises:
        BadRequest: a header that cannot be read, or two that exclude each other.
        VersionMismatch: an ETag that no record ever had.
    """
    headers = request.headers
    if_match, if_none_match = headers.get("If-Match"), headers.get("If-None-Match")
    if if_none_match is not None:
        if if_match is not None or if_none_match.strip() != "*":
            raise BadRequest('a write takes If-Match: "VERSION", If-Match: * or If-None-Match: *, and one of them only')
        op["if_version"] = 0
    elif if_match is not None:
        op["if_version"] = _version(if_match)
    key = idempotency_key(request)
    if key is not None:
        op["idempotency_key"] = key
    if takes_lease:
        generation = headers.get("Holdfast-Lease")
        if "lease" in query:
            generation = _agreed(generation, query["lease"], "Holdfast-Lease and ?lease=")
        if generation is not None:
            op["lease"] = integer(generation, "Holdfast-Lease")
    if "ttl" in query:
        op["ttl"] = _seconds(query["ttl"])


def idempotency_key(request: Request) -> str | None:
    """The ``Idempotency-Key``, if there is one.

    Raises:
        BadRequest: empty, or not ASCII.
    """
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (key and key.isascii()):
        raise BadRequest(f"expected an Idempotency-Key of printable ASCII characters, found {key!a:.80}")
    return key


def retry_of(request: Request) -> Retry | None:
    """Which request of which client this is, by its header ``Holdfast-Retry: CLIENT/NUMBER``.

    Raises:
        BadRequest: anything else in that header.
    """
    text = request.headers.get("Holdfast-Retry")
    if text is None:
        return None
    match = _RETRY.fullmatch(text)
    if match is None:
        raise BadRequest(
            "expected Holdfast-Retry: CLIENT/NUMBER, with a client of 8 to 64 of A-Z, a-z, 0-9, _ and -, "
            f"found {text!a:.80}"
        )
    return Retry(match[1], int(match[2]))


def has_seen(request: Request, tag: str) -> bool:
    """Whether the caller of a GET says that it has the version *tag* already."""
    seen = request.headers.get("If-None-Match")
    return seen is not None and (seen.strip() == "*" or tag in [_strong(one) for one in seen.split(",")])


def integer(text: str, name: str) -> int:
    """*text* as a whole number of 0 or more.

    Raises:
        BadRequest: it is none; *name* says where.
    """
    if not text.isascii() or not text.isdigit() or len(text) > INTEGER_DIGITS_MAX:
        raise BadRequest(f"expected a whole number of 0 or more as {name}, found {text!a:.80}")
    return int(text)


def limit(query: dict[str, str], limit_max: int) -> int:
    """How many items a page may have.

    Raises:
        BadRequest: not a number of 1 to *limit_max*.
    """
    text = query.get("limit")
    if text is None:
        return min(PAGE_DEFAULT, limit_max)
    wanted = integer(text, "limit")
    if not 1 <= wanted <= limit_max:
        raise BadRequest(f"expected a limit of 1 to {limit_max}, found {wanted}")
    return wanted


def positive(query: dict[str, str], name: str) -> int | None:
    """The parameter *name* as a whole number of 1 or more.

    Raises:
        BadRequest: it is none.
    """
    text = query.get(name)
    if text is None:
        return None
    found = integer(text, name)
    if not found:
        raise BadRequest(f"expected 1 or more as {name}, found 0")
    return found


def flag(query: dict[str, str], name: str) -> bool | None:
    """The parameter *name* as a yes or no.

    Raises:
        BadRequest: it is neither ``true`` nor ``false``.
    """
    text = query.get(name)
    if text is None:
        return None
    if text not in ("true", "false"):
        raise BadRequest(f"expected {name} to be true or false, found {text!a:.80}")
    return text == "true"


def span_s(query: dict[str, str], name: str) -> float | None:
    """The parameter *name* as a duration in seconds.

    Raises:
        BadRequest: it is none, or negative.
    """
    text = query.get(name)
    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise BadRequest(f"{name}: {error}") from None


def moment_ms(query: dict[str, str], backend: Backend, name: str = "since") -> int | None:
    """The moment in the parameter *name*, in ms since 1970.

    Raises:
        BadRequest: not ISO 8601.
    """
    text = query.get(name)
    if text is None:
        return None
    # An offset of +02:00 that was not percent-encoded arrives with a space.
    for candidate in (text, text.replace(" ", "+")):
        try:
            return parse_ms(candidate, backend.zone)
        except (ValueError, OverflowError):
            continue
    raise BadRequest(
        f"expected {name} as a date with its time in ISO 8601, such as 2026-11-21T06:00:00Z, found {text!a:.80}"
    )


def _agreed(first: str | None, second: str, where: str) -> str:
    """What two places say; neither wins in silence."""
    if first is not None and first != second:
        raise BadRequest(f"expected {where} to be equal, or one of them only, found {first!a:.80} and {second!a:.80}")
    return second


def _version(tag: str) -> int:
    tag = _strong(tag)
    if tag == "*":
        return ANY_VERSION
    if "," in tag:
        raise BadRequest("expected one ETag in If-Match, found several")
    text = tag[1:-1] if len(tag) > 2 and tag[0] == tag[-1] == '"' else tag
    if not text.isascii() or not text.isdigit() or len(text) > INTEGER_DIGITS_MAX or int(text) == 0:
        raise VersionMismatch(f"no record ever had the ETag {tag!a:.80}; read the record for its own")
    return int(text)


def _strong(tag: str) -> str:
    """*tag* as we made it: a proxy that compresses marks it as weak."""
    return tag.strip().removeprefix("W/")


def _seconds(text: str) -> Seconds:
    """A number of seconds as such; anything else is for the engine to judge, which knows ``90s`` and ``12h``."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= INTEGER_DIGITS_MAX else text
