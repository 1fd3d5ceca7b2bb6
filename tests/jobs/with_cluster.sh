#!/usr/bin/env bash
# with_cluster.sh NODES COMMAND...: runs COMMAND beside a real SLURM of NODES virtual nodes, and returns its exit code.
#
# The cluster lives in PID, network, mount and host name namespaces of its own, and its files in a tmpfs that only they see.
# COMMAND is started by the namespace's first process: when that ends or is killed, so does every process of the cluster, and
# network devices and files vanish with it. A virtual node is such a set of namespaces in turn: killing the process in
# $SELM_CLUSTER/nodeK.pid is a power cut.
#
# SELM_CLUSTER_ACCOUNTING=yes: with slurmdbd and a MariaDB of its own, and a controller that forgets jobs 20 s after their end.
#
# Exit code 77: no cluster can be made here (not root, no namespaces, packages of scripts/deps --slurm missing).
set -euo pipefail

skip() {
    echo "SKIPPED: $*"
    exit 77
}

if [ "${1:-}" != --inside ]; then
    [ $# -ge 2 ] || { echo "usage: with_cluster.sh NODES COMMAND..." >&2; exit 64; }
    [ "$(id -u)" = 0 ] || skip "a test cluster needs root"
    for tool in slurmctld slurmd munged sbatch srun ip unshare setpriv; do
        command -v "$tool" >/dev/null || skip "$tool is not installed (scripts/deps --slurm)"
    done
    if [ -n "${SELM_CLUSTER_ACCOUNTING:-}" ]; then
        for tool in slurmdbd mariadbd mariadb-install-db; do
            command -v "$tool" >/dev/null || skip "$tool is not installed (packages slurmdbd and mariadb-server)"
        done
    fi
    unshare --net --pid --mount --uts --ipc --fork --mount-proc true 2>/dev/null || skip "this machine refuses namespaces"
    unshare --net --uts --fork ip link add probe type bridge 2>/dev/null || skip "this machine refuses network bridges"
    setpriv --pdeathsig KILL unshare --net --pid --mount --uts --fork --mount-proc --kill-child bash "${BASH_SOURCE[0]}" --inside "$@" &
    outer=$!
    # unshare dies with this shell, and takes the first process of the namespace, and so all of it, along.
    trap 'kill -KILL "$outer" 2>/dev/null || true' EXIT
    trap 'exit 143' TERM INT HUP
    code=0
    wait "$outer" || code=$?
    exit "$code"
fi

trap 'echo "with_cluster: line $LINENO: $BASH_COMMAND" >&2' ERR # set -e says nothing
shift
nodes=$1
shift
export SELM_CLUSTER=/run/selm
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm # Open MPI names its segments by host name and process id, too
hostname control
mkdir -p $SELM_CLUSTER/state $SELM_CLUSTER/log
chmod 755 $SELM_CLUSTER
# Open MPI's session directories bear host name and process id, which two clusters have in common.
export TMPDIR=$SELM_CLUSTER/tmp
mkdir $TMPDIR
export SLURM_CONF=$SELM_CLUSTER/slurm.conf
# Ranks outnumber cores, which Open MPI cannot see: yield, do not pin. No shared memory tricks that containers refuse.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_mpi_yield_when_idle=1
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none

ip link set lo up
ip link add cluster type bridge
ip addr add 10.99.0.1/24 dev cluster
ip link set cluster up

# Limits are short: a dead node is noticed after 10 s, and a requeued job starts when the credential of its first start has
# expired (cred_expire). Debian's slurmd looks for a mounted cgroup file system unless the version is given.
cat >$SLURM_CONF <<CONF
ClusterName=test
SlurmctldHost=control(10.99.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$SELM_CLUSTER/munge,cred_expire=5
CredType=cred/munge
StateSaveLocation=$SELM_CLUSTER/state
SlurmdSpoolDir=$SELM_CLUSTER/spool-%n
TmpFS=$SELM_CLUSTER/spool-%n
SlurmctldPidFile=$SELM_CLUSTER/slurmctld.own
SlurmdPidFile=$SELM_CLUSTER/%n.own
SlurmctldLogFile=$SELM_CLUSTER/log/slurmctld.log
SlurmdLogFile=$SELM_CLUSTER/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_min_interval=100000
SlurmdParameters=config_overrides
MpiDefault=pmix
SlurmdTimeout=10
MessageTimeout=10
KillWait=5
JobRequeue=0
ReturnToService=2
MinJobAge=3600
PartitionName=test Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE
CONF
if [ -n "${SELM_CLUSTER_ACCOUNTING:-}" ]; then
    sed -i 's,accounting_storage/none,accounting_storage/slurmdbd,; s/^MinJobAge=.*/MinJobAge=20/' $SLURM_CONF
    printf "AccountingStorageHost=control\nAccountingStoragePass=%s/munge\n" $SELM_CLUSTER >>$SLURM_CONF # its socket
fi
echo "CgroupPlugin=cgroup/v1" >$SELM_CLUSTER/cgroup.conf
{
    echo "127.0.0.1 localhost"
    echo "10.99.0.1 control"
    for ((k = 1; k <= nodes; k++)); do
        echo "10.99.0.$((k + 10)) node$k"
        echo "NodeName=node$k NodeAddr=10.99.0.$((k + 10)) CPUs=4 RealMemory=4000 State=UNKNOWN" >>$SLURM_CONF
    done
} >$SELM_CLUSTER/hosts
mount --bind $SELM_CLUSTER/hosts /etc/hosts

# shellcheck source=tests/jobs/cluster.sh
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

dd if=/dev/urandom of=$SELM_CLUSTER/munge.key bs=128 count=1 status=none
chmod 600 $SELM_CLUSTER/munge.key
munged -F --key-file=$SELM_CLUSTER/munge.key --socket=$SELM_CLUSTER/munge --pid-file=$SELM_CLUSTER/munged.own \
    --seed-file=$SELM_CLUSTER/munge.seed --log-file=$SELM_CLUSTER/log/munged.log >$SELM_CLUSTER/log/munged.out 2>&1 </dev/null &
wait_for munged munge -n -S $SELM_CLUSTER/munge
if [ -n "${SELM_CLUSTER_ACCOUNTING:-}" ]; then start_accounting; fi
start_controller
for ((k = 1; k <= nodes; k++)); do start_node "$k"; done
wait_for "the nodes" all_idle "$nodes"

code=0
"$@" || code=$?
exit "$code" # the first process ends, and the cluster with it
