"""The version, for what records it; nothing else is imported with it."""

__version__ = "0.1.0"
