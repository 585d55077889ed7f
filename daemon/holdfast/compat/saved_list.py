"""How the list of messages that a bot saves goes on from the conversation as it is stored.

Stored messages never change, so a list with another beginning is not written anew for that: the conversation notes what the
list begins with, and from which message on the stored ones follow (``Beginning``). The usual one is a prompt of the system
with the time of day in it.

All of it is decided from marks of messages (``old_layout.mark_of``); nothing here reads or writes.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from holdfast.care.old_layout import BEGINNING, mark_of, originals

LEAD_MAX = 8
"""Messages at the beginning of a list that may differ from the stored ones without these being replaced."""

LEAD_BYTES_MAX = 64 << 10
"""Of these messages as JSON: they are part of the conversation's head, which stays in memory."""

TAIL = 8
"""Messages at the end that are compared; one of them that was edited is noticed whatever is appended."""

_SYSTEM = ("system", "developer")


class Beginning(NamedTuple):
    """What a bot's list begins with, in place of the oldest stored messages.

    Attributes:
        after: the number of the last message that is not shown.
        messages: what is shown instead, as the bot gave it.
        hidden: how many of those not shown were not the system's, when this was noted.
    """

    after: int
    messages: list[Any]
    hidden: int = 0

    def field(self) -> dict[str, Any]:
        """What the conversation keeps of it. The messages are text, since a bot's need not be JSON that we can keep."""
        shown = sum(not is_system(message) for message in self.messages)
        return {"after": self.after, "hidden": self.hidden, "shown": shown, "messages": json.dumps(self.messages)}


def beginning_of(head: Mapping[str, Any]) -> Beginning | None:
    """The one that the conversation with this *head* notes."""
    field = originals(head).get(BEGINNING)
    try:
        # Else something went through other hands, as a redacted export does.
        found = Beginning(int(field["after"]), json.loads(field["messages"]), int(field["hidden"]))  # type: ignore[index]
    except (TypeError, ValueError, KeyError):
        return None
    return found if isinstance(found.messages, list) else None


class Continuation(NamedTuple):
    """Where the stored messages stand in a list.

    Attributes:
        lead: messages of the list before them, not counting those that were let go since.
        start, end: where in the list the stored ones begin that are shown, and where those that are not stored yet.
        after: the number of the last stored message that is not shown.
        hidden: as of ``Beginning``.
        is_other: whether the list begins otherwise than the conversation does so far.
    """

    lead: int
    start: int
    end: int
    after: int
    hidden: int
    is_other: bool


class Known(NamedTuple):
    """What a save needs of a conversation as it is stored.

    Attributes:
        version: of the conversation; with another one this is out of date.
        created_at: tells it from a later one with the same id.
        stored: messages that are there.
        last_number: messages that were ever there; the oldest may have been let go.
        after: the number of the last message of the lead, or of those instead of which the lead is shown.
        lead: the marks of the messages that the list begins with: those noted, else the system's first ones.
        first: the mark of the first message after the lead; empty when there is none.
        last: the marks of the last ones after the lead, at most TAIL.
        hidden: as of ``Beginning``.
    """

    version: int
    created_at: str
    stored: int
    last_number: int
    after: int = 0
    lead: tuple[bytes, ...] = ()
    first: bytes = b""
    last: tuple[bytes, ...] = ()
    hidden: int = 0

    @property
    def let_go(self) -> int:
        """How many messages retention has deleted."""
        return self.last_number - self.stored

    @property
    def rest(self) -> int:
        """How many stored messages are shown after the lead."""
        return self.last_number - max(self.after, self.let_go)

    def goes_on_at(self, messages: Sequence[Any], count: int) -> Continuation | None:
        """How the first *count* of *messages* go on from those that are stored; None when they do not.

        The cost does not depend on how many there are.
        """
        lead = len(self.lead)
        if lead <= count and all(mark_of(one) == mark for one, mark in zip(messages, self.lead, strict=False)):
            found = self._rest_in(messages, count, lead)
            if found is not None:
                return Continuation(lead, *found, self.after, self.hidden, is_other=False)
        for lead in range(system_lead(messages, count), -1, -1):
            found = self._rest_in(messages, count, lead)
            if found is not None and fits(messages[:lead]):
                # What the bot holds of what was let go stays counted, so that the next list is understood as well.
                after = max(self.after, self.let_go) - (found[0] - lead)
                return Continuation(lead, *found, after, self.hidden, is_other=True)
        return None

    def after_save(self, version: int, messages: Sequence[Any], count: int, at: Continuation) -> Known:
        """What is known when the first *count* of *messages* were saved as *at* says, and the conversation has *version*."""
        new = count - at.end
        known = self._replace(version=version, stored=self.stored + new, last_number=self.last_number + new)
        return known._replace(
            after=at.after,
            lead=marks_of(messages[: at.lead]) if at.is_other else self.lead,
            first=mark_of(messages[at.start]) if at.start < count else b"",
            last=marks_of(messages[max(at.start, count - TAIL) : count]),
            hidden=at.hidden,
        )

    def _rest_in(self, messages: Sequence[Any], count: int, lead: int) -> tuple[int, int] | None:
        """Where in the list the stored messages after the lead begin and end."""
        # A bot that still holds what was let go since has that before them.
        starts = {lead, lead + max(0, self.let_go - self.after), max(lead, self.let_go)}
        if not self.rest:
            # Nothing is left to tell by what the bot still holds: rather something twice than something lost.
            return lead, lead
        for start in sorted(starts):
            end = start + self.rest
            if (
                end <= count
                and mark_of(messages[end - 1]) == self.last[-1]
                and mark_of(messages[start]) == self.first
                and marks_of(messages[end - len(self.last) : end]) == self.last
            ):
                return start, end
        return None


