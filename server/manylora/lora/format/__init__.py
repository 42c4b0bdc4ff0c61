"""Reads and validates an adapter folder in PEFT's layout."""
