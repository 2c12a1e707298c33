"""the index of the queue: it is by priority, then by age"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.drop_index("ix_jobs_status_created", "jobs")
    op.create_index("ix_jobs_queue", "jobs", ["status", "priority", "id"])


def downgrade() -> None:
    op.drop_index("ix_jobs_queue", "jobs")
    op.create_index("ix_jobs_status_created", "jobs", ["status", "created_at"])
