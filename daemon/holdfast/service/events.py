"""The catalogue of log events: what may be logged, with which fields."""

from __future__ import annotations

from typing import NamedTuple


class Event(NamedTuple):
    """One line of the catalogue.

    Attributes:
        meaning: what happened, for an operator.
        fields: what may stand in the log in full; every other field is redacted.
    """

    meaning: str
    fields: tuple[str, ...] = ()


EVENTS: dict[str, Event] = {
    # The process.
    "daemon.started": Event("the process runs and begins to load", ("version", "pid", "data_dir")),
    "daemon.ready": Event("it listens; from here on it serves", ("listen", "duration_ms")),
    "daemon.failed": Event("it ends with a non-zero exit code, for this reason", ("reason", "exit_code", "exception")),
    "status.report": Event(
        "the answer to SIGUSR2",
        (
            "state",
            "version",
            "pid",
            "uptime_s",
            "listen",
            "data_dir",
            "sessions",
            "pending_orders",
            "completed_orders",
            "users",
            "conversations",
            "open_escalations",
            "collections",
            "leases",
            "idempotency_keys",
            "seq",
            "durable_seq",
            "snapshot_seq",
            "archived_seq",
            "journal_bytes",
            "journal_segments",
            "snapshot_bytes",
            "durability",
            "last_flush",
            "backups",
            "copies",
            "disk",
            "parts",
            "degraded",
        ),
    ),
    "config.reloaded": Event("settings were read again and applied", ("changed", "needs_restart")),
    "config.rejected": Event("new settings are invalid; the old ones stay", ("reason",)),
    "config.watch_degraded": Event(
        "the system refused to watch the settings file; it is polled instead", ("reason", "poll_s")
    ),
    "signal.failed": Event("what a signal asked for could not be done", ("reason", "exception")),
    "thread.failed": Event("a thread of ours ended by an exception", ("thread", "exception")),
    # The data.
    "state.loaded": Event(
        "the data is in memory, with what was left out",
        ("sessions", "orders", "users", "dropped_stale", "skipped_invalid", "merged", "replayed", "duration_ms"),
    ),
    "sessions.expired": Event("so many sessions were idle for longer than their ttl", ("count",)),
    "flush.completed": Event(
        "the snapshots hold everything up to snapshot_seq", ("reason", "duration_ms", "bytes", "files", "snapshot_seq")
    ),
    "archive.damaged": Event(
        "archive.db cannot be used and is made anew; the old one goes to quarantine/", ("reason",)
    ),
    "archive.rebuilt": Event(
        "it was made anew from memory, from what could be read of the old one, and from the journal",
        ("conversations", "messages", "salvaged", "lost_messages"),
    ),
    "archive.condensed": Event(
        "texts of archived conversations were packed", ("messages", "bytes_before", "bytes_after", "duration_ms")
    ),
    "data.compacted": Event(
        "room that nothing used was given back", ("freed_bytes", "condensed_messages", "duration_ms")
    ),
    "archive.stalled": Event("it cannot be written for now; the journal keeps what it needs", ("reason", "action")),
    "archive.resumed": Event("it can be written again", ()),
    "archive.failed": Event("a fault inside Holdfast; it is tried again", ("reason", "exception")),
    "conversations.imported": Event(
        "what an old bot left was taken over; its files are in backups/imported-TIME/",
        ("conversations", "messages", "escalations", "broken", "duration_ms"),
    ),
    "conversation.import_failed": Event(
        "a file of an old bot could not be taken over; it is in quarantine/, with a report", ("reason",)
    ),
    "mirror.failed": Event(
        "some of the readable mirror could not be written; it is tried again after the next flush",
        ("reason", "exception"),
    ),
    "mirror.files_kept": Event(
        "files of the readable mirror whose conversations are not here, and were not deleted here, were moved to backups/",
        ("files", "kept_in"),
    ),
    "mirror.resumed": Event("all of it could be written again"),
    "data.migrated": Event(
        "the data directory is of the present format now; the backup is of the old one",
        ("from_format", "to_format", "steps", "backup", "duration_ms"),
    ),
    "data.mended": Event(
        "`holdfast mend` put right what it could; the backup is of before", ("backup", "steps", "problems")
    ),
    "data.verified": Event(
        "the data directory was looked through; nothing is wrong", ("reason", "deep", "duration_ms")
    ),
    "data.verify_failed": Event(
        "something is wrong in the data directory; /readyz says degraded until it is verified again",
        ("reason", "deep", "count", "parts", "action", "duration_ms"),
    ),
    "retention.completed": Event(
        "conversations and messages were let go because of their age",
        ("reason", "archived", "conversations", "messages_deleted", "bytes_freed", "held", "duration_ms"),
    ),
    "retention.idle_removed": Event("conversations idle for long were removed", ("deleted", "errors", "held")),
    "flush.failed": Event("the snapshots are as before; the journal has everything", ("reason", "error")),
    "recovery.candidate_found": Event(
        "what a backup has of a damaged file; the one that brings back most is used, an exact one before all others",
        ("file", "source", "at", "records", "is_exact", "salvaged", "lost_with_file"),
    ),
    "restore.started": Event("a state is being prepared beside the present one", ("source", "at", "seq")),
    "restore.completed": Event(
        "the data is what a backup, or a moment, held; `after_crash`: a start finished what was decided before",
        ("source", "at", "seq", "saved_as", "counts", "duration_ms", "after_crash"),
    ),
    "restore.failed": Event(
        "nothing was restored, for this reason; the data is what it was", ("source", "reason", "exception")
    ),
    "restore.backup_failed": Event(
        "the restored state could not be backed up: moments from then on are not reached before the next backup",
        ("reason",),
    ),
    "journal.tail_dropped": Event(
        "an unfinished last write was cut off; it was never acknowledged", ("bytes", "segment")
    ),
    "journal.damaged": Event(
        "events that were acknowledged are damaged or missing; the segment is in quarantine/",
        ("segment", "offset", "bytes", "reason"),
    ),
    "snapshot.damaged": Event("a snapshot file was damaged", ("file", "recovered_from", "records", "reason")),
    "snapshot.edited": Event(
        "a snapshot file was changed while we were stopped; it counts as it is", ("file", "records")
    ),
    "file.ignored": Event("a file that is not ours is left alone", ("file", "reason")),
    "backup.kept_before_merge": Event(
        "the files as found were kept before records were left out", ("files", "kept_in")
    ),
    "snapshot.edit_kept": Event(
        "somebody changed a snapshot file while we ran; a copy was kept before it was replaced", ("file", "kept_in")
    ),
    "snapshot.edit_merged": Event(
        "what somebody changed in a snapshot file while we ran was taken over; *missing* records are not deleted by that",
        ("file", "added", "newer", "older", "refused", "missing", "reason"),
    ),
    "snapshot.removed": Event("somebody removed a snapshot file while we ran; it is written anew", ("file",)),
    "inbox.merged": Event(
        "a file in the inbox was merged, and put into `inbox/done/`",
        ("file", "added", "newer", "older", "same", "conflicting", "messages"),
    ),
    "inbox.rejected": Event(
        "a file in the inbox could not be taken; it is in `inbox/rejected/` with a report", ("file", "reason")
    ),
    "inbox.postponed": Event(
        "a file in the inbox cannot be taken or put away now; it is tried again", ("file", "reason")
    ),
    "inbox.failed": Event(
        "the inbox, a file in it, or the snapshot files could not be looked at", ("reason", "exception")
    ),
    "inbox.watch_degraded": Event(
        "the system refused to watch the inbox; it is looked at twice a second all the same", ("reason", "poll_s")
    ),
    "backup.completed": Event(
        "a backup was made; *notes* say what could not be had, and so is not in it",
        ("backup", "reason", "seq", "bytes", "new_bytes", "notes", "duration_ms"),
    ),
    "backup.key_missing": Event(
        "the key of backups.identity_file cannot be read now; it is looked for again every minute", ("reason",)
    ),
    "backup.failed": Event("no backup could be made; it is tried again", ("reason", "error")),
    "backup.proved": Event("everything was loaded from a backup", ("backup", "duration_ms")),
    "backup.proof_failed": Event(
        "a backup does not give everything back, or that could not be tried; another one is made soon",
        ("backup", "reason", "is_tried"),
    ),
    "backups.rotated": Event("backups that need not be kept any more were removed", ("removed", "kept")),
    "backups.rotation_failed": Event("they could not be removed; it is tried again with the next backup", ("reason",)),
    "history.given_up": Event(
        "the disk is short of room, so the history behind the backups was removed",
        ("first_seq", "last_seq", "reason"),
    ),
    "history.resumed": Event("there is room again: the history is kept from this event on", ("after_seq",)),
    "history.gap_found": Event("events that the history should keep cannot be read", ("first_seq", "last_seq")),
    "history.set_aside": Event(
        "the data was put back from an older copy: events of the history beyond it are in quarantine/",
        ("first_seq", "last_seq", "present_seq"),
    ),
    "history.failed": Event("the history could not be kept for now; it is tried again", ("reason", "exception")),
    "backup.copied": Event(
        "a backup stands at the second place as well", ("name", "place", "files", "bytes", "duration_ms")
    ),
    "backup.copy_failed": Event(
        "the second place could not be read or written; it is tried again, later and later",
        ("reason", "place", "retry_s"),
    ),
    "disk.filling": Event(
        "the disk is nearly full, or will be within a day at the present rate",
        ("free_bytes", "hours_left", "free_files"),
    ),
    "disk.room_returned": Event("there is enough room again", ("free_bytes",)),
    "journal.sync_slow": Event("the disk took long to sync; told at most every 30 s", ("duration_ms",)),
    "journal.disk_filled": Event("the disk is full: writes are refused, reads go on", ("action",)),
    "journal.writes_resumed": Event("there is room again, writes are taken again"),
    "journal.keep_failed": Event("history could not be kept for readers, or not be removed", ("reason",)),
    "journal.failed": Event("a fault of ours in the journal thread; the process ends", ("exception",)),
    "clock.jumped": Event("the wall clock ran ahead of the monotonic one; expiry does not believe it", ("ahead_ms",)),
    # Requests.
    "request.failed": Event("a fault of ours; the client got 500", ("method", "route", "exception")),
    "request.refused": Event("a request without a good token, or by a forbidden way", ("code", "peer", "reason")),
    "stream.dropped": Event("a reader of the event stream was too slow; so many events behind", ("reason", "lag")),
    "connections.refused": Event("more connections than limits.connections", ("open", "limit")),
    "tokens.reload_failed": Event("a token file cannot be used; the tokens stay as they were", ("reason",)),
    # Services.
    "service.started": Event("a service runs", ("service", "duration_ms")),
    "service.start_failed": Event(
        "a service did not start; those before it are stopped", ("service", "reason", "exception")
    ),
    "service.stopped": Event("a service stopped within its deadline", ("service", "duration_ms")),
    "service.stop_failed": Event(
        "a service raised while it stopped; the stop goes on", ("service", "reason", "exception")
    ),
    "service.stop_timed_out": Event("a service did not stop in time; the stop goes on", ("service", "deadline_s")),
    "interval.failed": Event(
        "regular work raised; it is tried again later", ("interval", "reason", "retry_s", "exception")
    ),
    # The stop.
    "shutdown.started": Event("a graceful stop begins", ("signal",)),
    "shutdown.hurried": Event("a second signal: nothing but the final flush is waited for", ("signal",)),
    "shutdown.step_failed": Event("a final step raised; the next ones follow", ("step", "reason", "exception")),
    "shutdown.completed": Event("the stop is over; clean means all is on disk", ("duration_ms", "clean")),
    # The log itself.
    "log.lines_dropped": Event("the reader of stdout was too slow or gone; so many lines are missing here", ("count",)),
    "log.line_failed": Event("a line could not be rendered", ("reason",)),
    "library.logged": Event("a library has something to say", ("logger", "message", "exception")),
}
"""The single source: a test compares it with every call in the code and with the README."""


def events_table() -> str:
    """The table of events as it stands in the README, without a final newline."""
    rows = ["| event | meaning | fields |", "| --- | --- | --- |"]
    for name, event in sorted(EVENTS.items()):
        fields = ", ".join(f"`{field}`" for field in event.fields)
        rows.append(f"| `{name}` | {event.meaning} | {fields} |")
    return "\n".join(rows)
