"""The queue: requests, jobs, leases and facts in a database. The only home of SQLAlchemy."""

from sqlalchemy.exc import ArgumentError

from bot.errors import Refused
from bot.jobs.queue.table import UNCOUNTED, Queue
from bot.settings import Settings

__all__ = ["UNCOUNTED", "Queue", "open_queue"]


def open_queue(settings: Settings) -> Queue:
    """The queue of `settings`; missing tables are created."""
    settings.home.mkdir(parents=True, exist_ok=True)
    try:
        return Queue(
            settings.database_url, lease_s=settings.lease_s, attempts=settings.attempts, limit=settings.queue_limit
        )
    except (ArgumentError, ModuleNotFoundError) as error:
        raise Refused(
            "VALUE_OUT_OF_RANGE",
            "The database of MERGEBOT_DATABASE cannot be opened.",
            "Write an SQLAlchemy address and install its driver, or leave it out for SQLite.",
        ) from error