def known_after(version: int, created_at: str, messages: Sequence[Any], count: int) -> Known:
    """What is known of a conversation that was just made of the first *count* of *messages*."""
    lead = system_lead(messages, count)
    return Known(
        version,
        created_at,
        count,
        count,
        after=lead,
        lead=marks_of(messages[:lead]),
        first=mark_of(messages[lead]) if lead < count else b"",
        last=marks_of(messages[max(lead, count - TAIL) : count]),
    )


def marks_of(messages: Sequence[Any]) -> tuple[bytes, ...]:
    return tuple(map(mark_of, messages))


def is_system(message: Any) -> bool:
    """Whether *message*, an old bot's, is one of the system, as it is stored."""
    return isinstance(message, dict) and message.get("role") in _SYSTEM


def system_lead(messages: Sequence[Any], count: int) -> int:
    """With how many messages of the system the first *count* of *messages* begin, LEAD_MAX at most."""
    found = 0
    while found < min(count, LEAD_MAX) and is_system(messages[found]):
        found += 1
    return found


def fits(lead: Sequence[Any]) -> bool:
    """Whether a conversation may note that its list begins with *lead*."""
    return len(lead) <= LEAD_MAX and len(json.dumps(lead)) <= LEAD_BYTES_MAX


def end_in(given: Sequence[bytes], tail: Sequence[bytes]) -> tuple[int, int] | None:
    """Where a list goes on that may have lost its beginning, or been edited: behind which of its messages, and how many
    stored ones come after that message; None when none of the last stored ones is in it.

    Args:
        given: the marks of the list.
        tail: those of the last stored messages, the newest first.
    """
    there = set(given)
    skipped = next((index for index, mark in enumerate(tail) if mark in there), None)
    if skipped is None:
        return None
    ends = [index + 1 for index, mark in enumerate(given) if mark == tail[skipped]]
    # The first of several as good: rather something twice than something lost.
    return max(ends, key=lambda end: common_before(given, end, tail[skipped:])), skipped


def common_before(given: Sequence[bytes], end: int, tail: Sequence[bytes]) -> int:
    """How many messages before *end* are those of *tail*, the newest first."""
    count = 0
    while count < min(end, len(tail)) and given[end - 1 - count] == tail[count]:
        count += 1
    return count


def matches(stored: Sequence[bytes], given: Sequence[bytes]) -> list[int | None]:
    """For each mark of *given* the place in *stored* of the message that it is; None for a new one.

    Those that occur once in both say how the list moved; of others, the neighbours of these are the same, and what stands
    between the same two. So a customer's new "ok" is not taken for an old one.
    """
    found: list[int | None] = [None] * len(given)
    here, there = Counter(stored), Counter(given)
    place = {mark: index for index, mark in enumerate(stored) if here[mark] == 1}
    for index, mark in enumerate(given):
        if there[mark] == 1:
            found[index] = place.get(mark)
    taken = {index for index in found if index is not None}
    for order, step in ((range(len(given) - 2, -1, -1), 1), (range(1, len(given)), -1)):
        for index in order:
            neighbour = found[index + step]
            if found[index] is not None or neighbour is None:
                continue
            wanted = neighbour - step
            if 0 <= wanted < len(stored) and wanted not in taken and stored[wanted] == given[index]:
                found[index] = wanted
                taken.add(wanted)
    _match_between(stored, given, found, taken)
    return found


def _match_between(stored: Sequence[bytes], given: Sequence[bytes], found: list[int | None], taken: set[int]) -> None:
    """Have the rest of *given* be what of *stored* stands between the same two, in order."""
    places: defaultdict[bytes, list[int]] = defaultdict(list)
    for index, mark in enumerate(stored):
        if index not in taken:
            places[mark].append(index)
    bounds = [len(stored)] * (len(given) + 1)
    for index in range(len(given) - 1, -1, -1):
        place = found[index]
        bounds[index] = bounds[index + 1] if place is None else place
    low = -1
    for index, mark in enumerate(given):
        place = found[index]
        if place is None:
            free = places[mark]
            at = bisect_right(free, low)
            if at == len(free) or free[at] >= bounds[index]:
                continue
            place = found[index] = free[at]
        low = place
