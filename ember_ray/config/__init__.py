"""Typed run configuration: schema, YAML files, ``key=value`` overrides and the command line."""
