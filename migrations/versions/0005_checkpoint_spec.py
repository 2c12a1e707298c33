"""jobs: the spec that checkpoints were made with, until a retry with another one takes their place"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_JSON = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")


def upgrade() -> None:
    op.add_column("jobs", sa.Column("checkpoint_spec", _JSON, nullable=True))


def downgrade() -> None:
    # An older version takes every checkpoint for one of the job's spec.
    op.execute(
        "DELETE FROM checkpoints WHERE job_id IN (SELECT id FROM jobs "
        "WHERE checkpoint_spec IS NOT NULL AND CAST(checkpoint_spec AS TEXT) <> 'null')"
    )
    op.drop_column("jobs", "checkpoint_spec")
