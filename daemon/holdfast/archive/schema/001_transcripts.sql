-- Transcripts: conversations, their messages, their escalations, and what is counted of them.
--
-- Times are milliseconds since 1970, days are days since 1970 (UTC), booleans 0 or 1. Lists are read along an index in
-- the order in which they are shown, so that a first page costs the same however much there is; a query whose filter
-- leaves escalated or archived open merges one range of the index for each value.

-- Where the archive stands, and its totals: one row, changed in the transaction that changes what it counts.
--   archived_seq     every event of the journal up to here is in it
--   conversations    all of them; of these:
--   archived           archived ones
--   escalated          those that are or were escalated
--   messages         all of them; of these:
--   system_messages    those with the role system
--   tokens           the sum of tokens_used of all messages
CREATE TABLE totals (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    archived_seq INTEGER NOT NULL,
    conversations INTEGER NOT NULL,
    archived INTEGER NOT NULL,
    escalated INTEGER NOT NULL,
    messages INTEGER NOT NULL,
    system_messages INTEGER NOT NULL,
    tokens INTEGER NOT NULL
) STRICT;

INSERT INTO totals VALUES (1, 0, 0, 0, 0, 0, 0, 0);

-- The same by day, so that "the last 30 days" adds up days and looks only into the one that the moment cuts in two.
--   messages         created on this day
--   conversations    last updated on this day and not archived
CREATE TABLE days (
    day INTEGER PRIMARY KEY,
    messages INTEGER NOT NULL,
    conversations INTEGER NOT NULL
) STRICT;

-- Conversations without their messages. Columns beside the head repeat what stands in it, for the indexes.
--   key              ours, short, and what messages refer to
--   id               the caller's
--   version          of the head
--   oldest_ms        created_ms of the oldest message that is here; NULL without messages
--   head             the conversation as a JSON object; last, since it alone may be long
CREATE TABLE conversations (
    key INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    version INTEGER NOT NULL,
    user_id TEXT,
    session_id TEXT,
    escalated INTEGER NOT NULL,
    archived INTEGER NOT NULL,
    updated_ms INTEGER NOT NULL,
    oldest_ms INTEGER,
    head TEXT NOT NULL
) STRICT;

-- Finds a conversation; retention goes through all of them along it.
CREATE UNIQUE INDEX conversation_by_id ON conversations (id);

-- Lists, newest first; with escalated and archived in front, so that each combination of the two is one range.
CREATE INDEX conversation_by_time ON conversations (escalated, archived, updated_ms, id);

-- The lists of one user, and of one session.
CREATE INDEX conversation_by_user ON conversations (user_id, escalated, archived, updated_ms, id)
WHERE user_id IS NOT NULL;

CREATE INDEX conversation_by_session ON conversations (session_id, escalated, archived, updated_ms, id)
WHERE session_id IS NOT NULL;

-- Messages. There is no index for their order: the table is in it.
--   place            the conversation's key * 2^32 + the message's number
--   kind             role * 4 + author; roles: 0 system, 1 user, 2 assistant, 3 tool; authors: 0 none, 1 bot, 2 agent,
--                    3 customer
--   tokens_used      NULL where nobody counted
--   metadata         a JSON object, or NULL
--   channel, external_id   as in the metadata, for their index; NULL where it names none
CREATE TABLE messages (
    place INTEGER PRIMARY KEY,
    created_ms INTEGER NOT NULL,
    kind INTEGER NOT NULL,
    tokens_used INTEGER,
    content TEXT NOT NULL,
    metadata TEXT,
    channel TEXT,
    external_id TEXT
) STRICT;

-- Counts the messages of the day that is cut in two.
CREATE INDEX message_by_time ON messages (created_ms);

-- Finds what a channel delivers a second time. Not unique: what was acknowledged is kept, whatever it says of itself.
CREATE INDEX message_by_external_id ON messages (place >> 32, channel, external_id)
WHERE external_id IS NOT NULL;

-- Customers who wait, or waited, for a human; one escalation a conversation.
--   id               of the escalation and of its conversation
--   rank             of the priority: 0 high, 1 low, 2 any other
--   value            the escalation as a JSON object
CREATE TABLE escalations (
    id TEXT PRIMARY KEY,
    version INTEGER NOT NULL,
    status TEXT NOT NULL,
    rank INTEGER NOT NULL,
    opened_ms INTEGER NOT NULL,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Lists, high priority first, then the oldest; of all, and of one status.
CREATE INDEX escalation_by_rank ON escalations (rank, opened_ms, id);
CREATE INDEX escalation_by_status ON escalations (status, rank, opened_ms, id);
