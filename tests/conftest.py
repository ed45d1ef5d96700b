"""Being here puts this folder on the path: every test may import its helper modules."""
