#!/usr/bin/env bash
# Builds both images where no container engine runs, and trains a small model with them: a coordinator and two sites
# from the very configs of compose.yaml, on loopback ports and with a smaller budget. Prints a line for each check,
# then PASS, and leaves nothing behind.
#
#   docker/verify.sh            as root on a Debian: ten minutes on two cores, 6 GB under TMPDIR, with vfs far more
#
# buildah builds and runs, with chroot for isolation. The base image is bootstrapped from Debian under the name that
# FROM has, so that no registry of images is asked. STORAGE_DRIVER=vfs is for kernels that refuse buildah's overlays.
# pip's settings on this machine hold in the builds too: its configuration, its PIP_* variables, and the local
# directories that they name. PIP_EXTRA_ARGS is the builds' argument. Missing tools are installed from Debian.
set -euo pipefail

repo=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/isthmus-verify.XXXXXX")
mkdir "$work/tmp"
export BUILDAH_ISOLATION=chroot DEBIAN_FRONTEND=noninteractive
base=docker.io/library/python:3.11-slim
suite=bookworm # its python3 is 3.11
sites=(eu-west us-east)
started=()
blobs=/var/lib/containers/cache # the one place that buildah writes to outside of its roots
had_blobs=$(find "$blobs" -maxdepth 0 2>/dev/null || true)

die() {
    echo "verify.sh: $*" >&2
    exit 1
}

ok() { printf 'ok %5ds  %s\n' "$SECONDS" "$*"; }

b() {
    TMPDIR=$work/tmp buildah --root "$work/storage" --runroot "$work/run" \
        ${STORAGE_DRIVER:+--storage-driver "$STORAGE_DRIVER"} "$@"
}

