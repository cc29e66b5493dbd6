"""SONA: an engine that learns from feedback, in three loops: instant, background and deep."""
