"""Holds adapters: how they are packed, where they lie, who makes room."""
