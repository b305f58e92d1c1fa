#!/bin/bash
# One node of a run where nobody else starts it again: on a host that `polycom run` has reached by ssh, or in a
# pod of a PyTorchJob. It executes node.sh, and again after what a restart can mend: job.sh RANK HOST:PORT
export POLYCOM_NODE_RANK="$1" POLYCOM_RENDEZVOUS="$2"
echo $$ >@DIRECTORY@/"node-$1.pid" # for those who want it to end
give_up() { # with this status, which those that wait for this node read
    [ "$1" = 0 ] || printf '%s\n%s\n%s: exit status %s\n' "$rendezvous" "$1" "$(uname -n)" "$1" >"$absent"
    exit "$1"
}
rendezvous=$2 absent=@DIRECTORY@/"absent.node-$1.txt"

trap '' HUP PIPE # whoever has started it may end
node=''
stopped=''
told=''
end() { # its node, by this signal
    stopped=$1
    [ -z "$node" ] || { told=1; kill -s "$1" "$node"; }
}
trap 'end TERM' INT TERM
trap 'end USR1' USR1

restarts=0
while :; do
    bash @NODE_SCRIPT@ &
    node=$!
    [ -z "$stopped" ] || [ -n "$told" ] || end "$stopped" # it came before there was a node
    # A signal ends `wait`, not the node.
    while wait "$node"; kill -0 "$node" 2>/dev/null; do :; done
    wait "$node"
    status=$?
    # 1: failed, here or on another node. 137: killed, as for want of memory. All else is for a person to mend.
    # 125 to 127: nothing has run, in the words of container engines and shells; that is a refusal.
    case $status in 1 | 137) ;; 125 | 126 | 127) give_up 2 ;; *) give_up $status ;; esac
    node=
    [ -z "$stopped" ] || give_up $status
    if [ "$restarts" -ge @MAX_RESTARTS@ ]; then
        echo "exit status $status after $restarts restarts, as many as max_restarts allows" >&2
        give_up $status
    fi
    restarts=$((restarts + 1))
    echo "exit status $status: started again, restart $restarts of" @MAX_RESTARTS@ >&2
done
