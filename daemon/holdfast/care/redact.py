"""What makes a copy of the data fit to leave the house: stand-ins for people, nothing of what they wrote.

Of one export the same phone or id always becomes the same stand-in, in every file, so that records of one person still
belong together; the key is drawn anew for each export and kept nowhere. A phone keeps its length and its last three digits.
No two phones of one length become the same one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import Any

from holdfast.core.conversations import AUTHORS, ROLES
from holdfast.record import HEADER_KEY

REDACTED = "[redacted]"
"""In place of text that nobody but the house may read."""

KEPT_WORDS = frozenset(
    {
        "channel",
        "currency",
        "currentState",
        "language",
        "previousState",
        "priority",
        "productType",
        "status",
    }
)
"""Fields whose words stay, as long as they are single words without a number that could be a phone."""

KEPT_ROLES = frozenset({*ROLES, *AUTHORS, "waiting", "human"})
"""What stays in the fields ``author``, ``handler`` and ``role``; anything else is somebody's name."""

_ROUNDS = 6
_KEPT_DIGITS = 3
_DIGITS_MIN, _DIGITS_MAX = 7, 15
_NUMBER_DIGITS_MIN = 9
"""Of a phone that is a number; shorter ones are prices, unless their field says something else."""

_NUMBER_MIN = 10 ** (_NUMBER_DIGITS_MIN - 1)
_PHONE = re.compile(r"\+?\d[\d ().-]{5,24}")
_TIME = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?(?:Z|[+-]\d\d:?\d\d)?)?")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.:/-]{0,63}")
# Of a field, not of a person: Name is hidden as well, since Ana looks the same.
_KEY = re.compile(r"(?:[a-z_]|[A-Z](?![a-z]))[\w.-]{0,63}", re.ASCII)
_ENDINGS = ("@c.us", "@s.whatsapp.net", "@g.us")
_ID_ENDINGS = ("id", "Id", "ID", "hone")
_PHONE_FIELD = re.compile(r"[Pp]hone|[Mm]obile|[Mm][oó]vil|[Cc]elular|[Ww]hats[Aa]pp|^tel|_tel|Tel")
_ROLE_FIELDS = ("author", "handler", "role")


class Redactor:
    """Replaces what tells who somebody is, or what was said; for one export."""

    def __init__(self, key: bytes | None = None) -> None:
        """Draw the key; *key* is for tests."""
        self._key = secrets.token_bytes(32) if key is None else key

    def record(self, value: dict[str, Any], id_field: str) -> dict[str, Any]:
        """A session, order, user, escalation or record of a custom collection."""
        return {
            field if field == id_field else self._key_of(field): self._value(
                id_field if field == "id" else field, inner
            )
            if field != id_field
            else self.id(inner)
            for field, inner in value.items()
            if field != HEADER_KEY
        }

    def conversation(self, head: dict[str, Any]) -> dict[str, Any]:
        """A conversation without its messages."""
        return self.record(head, "id")

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """One message, of which its length stays."""
        content = message["content"]
        return {
            **message,
            "content": f"[{len(content)} characters]" if content else "",
            "metadata": {self._key_of(key): self._value(key, inner) for key, inner in message["metadata"].items()},
        }

    def id(self, id: Any) -> Any:
        """The stand-in of an id, the same for the same person however the phone is written."""
        if isinstance(id, int) and not isinstance(id, bool):
            return self._number(id, _DIGITS_MIN)
        text = str(id)
        ending = next((ending for ending in _ENDINGS if text.endswith(ending)), "")
        bare = text.removesuffix(ending)
        if _PHONE.fullmatch(bare) and (digits := self._digits_in(bare)):
            return self.phone(digits) + ending
        return f"id-{self._mark(text)}" if text else ""

    def phone(self, digits: str) -> str:
        """The stand-in of a phone of *digits*."""
        made = self._permuted(digits[:-_KEPT_DIGITS])
        while digits[0] != "0" and made[0] == "0":
            # As a number it would lose the zero, and meet another.
            made = self._permuted(made)
        return made + digits[-_KEPT_DIGITS:]

    def _permuted(self, digits: str) -> str:
        """A permutation of all texts of so many digits, by a Feistel network."""
        half = len(digits) // 2
        left, right = digits[:half], digits[half:]
        for turn in range(_ROUNDS):
            size = len(left)
            drawn = int(self._mark(f"{turn}:{right}", 16), 16) % 10**size if size else 0
            mixed = f"{(int(left or 0) + drawn) % 10**size:0{size}}" if size else ""
            left, right = right, mixed
        return left + right

    def _value(self, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {self._key_of(name): self._value(name, inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._value(key, inner) for inner in value]
        if isinstance(value, str):
            return self._text(key, value)
        if isinstance(value, int) and not isinstance(value, bool):
            return self._number(value, _DIGITS_MIN if _PHONE_FIELD.search(key) else _NUMBER_DIGITS_MIN)
        if isinstance(value, float) and abs(value) >= _NUMBER_MIN:
            return float(self._number(int(value), _NUMBER_DIGITS_MIN))
        return value

    def _text(self, key: str, text: str) -> str:
        if not text or _TIME.fullmatch(text):
            return text
        if _PHONE.fullmatch(text) and (digits := self._digits_in(text)):
            return self.phone(digits)
        if key.endswith(_ID_ENDINGS):
            return str(self.id(text))
        if key in _ROLE_FIELDS:
            return text if text in KEPT_ROLES else REDACTED
        if key in KEPT_WORDS and _WORD.fullmatch(text) and _digits_of(text) < _DIGITS_MIN:
            return text
        return REDACTED

    def _key_of(self, key: str) -> str:
        if _KEY.fullmatch(key) and _digits_of(key) < _DIGITS_MIN:
            return key
        if _PHONE.fullmatch(key) and (digits := self._digits_in(key)):
            return self.phone(digits)
        return f"key-{self._mark(key)}"

    def _number(self, number: int, digits_min: int) -> int:
        text = str(abs(number))
        if len(text) < digits_min:
            return number
        made = int(self.phone(text)) if len(text) <= _DIGITS_MAX else int(self._mark(text), 16)
        return made if number >= 0 else -made

    def _digits_in(self, text: str) -> str:
        digits = re.sub(r"\D", "", text)
        return digits if _DIGITS_MIN <= len(digits) <= _DIGITS_MAX else ""

    def _mark(self, text: str, hex_digits: int = 12) -> str:
        return hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:hex_digits]


def _digits_of(text: str) -> int:
    return sum(map(str.isdecimal, text))
