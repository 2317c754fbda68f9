"""Build script. The package is pure Python so far; metadata is in pyproject.toml."""

from setuptools import setup

setup()
