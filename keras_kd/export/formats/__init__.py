"""The formats of exported files: a folder each, and what they share."""
