"""Answers that must look like something: grammars are tried, made ready, kept, and followed token by token."""
