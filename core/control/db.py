"""Engine, sessionmaker and the database's own clock. A transaction is a visible `with` block."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeVar

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    DateTime,
    Engine,
    Float,
    create_engine,
    event,
    text,
    update,
)
from sqlalchemy.engine import Connection, Dialect
from sqlalchemy.exc import IntegrityError, OperationalError, TimeoutError  # noqa: A004
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, sessionmaker
from sqlalchemy.orm import Session as Session
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator

Sessions = sessionmaker[Session]
Row = TypeVar("Row", bound=DeclarativeBase)
DatabaseUnavailable = (OperationalError, TimeoutError)
AlreadyThere = IntegrityError
# Why a row is held: many may use it at once, and meanwhile nobody changes or deletes it.
Purpose = Literal["use", "change"]
_LOCKS: dict[Purpose, Any] = {"use": {"read": True}, "change": True}


def connect(url: str) -> Sessions:
    """A sessionmaker on SQLite (WAL) or Postgres. Nothing is opened before the first use."""
    if url.startswith("sqlite"):
        engine = create_engine(
            url,
            json_serializer=_json,
            hide_parameters=True,
            connect_args={"timeout": 30, "isolation_level": None},
        )
        event.listen(engine, "connect", _sqlite_connect)
        event.listen(engine, "begin", _sqlite_begin)
    else:
        engine = create_engine(
            url,
            json_serializer=_json,
            hide_parameters=True,
            pool_pre_ping=True,
            pool_size=20,
            max_overflow=40,
            connect_args={"connect_timeout": 5},
        )
    return sessionmaker(engine, expire_on_commit=False)


# SQLite looks names up in the text itself, so they stand in it as they are.
_json = partial(json.dumps, ensure_ascii=False)


def engine_of(sessions: Sessions) -> Engine:
    engine = sessions.kw["bind"]
    assert isinstance(engine, Engine)
    return engine


@contextmanager
def reading(sessions: Sessions) -> Iterator[Session]:
    """A session for queries only; on SQLite it does not take the one write lock."""
    with sessions(bind=engine_of(sessions).execution_options(read_only=True)) as session:
        yield session


def locked(session: Session, table: type[Row], row_id: str, purpose: Purpose) -> Row | None:
    """The row as it is now, held until the transaction ends. (On SQLite the transaction holds everything.)"""
    return session.get(table, row_id, with_for_update=_LOCKS[purpose], populate_existing=True)


def update_one(
    session: Session, table: type[DeclarativeBase], where: list[ColumnElement[bool]], **values: Any
) -> bool:
    """One conditional UPDATE by the database itself; whether it found its row."""
    session.flush()
    statement = update(table).where(*where).values(**values).execution_options(synchronize_session=False)
    result = session.execute(statement)
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def check(sessions: Sessions) -> None:
    """Raise DatabaseUnavailable when the database does not answer."""
    with reading(sessions) as session:
        session.execute(text("SELECT 1"))


def _sqlite_connect(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _sqlite_begin(connection: Connection) -> None:
    # A writer that began as a reader cannot wait for the lock, it fails at once: take the lock first.
    read_only = connection.get_execution_options().get("read_only")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


class now_epoch(FunctionElement[float]):  # noqa: N801 - it reads as the SQL function it is
    """Seconds since 1970 by the database's clock: the only clock that leases are compared with."""

    type = Float()
    inherit_cache = True


@compiles(now_epoch, "sqlite")
def _sqlite_now(_element: object, _compiler: object, **_kw: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now_epoch, "postgresql")
def _postgres_now(_element: object, _compiler: object, **_kw: object) -> str:
    return "extract(epoch from clock_timestamp())"


class UTCDateTime(TypeDecorator[datetime]):
    """Datetimes with a zone, always UTC; SQLite keeps them without one."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
