#!/bin/bash
@OPTIONS@
#
# One run as a job of Slurm. `polycom run` has written and submitted it; `sbatch` takes it by itself, too.
# It runs on the first node, has every node execute node.sh, and is queued again after what a restart can mend.

# All nodes meet on the first one, under the address that Slurm itself reaches it by, and a free port.
address=$(scontrol show --oneliner node "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
is_taken() { # anything listens there, under whatever address
    grep -Eqs "^ *[0-9]+: [0-9A-F]+:$(printf %04X "$1") [0-9A-F:]+ 0A " /proc/net/tcp /proc/net/tcp6
}
port=$((20000 + SLURM_JOB_ID % 12000)) # below those that the system hands out; another for another job
while is_taken "$port"; do port=$((port < 31999 ? port + 1 : 20000)); done
export POLYCOM_RENDEZVOUS="$address:$port"
unset POLYCOM_NODE_RANK # whoever submits may have one; each node's is Slurm's

rm -f @RECORD@/absent.node-*.txt # of an earlier start

# A step takes all of a node's CPUs only if it is told so; and it waits for whoever is last.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
srun --nodes=@NODES@ --ntasks=@NODES@ --ntasks-per-node=1 --cpu-bind=none --mpi=none --export=ALL \
    --wait=0 --kill-on-bad-exit=0@STEP_OPTIONS@ \
    bash @NODE_SCRIPT@
status=$?

# 0: done. 2: refused, for a person to mend, as what engines and shells could not start (125 to 127) is.
# 129, 130, 143: a person has stopped it, by HUP, INT or TERM.
case $status in 0 | 2 | 12[5-7] | 129 | 130 | 143) exit $status ;; esac
# What is left has failed, was killed on one node, or was warned of its time limit (USR1): it can go on.
restarts=${SLURM_RESTART_COUNT:-0}
if [ "$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID")" != RUNNING ]; then
    echo "$0: the job is being ended, so it is not queued again (exit status $status)" >&2
elif [ "$restarts" -ge @MAX_RESTARTS@ ]; then
    echo "exit status $status after $restarts restarts, as many as max_restarts allows" >&2
else
    echo "exit status $status: queued again, restart $((restarts + 1)) of" @MAX_RESTARTS@ >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
