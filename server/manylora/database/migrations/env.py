"""Runs the migrations on the connection (and in the transaction) that `open_database` holds."""

from alembic import context

from manylora.database.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
