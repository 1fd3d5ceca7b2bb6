# shellcheck shell=bash
# The parts of the cluster of with_cluster.sh, and what may happen to them. Sourced inside of its namespaces.

wait_for() { # wait_for WHAT COMMAND...: two minutes at most
    local what=$1 end=$((SECONDS + 120))
    shift
    until "$@" >/dev/null 2>&1; do
        if ((SECONDS > end)); then
            echo "cluster: $what does not come up" >&2
            tail -n 20 "$SELM_CLUSTER"/log/* >&2
            exit 1
        fi
        sleep 0.2
    done
}

# The database's files and socket are in the cluster's own /run.
start_accounting() {
    mkdir -p /run/mysqld
    mariadb-install-db --no-defaults --user=root --datadir="$SELM_CLUSTER/db" --auth-root-authentication-method=normal --skip-test-db \
        >"$SELM_CLUSTER/log/mariadb.out" 2>&1
    mariadbd --no-defaults --user=root --datadir="$SELM_CLUSTER/db" --socket=/run/mysqld/mysqld.sock --skip-networking \
        --innodb-use-native-aio=0 --innodb-flush-method=fsync --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 \
        >>"$SELM_CLUSTER/log/mariadb.out" 2>&1 </dev/null &
    wait_for mariadbd mariadb-admin --no-defaults --socket=/run/mysqld/mysqld.sock ping
    cat >"$SELM_CLUSTER/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$SELM_CLUSTER/munge
DbdHost=control
DbdAddr=10.99.0.1
SlurmUser=root
LogFile=$SELM_CLUSTER/log/slurmdbd.log
PidFile=$SELM_CLUSTER/slurmdbd.own
StorageType=accounting_storage/mysql
StorageUser=root
CONF
    chmod 600 "$SELM_CLUSTER/slurmdbd.conf"
    slurmdbd -D >>"$SELM_CLUSTER/log/slurmdbd.out" 2>&1 </dev/null &
    wait_for slurmdbd sacctmgr --noheader list cluster
    sacctmgr --immediate add cluster test >/dev/null
}

# A daemon is started by the shell that runs this, and ends with the cluster's namespaces at the latest.
start_controller() {
    slurmctld -D >>"$SELM_CLUSTER/log/slurmctld.out" 2>&1 </dev/null &
    echo $! >"$SELM_CLUSTER/slurmctld.pid"
    disown
    wait_for slurmctld scontrol ping
}

kill_controller() { kill -9 "$(cat "$SELM_CLUSTER/slurmctld.pid")"; }

start_node() { # start_node K
    local name=node$1 link=link$1
    mkdir -p "$SELM_CLUSTER/spool-$name"
    # shellcheck disable=SC2016
    unshare --net --pid --uts --ipc --mount --fork --mount-proc --kill-child bash -c '
        hostname "$0"
        mount -t tmpfs tmpfs /dev/shm
        until ip addr show eth0 2>/dev/null | grep -q "inet "; do sleep 0.1; done
        slurmd -D -N "$0" &
        while :; do sleep 1000 & wait $!; done # a first process reaps orphans, and stays when slurmd dies' \
        "$name" >>"$SELM_CLUSTER/log/$name.out" 2>&1 </dev/null &
    echo $! >"$SELM_CLUSTER/$name.pid"
    until [ "$(readlink "/proc/$!/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
    until ip link add "$link" type veth peer name eth0 netns $! 2>/dev/null; do sleep 0.1; done # the kernel removes a former one late
    ip link set "$link" master cluster up
    nsenter --net="/proc/$!/ns/net" ip link set lo up
    nsenter --net="/proc/$!/ns/net" ip link set eth0 up
    nsenter --net="/proc/$!/ns/net" ip addr add "10.99.0.$(($1 + 10))/24" dev eth0
    disown
}

power_cut() { # power_cut K: every process of the node is gone at once, without a word to anybody
    kill -9 "$(cat "$SELM_CLUSTER/node$1.pid")"
    ip link del "link$1" 2>/dev/null || true
}
power_on() { # a node that starts has an empty directory for temporary files: SLURM's PMIx does not start a step whose directory is there
    rm -rf "$SELM_CLUSTER/spool-node$1"
    start_node "$1"
}

# The node goes on by itself: it reaches the file system, but neither the controller nor other nodes.
unplug() { ip link set "link$1" down; }
plug() { ip link set "link$1" up; }

# plug_restarted K: slurmd 22.05 forgets a job only when the controller ends it there. Where the job's copy has ended by itself while the
# node was cut off, the same slurmd refuses the job's next start ("already running"), and the controller holds the job.
plug_restarted() {
    kill_slurmd "$1"
    plug "$1"
    start_slurmd "$1"
}

# on_node K COMMAND...: as a process of the node.
on_node() {
    local first
    first=$(pgrep -P "$(cat "$SELM_CLUSTER/node$1.pid")" | head -n 1)
    shift
    nsenter --target "$first" --net --pid --uts --ipc --mount "$@"
}
kill_slurmd() { # steps and batch script of the node go on
    # shellcheck disable=SC2016
    on_node "$1" bash -c 'kill -9 "$(cat "$1")"' bash "$SELM_CLUSTER/node$1.own"
}
start_slurmd() {
    on_node "$1" slurmd -D -N "node$1" >>"$SELM_CLUSTER/log/node$1.out" 2>&1 </dev/null &
    disown
}

# shellcheck disable=SC2317 # called by wait_for
all_idle() { [ "$(sinfo -h -N -t idle -o %N | sort -u | wc -l)" = "$1" ]; }
# shellcheck disable=SC2317
none_lost() { [ -z "$(sinfo -h -N -t down,drain,unk,no_respond -o %N)" ]; }
