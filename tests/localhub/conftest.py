"""The fixture `local_hub` for the tests of this folder."""

from tests.localhub.server import local_hub

__all__ = ["local_hub"]
