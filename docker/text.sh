#!/bin/sh
# Fetches the demo's text, Shakespeare's plays, where /data holds no text yet.
set -eu
if [ -z "$(find /data -name '*.txt' -o -name '*.md')" ]; then
    python -c "from pathlib import Path; from lab.corpus import shakespeare; print(shakespeare(Path('/data')))"
fi
