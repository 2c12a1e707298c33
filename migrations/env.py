"""Alembic's environment: the database of the settings, the tables of core.control."""

from alembic import context
from sqlalchemy import NullPool, create_engine

from core import settings
from core.control.tables import Table

url = context.config.get_main_option("sqlalchemy.url") or settings.load().database

with create_engine(url, poolclass=NullPool).connect() as connection:
    context.configure(
        connection=connection,
        target_metadata=Table.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
