"""Backup sets made the simplest way, and lives whose moments are remembered."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson

from holdfast import __version__
from holdfast.archive.place import ARCHIVE
from holdfast.archive.sqlite import open_sqlite
from holdfast.care.backup_set import (
    BACKUPS,
    SET_FILE,
    BackupSet,
    Kind,
    Proof,
    SetManifest,
    StoredFile,
    encode_set_manifest,
    read_set,
    stored_name,
    write_proof,
)
from holdfast.care.packing import pack
from holdfast.clock import format_ms
from holdfast.disk.files import Directory
from holdfast.disk.snapshot import FORMAT_VERSION, MANIFEST, read_manifest
from holdfast.engine import Engine
from holdfast.ops import (
    AnyOp,
    Message,
    MessageAppend,
    OrderComplete,
    OrderPut,
    RecordPut,
    SessionDelete,
    SessionPut,
    StatsOrder,
    UserPut,
)
from holdfast.settings import Settings
from tests import engine_harness
from tests.engine_harness import do, everything


def settings_of(data_dir: Path, **chosen: Any) -> Settings:
    """As of ``engine_harness``, with the history that moments are restored from."""
    return engine_harness.settings_of(data_dir, **({"backups": {"pitr": 7 * 24 * 3600.0}} | chosen))


def opened(data_dir: Path, **chosen: Any) -> Engine:
    """As of ``engine_harness``, with the history that moments are restored from."""
    return engine_harness.opened(data_dir, **({"backups": {"pitr": 7 * 24 * 3600.0}} | chosen))


def set_name(ms: int) -> str:
    """The name of a set made at *ms*."""
    return format_ms(ms).replace(":", "")


def pack_set(data_dir: Path, at_ms: int, into: Path | None = None, reason: str = "api") -> BackupSet:
    """A set of the stopped, flushed directory *data_dir*, made at *at_ms*."""
    place = (into or data_dir) / BACKUPS / set_name(at_ms)
    place.mkdir(parents=True)
    with Directory(data_dir) as directory:
        manifest = read_manifest(directory, MANIFEST)
    assert manifest is not None
    archive = open_sqlite(data_dir / ARCHIVE)
    archived_seq, messages = archive.archived_seq, sum(archive.message_counts().values())
    archive.close()
    kinds: Mapping[str, Kind] = {
        MANIFEST: "manifest",
        ARCHIVE: "archive",
        **dict.fromkeys(manifest.files, "snapshot"),
    }
    files = {}
    for name, kind in kinds.items():
        raw = (data_dir / name).read_bytes()
        stored = b"".join(pack([raw]))
        (place / stored_name(name, sealed=False)).write_bytes(stored)
        files[name] = StoredFile(
            kind,
            stored_name(name, sealed=False),
            len(stored),
            hashlib.sha256(stored).hexdigest(),
            len(raw),
            hashlib.sha256(raw).hexdigest(),
            messages if kind == "archive" else manifest.files[name].records if name in manifest.files else 0,
        )
    found = SetManifest(
        data_format=FORMAT_VERSION,
        holdfast=__version__,
        at=format_ms(at_ms),
        reason=reason,
        seq=max(manifest.snapshot_seq, archived_seq),
        snapshot_seq=manifest.snapshot_seq,
        archived_seq=archived_seq,
        lineage=manifest.lineage,
        files=files,
    )
    (place / SET_FILE).write_bytes(encode_set_manifest(found))
    write_proof(place, Proof(format_ms(at_ms), ok=True))
    return read_set(place)


def change(engine: Engine, number: int) -> None:
    """The change *number* of a life in which every kind of record appears, changes and goes."""
    for op in _ops(number):
        do(engine, op)


def _ops(number: int) -> list[AnyOp]:
    phone = f"57300{number % 7:04d}"
    match number % 6:
        case 0:
            return [SessionPut(id=phone, value={"currentState": "catalog", "turn": number})]
        case 1:
            return [
                OrderPut(id=str(number), value={"recipientPhone": phone, "productType": "music"}),
                *([OrderComplete(id=str(number), revenue=Decimal("10.10"))] if number % 4 == 1 else []),
            ]
        case 2:
            return [UserPut(id=phone, value={"name": f"user {number}"})]
        case 3:
            messages = [
                Message(role="user", content=f"hola {number}", channel="whatsapp", external_id=f"wamid.{number}"),
                Message(role="assistant", content="buenas", tokens_used=7, metadata={"model": "small"}),
            ]
            return [MessageAppend(id=f"chat-{number % 4}", messages=messages)]
        case 4:
            return [RecordPut(collection="notes", id=f"n{number}", value={"text": f"note {number}"})]
        case _:
            return [
                StatsOrder(product_type="videos"),
                SessionPut(id="short", value={"turn": number}),
                SessionDelete(id="short"),
            ]


def all_of(engine: Engine) -> dict[str, Any]:
    """All that readers can see: records with versions, figures, conversations with their messages."""
    seen = everything(engine)
    seen["completed_orders"] = {
        one.id: (one.version, orjson.loads(one.value)) for one in engine.everything("completed_orders")
    }
    seen["conversations"] = {
        one.id: (one.version, orjson.loads(one.value), messages_of(engine, one.id))
        for one in engine.everything("conversations")
    }
    return seen


def messages_of(engine: Engine, id: str) -> list[Any]:
    """Every message of the conversation *id*."""
    return [orjson.loads(item.value) for item in engine.transcripts.messages(id, limit=1_000).items]


def copy_of(data_dir: Path, place: Path) -> Path:
    """Another directory like *data_dir*."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(data_dir, place)
    return place
