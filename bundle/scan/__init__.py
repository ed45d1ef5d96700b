"""Strict parsers: a foreign file enters only when the parser of its role accepts all of it."""
