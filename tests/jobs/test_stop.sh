#!/usr/bin/env bash
# Stop signals, scancel, a lost node and restarts without progress: the run ends with the data of an undisturbed one, or says why not.
set -euo pipefail
# shellcheck source=tests/jobs/support.sh
source "$(dirname "${BASH_SOURCE[0]}")/support.sh"
in_cluster 3 880 "${BASH_SOURCE[0]}"
make_recipe 16 9
job_script=$SELM_SOURCE_DIR/jobs/selm_iter.slurm

mpi 2 selm_iter --config recipe.cfg --run reference --progress off >reference.log 2>&1

# All at once, on 3 nodes of 4 CPUs: under srun, under mpirun, and one that is cancelled.
one=$(submit --nodes=2 --ntasks-per-node=1 "$job_script" --run signalled)
two=$(SELM_LAUNCHER=mpirun submit --nodes=2 --ntasks-per-node=1 "$job_script" --run by_mpirun)
three=$(submit --nodes=2 --ntasks-per-node=1 "$job_script" --run cancelled)
wait_until "$one at work" log_has "selm-iter-$one.out" 'iteration 1 of 2: generate'
scancel --batch --signal=USR1 "$one"
wait_until "$two at work" log_has "selm-iter-$two.out" 'iteration 1 of 2: generate'
scancel --batch --signal=USR1 "$two"
wait_until "$three at work" log_has "selm-iter-$three.out" 'iteration 1 of 2: generate'
scancel "$three"
ends_as CANCELLED "$three"
checks=$((checks + 1))
[ ! -e cancelled/iter2/policy/config.json ] || fail "the cancelled run was finished: nothing was tested"
# A cancelled job stays so; the same directory goes on by hand.
three=$(submit --nodes=2 --ntasks-per-node=1 "$job_script" --run cancelled)

# A program that always stops and never gets on: two ends without progress are allowed here.
mkdir stub
cat >stub/selm_iter <<'STUB'
#!/bin/sh
[ "$1" = --version ] || exit 75
STUB
chmod +x stub/selm_iter
stuck=$(PATH=$PWD/stub:$PATH SELM_MAX_RESTARTS=2 submit "$job_script" --run stuck)

# Ranks that crash while they start, twice and always; the third start of the former comes to its end.
for run in crashing crashed; do
    mkdir $run.bin
    cat >$run.bin/selm_iter <<STUB
#!/bin/sh
[ "\$1" = --version ] && exit
echo start >>$PWD/$run.starts
echo "fences by \$SLURM_PMIX_FENCE"
[ $run = crashing ] && [ "\$(grep -c start $PWD/$run.starts)" = 3 ] || kill -SEGV \$\$
touch "\$SELM_START_FILE" "\$SELM_DONE_FILE"
STUB
    chmod +x $run.bin/selm_iter
done
crashing=$(PATH=$PWD/crashing.bin:$PATH submit --ntasks=1 "$job_script" --run crashing)
# A stop signal that makes the launcher fail before it has started anything.
mkdir early.bin
cat >early.bin/selm_iter <<STUB
#!/bin/sh
[ "\$1" = --version ] && exit
trap '' USR1
if [ ! -e $PWD/early.signalled ]; then
    touch $PWD/early.signalled
    scancel --batch --signal=USR1 \$SLURM_JOB_ID
    until grep -q 'stop signal' $PWD/selm-iter-\$SLURM_JOB_ID.out; do sleep 0.2; done
    exit 1
fi
touch "\$SELM_START_FILE" "\$SELM_DONE_FILE"
STUB
chmod +x early.bin/selm_iter
early=$(PATH=$PWD/early.bin:$PATH submit --ntasks=1 "$job_script" --run early)
crashed=$(PATH=$PWD/crashed.bin:$PATH submit --ntasks=1 "$job_script" --run crashed)

for run in signalled by_mpirun; do
    job=$one
    [ "$run" = signalled ] || job=$two
    ends_as COMPLETED "$job"
    expect 0 'stop signal' cat "selm-iter-$job.out"
    expect_count 1 'everything .*saved; requeued .restart 1.'
    expect 0 "job $job restart 1" cat "$run/slurm/provenance.txt"
    same reference "$run" "USR1"
done

ends_as FAILED "$stuck"
expect 0 'restarts brought no progress' cat "selm-iter-$stuck.out"
expect_count 1 'requeued .restart 1.'

ends_as COMPLETED "$crashing"
expect 0 '^fences by ring' cat "selm-iter-$crashing.out"
expect_count 2 'ranks or launcher died before all ranks had started: started again'
ends_as COMPLETED "$early"
expect 0 'stopped before the ranks had started; requeued .restart 1.' cat "selm-iter-$early.out"
ends_as FAILED "$crashed"
expect 0 'exit code 139, and all nodes of the job answer' cat "selm-iter-$crashed.out"
expect_count 2 'ranks or launcher died before all ranks had started: started again'

ends_as COMPLETED "$three"
same reference cancelled "scancel, and submitted again"

# A node loses power under mpirun: the script asks for the requeue, before SLURM has noticed anything.
four=$(SELM_LAUNCHER=mpirun submit --nodes=2 --ntasks-per-node=1 "$job_script" --run powerless)
wait_until "$four at work" log_has "selm-iter-$four.out" 'iteration 1 of 2: rank'
node=$(scontrol show hostnames "$(squeue -h -j "$four" -o %N)" | tail -n 1)
kill -9 "$(cat "$SELM_CLUSTER/$node.pid")"
ends_as COMPLETED "$four"
expect 0 'requeued .restart 1.' cat "selm-iter-$four.out"
same reference powerless "a node lost under mpirun"
finish
