"""Metadata lives in pyproject.toml; this shim serves tools that ask for a setup.py."""

from setuptools import setup

setup()
