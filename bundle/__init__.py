"""The sealed bundle format, its verification and the strict parsers; both sides run this code."""
