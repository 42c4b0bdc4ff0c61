"""Alembic's migrations, run by `catalog.database.open_database` on the connection it hands over."""
