"""A conversation as a person reads it: who said what, when."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec
import orjson

from holdfast.cli.show import blocks_are_shown, cells_of, printable, readable_count, readable_size, styled

WHO_CELLS = 8
"""``customer`` is the longest of those who usually speak."""

TEXT_CELLS_MIN = 20
"""What is said gets at least this, however narrow the terminal is."""

TAB_CELLS = 4

_USUAL_AUTHOR = {"user": "customer", "assistant": "bot"}
_DIM_ROLES = ("system", "tool")
_COLOURS = {"customer": "cyan", "bot": "green", "agent": "yellow"}

# What attachments are called in the metadata of bots; the first that is there counts.
_NAME_FIELDS = ("name", "filename", "file_name", "title")
_KIND_FIELDS = ("mime_type", "content_type", "type", "kind")
_SIZE_FIELDS = ("size", "bytes", "size_bytes", "file_size")
_PLACE_FIELDS = ("ref", "reference", "url", "path", "media_id", "id")


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a transcript says of its conversation; the fields are those of CONTRACT section 6."""

    id: str
    title: str | None = None
    user_id: str | None = None
    session_id: str | None = None
    created_at: datetime | None = None
    updated_at: datetime | None = None
    escalated: bool = False
    archived: bool = False
    handler: str = "bot"
    message_count: int = 0
    system_count: int = 0
    tokens_used: int = 0
    last_number: int = 0
    hold: bool = False
    hold_reason: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a conversation, as the daemon tells it."""

    number: int
    role: str
    content: str
    created_at: datetime
    author: str | None = None
    metadata: dict[str, Any] = {}


class Escalation(msgspec.Struct, frozen=True, kw_only=True):
    """A customer who waits for a human, or did."""

    id: str
    reason: str
    priority: str
    status: str
    opened_at: datetime
    contact_info: Any = None
    assignee: str | None = None
    claimed_at: datetime | None = None
    resolved_at: datetime | None = None

    def contacts(self) -> list[tuple[str, str]]:
        """How the customer is reached, by kind; older programs may have stored anything there."""
        found = self.contact_info if isinstance(self.contact_info, dict) else {"contact": self.contact_info}
        # What begins with an underscore is a note of ours, such as the text of a time in an old file.
        shown = ((name, value) for name, value in found.items() if not name.startswith("_"))
        return [(name, text_of(value)) for name, value in shown if value is not None]


class Transcript:
    """Writes one conversation, message after message, for a terminal of *columns*; None: no line is wrapped."""

    def __init__(self, columns: int | None) -> None:
        self._columns = columns
        self._day = ""
        self._tools: dict[str, str] = {}

    def heading(self, head: Head, escalation: Escalation | None) -> Iterator[str]:
        """What stands above the messages: title, counts, and what keeps or holds up the conversation."""
        yield from self._paragraph(head.title or "(no title)", bold=True)
        whose = [f"{name} {text}" for name, text in (("user", head.user_id), ("session", head.session_id)) if text]
        yield from self._paragraph(_joined(f"conversation {head.id}", *whose), dim=True)
        counts = readable_count(head.message_count, "message")
        if head.system_count:
            counts += f" and {head.system_count:,} of the system"
        yield from self._paragraph(_joined(counts, readable_count(head.tokens_used, "token"), _span(head)), dim=True)
        states = (("a human answers", head.handler == "human"), ("archived", head.archived))
        yield from self._paragraph(_joined(*(text for text, is_so in states if is_so)), fg="magenta")
        if escalation is not None:
            for text in escalation_texts(escalation):
                yield from self._paragraph(text, fg=colour_of(escalation))
        elif head.escalated:
            yield from self._paragraph("escalated", fg="yellow")
        if head.hold:
            reason = f": {head.hold_reason}" if head.hold_reason else ""
            yield from self._paragraph(f"under a legal hold{reason}", fg="red")

    def lines(self, message: Message) -> Iterator[str]:
        """*message*, below the day when that is another than before."""
        at = local(message.created_at)
        day = f"{at:%A}, {at.day} {at:%B %Y}"
        if day != self._day:
            self._day = day
            yield ""
            yield self._rule(day)
        who = _who(message)
        is_dim = message.role in _DIM_ROLES
        time = f"{at:%H:%M}"
        indent = " " * (len(time) + 2 + WHO_CELLS + 2)
        cells = None if self._columns is None else max(self._columns - len(indent), TEXT_CELLS_MIN)
        said = [styled(line, dim=True) if is_dim else line for line in self._said(message, cells)]
        said += [styled(line, dim=True) for note in self._notes(message) for line in wrapped(note, cells)]
        shown = (
            f"{styled(time, dim=True)}  {styled(f'{who:<{WHO_CELLS}}', bold=True, fg=_COLOURS.get(who), dim=is_dim)}"
        )
        # Whose name is longer has a line for himself.
        yield f"{shown}  {said.pop(0)}" if said and len(who) <= WHO_CELLS else shown
        for line in said:
            yield f"{indent}{line}" if line else ""

    def note(self, text: str) -> Iterator[str]:
        """Something about the transcript itself."""
        yield from self._paragraph(text, dim=True)

    def _said(self, message: Message, cells: int | None) -> list[str]:
        """What *message* says, a result with the name of its tool."""
        content = message.content.strip("\r\n")
        if message.role == "tool":
            name = message.metadata.get("name") or self._tools.get(str(message.metadata.get("tool_call_id")))
            content = f"{text_of(name)}: {content}" if name else content
        return wrapped(content, cells) if content else []

    def _notes(self, message: Message) -> Iterator[str]:
        """What *message* calls, and what is attached to it."""
        yield from self._calls(message.metadata)
        for one in _list(message.metadata, "attachments"):
            yield f"attached {_attachment(one)}"

    def _calls(self, metadata: dict[str, Any]) -> Iterator[str]:
        """The tools that are called, as ``calls NAME(ARGUMENTS)``; their names are kept for their results."""
        for call in _list(metadata, "tool_calls"):
            if not isinstance(call, dict):
                yield f"calls {text_of(call)}"
                continue
            function = call.get("function")
            # OpenAI has name and arguments below "function", Anthropic "input" beside the name.
            inner = function if isinstance(function, dict) else call
            name = text_of(inner.get("name") or "a tool")
            if call.get("id"):
                self._tools[str(call["id"])] = name
            arguments = inner.get("arguments", inner.get("input"))
            yield f"calls {name}({'' if arguments is None else text_of(arguments)})"

    def _rule(self, text: str) -> str:
        dash = "─" if blocks_are_shown() else "-"
        rest = 2 if self._columns is None else max(2, self._columns - len(text) - 4)
        return styled(f"{dash * 2} {text} {dash * rest}", dim=True)

    def _paragraph(self, text: str, **style: Any) -> Iterator[str]:
        if text:
            for line in wrapped(text, self._columns):
                yield styled(line, **style)


def escalation_texts(escalation: Escalation) -> Iterator[str]:
    """An escalation, in a sentence and what it says about the customer."""
    priority = "high priority" if escalation.priority == "high" else f"{escalation.priority} priority"
    since = f"since {local(escalation.opened_at):%Y-%m-%d %H:%M}"
    match escalation.status:
        case "pending":
            how = f"waits for a human {since}"
        case "claimed":
            how = f"with {escalation.assignee or 'a human'}, escalated {since}"
        case other:
            how = f"escalation {other}, opened {local(escalation.opened_at):%Y-%m-%d %H:%M}"
    yield f"{how} ({priority}): {escalation.reason}"
    contacts = escalation.contacts()
    if contacts:
        yield "contact: " + ", ".join(f"{name} {text}" for name, text in contacts)


def colour_of(escalation: Escalation) -> str:
    """The colour in which an escalation is shown."""
    if escalation.status == "resolved":
        return "green"
    return "red" if escalation.priority == "high" else "yellow"


def local(at: datetime) -> datetime:
    """*at* on the clock of whoever looks."""
    try:
        return at.astimezone()
    except (OverflowError, OSError, ValueError):
        # The first and last days of the calendar have no local time everywhere.
        return at


def wrapped(text: str, cells: int | None) -> list[str]:
    """*text* in lines of at most *cells* columns, broken between words; without *cells* only where it has lines itself.

    Nothing in it reaches the terminal but characters: all others are escaped.
    """
    lines: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = printable(line.expandtabs(TAB_CELLS)).rstrip(" ")
        lines += [shown] if cells is None or cells_of(shown) <= cells else _broken(shown, cells)
    return lines


def _broken(line: str, cells: int) -> Iterator[str]:
    from rich.cells import chop_cells

    current, used = "", 0
    # Only at spaces: a no-break space is none.
    for part in re.findall(" +|[^ ]+", line):
        taken = cells_of(part)
        if used + taken <= cells:
            current, used = current + part, used + taken
            continue
        if current.strip(" "):
            yield current.rstrip(" ")
        current, used = "", 0
        if part[0] == " ":
            continue
        *whole, current = chop_cells(part, cells)
        yield from whole
        used = cells_of(current)
    if current:
        yield current


def _who(message: Message) -> str:
    usual = _USUAL_AUTHOR.get(message.role)
    if message.author is None or message.author == usual:
        return printable(usual or message.role)
    if message.role == "assistant":
        return printable(message.author)
    return printable(f"{message.role} (by {message.author})")


def _span(head: Head) -> str:
    if head.created_at is None or head.updated_at is None:
        return ""
    first, last = local(head.created_at), local(head.updated_at)
    same_day = first.date() == last.date()
    until = "" if last == first else f" to {last:%H:%M}" if same_day else f" to {last:%Y-%m-%d %H:%M}"
    return f"{first:%Y-%m-%d %H:%M}{until} {last.tzname()}"


def _joined(*parts: str) -> str:
    return (" · " if blocks_are_shown() else ", ").join(part for part in parts if part)


def _attachment(found: Any) -> str:
    """*found*, which is whatever the bots have written there: its name, kind and size, and where it is."""
    if not isinstance(found, dict):
        return text_of(found)

    def first(fields: tuple[str, ...]) -> Any:
        return next((found[field] for field in fields if found.get(field)), None)

    name, kind, size, place = first(_NAME_FIELDS), first(_KIND_FIELDS), first(_SIZE_FIELDS), first(_PLACE_FIELDS)
    if name is None and place is None:
        return text_of(found)
    about = [text_of(kind)] if kind is not None else []
    if isinstance(size, int):
        about.append(readable_size(size))
    described = [text_of(name)] if name is not None else []
    described += [f"({', '.join(about)})"] if about else []
    described += [text_of(place)] if place is not None else []
    return " ".join(described)


def _list(metadata: dict[str, Any], name: str) -> list[Any]:
    found = metadata.get(name)
    return found if isinstance(found, list) else [] if found is None else [found]


def text_of(value: Any) -> str:
    """*value*, of whatever type, as text."""
    return value if isinstance(value, str) else orjson.dumps(value).decode()
