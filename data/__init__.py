"""The embedded demo's models and data, and published numbers."""
