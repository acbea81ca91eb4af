"""Local Hub: serves the Hub's HTTP protocol from a local disk, for the demo and for tests.

    serve(root)            run it on a socket                    (serve.py)
    create_app(root)       the ASGI application                  (app.py)
    add_user(root, ...)    users, organisations, tokens          (users.py)
    seed(root, folder)     repos from a folder                   (seeding.py)

Its contract is docs/design/hub.md 5; storage.py describes the files on disk.
"""

from bot.localhub.app import LocalHub, create_app
from bot.localhub.seeding import seed
from bot.localhub.serve import serve
from bot.localhub.users import add_user

__all__ = ["LocalHub", "add_user", "create_app", "seed", "serve"]
