"""Benchmarks: one question a file, one table each; run as ``python -m benchmarks.vit`` from the repository root."""
