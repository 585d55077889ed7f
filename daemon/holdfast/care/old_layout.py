"""The dictionaries in which the bots that Holdfast replaces keep conversations, to ours and back.

One rule for old files, for the readable mirror and for ``compat.chatbot_storage``, so that what was read in one place comes
back the same in another:

* A message is ``{"role", "content"}`` and, beside them, whatever its bot wrote; all that is beside them is our ``metadata``.
  ``timestamp`` or ``created_at`` among it, when it is a time, is when the message was created, ``tokens_used`` and ``author``,
  when they are what we call so, are that as well; they stay in the metadata too.
* A message that would not come back the same from that (a role that we do not have, content that is no text or is empty, JSON
  that cannot be kept exactly) stands whole, as JSON text, in ``metadata["_original"]``; role and content are then the nearest
  that we have: synonyms of a role are that role, any other is ``tool``, content is the text that is in it.
* A time that the old form says otherwise than we would (with microseconds, with a zone) stands as it was beside ours, under
  ``_original`` in the conversation's head or in the escalation's ``contact_info``, and is shown for as long as ours is the
  moment that it stands for.
* Nothing is left out. What is too large for the limits is refused by the engine, as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, tzinfo
from typing import Any, cast

import orjson

from holdfast import values
from holdfast.clock import format_ms, parse_ms
from holdfast.core.conversations import AUTHORS, KEPT_BY_US, ROLES, TEXT_CHARS_MAX, TOKENS_MAX
from holdfast.errors import HoldfastError
from holdfast.ops import Author, Message, Role

ORIGINAL = "_original"
"""The key of ``metadata``, of ``contact_info`` or of a conversation's head, under which stands what has no place of its own."""

BEGINNING = "beginning"
"""The key of a head's ``_original`` under which ``compat.chatbot_storage`` notes with what its bot's list begins."""

CONVERSATION_FIELDS = ("id", "created_at", "updated_at", "title", "messages", "escalated")
"""What every conversation of an old bot has, in its order."""

KEPT = "_holdfast_kept"
"""The key under which a file of the readable mirror says what the old layout has no place for."""

OLD_ESCALATION = "old_escalation"
"""The field of a conversation that keeps an old escalation which waits for nobody any more."""

NO_REASON = "no reason given"

_ROLE_OF = {
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "agent": "assistant",
    "human": "user",
    "customer": "user",
    "developer": "system",
    "function": "tool",
}
_FOR_WINDOWS = ("tool_calls", "tool_call_id", "attachments")
"""What tells which messages belong together, and what may stand without content; kept readable beside an original."""

_EMPTY = " "
"""The content of a message that had none: the engine takes no empty one."""

_NO_LIMITS = values.ValueLimits(bytes_max=1 << 40)
_OWN = ("user_id", "session_id")
_TIMES = ("created_at", "updated_at")
_OWN_ORIGINAL = "own"
"""The key of a head's ``_original`` for an old bot's own field of that name."""


def message_of(old: Any, zone: tzinfo, created_at: str | None = None, *, has_external_id: bool = False) -> Message:
    """The message that *old*, one of an old bot's, becomes; it is not checked against the limits.

    Args:
        zone: in which its time is read when it has none of its own.
        created_at: when it was created, where it does not say so itself; None means now.
        has_external_id: an external id in it is one that we gave it, as our mirror shows it.

    Raises:
        TypeError, ValueError: nothing that JSON could hold.
    """
    said = _moment_of(old, zone) if isinstance(old, dict) else None
    if said is not None:
        created_at = said
    if not isinstance(old, dict):
        return _wrapped(old, {}, created_at)
    rest = {key: value for key, value in old.items() if key not in ("role", "content")}
    if not _is_plain(old, rest, has_external_id=has_external_id):
        return _wrapped(old, rest, created_at)
    tokens, author = rest.get("tokens_used"), rest.get("author")
    return Message(
        role=old["role"],
        content=old["content"],
        tokens_used=tokens if type(tokens) is int and 0 <= tokens <= TOKENS_MAX else None,
        author=cast(Author, author) if author in AUTHORS else None,
        metadata=rest or None,
        created_at=created_at,
    )


def old_message(message: Mapping[str, Any]) -> Any:
    """The old bot's form of *message*, given as our API shows it: what ``message_of`` was given."""
    metadata = message.get("metadata") or {}
    original = metadata.get(ORIGINAL)
    if isinstance(original, str):
        try:
            return json.loads(original)
        except ValueError:
            pass  # somebody else's key of the same name
    shown = {"role": message["role"], "content": message["content"]}
    shown |= {key: value for key, value in metadata.items() if key not in shown}
    if message.get("author") == "agent":
        # The one author that the role does not tell.
        shown.setdefault("author", "agent")
    return shown


