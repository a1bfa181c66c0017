"""Differences between vLLM versions, one file each: why it exists, and what lets it go."""
