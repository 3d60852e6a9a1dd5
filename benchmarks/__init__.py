"""Ours against theirs: one file a method that has a peer, both timed in the same run."""
