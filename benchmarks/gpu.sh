#!/usr/bin/env bash
# Isthmus beside a plain training loop on this machine's accelerator; the table goes to docs/results/gpu.md and gpu.json
# (with --quick only to files that are named). Without an accelerator all of it is tried on the CPU with a tiny model, which
# ends with code 0 only if every check of its own holds.
#
#   benchmarks/gpu.sh [--quick] [--sites N ...] [--seconds S] [--batch-size B] [--steps H] [--json FILE] [--markdown FILE]
#
# PYTHON names the interpreter; absent: .venv of this checkout (made by `make`), else python3.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then
    python=python3
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

find_device='from site_agent.training.devices import choose_device; print(choose_device("").type)'
if ! device=$("$python" -c "$find_device"); then
    echo "gpu.sh: $python cannot load Isthmus; run \`make lint\` once to set .venv up, or set PYTHON" >&2
    exit 2
fi

if [ "$device" = cpu ]; then
    echo "gpu.sh: no accelerator here, so a tiny model is trained on the CPU to check all of it; its speeds mean nothing"
    exec "$python" -m benchmarks.gpu --self-check "$@"
fi
case " $* " in
    *" --quick "*) ;;
    *) set -- --json "$root/docs/results/gpu.json" --markdown "$root/docs/results/gpu.md" "$@" ;;
esac
exec "$python" -m benchmarks.gpu "$@"
