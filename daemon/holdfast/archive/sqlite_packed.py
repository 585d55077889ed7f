"""The texts of old conversations, packed together: blocks of zstd, with a dictionary of what is said again and again."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import zstandard

PLACES = 1 << 32
"""Places of one conversation, as in ``sqlite_rows``."""

BLOCK_MESSAGES = 32
"""In one block: twice as many save 2 % more, and whoever reads one message unpacks all of them."""

BLOCK_BYTES_MAX = 256 << 10
"""… unless they are this long together; a longer message has a block of its own."""

TEXT_BYTES_MAX = 512 << 20
"""Of one block unpacked; more is damage."""

LEVEL = 19
"""Of zstd: 0.5 ms for a conversation, once in its life."""

DICTIONARY_BYTES = 112_640
DICTIONARY_SEGMENT, DICTIONARY_MATCH = 200, 8
"""How ZDICT looks for what is worth it; found by trial, its own search takes a minute."""

SAMPLES_MIN, SAMPLES_MAX = 200, 600
"""Conversations that a dictionary is made of; with fewer there is none yet."""

SAMPLE_MESSAGES_MAX = 40
"""Of each of them."""

SHARED_BY = 5
"""Only what so many conversations have in common, three words at a time, may stand in a dictionary …"""

WORDS = 3

RETRAIN_AT = 10
"""With so many times the messages a new dictionary is made."""

TABLES = (
    # Blocks of texts: a zstd frame with a checksum around [[number, content, metadata], …] in MessagePack.
    #   place            of the first message in it
    #   dictionary       that it was compressed with; 0 for none
    """
    CREATE TABLE IF NOT EXISTS blocks (
        place INTEGER PRIMARY KEY, dictionary INTEGER NOT NULL, texts BLOB NOT NULL
    ) STRICT
    """,
    # Dictionaries for zstd, each of them twice, since without it its blocks cannot be read.
    #   copy             0 or 1
    #   messages         how many there were when it was made; with ten times as many another one is made
    #   sha256           of the content
    """
    CREATE TABLE IF NOT EXISTS dictionaries (
        id INTEGER NOT NULL, copy INTEGER NOT NULL, messages INTEGER NOT NULL, sha256 BLOB NOT NULL,
        content BLOB NOT NULL, PRIMARY KEY (id, copy)
    ) STRICT
    """,
)
"""Made with the first block: where nothing is packed they would be two pages for nothing."""

_WORD = re.compile(r"\s*\S+")
_HAS_DIGIT = re.compile(r"\d")
_SAMPLE_CHARS_MIN = 8
_PAUSE_EVERY, _PAUSE_S = 20, 0.002


def has_tables(connection: sqlite3.Connection) -> bool:
    """Whether something was ever packed."""
    return connection.execute("SELECT 1 FROM sqlite_schema WHERE name = 'dictionaries'").fetchone() is not None


class BlockDamaged(Exception):
    """A block, or what is needed to unpack it, is missing or not what it was."""


class Text(NamedTuple):
    """What is packed of one message.

    Attributes:
        metadata: None where it has none.
    """

    number: int
    content: str
    metadata: str | None

    @property
    def bytes(self) -> int:
        """What both take."""
        return len(self.content.encode()) + len((self.metadata or "").encode())


class Dictionaries:
    """The dictionaries of one archive; any thread may use it, each with a connection of its own."""

    def __init__(self) -> None:
        self._loaded: dict[int, zstandard.ZstdCompressionDict] = {}

    def get(self, connection: sqlite3.Connection, id: int) -> zstandard.ZstdCompressionDict:
        """The dictionary *id*.

        Raises:
            BlockDamaged: neither of its copies can be read.
        """
        found = self._loaded.get(id)
        if found is None:
            found = self._loaded[id] = self._load(connection, id)
        return found

    @staticmethod
    def _load(connection: sqlite3.Connection, id: int) -> zstandard.ZstdCompressionDict:
        for copy in (0, 1):
            try:
                row = connection.execute(
                    "SELECT sha256, content FROM dictionaries WHERE id = ? AND copy = ?", (id, copy)
                ).fetchone()
            except sqlite3.DatabaseError:
                continue
            if row is not None and hashlib.sha256(row[1]).digest() == row[0]:
                return zstandard.ZstdCompressionDict(row[1])
        raise BlockDamaged(f"dictionary {id} cannot be read")


class Texts:
    """Reads packed messages by one connection, in the order of their places; for one query, by one thread."""

    def __init__(self, connection: sqlite3.Connection, dictionaries: Dictionaries) -> None:
        self._connection = connection
        self._dictionaries = dictionaries
        self._decompressors: dict[int, zstandard.ZstdDecompressor] = {}
        self._place = -1
        self._texts: dict[int, Text] = {}

    def of(self, place: int, packed: int) -> Text:
        """What is packed of the message at *place*, whose column says *packed*.

        Raises:
            BlockDamaged: it cannot be unpacked.
        """
        block = place // PLACES * PLACES + packed // PLACES
        if block != self._place:
            self._texts = {text.number: text for text in self.block(block)}
            self._place = block
        try:
            return self._texts[place % PLACES]
        except KeyError:
            raise BlockDamaged(f"the block at {block} lacks message {place % PLACES}") from None

    def block(self, place: int) -> list[Text]:
        """All that the block at *place* holds; errors as ``of``."""
        row = self._connection.execute("SELECT dictionary, texts FROM blocks WHERE place = ?", (place,)).fetchone()
        if row is None:
            raise BlockDamaged(f"there is no block at {place}")
        dictionary, packed = row
        decompressor = self._decompressors.get(dictionary)
        if decompressor is None:
            data = self._dictionaries.get(self._connection, dictionary) if dictionary else None
            decompressor = self._decompressors[dictionary] = zstandard.ZstdDecompressor(dict_data=data)
        try:
            if zstandard.frame_content_size(packed) > TEXT_BYTES_MAX:
                raise BlockDamaged(f"the block at {place} claims to be too large")
            return _decode(decompressor.decompress(packed))
        except (zstandard.ZstdError, msgspec.DecodeError, TypeError) as error:
            raise BlockDamaged(f"the block at {place} cannot be unpacked: {error}") from error


_decode = msgspec.msgpack.Decoder(list[Text]).decode


def blocks_of(texts: Iterable[Text]) -> list[list[Text]]:
    """*texts* of one conversation, in order, in the portions that are packed together."""
    blocks: list[list[Text]] = []
    size = 0
    for text in texts:
        if not blocks or len(blocks[-1]) >= BLOCK_MESSAGES or size + text.bytes > BLOCK_BYTES_MAX:
            blocks.append([])
            size = 0
        blocks[-1].append(text)
        size += text.bytes
    return blocks


class Packer:
    """Packs with one dictionary, or with none; of one thread."""

    def __init__(self, id: int = 0, content: bytes | None = None) -> None:
        """With the dictionary *id*, which is *content*; it takes 30 ms to be made ready."""
        self.id = id
        data = None if content is None else zstandard.ZstdCompressionDict(content)
        if data is not None:
            # Else this would be done for each block.
            data.precompute_compress(level=LEVEL)
        self._compressor = zstandard.ZstdCompressor(
            level=LEVEL, dict_data=data, write_checksum=True, write_content_size=True, write_dict_id=False
        )

    def pack(self, texts: Sequence[Text]) -> bytes:
        """A block of *texts*."""
        return self._compressor.compress(msgspec.msgpack.encode([tuple(text) for text in texts]))


def train(conversations: Sequence[Sequence[str]]) -> bytes | None:
    """A dictionary of what messages of several *conversations* have in common; None when that is too little.

    Nothing with a digit is in it, and nothing that fewer than SHARED_BY of them say, three words at a time: no number, no
    address, no sentence of one person's own. So erasing a person leaves nothing of him there.
    """
    said: defaultdict[str, set[int]] = defaultdict(set)
    split: list[list[list[str]]] = []
    for index, messages in enumerate(conversations):
        _leave_others_time(index)
        split.append([_WORD.findall(message) for message in messages])
        for words in split[-1]:
            for run in _runs(words):
                if len(said[run]) < SHARED_BY:
                    said[run].add(index)
    shared = {run for run, by in said.items() if len(by) >= SHARED_BY and not _HAS_DIGIT.search(run)}
    samples: list[bytes | bytearray | memoryview] = []
    for index, conversation in enumerate(split):
        _leave_others_time(index)
        for words in conversation:
            samples += [part.encode() for part in _shared_parts(words, shared) if len(part) >= _SAMPLE_CHARS_MIN]
    try:
        trained = zstandard.train_dictionary(DICTIONARY_BYTES, samples, k=DICTIONARY_SEGMENT, d=DICTIONARY_MATCH)
    except zstandard.ZstdError:
        return None  # there is hardly anything
    return trained.as_bytes()


def _runs(words: list[str]) -> list[str]:
    return ["".join(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)]


def _shared_parts(words: list[str], shared: set[str]) -> list[str]:
    """The longest parts of a message in which each three words in a row are *shared*."""
    parts: list[str] = []
    end = 0
    for start, run in enumerate(_runs(words)):
        if run not in shared:
            continue
        if start < end - WORDS + 2 and parts:
            parts[-1] += words[start + WORDS - 1]
        else:
            parts.append(run)
        end = start + WORDS
    return parts


def _leave_others_time(index: int) -> None:
    if index % _PAUSE_EVERY == 0:
        time.sleep(_PAUSE_S)
