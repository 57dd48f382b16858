"""Encoders, conditions and denoisers: everything that holds weights."""
