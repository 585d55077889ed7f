"""The dictionaries in which the bots that Holdfast replaces keep conversations, to ours and back.

One rule for old files, for the readable mirror and for ``compat.chatbot_storage``, so that what was read in one place comes
back the same in another:

* A message is ``{"role", "content"}`` and, beside them, whatever its bot wrote; all that is beside them is our ``metadata``.
  ``timestamp`` or ``created_at`` among it, when it is a time, is when the message was created, ``tokens_used`` and ``author``,
  when they are what we call so, are that as well; they stay in the metadata too.
* A message that would not come back the same from that (a role that we do not have, content that is no text or is empty, JSON
  that cannot be kept exactly) stands whole, as JSON text, in ``metadata["_original"]``; role and content are then the nearest
  that we have: synonyms of a role are that role, any other is ``tool``, content is the text that is in it.
* Nothing is left out. What is too large for the limits is refused by the engine, as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import tzinfo
from typing import Any, cast

import orjson

from holdfast import values
from holdfast.clock import format_ms, parse_ms
from holdfast.core.conversations import AUTHORS, KEPT_BY_US, ROLES, TEXT_CHARS_MAX, TOKENS_MAX
from holdfast.errors import HoldfastError
from holdfast.ops import Author, Message, Role

ORIGINAL = "_original"
"""The key of ``metadata``, or of ``contact_info``, under which stands what has no place of its own."""

CONVERSATION_FIELDS = ("id", "created_at", "updated_at", "title", "messages", "escalated")
"""What every conversation of an old bot has, in its order."""

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


def message_of(old: Any, zone: tzinfo, created_at: str | None = None) -> Message:
    """The message that *old*, one of an old bot's, becomes; it is not checked against the limits.

    Args:
        zone: in which its time is read when it has none of its own.
        created_at: when it was created, where it does not say so itself; None means now.

    Raises:
        TypeError, ValueError: nothing that JSON could hold.
    """
    said = _moment_of(old, zone) if isinstance(old, dict) else None
    if said is not None:
        created_at = said
    if not isinstance(old, dict):
        return _wrapped(old, {}, created_at)
    rest = {key: value for key, value in old.items() if key not in ("role", "content")}
    if not _is_plain(old, rest):
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
        if key in CONVERSATION_FIELDS or key in KEPT_BY_US or not _is_text(key) or key == "_holdfast":
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
    for field in ("created_at", "updated_at"):
        found = moment(old.get(field), zone)
        if found is not None:
            given[field] = found
    return given


def own_fields(head: Mapping[str, Any]) -> dict[str, Any]:
    """Of *head* the fields that are neither in every old conversation nor kept by us: its owner and the caller's own."""
    return {
        key: value
        for key, value in head.items()
        if key not in CONVERSATION_FIELDS and key not in KEPT_BY_US and not (key in _OWN and value is None)
    }


def escalation_fields(old: Mapping[str, Any], zone: tzinfo) -> dict[str, Any]:
    """The arguments of ``escalation.open`` for the old escalation *old*, all but its id."""
    reason = old.get("reason")
    text = reason if isinstance(reason, str) and _is_text(reason) else NO_REASON
    return {
        "reason": text[:TEXT_CHARS_MAX] if text.strip() else NO_REASON,
        "contact_info": contact_of(old.get("contact_info")),
        "priority": "high" if str(old.get("priority")).lower() in ("high", "urgent", "critical") else "low",
        "opened_at": moment(old.get("timestamp"), zone) or moment(old.get("created_at"), zone),
    }


def contact_of(old: Any) -> dict[str, Any] | None:
    """*old*, how a customer is reached, as the JSON object that we keep."""
    if old is None or (isinstance(old, dict) and _is_kept(old) and ORIGINAL not in old):
        return old
    return {ORIGINAL: json.dumps(old)}


def old_contact(contact: Any) -> Any:
    """What ``contact_of`` was given."""
    if isinstance(contact, dict) and set(contact) == {ORIGINAL}:
        return json.loads(contact[ORIGINAL])
    return contact


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


def _moment_of(old: Mapping[Any, Any], zone: tzinfo) -> str | None:
    return moment(old.get("timestamp"), zone) or moment(old.get("created_at"), zone)


def _is_plain(old: Mapping[Any, Any], rest: Mapping[Any, Any]) -> bool:
    """Whether *old* comes back the same from its role, its content and *rest* as metadata."""
    content = old.get("content")
    return (
        old.get("role") in ROLES
        and isinstance(content, str)
        and _is_text(content)
        and (content != "" or bool(rest.get("tool_calls") or rest.get("attachments")))
        # With an external id it would be told from others by that, and be dropped when it comes twice.
        and not any(key in rest for key in ("channel", "external_id", ORIGINAL))
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
