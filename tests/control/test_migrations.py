"""The migrations make exactly the tables of core.control.tables, there and back."""

import os
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

import migrations
from core.control.db import Sessions, engine_of
from core.control.tables import Table
from migrations.upgrade import upgrade


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without any table."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    server = request.getfixturevalue("postgres").replace("postgresql://", "postgresql+psycopg://")
    name = f"empty_{os.urandom(6).hex()}"
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = admin.url.set(database=name).render_as_string(hide_password=False)
    admin.dispose()
    return url


def downgrade(url: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("sqlalchemy.url", url.replace("%", "%%"))
    command.downgrade(config, "base")


def differences(url: str) -> list[object]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = compare_metadata(
            MigrationContext.configure(connection, opts={"compare_type": True}), Table.metadata
        )
    engine.dispose()
    return list(found)


def left(url: str) -> tuple[set[str], list[str]]:
    """The tables and, on Postgres, the types of a database."""
    engine = create_engine(url)
    with engine.connect() as connection:
        tables = set(inspect(connection).get_table_names())
        types = []
        if engine.dialect.name == "postgresql":
            types = list(connection.scalars(text("SELECT typname FROM pg_type WHERE typtype = 'e'")))
    engine.dispose()
    return tables, types


def test_upgrade_makes_the_tables_that_the_code_uses(empty_url: str) -> None:
    assert differences(empty_url) != []
    upgrade(empty_url)
    assert differences(empty_url) == []


def test_upgrading_twice_changes_nothing(empty_url: str) -> None:
    upgrade(empty_url)
    upgrade(empty_url)
    assert differences(empty_url) == []


def test_downgrade_leaves_nothing_behind(empty_url: str) -> None:
    upgrade(empty_url)
    downgrade(empty_url)
    assert left(empty_url) == ({"alembic_version"}, [])


def test_up_down_and_up_again(empty_url: str) -> None:
    upgrade(empty_url)
    downgrade(empty_url)
    upgrade(empty_url)
    assert differences(empty_url) == []


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_sqlite_writes_ahead_and_keeps_foreign_keys(sessions: Sessions) -> None:
    with engine_of(sessions).connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
