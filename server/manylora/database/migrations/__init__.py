"""Alembic's migrations, run by `database.database.open_database` on the connection it hands over."""
