"""Reading conversations: heads from memory, messages and lists from the archive, which is waited for.

All methods block, for about a millisecond when the archive is behind; event loops call them in a thread.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import orjson

from holdfast.archive.base import (
    Archive,
    ArchiveDamaged,
    ArchiveError,
    ConversationQuery,
    EscalationQuery,
    Figures,
    MessageQuery,
)
from holdfast.archive.follower import Follower
from holdfast.clock import format_ms, parse_ms
from holdfast.core.conversations import AUTHORS, PRIORITIES, ROLES
from holdfast.core.event import StoredMessage
from holdfast.errors import BadRequest, NotFound, TooLarge, Unavailable
from holdfast.ops import Page, Record, Window

T = TypeVar("T")

PAGE_MAX = 1_000
"""What one page holds at most; for more there are cursors."""

WHOLE_BYTES_MAX = 64 << 20
"""A conversation above this is read in pages."""

READ_BYTES_MAX = 16 << 20
"""Of the messages that are read at once: a page or a window ends there, however many were asked for."""

READ_AT_ONCE = 128
"""Messages that are read before it is known how long they are."""

LOOKS_MAX = 100
"""At a conversation that others remove and begin anew all the time."""

LOOK_AGAIN_S = 0.001
"""Between two looks."""

CHARS_A_TOKEN = 4
"""For messages whose tokens nobody counted: about what English text takes, and more than most others."""

STATUSES = ("pending", "claimed", "resolved")

NUMBER_DIGITS_MAX = 18
"""Of a message's number."""


