"""The running server: its parts, its HTTP application, its process."""
