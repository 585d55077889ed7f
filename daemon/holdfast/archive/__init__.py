"""Transcripts on the disk: an archive that follows the journal."""