class Transcripts:
    """The conversations of one engine, for reading; as long as the engine is open. Thread-safe."""

    def __init__(
        self,
        get: Callable[[str, str], Record | None],
        born_of: Callable[[str], tuple[int | None, int]],
        now_ms: Callable[[], int],
        check_readable: Callable[[], None],
    ) -> None:
        """*get* reads a record of memory in its last durable state; *born_of* says with which event a conversation began,
        and to which seq that is known at least; *check_readable* raises when nothing can be read."""
        self._get = get
        self._born_of = born_of
        self._now_ms = now_ms
        self._check_readable = check_readable
        self._follower: Follower | None = None

    def follow_with(self, follower: Follower) -> None:
        """Read from the archive of *follower* from now on."""
        self._follower = follower

    def conversation(self, id: str) -> Record | None:
        """One conversation whole, as one JSON object: the fields of its head, then ``messages``.

        Raises:
            TooLarge: above WHOLE_BYTES_MAX; its messages can be read in pages.
            Unavailable: the archive is not there.
        """
        seen = None
        for _ in range(LOOKS_MAX):
            born, _ = self._born_of(id)
            head = self._get("conversations", id)
            if head is None or born is None:
                return None
            said = orjson.loads(head.value)
            messages = self._all_messages(id, said["last_number"])
            is_same = self._born_then(id) == born
            if is_same and len(messages) == said["message_count"] + said["system_count"]:
                break
            # Cut meanwhile; or lost with a damaged archive, which is so the next time as well.
            if is_same and seen == (head, len(messages)):
                break
            seen = head, len(messages)
            time.sleep(LOOK_AGAIN_S)
        assert head is not None
        return Record(id, head.version, head.value[:-1] + b',"messages":[' + b",".join(messages) + b"]}")

    def _born_then(self, id: str) -> int | None:
        """With which event the conversation *id* began, when memory shows all that the archive may have given just now."""
        archive = self._follower.present if self._follower is not None else None
        archived_seq = 0 if archive is None else archive.archived_seq
        for _ in range(LOOKS_MAX):
            born, seq = self._born_of(id)
            if seq >= archived_seq:
                break
            # It follows what is synced, which memory shows a moment later.
            time.sleep(LOOK_AGAIN_S)
        return born

    def _all_messages(self, id: str, last_number: int) -> list[bytes]:
        """Those up to *last_number*, so that what is appended meanwhile does not come to an older head."""
        messages: list[bytes] = []
        size = 0
        wanted = MessageQuery(limit=PAGE_MAX, newest=False, before=last_number + 1)
        while True:
            found, is_cut = self._messages(id, wanted)
            for message in found:
                messages.append(encode_message(message))
                size += len(messages[-1])
            if size > WHOLE_BYTES_MAX:
                raise TooLarge(f"conversation {id!r} has more than {WHOLE_BYTES_MAX} bytes; read its messages in pages")
            if len(found) < PAGE_MAX and not is_cut:
                return messages
            wanted = msgspec.structs.replace(wanted, after=found[-1].number)

    def page(
        self,
        *,
        limit: int = 100,
        cursor: str | None = None,
        user_id: str | None = None,
        session_id: str | None = None,
        escalated: bool | None = None,
        archived: bool | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        active_within_s: float | None = None,
        older_than_s: float | None = None,
    ) -> Page:
        """Conversations without their messages, the one with the newest message first.

        Args:
            cursor: ``next`` of the page before.
            since_ms, until_ms: updated at or after, before; ms since 1970.
            active_within_s, older_than_s: updated at most, more than so many seconds ago.

        Raises:
            BadRequest: a limit below 1, a flag that is none, or a cursor of another list.
        """
        limit = _limit(limit)
        _check_text(user_id, "user_id")
        _check_text(session_id, "session_id")
        _check_flag(escalated, "escalated")
        _check_flag(archived, "archived")
        # The spans themselves, not the moments they come to: those are others for every page.
        filters = [user_id, session_id, escalated, archived, since_ms, until_ms, active_within_s, older_than_s]
        after = _decoded(cursor, "conversations", filters, tuple[int, str])
        if active_within_s is not None:
            since_ms = max(since_ms or 0, self._ago_ms(active_within_s))
        if older_than_s is not None:
            ago_ms = self._ago_ms(older_than_s)
            until_ms = ago_ms if until_ms is None else min(until_ms, ago_ms)
        wanted = ConversationQuery(
            user_id=user_id,
            session_id=session_id,
            escalated=escalated,
            archived=archived,
            since_ms=since_ms,
            until_ms=until_ms,
            after=after,
            limit=limit + 1,
        )
        found = self._read(lambda archive: archive.conversations(wanted))
        items = [Record(head.id, head.version, head.value) for head in found[:limit]]
        if len(found) <= limit:
            return Page(items, None)
        last = items[-1]
        updated_ms = parse_ms(orjson.loads(last.value)["updated_at"])
        return Page(items, _encoded("conversations", filters, (updated_ms, last.id)))

    def messages(
        self,
        id: str,
        *,
        limit: int = 100,
        before: str | int | None = None,
        after: int | None = None,
        role: str | None = None,
        author: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
    ) -> Page:
        """Messages of one conversation, in order: the newest of those that are wanted or, with *after*, the oldest.

        Each item's id is the message's number, its value the message. Long messages make a page shorter than *limit*.

        Args:
            before: ``next`` of the page that followed, or a number: only older ones.
            after: a number: only newer ones.
            since_ms, until_ms: created at or after, before; ms since 1970.

        Raises:
            NotFound: no such conversation.
            BadRequest: a role or author that does not exist, a limit below 1, a cursor of another list.
        """
        limit = _limit(limit)
        if role is not None and role not in ROLES:
            raise BadRequest(f"role must be one of {', '.join(ROLES)}, found {role!r:.80}")
        if author is not None and author not in AUTHORS:
            raise BadRequest(f"author must be one of {', '.join(AUTHORS)}, found {author!r:.80}")
        if after is not None and (before is not None or after < 0):
            raise BadRequest("expected either before or after, and after as a number of 0 or more")
        self._check_there(id)
        filters = [id, role, author, since_ms, until_ms]
        number: int | None
        if isinstance(before, str) and not (before.isascii() and before.isdigit() and len(before) <= NUMBER_DIGITS_MAX):
            number = _decoded(before, "messages", filters, int)
        else:
            number = None if before is None else int(before)
        wanted = MessageQuery(
            after=after or 0,
            before=number,
            role=role,
            author=author,
            since_ms=since_ms,
            until_ms=until_ms,
            limit=limit + 1,
            newest=after is None,
        )
        found, is_cut = self._messages(id, wanted)
        has_more = is_cut or len(found) > limit
        if len(found) > limit:
            found = found[1:] if after is None else found[:-1]
        items = [Record(str(message.number), 1, encode_message(message)) for message in found]
        if not has_more:
            return Page(items, None)
        if after is None:
            return Page(items, _encoded("messages", filters, found[0].number))
        return Page(items, str(found[-1].number))

    def window(self, id: str, *, messages: int | None = None, tokens: int | None = None) -> Window:
        """The newest messages that fit, oldest first, never a tool's result without its call.

        However much was asked for, they are WINDOW_MAX at most, and about READ_BYTES_MAX bytes.

        Args:
            messages: at most so many; without both, 20.
            tokens: at most so many together. A message whose tokens nobody counted counts one for CHARS_A_TOKEN characters.

        Raises:
            NotFound: no such conversation.
            BadRequest: below 1.
        """
        for name, given in (("messages", messages), ("tokens", tokens)):
            if given is not None and given < 1:
                raise BadRequest(f"{name} must be 1 or more, found {given}")
        if messages is None and tokens is None:
            messages = WINDOW_MESSAGES
        self._check_there(id)
        found = self._window(id, messages, tokens)
        items = [Record(str(message.number), 1, encode_message(message)) for message in found]
        return Window(items, sum(map(tokens_of, found)))

    def _window(self, id: str, messages: int | None, tokens: int | None) -> list[StoredMessage]:
        if messages is None:
            return self._token_window(id, tokens or 0)
        wanted = MessageQuery(limit=min(messages, WINDOW_MAX))
        found, _ = self._messages(id, wanted)
        return whole_calls(found if tokens is None else _fitting(found, tokens))

    def _token_window(self, id: str, tokens: int) -> list[StoredMessage]:
        newest: list[StoredMessage] = []
        wanted = MessageQuery(limit=50)
        while len(newest) < WINDOW_MAX:
            found, is_cut = self._messages(id, wanted)
            newest = found + newest
            fitting = _fitting(newest, tokens)
            if is_cut or len(found) < wanted.limit or len(fitting) < len(newest):
                return whole_calls(fitting)
            wanted = msgspec.structs.replace(wanted, before=newest[0].number, limit=200)
        return whole_calls(newest)

    def escalations(
        self, *, limit: int = 100, cursor: str | None = None, status: str | None = None, priority: str | None = None
    ) -> Page:
        """Escalations, those of high priority first, then the one that waits longest.

        Raises:
            BadRequest: a status or priority that does not exist, a limit below 1, a cursor of another list.
        """
        limit = _limit(limit)
        if status is not None and status not in STATUSES:
            raise BadRequest(f"status must be one of {', '.join(STATUSES)}, found {status!r:.80}")
        if priority is not None and priority not in PRIORITIES:
            raise BadRequest(f"priority must be one of {', '.join(PRIORITIES)}, found {priority!r:.80}")
        filters = [status, priority]
        after = _decoded(cursor, "escalations", filters, tuple[str, int, str])
        wanted = EscalationQuery(status=status, priority=priority, after=after, limit=limit + 1)
        found = self._read(lambda archive: archive.escalations(wanted))
        items = [Record(*one) for one in found[:limit]]
        if len(found) <= limit:
            return Page(items, None)
        last = orjson.loads(items[-1].value)
        return Page(
            items, _encoded("escalations", filters, (last["priority"], parse_ms(last["opened_at"]), last["id"]))
        )

    def figures(self) -> Figures:
        """How much there is, exactly, without counting it."""
        now_ms = self._now_ms()
        return self._read(lambda archive: archive.figures(now_ms))

    def storage(self) -> dict[str, Any]:
        """The figures for people and monitors (CONTRACT section 7), with two that follow from them."""
        figures = self.figures()
        said: dict[str, Any] = msgspec.to_builtins(figures)
        count = figures.conversations
        said["total"] = said.pop("conversations")
        said["escalated_share"] = round(figures.escalated / count, 4) if count else 0.0
        said["average_messages"] = round((figures.messages - figures.system_messages) / count, 2) if count else 0.0
        return {"total": said.pop("total")} | said

    def external_numbers(self, id: str, wanted: Sequence[tuple[str, str]], born: int) -> dict[tuple[str, str], int]:
        """Of the external ids *wanted* those that the archive has; it is not waited for, memory has the newest.

        None while it has not come to the event *born*, with which the conversation *id* began: it may still hold an
        earlier one with that id.
        """
        if self._follower is None:
            return {}
        archive = self._follower.present
        if archive is None or archive.archived_seq < born:
            return {}
        try:
            return archive.external_numbers(id, wanted)
        except (ArchiveError, ArchiveDamaged):
            return {}  # told by the follower; a message must not be refused for it

    def read(self, question: Callable[[Archive], T]) -> T:
        """What the archive answers to *question*, for those who keep it in order."""
        return self._read(question)

    def _ago_ms(self, seconds: float) -> int:
        return max(0, self._now_ms() - round(seconds * 1000))

    def _check_there(self, id: str) -> None:
        if self._get("conversations", id) is None:
            raise NotFound(f"no conversation {id!r:.80}")

    def _messages(self, id: str, wanted: MessageQuery) -> tuple[list[StoredMessage], bool]:
        """What is *wanted*, up to about READ_BYTES_MAX, and whether there may be more of it behind these."""
        found: list[StoredMessage] = []
        size, at_once = 0, READ_AT_ONCE
        while True:
            asked = msgspec.structs.replace(wanted, limit=min(at_once, wanted.limit - len(found)))
            some = self._some(id, asked)
            found = some + found if wanted.newest else found + some
            size += sum(_bytes_of(message.content) + len(message.metadata) for message in some)
            if len(some) < asked.limit or len(found) == wanted.limit:
                return found, False
            if size >= READ_BYTES_MAX:
                return found, True
            # As many as should fit when they are as long as those so far.
            at_once = max(1, (READ_BYTES_MAX - size) * len(found) // max(size, 1))
            if wanted.newest:
                wanted = msgspec.structs.replace(wanted, before=found[0].number)
            else:
                wanted = msgspec.structs.replace(wanted, after=found[-1].number)

    def _some(self, id: str, wanted: MessageQuery) -> list[StoredMessage]:
        return self._read(lambda archive: archive.messages(id, wanted))

    def _read(self, question: Callable[[Archive], T]) -> T:
        self._check_readable()
        follower = self._follower
        if follower is None:
            raise Unavailable("the archive is not open yet; try again soon")
        try:
            try:
                return question(follower.archive())
            except ArchiveDamaged as error:
                # Whoever finds it waits for the new one, as those who come after do.
                follower.report_damage(error)
                return question(follower.archive())
        except ArchiveDamaged as error:
            raise Unavailable(f"the archive is damaged and being made anew: {error}; try again soon") from error
        except ArchiveError as error:
            raise Unavailable(f"the archive cannot be read: {error}; try again soon") from error


WINDOW_MESSAGES = 20
WINDOW_MAX = 10_000


def encode_message(message: StoredMessage) -> bytes:
    """*message* as the JSON that callers see."""
    shown: dict[str, Any] = {
        "number": message.number,
        "role": message.role,
        "content": message.content,
        "author": message.author or None,
        "tokens_used": message.tokens_used,
        "created_at": format_ms(message.created_ms),
        "metadata": orjson.Fragment(bytes(message.metadata)) if message.metadata else {},
    }
    return orjson.dumps(shown)


def whole_calls(messages: list[StoredMessage]) -> list[StoredMessage]:
    """*messages* without the results of tools whose call is not among them, before them."""
    calls: set[str] = set()
    has_call = False
    whole = []
    for message in messages:
        if message.role == "tool":
            call = _metadata(message).get("tool_call_id")
            if not has_call or (isinstance(call, str) and call not in calls):
                continue
        elif message.role == "assistant":
            made = _metadata(message).get("tool_calls")
            if made:
                has_call = True
                calls |= {id for id in map(_call_id, made if isinstance(made, list) else [made]) if id}
        whole.append(message)
    return whole


def _call_id(call: Any) -> str | None:
    """The id of a tool call, given as such or as the object that language models return."""
    if isinstance(call, dict):
        call = call.get("id")
    return call if isinstance(call, str) else None


def _metadata(message: StoredMessage) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(bytes(message.metadata)) if message.metadata else {}
    return found


def tokens_of(message: StoredMessage) -> int:
    """What *message* takes of a window, estimated where nobody counted."""
    if message.tokens_used is not None:
        return message.tokens_used
    return -(-len(message.content) // CHARS_A_TOKEN)


def _fitting(messages: list[StoredMessage], tokens: int) -> list[StoredMessage]:
    """The newest of *messages* that have *tokens* together at most."""
    start = len(messages)
    while start and tokens_of(messages[start - 1]) <= tokens:
        start -= 1
        tokens -= tokens_of(messages[start])
    return messages[start:]


def _check_text(text: str | None, name: str) -> None:
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name} holds a lone surrogate; send valid Unicode") from None


def _check_flag(flag: bool | None, name: str) -> None:
    if flag is not None and not isinstance(flag, bool):
        raise BadRequest(f"expected {name} to be true or false, found {flag!r:.80}")


def _limit(limit: int) -> int:
    if limit < 1:
        raise BadRequest(f"limit must be 1 or more, found {limit}")
    return min(limit, PAGE_MAX)


def _encoded(of: str, filters: list[Any], place: Any) -> str:
    return base64.urlsafe_b64encode(orjson.dumps([of, filters, place])).decode().rstrip("=")


def _decoded(cursor: str | None, of: str, filters: list[Any], kind: Any) -> Any:
    """The place that *cursor* stands for; None for the beginning.

    Raises:
        BadRequest: no cursor, or one of another list or with other filters.
    """
    if cursor is None:
        return None
    try:
        raw = base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4))
        said_of, said_filters, place = msgspec.json.decode(raw, type=tuple[str, list[Any], Any])
        if said_of == of and said_filters == filters:
            return msgspec.convert(place, kind)
    except (ValueError, msgspec.DecodeError):
        raise BadRequest("not a cursor; use the 'next' of the page before, or leave it out") from None
    raise BadRequest("a cursor of another list, or of this list with other filters; begin again without it")


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
