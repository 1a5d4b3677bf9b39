"""A function in a process of its own: its peak of memory is then its own, and so is what it imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def apart(module: str, function: str, *case: Any) -> Any:
    """What the function of `benchmarks.MODULE` returns; `case` and that go through JSON. Raises SystemExit with what it
    said where it fails."""
    code = (
        f"import json, sys; from benchmarks import {module}; out = sys.stdout; sys.stdout = sys.stderr; "
        f"print(json.dumps({module}.{function}(*json.load(sys.stdin))), file=out)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(case), capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return json.loads(run.stdout)


def status_bytes(field: str, process: int | None = None) -> int:
    """A field of the process's status (None: of this one), in bytes: VmRSS, VmHWM, RssAnon. 0 where there is none."""
    status = Path(f"/proc/{process or 'self'}/status").read_text(encoding="ascii")
    match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return int(match[1]) << 10 if match else 0
