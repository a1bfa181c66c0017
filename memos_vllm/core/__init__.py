"""Next-scene prediction and residency: which prefixes come next, and which blocks to keep or bring for them.

Pure Python. Nothing here reads a clock, draws a random number or does I/O; times are passed in, in seconds.
"""
