"""As ``worker.py``, for folders that transformers has saved: what is done is in ``hugging_face_folders.py``."""

from __future__ import annotations

from typing import Any


def work(job: str) -> dict[str, Any]:
    from tests.support.hugging_face_folders import run  # only now: `serve` has limited memory and quieted logging

    return run(job)


if __name__ == "__main__":
    from tests.support.worker import serve

    serve(work)
