"""SHA-256 of the output's shards while they are written: one thread follows the complete tensors.

It reads back from the page cache, in the order of offsets, so a resumed merge has the same hashes.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Mapping

from bot.merge.planning.plan import Plan, Step

BLOCK_BYTES = 2**20


class Hashing:
    """Thread that hashes open shards. `handles`: shard number -> descriptor; `done`: steps complete at the start."""

    def __init__(self, plan: Plan, handles: Mapping[int, int], done: Iterable[int]) -> None:
        self._plan, self._handles = plan, handles
        self._finished = set(done)
        self._wake = threading.Condition()
        self._stopped = False
        self._hashes: list[str] = []
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="hash", daemon=True)
        self._thread.start()

    def finished(self, step: int) -> None:
        """Mark the bytes of a step as readable."""
        with self._wake:
            self._finished.add(step)
            self._wake.notify()

    def result(self) -> list[str]:
        """Wait for the last byte; one hash per shard (64 hex digits)."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._hashes

    def stop(self) -> None:
        """Stop the thread, complete or not."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        by_shard: dict[int, list[Step]] = {number: [] for number in range(len(self._plan.shards))}
        for step in self._plan.steps:
            by_shard[step.shard].append(step)
        try:
            for number, steps in by_shard.items():
                digest = hashlib.sha256(self._plan.shards[number].header)
                for step in sorted(steps, key=lambda step: step.offset):
                    if not self._wait_for(step):
                        return
                    self._hash(digest, step)
                self._hashes.append(digest.hexdigest())
        except Exception as error:
            self._failure = error

    def _wait_for(self, step: Step) -> bool:
        """Wait until the step is finished; False if the merge ends before."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopped or step.index in self._finished)
            return not self._stopped

    def _hash(self, digest: hashlib._Hash, step: Step) -> None:
        buffer = memoryview(bytearray(min(BLOCK_BYTES, max(1, step.nbytes))))
        at, end = step.offset, step.offset + step.nbytes
        while at < end and not self._stopped:
            count = os.preadv(self._handles[step.shard], [buffer[: end - at]], at)
            if not count:
                raise OSError(f"shard {step.shard} ends at byte {at}")
            digest.update(buffer[:count])
            at += count
