"""training: pause, priorities, presets, recoveries, certificates, exports"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")
_KIND = sa.Enum("TRAIN", "EXPORT", name="jobkind")
_ASKED = sa.Enum("CANCEL", "PAUSE", name="asked")


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        with op.get_context().autocommit_block():
            op.execute("ALTER TYPE jobstatus ADD VALUE IF NOT EXISTS 'PAUSED'")
        _KIND.create(op.get_bind())
        _ASKED.create(op.get_bind())
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("kind", _KIND, nullable=False, server_default="TRAIN"))
        jobs.add_column(sa.Column("priority", sa.Integer(), nullable=False, server_default="0"))
        jobs.add_column(sa.Column("preset", _JSON, nullable=True))
        jobs.add_column(sa.Column("recoveries", _JSON, nullable=False, server_default="[]"))
        jobs.add_column(sa.Column("asked", _ASKED, nullable=True))
        jobs.alter_column("dataset_id", existing_type=sa.String(), nullable=True)
    op.execute("UPDATE jobs SET asked = 'CANCEL' WHERE cancel_requested")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("cancel_requested")
        for name in ("kind", "priority", "recoveries"):
            jobs.alter_column(name, server_default=None)
    op.add_column("workers", sa.Column("device", _JSON, nullable=True))
    op.add_column("adapters", sa.Column("certificate", _JSON, nullable=True))
    op.create_table(
        "exports",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("adapter_id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("format", sa.String(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("files", _JSON, nullable=False),
        sa.Column("report", _JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_exports_adapter_id"), "exports", ["adapter_id"])


def downgrade() -> None:
    op.drop_table("exports")
    op.drop_column("adapters", "certificate")
    op.drop_column("workers", "device")
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(
            sa.Column("cancel_requested", sa.Boolean(), nullable=False, server_default=sa.false())
        )
    op.execute("UPDATE jobs SET cancel_requested = true WHERE asked = 'CANCEL'")
    # What the old tables cannot say: a paused job waits as a queued one, an export was never asked for.
    op.execute("UPDATE jobs SET status = 'QUEUED' WHERE status = 'PAUSED'")
    op.execute("DELETE FROM jobs WHERE kind = 'EXPORT'")
    with op.batch_alter_table("jobs") as jobs:
        jobs.alter_column("cancel_requested", server_default=None)
        jobs.alter_column("dataset_id", existing_type=sa.String(), nullable=False)
        for name in ("asked", "recoveries", "preset", "priority", "kind"):
            jobs.drop_column(name)
    if op.get_bind().dialect.name == "postgresql":
        _ASKED.drop(op.get_bind())
        _KIND.drop(op.get_bind())