clean_up() {
    local status=$? log pid mount
    trap - EXIT
    for pid in ${started[@]+"${started[@]}"}; do kill_tree "$pid" KILL; done
    if [ "$status" != 0 ]; then
        find "$work" -maxdepth 1 -name '*.log' -size +0 -printf '%T@ %p\n' | sort -n | tail -n 4 | cut -d' ' -f2 |
            while read -r log; do echo "--- the end of ${log##*/}" && tail -n 20 "$log"; done >&2
        echo "FAIL" >&2
    fi
    wait
    b rm --all >/dev/null 2>&1 || true
    while read -r mount; do umount -l "$mount"; done < <(awk -v top="$work/" 'index($2, top) == 1 {print $2}' /proc/mounts | tac)
    rm -rf --one-file-system "$work"
    if [ -z "$had_blobs" ]; then
        rm -rf "$blobs"
        rmdir --ignore-fail-on-non-empty "${blobs%/*}" 2>/dev/null || true
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# Signals a process and all that descend from it, leaves first: buildah does not pass signals on.
kill_tree() {
    local child
    for child in $(pgrep -P "$1"); do kill_tree "$child" "$2"; done
    kill -"$2" "$1" 2>/dev/null || true
}

# The process of a started container that runs isthmus itself: the last in the line of descent.
innermost() {
    local child
    child=$(pgrep -P "$1" | head -n 1)
    if [ -n "$child" ]; then innermost "$child"; else echo "$1"; fi
}

need() {
    command -v "$1" >/dev/null && return
    apt-get update -qq >"$work/apt.log" 2>&1 || true
    apt-get install -y -qq --no-install-recommends "${2:-$1}" >>"$work/apt.log" 2>&1 || die "cannot install ${2:-$1}"
}

# -- the files that other programs read

check_prometheus() {
    local promtool
    if ! promtool=$(command -v promtool); then # the package also holds a server, which must not start here
        apt-get update -qq >"$work/apt.log" 2>&1 || true
        if ! (cd "$work" && apt-get download -qq prometheus >>"$work/apt.log" 2>&1 && dpkg -x prometheus_*.deb tools); then
            echo "skip: prometheus.yml: no promtool here"
            return
        fi
        promtool=$work/tools/usr/bin/promtool
    fi
    "$promtool" check config "$repo/docker/prometheus.yml" >"$work/promtool.log" 2>&1 || die "prometheus.yml is refused"
    ok "prometheus.yml: promtool accepts it"
}

check_compose() {
    local compose=(docker compose) file=$repo/docker/compose.yaml
    if ! docker compose version >/dev/null 2>&1; then
        need docker-compose
        compose=(docker-compose)
        if ! "${compose[@]}" version --short | grep -qv '^1'; then # it is older than the key `name`
            sed '/^name:/d' "$file" >"$work/compose.yaml"
            file=$work/compose.yaml
        fi
    fi
    "${compose[@]}" --project-directory "$repo/docker" -f "$file" config >"$work/compose.log" 2>&1 \
        || die "compose.yaml is refused"
    ok "compose.yaml: ${compose[*]} $("${compose[@]}" version --short) accepts it"
}

# -- the images

make_base() {
    local container
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$suite" "$work/base" \
        >"$work/debootstrap.log" 2>&1
    rm -rf "$work"/base/var/cache/apt/archives/*.deb "$work"/base/var/lib/apt/lists/*
    container=$(b from scratch)
    b add --quiet "$container" "$work/base" / >/dev/null
    b config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
    b commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$work/base"
    ok "base image: Debian $suite with $(python_of_base)"
}

python_of_base() {
    local container
    container=$(b from --pull-never "$base")
    b run "$container" -- python3 --version
    b rm "$container" >/dev/null
}

# Writes this machine's pip settings to a file, and prints buildah's -v for it and for the paths that it names.
pip_mounts() {
    python3 - "$work/pip.conf" <<'PYTHON'
import ast, subprocess, sys
from pathlib import Path
from urllib.parse import urlsplit

WHERE_FROM = {"index-url", "extra-index-url", "find-links", "no-index", "cert", "client-cert", "trusted-host", "proxy"}
listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
options = {}
for line in listed.splitlines():
    key, found, value = line.partition("=")
    section, _, option = key.rpartition(".")
    if found and option in WHERE_FROM and (section == ":env:" or option not in options):
        options[option] = ast.literal_eval(value).split()
target = Path(sys.argv[1])
lines = [f"{option} = " + "\n    ".join(values) for option, values in options.items()]
target.write_text("\n".join(["[global]", *lines]) + "\n")
print(f"-v\n{target}:/etc/pip.conf:ro")
for value in {value for values in options.values() for value in values}:
    url = urlsplit(value)
    path = Path(url.path)
    if url.scheme not in ("", "file") or not path.is_absolute():
        continue
    # an index's pages may refer to files beside it
    path = path.parent if path.name == "simple" and path.is_dir() else path
    if path.exists():
        print(f"-v\n{path}:{path}:ro")
PYTHON
}

build() {
    local began=$SECONDS
    b build --quiet --pull-never --layers --format docker --build-arg PIP_EXTRA_ARGS="${PIP_EXTRA_ARGS:-}" \
        "${mounts[@]}" -f "$repo/docker/$1.Dockerfile" -t "isthmus-$1" "$repo" >"$work/build-$1.log" 2>&1 \
        || die "docker/$1.Dockerfile does not build"
    ok "isthmus-$1: built in $((SECONDS - began)) s"
}

check_image() {
    local container user kernels
    container=$(b from --pull-never "isthmus-$1")
    user=$(b run "$container" -- id -u)
    [ "$user" != 0 ] || die "isthmus-$1 runs as root"
    kernels=$(b run --env NUMBA_DEBUG_CACHE=1 "$container" -- \
        python -c "from coordinator.outer.step import warm_up; warm_up()")
    grep -q 'data loaded from' <<<"$kernels" || die "isthmus-$1 holds no compiled kernels"
    ! grep -q 'data saved to' <<<"$kernels" || die "isthmus-$1 compiles its kernels anew at run time"
    [ "$(b run "$container" -- python -c "import torch; print(torch.version.cuda)")" = None ] \
        || die "isthmus-$1 has a GPU build of torch: name an index of CPU builds in PIP_EXTRA_ARGS"
    ok "isthmus-$1: user $user, kernels compiled, torch for CPUs, $(du -sm "$(b mount "$container")" | cut -f1) MB"
    b rm "$container" >/dev/null
}

layers_of() {
    b inspect --type image --format '{{range .OCIv1.RootFS.DiffIDs}}{{println .}}{{end}}' "isthmus-$1" | grep .
}

check_layers() {
    local shared all
    all=$(layers_of coordinator | wc -l)
    shared=$(comm -12 <(layers_of coordinator | sort) <(layers_of site | sort) | wc -l)
    [ "$shared" = "$all" ] || die "the images share $shared of $all layers only"
    ok "the images share all $all layers"
}

# -- a run

# Prints what an image would start, or asks its health with, as words one a line: Entrypoint, Cmd or Healthcheck.Test.
config_of() { b inspect --type image --format "{{range .Docker.Config.$2}}{{println .}}{{end}}" "isthmus-$1" | grep .; }

free_port() { python3 -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"; }

# create NAME IMAGE. buildah mounts an image's own volume and ours at the same place in either order: the image's goes.
create() {
    b from --pull-never --name "$1" "isthmus-$2" >/dev/null
    b inspect --type image --format '{{.Docker.Config.Volumes}}' "isthmus-$2" | grep -q /state \
        || die "isthmus-$2 has no volume for its state"
    b config --volume /state- "$1"
}

# start NAME IMAGE ARGUMENT…: runs the image's own command, and ARGUMENTs, in the background with NAME's volumes.
start() {
    local name=$1 image=$2 entrypoint command volumes
    shift 2
    mapfile -t entrypoint < <(config_of "$image" Entrypoint)
    mapfile -t command < <(config_of "$image" Cmd)
    mapfile -t volumes < <(volumes_of "$name")
    b run "${volumes[@]}" "$name" -- "${entrypoint[@]}" "${command[@]}" "$@" >"$work/$name.log" 2>&1 &
    started+=($!)
}

# The volumes of compose.yaml, as words one a line.
volumes_of() {
    if [ "$1" = coordinator ]; then
        printf -- '-v\n%s\n' "$work/config/run.toml:/etc/isthmus/run.toml:ro"
    else
        printf -- '-v\n%s\n' "$work/config/$1.toml:/etc/isthmus/site.toml:ro" "$work/data:/data:ro" \
            "$work/tokens:/tokens:ro"
    fi
    printf -- '-v\n%s\n' "$work/state/$1:/state"
}

one_shot() {
    local script=$1
    shift
    b run -v "$repo/docker/$script:/etc/isthmus/$script:ro" "$@"
}

# healthy NAME IMAGE URL: runs the image's own health check once, in the container.
healthy() {
    local check
    mapfile -t check < <(config_of "$2" Healthcheck.Test)
    [ "${check[0]}" = CMD ] || die "isthmus-$2 has no health check"
    b run --env ISTHMUS_HEALTH_URL="$3" "$1" -- "${check[@]:1}" >/dev/null 2>&1
}

# until_healthy PID NAME IMAGE URL: waits for as long as the process lives.
until_healthy() {
    until healthy "$2" "$3" "$4"; do
        kill -0 "$1" 2>/dev/null || die "$2 ended before it was healthy"
        sleep 1
    done
    ok "$2: healthy"
}

get() { python3 -c "import sys, urllib.request as u; print(u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=10).read().decode())" "$1"; }

prepare_run() {
    local owner site port
    owner=$(b run coordinator -- id -u)
    mkdir -p "$work"/{config,tokens,data,out,state/{coordinator,eu-west,us-east}}
    chmod 755 "$work"
    chown "$owner" "$work"/{tokens,out} "$work"/state/*
    port=$(free_port)
    url=http://127.0.0.1:$port
    sed 's/^tokens = .*/tokens = 300_000/' "$repo/docker/run.toml" >"$work/config/run.toml"
    for site in "${sites[@]}"; do
        metrics[$site]=$(free_port)
        sed -e "s|^coordinator = .*|coordinator = \"$url\"|" -e "s|^host = .*|port = ${metrics[$site]}|" \
            "$repo/docker/sites/$site.toml" >"$work/config/$site.toml"
    done
}

check_preparation() {
    local before
    one_shot text.sh --user 0:0 -v "$work/data:/data" "${mounts[@]}" coordinator -- sh /etc/isthmus/text.sh >"$work/text.log" 2>&1 \
        || die "text.sh fails"
    [ -n "$(find "$work/data" -name '*.txt')" ] || die "text.sh fetched no text"
    ok "text.sh: $(du -sh "$work/data" | cut -f1) of text"
    make_tokens
    before=$(cat "$work"/tokens/*)
    make_tokens
    [ "$before" = "$(cat "$work"/tokens/*)" ] || die "tokens.sh replaced valid tokens"
    ok "tokens.sh: a token for each site, kept when it runs again"
}

make_tokens() {
    one_shot tokens.sh -v "$work/state/coordinator:/state" -v "$work/tokens:/tokens" coordinator -- \
        sh /etc/isthmus/tokens.sh "${sites[@]}" >"$work/tokens.log" 2>&1 || die "tokens.sh fails"
}

check_refusals() {
    local status=0 volumes
    mapfile -t volumes < <(volumes_of coordinator)
    b run "${volumes[@]}" coordinator -- isthmus coordinator serve /etc/isthmus/run.toml --state /state \
        --host 0.0.0.0 --insecure >"$work/insecure.log" 2>&1 || status=$?
    [ "$status" = 2 ] || die "--insecure beyond loopback ended with $status, not 2"
    ok "coordinator: refuses --insecure beyond loopback"
    ! healthy coordinator coordinator "$url/healthz" || die "the health check finds health where nothing runs"
    ok "coordinator: not healthy before it runs"
}

train() {
    local site pid status pids=()
    start coordinator coordinator --host 127.0.0.1 --port "${url##*:}"
    coordinator_pid=${started[-1]}
    until_healthy "$coordinator_pid" coordinator coordinator "$url/healthz"
    get "$url/metrics" | grep '^isthmus_' >/dev/null || die "the coordinator has no metrics"
    ok "coordinator: serves metrics"
    for site in "${sites[@]}"; do
        start "$site" site
        pids+=("${started[-1]}")
    done
    for site in "${!pids[@]}"; do
        until_healthy "${pids[$site]}" "${sites[$site]}" site "http://127.0.0.1:${metrics[${sites[$site]}]}/metrics"
        get "http://127.0.0.1:${metrics[${sites[$site]}]}/metrics" | grep '^isthmus_site_' >/dev/null \
            || die "${sites[$site]} has no metrics"
        ok "${sites[$site]}: serves metrics"
    done
    for site in "${!pids[@]}"; do
        status=0
        wait "${pids[$site]}" || status=$?
        [ "$status" = 0 ] || die "${sites[$site]} ended with $status"
    done
    get "$url/v1/status" >"$work/status.json"
    python3 -c "
import json, sys
status = json.load(open(sys.argv[1]))
assert status['state'] == 'finished', status['state']
print(f\"run finished: {status['tokens']:,} tokens, {status['outer_steps']} outer steps, eval loss {status['eval_loss']}\")
" "$work/status.json" >"$work/finish.log" 2>&1 || die "the run is not finished"
    ok "$(cat "$work/finish.log")"
}

check_end() {
    local status=0 volumes
    kill -TERM "$(innermost "$coordinator_pid")"
    wait "$coordinator_pid" || status=$?
    [ "$status" = 0 ] || die "the coordinator ended with $status on SIGTERM"
    ok "coordinator: ends on SIGTERM"
    mapfile -t volumes < <(volumes_of coordinator)
    b run "${volumes[@]}" -v "$work/out:/out" coordinator -- \
        isthmus coordinator export /state /out/model.safetensors >"$work/export.log" 2>&1 || die "the weights do not export"
    b run -v "$work/out:/out" coordinator -- python -c "
from safetensors.torch import load_file
tensors = load_file('/out/model.safetensors')
assert all(tensor.isfinite().all() for tensor in tensors.values())
print(f'export: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} parameters')
" >"$work/weights.log" 2>&1 || die "the exported weights do not load"
    ok "$(cat "$work/weights.log")"
}

[ "$(id -u)" = 0 ] || die "needs root, for debootstrap and chroot"
command -v apt-get >/dev/null || die "needs a Debian: the base image and the tools come from there"
need python3
need pgrep procps
check_prometheus
check_compose
need buildah
need debootstrap
make_base
mapfile -t mounts < <(pip_mounts)
for image in coordinator site; do
    build "$image"
    check_image "$image"
done
check_layers
declare -A metrics
create coordinator coordinator
for site in "${sites[@]}"; do create "$site" site; done
prepare_run
check_refusals
check_preparation
train
check_end
echo PASS
