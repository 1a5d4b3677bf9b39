"""`isthmus …` as it is, and when it ends the most memory that it had of its device.

    python -m benchmarks.watched_site FILE DEVICE site run SITE.toml

No program but the site itself knows what its own tensors take. FILE is JSON, `{"peak_bytes": N}`, null where the make
of device does not say.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import isthmus


def main() -> None:
    """Runs the command line."""
    file, device = Path(sys.argv[1]), sys.argv[2]
    sys.argv = ["isthmus", *sys.argv[3:]]
    try:
        isthmus.main()
    finally:
        _write(file, device)


def _write(file: Path, device: str) -> None:
    # Here, and not above: torch is loaded as `isthmus` loads it.
    import torch

    from benchmarks.plain_loop import peak_bytes

    file.write_text(json.dumps({"peak_bytes": peak_bytes(torch.device(device))}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
