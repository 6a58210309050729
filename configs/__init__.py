"""YAML of each recipe; a package so that it is found wherever the project is installed."""
