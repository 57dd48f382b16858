"""Benchmarks of a frozen encoder, one a file; `table` runs any encoder on any of them.

A benchmark reads an encoder through `encode_text` and `models.encoders.embed` alone; all scores are fractions in
[0, 1].
"""
