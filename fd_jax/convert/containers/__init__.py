"""Readers and writers of weight files, by kind of file; they know no network."""
