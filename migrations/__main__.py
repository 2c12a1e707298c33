"""`python -m migrations`: bring the database of the settings up to date."""

from core import settings
from migrations.upgrade import upgrade

upgrade(settings.load().database)
