"""Vocabulary, errors, dated rules and decisions. Pure: no file, network, clock or environment."""
