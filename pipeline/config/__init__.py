"""YAML files and command-line overrides become one frozen, typed recipe."""
