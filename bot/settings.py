"""Settings and the environment of child processes: the only module that reads `os.environ`.

`activate` must run before the first import of huggingface_hub, transformers, datasets or gradio, which read their
settings at import. `child_environment` builds the environment of a child by allow-list, so that a token of the parent
never reaches a process that reads untrusted files.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

Zone = Literal["worker", "publisher"]

# hub.md 7: each of these silences or pins a library that would otherwise call out or vary.
CLIENT_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_EXPERIMENTAL_WARNING": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",  # callers show their own
}

# Needed to find Python, its libraries, the GPU and a temporary folder; nothing here names a person or a secret.
INHERITED = (
    "PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NO_PROXY", "SSL_CERT_FILE", "MERGEBOT_CRASH_AT",
    "MERGEBOT_CRASH_ONCE",
)  # fmt: skip

LIVE_HUB = "https://huggingface.co"


class Settings(BaseSettings):
    """Everything an operator can set, as `MERGEBOT_<NAME>` in the environment or by a command's option."""

    model_config = SettingsConfigDict(env_prefix="MERGEBOT_", frozen=True, extra="ignore")

    home: Path = Field(default=Path("mergebot-data"), description="database, caches and scratch folders")
    hub: str = Field(
        default_factory=lambda: os.environ.get("HF_ENDPOINT") or LIVE_HUB,
        description="address of the Hub, without a final slash; HF_ENDPOINT unless it is given",
    )
    namespace: str = Field(default="mergebot", description="organisation that owns what the bot publishes")
    publish_token_file: Path | None = Field(
        default=None, description="file with the write token; only the publisher opens it"
    )
    database: str | None = Field(default=None, description="SQLAlchemy address; default: SQLite in `home`")

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where merges and evaluations run")
    slots: int = Field(default=1, ge=1, description="jobs that run at the same time")
    attempts: int = Field(default=3, ge=1, description="tries of a stage before its job fails")
    lease_s: float = Field(default=120.0, gt=0, description="seconds after which a silent worker loses its job")
    poll_s: float = Field(default=60.0, gt=0, description="seconds between two polls for tagged repos")
    tick_s: float = Field(default=1.0, gt=0, description="seconds between two looks at the queue")

    open_requests_per_person: int = Field(default=3, ge=1, description="unfinished requests per person")
    requests_per_person_and_day: int = Field(default=20, ge=1, description="requests per person and day")
    queue_limit: int = Field(default=1000, ge=1, description="unfinished jobs in all")
    disk_limit_bytes: int = Field(default=120_000_000_000, gt=0, description="disk space of one job")
    memory_limit_bytes: int = Field(default=64_000_000_000, gt=0, description="memory of one job")
    merge_timeout_s: float = Field(default=4 * 3600, gt=0, description="time limit of the merge stage")
    evaluate_timeout_s: float = Field(default=8 * 3600, gt=0, description="time limit of the evaluate stage")
    publish_timeout_s: float = Field(default=2 * 3600, gt=0, description="time limit of the publish stage")

    suite: str = Field(default="quick", description="suite that the form offers first")
    first_stage: int = Field(
        default=0,
        ge=0,
        description="questions per task after which a merge that cannot win is stopped; 0: never",
    )
    first_stage_margin: float = Field(
        default=0.0, ge=-1, le=1, description="lead over each source that counts as a win"
    )
    first_stage_error: float = Field(default=0.05, gt=0, lt=1, description="share of winning merges stopped, at most")
    speed_budget_s: float = Field(default=600.0, gt=0, description="time for heads, calibration and the speed test")
    speed_questions: int = Field(default=16, ge=1, description="questions of the speed test")
    speed_new_tokens: int = Field(default=48, ge=8, description="new tokens per answer of the speed test")

    public: bool = Field(default=False, description="the Space is open to everybody: visitors must log in")
    schedule: bool = Field(
        default=True, description="the Space runs the jobs too; off where a scheduler runs elsewhere"
    )
    examples: Path | None = Field(
        default=None, description="folder of recipes (*.yml) the form offers; a first line `# ...` is the title"
    )

    @field_validator("hub")
    @classmethod
    def _no_final_slash(cls, hub: str) -> str:
        return hub.rstrip("/")

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{(self.home / 'mergebot.db').resolve()}"

    @property
    def scratch(self) -> Path:
        """Folder of scratch folders, one per job, removed when the job has ended."""
        return self.home / "scratch"

    @property
    def logs(self) -> Path:
        """Folder of the output of each stage of each job."""
        return self.home / "logs"

    def source_folder(self, repo: str, revision: str) -> Path:
        """Folder of the verified files of a source at a commit."""
        return self.home / "cache" / "sources" / repo / revision

    def parts_folder(self, repo: str, revision: str) -> Path:
        """Folder of the byte ranges of a source: never a complete model, so apart from those."""
        return self.home / "cache" / "parts" / repo / revision

    @property
    def evaluations(self) -> Path:
        """Evaluations already made, by model content, suite and settings."""
        return self.home / "cache" / "evaluations"

    def write_token(self) -> str | None:
        """The token that can publish. To be called in the publisher process only."""
        if self.publish_token_file is None:
            return None
        return self.publish_token_file.read_text().strip()


