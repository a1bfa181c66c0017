"""Benchmarks. Each runs as ``python -m benchmarks.NAME``; the pieces they share are one noun per file.

serving   a ``vllm serve`` process, stock or with the plugin
models    model directories made without a hub
texts     documents and queries of an exact token length
client    one timed streaming request
report    machine, versions, rows, tables, plots
"""
