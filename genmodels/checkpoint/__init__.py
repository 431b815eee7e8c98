"""Checkpoints with digests (`manager`, `verify`), where a state comes from (`init`), surgery."""
