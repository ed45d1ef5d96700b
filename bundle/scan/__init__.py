"""Strict parsers of foreign files: a file enters only when the parser of its role accepts it all."""
