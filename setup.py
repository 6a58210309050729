"""Build script; everything it needs to know is declared in pyproject.toml."""

from setuptools import setup

setup()
