"""The connected side: inspect, convert, prove parity, seal. Never imported by the secured side."""
