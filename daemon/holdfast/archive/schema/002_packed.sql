-- The texts of archived conversations, packed; everything that is asked for by role, author or time stays in messages.
--
-- Of a packed message content is empty and metadata NULL; both stand in its block, with those of its neighbours. The tables
-- of blocks and dictionaries come with the first block (sqlite_packed.py), since an empty table takes a page as well.

-- packed           NULL, or the number of the first message of its block * 2^32 + bytes of its content and metadata
ALTER TABLE messages ADD COLUMN packed INTEGER;

-- packed_version   the version at which all messages were packed; with the next change there may be more to pack
ALTER TABLE conversations ADD COLUMN packed_version INTEGER;
