#!/usr/bin/env bash
# A one-node Slurm cluster on this machine's loopback, everything in one folder.
#
#   loopback_cluster.sh start FOLDER     then: export SLURM_CONF=FOLDER/slurm.conf
#   loopback_cluster.sh stop FOLDER
#
# Needs slurmctld, slurmd and munged (Debian: apt-get install slurm-wlm munge) and root, because slurmd changes users.
# Two partitions: jobs in "high" take the node from jobs in "low", which are told to stop, given GRACE seconds, and
# requeued.
set -euo pipefail

action=$1
folder=$(realpath -m "$2")
port=${PORT:-$((21000 + RANDOM % 9000))}

stop() {
    for daemon in slurmd slurmctld munged; do
        if [[ -s "$folder/$daemon.pid" ]]; then
            kill "$(cat "$folder/$daemon.pid")" 2>/dev/null || true
        fi
    done
}

start() {
    mkdir -p "$folder/state" "$folder/spool"
    chmod 711 "$folder"
    local host
    host=$(hostname -s)
    dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
    chmod 400 "$folder/munge.key"
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    cat >"$folder/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
SlurmctldParameters=enable_configless
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/jobs.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=30
MinJobAge=86400
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=$host Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE:-120} State=UP
PartitionName=high Nodes=$host PriorityTier=10 PreemptMode=OFF State=UP
CONF
    printf 'CgroupPlugin=cgroup/v1\nConstrainCores=no\n' >"$folder/cgroup.conf"
    export SLURM_CONF="$folder/slurm.conf"
    slurmctld -c -f "$SLURM_CONF"
    slurmd -c -f "$SLURM_CONF"
    for _ in $(seq 60); do
        if [[ "$(sinfo --noheader --format=%T --partition=low 2>/dev/null)" == idle ]]; then return 0; fi
        sleep 1
    done
    echo "error: the node did not come up" >&2
    tail -n 5 "$folder"/*.log >&2
    return 1
}

case $action in
start) start || { stop; exit 1; } ;;
stop) stop ;;
*) echo "error: expected start or stop" >&2; exit 2 ;;
esac
