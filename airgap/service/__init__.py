"""The broker as a daemon: many people, one sealed pair (docs/design/architecture.md, 4)."""
