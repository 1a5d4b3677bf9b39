#!/usr/bin/env bash
# Runs site.sbatch and two-makes.sbatch under a real Slurm of two nodes on this machine: a small model, on CPUs, with a
# coordinator beside it. Prints a line for each check, then PASS, and leaves nothing behind but Debian's packages
# slurm-wlm and munge, which it installs where they are missing.
#
#   deploy/slurm/verify.sh      as root on a Debian, with the environment active that has isthmus: five minutes
#
# NODES is how many nodes the site has: 2, or 1 (then two-makes.sbatch, which needs two, is left out).
set -euo pipefail

repo=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/isthmus-slurm.XXXXXX")
nodes=${NODES:-2}
started=()
export SLURM_CONF=$work/slurm.conf OMP_NUM_THREADS=1 PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$repo DEBIAN_FRONTEND=noninteractive
unset http_proxy HTTP_PROXY

die() {
    echo "verify.sh: $*" >&2
    exit 1
}

ok() { printf 'ok %5ds  %s\n' "$SECONDS" "$*"; }

clean_up() {
    local status=$? pid log
    trap - EXIT
    if [ "$status" != 0 ]; then
        for log in "$work"/*.log; do echo "--- the end of ${log##*/}" && tail -n 30 "$log"; done >&2
        echo "FAIL" >&2
    fi
    scancel --user=root >/dev/null 2>&1 || true
    until_or 60 no_jobs || true
    for pid in ${started[@]+"${started[@]}"}; do kill "$pid" 2>/dev/null || true; done
    for pid in "$work"/*.pid; do [ ! -e "$pid" ] || kill "$(cat "$pid")" 2>/dev/null || true; done
    wait
    rm -rf "$work"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

need() {
    command -v "$1" >/dev/null && return
    apt-get update -qq >"$work/apt.log" 2>&1 || true
    apt-get install -y -qq --no-install-recommends "$2" >>"$work/apt.log" 2>&1 || die "cannot install $2"
}

# until_or SECONDS COMMAND…: waits until the command is true; false after so long.
until_or() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 1
    done
}

no_jobs() { [ -z "$(squeue --noheader 2>/dev/null)" ]; }
free_port() { python -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"; }
state_of() { scontrol show job "$1" | grep -o 'JobState=[A-Z]*' | head -n 1 | cut -d= -f2; }
is() { [ "$(state_of "$1")" = "$2" ]; }
idle() { [ "$(sinfo --noheader --format=%T --partition=low | sort -u)" = idle ]; }
said() { [ -e "$1" ] && [ "$(grep -c "$2" "$1")" -ge "$3" ]; } # FILE TEXT TIMES
serves() { get /healthz >/dev/null 2>&1; }
get() { python -c "import sys, urllib.request as u; print(u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=10).read().decode())" "$url$1"; }
tokens() { get /v1/status | python -c "import json, sys; print(json.load(sys.stdin)['tokens'])"; }

# -- Slurm, all of it in a directory

start_slurm() {
    local node host
    host=$(hostname -s)
    mkdir -p "$work"/{munge,state,spool/n1,spool/n2,run}
    chmod 755 "$work"
    head -c 128 /dev/urandom >"$work/munge/key"
    chmod 400 "$work/munge/key"
    munged --force --key-file="$work/munge/key" --socket="$work/munge/socket" --pid-file="$work/munged.pid" \
        --log-file="$work/munge/log" --seed-file="$work/munge/seed" >"$work/munge.log" 2>&1 || die "munged does not start"
    cat >"$SLURM_CONF" <<CONF
ClusterName=verify
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$work/munge/socket
SlurmctldPort=$(free_port)
StateSaveLocation=$work/state
SlurmdSpoolDir=$work/spool/%n
SlurmctldPidFile=$work/slurmctld.pid
SlurmdPidFile=$work/slurmd-%n.pid
SlurmctldLogFile=$work/slurmctld.log
SlurmdLogFile=$work/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=40
MpiDefault=none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$(free_port) CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
CONF
    slurmctld || die "slurmctld does not start"
    for node in n1 n2; do slurmd -N "$node" || die "slurmd does not start"; done
    until_or 60 idle || die "the nodes do not come up"
    ok "slurm $(sinfo --version | cut -d' ' -f2): two nodes on this machine"
}

# -- a run

start_coordinator() {
    cd "$work/run"
    url=http://127.0.0.1:$(free_port)
    mkdir data
    cat "$repo"/docs/*.md >data/text.txt
    cat >run.toml <<'TOML'
[run]
name = "slurm"
tokens = 1_500_000
[task]
use = "byte-lm"
context = 64
width = 32
layers = 1
heads = 2
[inner]
steps = 20
batch_size = 8
TOML
    cat >site.toml <<TOML
[site]
name = "eu-west"
coordinator = "$url"
token_file = "eu-west.token"
state = "state/eu-west"
patience_seconds = 120
stop_seconds = 30
[devices]
threads = 1
throttle = 0.1
[data]
paths = "data"
[metrics]
port = 0
TOML
    python -m isthmus coordinator token add eu-west --state state/coordinator >eu-west.token
    python -m isthmus coordinator serve run.toml --state state/coordinator --port "${url##*:}" >"$work/coordinator.log" 2>&1 &
    started+=($!)
    until_or 180 serves || die "the coordinator does not start"
    ok "a coordinator serves a run"
}

check_site() {
    local job log urgent before
    job=$(sbatch --parsable --nodes="$nodes" --gpus-per-node=0 --cpus-per-task=1 --time=30 \
        "$repo/deploy/slurm/site.sbatch" site.toml)
    log=isthmus-eu-west-$job.log
    until_or 180 said "$log" 'step 50: loss' 1 || die "the site does not train"
    [ "$nodes" = 1 ] || said "$log" 'site eu-west in run .* on 2 x ' 1 || die "the nodes do not train together"
    ok "site.sbatch: trains on $nodes node(s)"

    scancel --signal=USR1 --batch "$job" # what Slurm does when the time is nearly up
    until_or 90 said "$log" 'goes back into the queue' 1 || die "the site does not leave when its time is up"
    said "$log" 'SIGTERM: leaving' 1 || die "the site does not leave cleanly"
    until_or 60 is "$job" PENDING || die "the job does not go back into the queue"
    before=$(tokens)
    ok "its time is up: it saves, leaves and is back in the queue, with $before tokens merged"

    scontrol update JobId="$job" StartTime=now
    until_or 180 said "$log" 'site eu-west in run' 2 || die "the site does not start again"
    until_or 120 more_than "$before" || die "the site does not go on"
    ! said "$log" 'step 50: loss' 2 || die "the site began anew"
    ok "started again: it goes on from its state"

    urgent=$(sbatch --parsable --partition=high --nodes=2 --time=5 --output="$work/urgent.log" --wrap 'true')
    until_or 120 said "$log" 'goes back into the queue' 2 || die "the site does not leave when it is preempted"
    said "$log" 'SIGTERM: leaving' 2 || die "the site does not leave cleanly when it is preempted"
    until_or 120 is "$urgent" COMPLETED || die "the urgent job does not get its nodes"
    until_or 60 is "$job" PENDING || die "the preempted job does not go back into the queue"
    ok "preempted: it saves, leaves within the grace time and is back in the queue"

    if [ "$nodes" = 1 ]; then
        scontrol update JobId="$job" StartTime=now
        check_end "$job"
    else
        scancel "$job"
    fi
}

# On CPUs both makes are the same, and so are their environments; the job, its parts and the rendezvous are not.
check_two_makes() {
    local job log before environment
    environment=$(dirname "$(dirname "$(command -v torchrun)")")
    sed -e 's/^\(#SBATCH --partition\)=.*/\1=low/' -e 's/^\(#SBATCH --nodes\)=.*/\1=1/' -e '/^#SBATCH --gpus/d' \
        -e 's/^\(#SBATCH --cpus-per-task\)=.*/\1=1/' -e 's/^\(#SBATCH --time\)=.*/\1=30/' \
        "$repo/deploy/slurm/two-makes.sbatch" >two-makes.sbatch
    before=$(tokens)
    job=$(FIRST=$environment SECOND=$environment FIRST_PROCESSES=1 SECOND_PROCESSES=1 sbatch --parsable \
        two-makes.sbatch site.toml)
    log=isthmus-eu-west-$job.log
    until_or 180 said "$log" 'site eu-west in run' 1 || die "two-makes.sbatch: the site does not start"
    until_or 120 more_than "$before" || die "two-makes.sbatch: the site does not train"
    said "$log" 'site eu-west in run .* on 2 x ' 1 || die "two-makes.sbatch: the parts do not train together"
    ok "two-makes.sbatch: the parts meet, and the site goes on from its state"

    scancel --signal=USR1 --batch "$job"
    until_or 90 said "$log" 'goes back into the queue' 1 || die "two-makes.sbatch: the site does not leave"
    said "$log" 'SIGTERM: leaving' 1 || die "two-makes.sbatch: the site does not leave cleanly"
    until_or 60 is "$job" PENDING || die "two-makes.sbatch: the job does not go back into the queue"
    ok "two-makes.sbatch: its time is up, and both parts are back in the queue"

    scontrol update JobId="$job" StartTime=now
    scontrol update JobId="$((job + 1))" StartTime=now
    check_end "$job"
}

check_end() {
    sed -i '/^throttle/d' site.toml
    until_or 300 is "$1" COMPLETED || die "the run does not end"
    get /v1/status | grep -q '"state": *"finished"' || die "the run is not finished"
    ok "the run is finished after $(scontrol show job "$1" | grep -o 'Restarts=[0-9]*' | head -n 1 | cut -d= -f2) restarts, and the job is done"
}

more_than() { [ "$(tokens)" -gt "$1" ]; }

[ "$(id -u)" = 0 ] || die "needs root, for slurmd"
command -v apt-get >/dev/null || command -v slurmd >/dev/null || die "needs Slurm, or a Debian that has it"
command -v torchrun >/dev/null || die "activate the environment that has isthmus"
need slurmctld slurm-wlm
need munged munge
start_slurm
start_coordinator
check_site
[ "$nodes" = 1 ] || check_two_makes
echo PASS
