"""The dataclasses of every table, grouped by what they are about."""