def mark_of(old: Any) -> bytes:
    """A few bytes that are the same for two old messages when they are the same to a reader of JSON.

    Raises:
        TypeError, ValueError: nothing that JSON could hold.
    """
    try:
        encoded = orjson.dumps(old, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        encoded = json.dumps(old, sort_keys=True).encode()
    return hashlib.blake2b(encoded, digest_size=16).digest()


def head_fields(old: Mapping[str, Any], zone: tzinfo) -> dict[str, Any]:
    """What ``conversation.put`` is given for the old conversation *old*: all of it but its messages.

    What we count ourselves (``message_count`` and the like) and what cannot be kept is left out.
    """
    given: dict[str, Any] = {}
    for key, value in old.items():
        if key in CONVERSATION_FIELDS or key in KEPT_BY_US or not _is_text(key) or key in ("_holdfast", KEPT):
            continue
        if key in _OWN:
            text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
            if text and text.isprintable():
                given[key] = text
        elif value is not None and _is_kept(value):
            given[key] = value
    title = old.get("title")
    if isinstance(title, str) and title and _is_text(title):
        given["title"] = title[:TEXT_CHARS_MAX]
    given["escalated"] = bool(old.get("escalated"))
    original = originals(given)
    for field in _TIMES:
        found = moment(old.get(field), zone)
        if found is not None:
            given[field] = found
            if _is_other_text(old[field], found, zone):
                original = original | {field: old[field]}
    if original:
        given[ORIGINAL] = original
    return given


def originals(head: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside the fields of *head*, and no bot is shown; under ``own`` somebody else's field of that name."""
    found = head.get(ORIGINAL)
    if found is None or (isinstance(found, dict) and found.keys() <= {*_TIMES, BEGINNING, _OWN_ORIGINAL}):
        return found or {}
    return {_OWN_ORIGINAL: found}


def bots_fields(head: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``own_fields`` that an old bot, or another program, gave the conversation."""
    own = own_fields(head)
    for key in (ORIGINAL, OLD_ESCALATION):
        own.pop(key, None)
    found = originals(head)
    return own | {ORIGINAL: found[_OWN_ORIGINAL]} if _OWN_ORIGINAL in found else own


def shown_time(ours: str, original: Any, zone: tzinfo) -> str:
    """The moment *ours* as *original* says it, when that is the same moment; else local, in *zone*, without naming it."""
    return original if isinstance(original, str) and moment(original, zone) == ours else local_time(ours, zone)


def local_time(ours: str, zone: tzinfo) -> str:
    """The moment *ours* as old bots write it."""
    return datetime.fromisoformat(ours).astimezone(zone).replace(tzinfo=None).isoformat()


def own_fields(head: Mapping[str, Any]) -> dict[str, Any]:
    """Of *head* the fields that are neither in every old conversation nor kept by us: its owner and the caller's own."""
    return {
        key: value
        for key, value in head.items()
        if key not in CONVERSATION_FIELDS and key not in (*KEPT_BY_US, KEPT) and not (key in _OWN and value is None)
    }


def escalation_fields(old: Mapping[str, Any], zone: tzinfo) -> dict[str, Any]:
    """The arguments of ``escalation.open`` for the old escalation *old*, all but its id."""
    reason = old.get("reason")
    text = reason if isinstance(reason, str) and _is_text(reason) else NO_REASON
    timestamp = old.get("timestamp")
    opened_at = moment(timestamp, zone)
    is_other = opened_at is not None and _is_other_text(timestamp, opened_at, zone)
    return {
        "reason": text[:TEXT_CHARS_MAX] if text.strip() else NO_REASON,
        "contact_info": contact_of(old.get("contact_info"), timestamp if is_other else None),
        "priority": "high" if str(old.get("priority")).lower() in ("high", "urgent", "critical") else "low",
        "opened_at": opened_at or moment(old.get("created_at"), zone),
    }


def contact_of(old: Any, timestamp: str | None = None) -> dict[str, Any] | None:
    """*old*, how a customer is reached, as the JSON object that we keep.

    Args:
        timestamp: since when he waits, in the old bot's words, where they are not ours.
    """
    is_plain = old is None or (isinstance(old, dict) and _is_kept(old) and ORIGINAL not in old)
    if timestamp is None:
        return old if is_plain else {ORIGINAL: json.dumps(old)}
    if is_plain and old:
        return {**old, ORIGINAL: {"timestamp": timestamp}}
    return {ORIGINAL: {"timestamp": timestamp, "contact_info": json.dumps(old)}}


def old_contact(contact: Any) -> Any:
    """What ``contact_of`` was given."""
    original: Any = contact.get(ORIGINAL) if isinstance(contact, dict) else None
    if isinstance(original, dict) and "timestamp" in original:
        if "contact_info" not in original:
            return {key: value for key, value in contact.items() if key != ORIGINAL}
        original = original["contact_info"]
    elif original is None or len(contact) > 1:
        return contact
    try:
        return json.loads(original)
    except (TypeError, ValueError):
        return contact  # somebody else's key of the same name


def old_timestamp(contact: Any) -> str | None:
    """The *timestamp* that ``contact_of`` was given."""
    original = contact.get(ORIGINAL) if isinstance(contact, dict) else None
    timestamp = original.get("timestamp") if isinstance(original, dict) else None
    return timestamp if isinstance(timestamp, str) else None


def old_escalation(escalation: Mapping[str, Any]) -> dict[str, Any]:
    """The old bots' form of *escalation*, with our time."""
    return {
        "conversation_id": escalation["conversation_id"],
        "timestamp": escalation["opened_at"],
        "reason": escalation["reason"],
        "contact_info": old_contact(escalation["contact_info"]),
        "priority": escalation["priority"],
        "status": escalation["status"],
    }


def is_waiting(old: Mapping[str, Any]) -> bool:
    """Whether the customer of the old escalation *old* still waits for somebody."""
    return str(old.get("status") or "pending").lower() in ("pending", "open", "waiting", "new")


def moment(value: Any, zone: tzinfo) -> str | None:
    """*value* as a time in our form, read in *zone* when it has none of its own; None when it is no time in ISO 8601."""
    if not isinstance(value, str):
        return None
    try:
        return format_ms(parse_ms(value, zone))
    except (ValueError, OverflowError):
        return None


def _is_other_text(text: Any, ours: str, zone: tzinfo) -> bool:
    """Whether *text*, an old bot's for the moment *ours*, is neither how we nor how ``local_time`` would say it."""
    return _is_text(text) and text not in (ours, local_time(ours, zone))


def _moment_of(old: Mapping[Any, Any], zone: tzinfo) -> str | None:
    return moment(old.get("timestamp"), zone) or moment(old.get("created_at"), zone)


def _is_plain(old: Mapping[Any, Any], rest: Mapping[Any, Any], *, has_external_id: bool) -> bool:
    """Whether *old* comes back the same from its role, its content and *rest* as metadata."""
    content = old.get("content")
    return (
        old.get("role") in ROLES
        and isinstance(content, str)
        and _is_text(content)
        and (content != "" or bool(rest.get("tool_calls") or rest.get("attachments")))
        # With an external id it would be told from others by that, and be dropped when it comes twice.
        and ORIGINAL not in rest
        and (has_external_id or not any(key in rest for key in ("channel", "external_id")))
        and _is_kept(rest)
    )


def _wrapped(old: Any, rest: Mapping[Any, Any], created_at: str | None) -> Message:
    """*old* as JSON text, with what others may want to know of it."""
    role: Any = old.get("role") if isinstance(old, dict) else None
    if not isinstance(role, str):
        role = "tool"
    elif role not in ROLES:
        role = _ROLE_OF.get(role.lower(), "tool")
    metadata: dict[str, Any] = {key: rest[key] for key in _FOR_WINDOWS if rest.get(key) and _is_kept(rest[key])}
    has_content = bool(metadata.get("tool_calls") or metadata.get("attachments"))
    # All in ASCII, so that not even half a pair of surrogates is in the way.
    metadata[ORIGINAL] = json.dumps(old)
    content = _text_in(old.get("content") if isinstance(old, dict) else old)
    return Message(
        role=cast(Role, role),
        content=content or ("" if has_content else _EMPTY),
        metadata=metadata,
        created_at=created_at,
    )


def _text_in(content: Any) -> str:
    """What can be read of *content*, which language models also give as a list of parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "\n".join(part for part in parts if isinstance(part, str)) or content
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_kept(value: Any) -> bool:
    """Whether JSON can hold *value* exactly, and deep enough."""
    try:
        values.encode({"": value}, _NO_LIMITS)
    except HoldfastError:
        return False
    return True
