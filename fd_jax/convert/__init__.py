"""Weights in and out: readers, rule tables, one module per family of public files."""
