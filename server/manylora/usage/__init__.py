"""Chargeback: who used what, kept in the database and summed up on request."""
