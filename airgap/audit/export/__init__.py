"""Exports of the log: evidence as it stands, and rows derived from it."""
