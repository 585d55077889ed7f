"""``make bench``: what Holdfast does, beside what a user would pick instead, in one run."""
