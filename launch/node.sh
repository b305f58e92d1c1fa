#!/bin/bash
# What each node of the run executes, whoever starts it. Which node it is and where they meet is told by
# POLYCOM_NODE_RANK and POLYCOM_RENDEZVOUS; Slurm tells the rank by its own variable.
export POLYCOM_NODE_RANK="${POLYCOM_NODE_RANK:-${SLURM_NODEID:-0}}"
# The other nodes wait for this one. Why nothing could start here they read in its file.
absent=@RECORD@/"absent.node-$POLYCOM_NODE_RANK.txt"
tell() {
    [ "$1" = 0 ] || [ -z "${POLYCOM_RENDEZVOUS:-}" ] ||
        printf '%s\n%s\n%s: its set-up or its command ended with exit status %s\n' \
            "$POLYCOM_RENDEZVOUS" "$1" "$(uname -n)" "$1" >"$absent"
}
rm -f "$absent"
trap 'tell $?' EXIT
set -e # of the setup, where there is any
cd @DIRECTORY@
@SETUP@
set +e
shopt -s execfail # the trap hears nothing of an exec that fails
exec @COMMAND@
status=$?
tell $status
exit $status