def settings_page() -> str:
    """Markdown of docs/settings.md, with a row per setting."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None or field.default_factory is not None else f"`{field.default}`"
        rows.append(f"| `MERGEBOT_{name.upper()}` | {default} | {field.description} |")
    head = "# Settings\n\nEnvironment variables. Generated from `bot/settings.py`.\n\n"
    return "\n".join([f"{head}| variable | default | meaning |", "|---|---|---|", *rows]) + "\n"


def activate(settings: Settings) -> None:
    """Apply `settings` to this process and the libraries it imports from here on.

    Call it before huggingface_hub, transformers, datasets or gradio are imported. A later `Settings()` in this process
    gives the same values.
    """
    os.environ.update(_client_environment(settings))
    os.environ.update(_own_environment(settings))
    os.environ.pop("HF_TOKEN", None)


def child_environment(settings: Settings, zone: Zone) -> dict[str, str]:
    """Complete environment of a child process of `zone`; only the publisher's names the file of the write token.

    A worker reads untrusted files and needs no queue, so it does not get the database address, which may hold a
    password.
    """
    hidden = {"publish_token_file", "database"} if zone == "worker" else set()
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environment.update(_client_environment(settings))
    environment.update(_own_environment(settings, without=hidden))
    environment["HF_HOME"] = str((settings.home / "cache" / "huggingface").resolve())
    return environment


def _own_environment(settings: Settings, *, without: Collection[str] = ()) -> dict[str, str]:
    environment = {}
    for name in Settings.model_fields:
        value = getattr(settings, name)
        if value is not None and name not in without:
            environment[f"MERGEBOT_{name.upper()}"] = str(value.resolve()) if isinstance(value, Path) else str(value)
    return environment


def _client_environment(settings: Settings) -> dict[str, str]:
    environment = dict(CLIENT_ENVIRONMENT, HF_ENDPOINT=settings.hub)
    if settings.hub != LIVE_HUB:
        # The local Hub does not speak the Xet protocol, and a client that tries does not fall back (hub.md 5.5).
        environment["HF_HUB_DISABLE_XET"] = "1"
    return environment


def failpoint(name: str, k: int | None = None) -> None:
    """Die here, as if the power failed, when `MERGEBOT_CRASH_AT` is `name` or `name:k` (tests of reliability.md 7).

    With `MERGEBOT_CRASH_ONCE` a file's name, only the process that makes this file dies; the next one passes.
    """
    if os.environ.get("MERGEBOT_CRASH_AT") not in (name, f"{name}:{k}"):
        return
    once = os.environ.get("MERGEBOT_CRASH_ONCE")
    if once is not None:
        try:
            Path(once).touch(exist_ok=False)
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
