"""The jobs table: what was asked, who works on it, which facts are known. The only home of SQLAlchemy."""

from bot.queue.table import Queue
from bot.settings import Settings

__all__ = ["Queue", "open_queue"]


def open_queue(settings: Settings) -> Queue:
    """The queue that `settings` speak of; its tables are made when they are missing."""
    settings.home.mkdir(parents=True, exist_ok=True)
    return Queue(
        settings.database_url, lease_s=settings.lease_s, attempts=settings.attempts, limit=settings.queue_limit
    )
